# SPDX-License-Identifier: Apache-2.0
"""The options that exec, run, shell, test and instances share, and the way from them to a container. Start ring."""

from __future__ import annotations

import posix

from pysingularity import messages
from pysingularity.cli.options import FLAG, LIST, MANY, TEXT, Arguments, Option
from pysingularity.errors import UserError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

    from pysingularity.cli.transfer import Display

FILES, ENVIRONMENT, RIGHTS, SPACES, DEVICES, FETCHING, LIMITS = (
    "Files",
    "Environment",
    "Rights",
    "Namespaces",
    "Devices",
    "Fetching",
    "Limits",
)

#: Flags of the peers for what is always so here: images are served in user space, no host command emulates root,
#: there is no other mode than the native one, and the ranks of a job share one mount and user namespace of an image.
HOLDS = ("sif-fuse", "no-oci", "no-compat", "ignore-fakeroot-command", "no-tmp-sandbox", "sharens")
#: flag, kind, environment keys, why not and what to do instead
REFUSED = (
    ("nvccli", FLAG, ("NVCCLI",), "use --nv, or --device nvidia.com/gpu=all with a CDI file of nvidia-ctk"),
    ("allow-setuid", FLAG, (), "programs never gain rights here (no_new_privs)"),
    ("boot", FLAG, (), "a container of ours does not boot an init system"),
    ("fusemount", MANY, ("FUSEMOUNT",), "mount on the host and use --bind"),
    ("runscript-timeout", TEXT, (), "use timeout(1)"),
    ("ignore-userns", FLAG, (), "containers need user namespaces; see: singularity doctor"),
    ("oci", FLAG, ("OCI",), "there is no runc mode; --compat behaves like Docker"),
)

OPTIONS: tuple[Option, ...] = (
    # Files
    Option(
        "bind",
        "Bind a file or folder of the host into the container; OPTS: ro, rw, image-src=PATH, id=N",
        short="B",
        kind=MANY,
        metavar="SRC[:DST[:OPTS]]",
        env=("BIND", "BINDPATH"),
        group=FILES,
    ),
    Option(
        "mount",
        "Bind, written as type=bind,source=SRC,destination=DST[,ro]",
        kind=MANY,
        metavar="SPEC",
        env=("MOUNT",),
        group=FILES,
    ),
    Option(
        "home",
        "Use SRC as home directory, at DST in the container",
        short="H",
        kind=TEXT,
        metavar="SRC[:DST]",
        env=("HOME",),
        group=FILES,
    ),
    Option("no-home", "Do not mount the home directory", env=("NO_HOME",), group=FILES),
    Option("writable", "Write into the image itself (sandboxes)", short="w", env=("WRITABLE",), group=FILES),
    Option(
        "writable-tmpfs", "Let changes live in memory and go with the container", env=("WRITABLE_TMPFS",), group=FILES
    ),
    Option(
        "overlay",
        "Keep changes in the folder PATH, or lay a folder or image over the image with :ro",
        short="o",
        kind=LIST,
        metavar="PATH[:ro]",
        env=("OVERLAY", "OVERLAYIMAGE"),
        group=FILES,
    ),
    Option("contain", "Use a minimal /dev and empty /tmp and home", short="c", env=("CONTAIN",), group=FILES),
    Option(
        "containall",
        "Contain files, processes, interprocess communication and environment",
        short="C",
        env=("CONTAINALL",),
        group=FILES,
    ),
    Option(
        "workdir",
        "Keep /tmp, /var/tmp and home of a contained container in DIR",
        short="W",
        kind=TEXT,
        metavar="DIR",
        env=("WORKDIR",),
        group=FILES,
    ),
    Option(
        "scratch",
        "Put an empty folder at PATH",
        short="S",
        kind=LIST,
        metavar="PATH",
        env=("SCRATCH", "SCRATCHDIR"),
        group=FILES,
    ),
    Option(
        "no-mount",
        "Leave out mounts: proc, sys, dev, devpts, home, tmp, cwd, bind-paths, or a path",
        kind=LIST,
        metavar="NAME",
        env=("NO_MOUNT",),
        group=FILES,
    ),
    Option(
        "cwd",
        "Start in DIR of the container",
        kind=TEXT,
        metavar="DIR",
        env=("CWD", "PWD", "TARGET_PWD"),
        aliases=("pwd",),
        group=FILES,
    ),
    Option(
        "image-cwd",
        "Start in the folder that an OCI image names (WORKDIR), when it has one",
        env=("IMAGE_CWD",),
        group=FILES,
    ),
    Option("underlay", "Provide mount points by binds instead of an overlay", env=("UNDERLAY",), group=FILES),
    Option(
        "passphrase",
        "Ask for the passphrase of an encrypted image (or set SINGULARITY_ENCRYPTION_PASSPHRASE)",
        group=FILES,
    ),
    Option(
        "pem-path",
        "Open an encrypted image with the private RSA key in FILE (or set SINGULARITY_ENCRYPTION_PEM_PATH)",
        kind=TEXT,
        metavar="FILE",
        group=FILES,
    ),
    # Environment
    Option(
        "cleanenv",
        "Let no variable of the caller in but TERM and proxies",
        short="e",
        env=("CLEANENV",),
        group=ENVIRONMENT,
    ),
    Option(
        "no-env",
        "Keep these variables of the caller out",
        kind=LIST,
        metavar="NAME",
        env=("NOENV",),
        group=ENVIRONMENT,
    ),
    Option("env", "Set variables", kind=MANY, metavar="NAME=VALUE", group=ENVIRONMENT),
    Option(
        "env-file",
        "Set the variables that a shell file sets",
        kind=MANY,
        metavar="FILE",
        env=("ENV_FILE",),
        group=ENVIRONMENT,
    ),
    Option("explain-env", "Show every variable and where it comes from, and end", group=ENVIRONMENT),
    Option(
        "app", "Use the app NAME of the image", kind=TEXT, metavar="NAME", env=("APP", "APPNAME"), group=ENVIRONMENT
    ),
    Option("no-umask", "Start with umask 0022 instead of the caller's", env=("NO_UMASK",), group=ENVIRONMENT),
    Option("no-eval", "Let scripts of OCI images take arguments literally", env=("NO_EVAL",), group=ENVIRONMENT),
    Option(
        "compat",
        "Behave like Docker: --containall --no-init --no-umask --no-eval --writable-tmpfs --image-cwd --image-user",
        env=("COMPAT",),
        group=ENVIRONMENT,
    ),
    # Rights
    Option("fakeroot", "Be root inside, without being root", short="f", env=("FAKEROOT",), group=RIGHTS),
    Option(
        "image-user",
        "Be the user that an OCI image names (USER), when it names one; on the host you stay who you are",
        env=("IMAGE_USER",),
        group=RIGHTS,
    ),
    Option(
        "userns",
        "Use a user namespace (root; ordinary users always do)",
        short="u",
        env=("USERNS", "UNSHARE_USERNS"),
        group=RIGHTS,
    ),
    Option("keep-privs", "Let root keep all capabilities (the default)", env=("KEEP_PRIVS",), group=RIGHTS),
    Option("no-privs", "Take all capabilities away, also from root", env=("NO_PRIVS",), group=RIGHTS),
    Option(
        "add-caps",
        "Give these capabilities of the container's user namespace, or keep them with --no-privs",
        kind=LIST,
        metavar="CAP",
        env=("ADD_CAPS",),
        group=RIGHTS,
    ),
    Option(
        "drop-caps",
        "Take these capabilities away (all: every one)",
        kind=LIST,
        metavar="CAP",
        env=("DROP_CAPS",),
        group=RIGHTS,
    ),
    Option(
        "security",
        "Confine the program: seccomp:PROFILE.json, apparmor:PROFILE, selinux:CONTEXT, or as root uid:N, gid:N[:N...]",
        kind=MANY,
        metavar="KIND:VALUE",
        env=("SECURITY",),
        group=RIGHTS,
    ),
    Option("ignore-subuid", "Emulate root without subordinate ids", hidden=True, group=RIGHTS),
    # Namespaces
    Option("pid", "Give the container its own processes", short="p", env=("PID", "UNSHARE_PID"), group=SPACES),
    Option("no-init", "Make the program process 1 of --pid", env=("NO_INIT", "NOSHIMINIT"), group=SPACES),
    Option(
        "ipc",
        "Give the container its own interprocess communication",
        short="i",
        env=("IPC", "UNSHARE_IPC"),
        group=SPACES,
    ),
    Option("net", "Give the container its own network", short="n", env=("NET", "UNSHARE_NET"), group=SPACES),
    Option(
        "network",
        "With --net: none (only loopback), or pasta to connect it",
        kind=TEXT,
        metavar="NAME",
        env=("NETWORK",),
        group=SPACES,
    ),
    Option(
        "publish",
        "With --network pasta: forward a port of the host",
        kind=LIST,
        metavar="HOST:CONTAINER",
        env=("PUBLISH",),
        group=SPACES,
    ),
    Option(
        "network-args",
        "With --net: portmap=HOST:CONTAINER[/tcp|/udp], the same as --publish",
        kind=LIST,
        metavar="KEY=VALUE",
        env=("NETWORK_ARGS",),
        hidden=True,
        group=SPACES,
    ),
    Option(
        "netns-path",
        "Join the network namespace at PATH (root)",
        kind=TEXT,
        metavar="PATH",
        env=("NETNS_PATH",),
        group=SPACES,
    ),
    Option("uts", "Give the container its own host name", env=("UTS", "UNSHARE_UTS"), group=SPACES),
    Option("hostname", "Set the container's host name", kind=TEXT, metavar="NAME", env=("HOSTNAME",), group=SPACES),
    Option("dns", "Use these name servers", kind=LIST, metavar="ADDRESS", env=("DNS",), group=SPACES),
    # Devices
    Option("nv", "Bring NVIDIA's devices, libraries and programs in", env=("NV",), group=DEVICES),
    Option("no-nv", "Do not, whatever the settings say", env=("NO_NV", "NV_OFF"), hidden=True, group=DEVICES),
    Option("rocm", "Bring AMD's devices, libraries and programs in", env=("ROCM",), group=DEVICES),
    Option("no-rocm", "Do not, whatever the settings say", env=("NO_ROCM", "ROCM_OFF"), hidden=True, group=DEVICES),
    Option(
        "device",
        "Bring in a Container Device Interface device",
        kind=LIST,
        metavar="VENDOR/CLASS=NAME",
        env=("DEVICE",),
        group=DEVICES,
    ),
    Option("cdi-dirs", "Where CDI files lie", kind=LIST, metavar="DIR", env=("CDI_DIRS",), group=DEVICES),
    # Fetching
    Option(
        "pull",
        "Ask the registry for a newer image: missing (only for new names), always or never",
        kind=TEXT,
        metavar="WHEN",
        env=("PULL",),
        choices=("missing", "always", "never"),
        group=FETCHING,
    ),
    Option("offline", "Use what the cache has; the same as --pull never", env=("OFFLINE",), group=FETCHING),
    Option("disable-cache", "Neither use nor fill the cache of images", env=("DISABLE_CACHE",), group=FETCHING),
    Option("no-https", "Talk to the registry without encryption", env=("NOHTTPS", "NO_HTTPS"), group=FETCHING),
    Option(
        "docker-username",
        "Name for the registry",
        kind=TEXT,
        metavar="NAME",
        env=("DOCKER_USERNAME",),
        bare_env=("DOCKER_USERNAME",),
        group=FETCHING,
    ),
    Option(
        "docker-password",
        "Password for the registry",
        kind=TEXT,
        metavar="WORD",
        env=("DOCKER_PASSWORD",),
        bare_env=("DOCKER_PASSWORD",),
        group=FETCHING,
    ),
    Option("docker-login", "Ask for name and password of the registry", env=("DOCKER_LOGIN",), group=FETCHING),
    Option(
        "authfile",
        "Use the credentials in FILE",
        kind=TEXT,
        metavar="FILE",
        env=("AUTHFILE", "AUTH_FILE"),
        group=FETCHING,
    ),
    Option(
        "docker-host",
        "Use this Docker daemon for docker-daemon: images",
        kind=TEXT,
        metavar="URL",
        env=("DOCKER_HOST",),
        group=FETCHING,
    ),
    Option(
        "tmpdir", "Put temporary files into DIR", kind=TEXT, metavar="DIR", env=("TMPDIR",), hidden=True, group=FETCHING
    ),
    # Limits
    *(
        Option(name, text, kind=kind, metavar=metavar, env=(name.upper().replace("-", "_"),), group=LIMITS)
        for name, kind, metavar, text in (
            ("memory", TEXT, "SIZE", "Bound the memory (512M, 4G)"),
            ("memory-reservation", TEXT, "SIZE", "Keep this much memory when it gets scarce"),
            ("memory-swap", TEXT, "SIZE", "Bound memory and swap together, -1 for no bound of swap"),
            ("cpus", TEXT, "NUMBER", "Bound the processor time to that of NUMBER processors (1.5)"),
            ("cpu-shares", TEXT, "NUMBER", "Weigh the processor time, from 2 to 262144"),
            ("cpuset-cpus", TEXT, "LIST", "Run on these processors (0-3,6)"),
            ("cpuset-mems", TEXT, "LIST", "Take memory of these nodes"),
            ("pids-limit", TEXT, "NUMBER", "Bound the number of processes, -1 for no bound"),
            ("blkio-weight", TEXT, "NUMBER", "Weigh reading and writing of disks, from 10 to 1000"),
            ("blkio-weight-device", LIST, "DEVICE:NUMBER", "The same for one disk"),
            ("oom-kill-disable", FLAG, "", "Not available: control groups of version 2 have no such switch"),
            ("apply-cgroups", TEXT, "FILE", "Set the limits in a TOML file"),
        )
    ),
    # What the peers have: what holds here anyway is accepted, what cannot be had is refused with a reason.
    Option("no-pid", "Do without own processes", env=("NO_PID",), hidden=True),
    Option("unsquash", "Unpack instead of mounting", env=("UNSQUASH",), aliases=("tmp-sandbox",), hidden=True),
    *(Option(name, "Holds anyway", hidden=True) for name in HOLDS),
    *(Option(name, f"Refused: {reason}", kind=kind, env=env, hidden=True) for name, kind, env, reason in REFUSED),
    # For tests and curious people
    Option("dry-run", "Say what would be done, and end", hidden=True),
)


def start(action: str, arguments: Arguments, environ: dict[str, str]) -> NoReturn:
    """Become what the command line asks for.

    Raises:
        SingularityError: the container could not be made.
    """
    keep_standard_descriptors()
    refuse(arguments)
    image, words = arguments.positional[0], arguments.positional[1:]
    if action == "shell" and words:
        messages.warning(f"shell takes no arguments; left out: {' '.join(words)}")
        words = []
    if image.startswith("instance://"):
        _join(action, image[len("instance://") :], words, arguments, environ)
    from pysingularity.runtime.enter import enter
    from pysingularity.runtime.prepare import prepare

    spec = prepare(action, local_image(image, arguments, environ), words, arguments, environ)
    if arguments.dry_run:
        _dry_run(spec)
    enter(spec)


def refuse(arguments: Arguments) -> None:
    """Refuse what the peers have and this runtime has not.

    Raises:
        UserError: one of those flags was given; the message says what to do instead.
    """
    for name, _, _, reason in REFUSED:
        if getattr(arguments, name.replace("-", "_")):
            raise UserError("not-available", f"--{name} is not available here", hint=reason)


def keep_standard_descriptors() -> None:
    """Make sure that nothing we open gets the number of a standard descriptor that the caller had closed.

    What is put there closes itself at execve, so the program finds them closed as well.
    """
    for number in (0, 1, 2):
        try:
            posix.fstat(number)
        except OSError:
            posix.open("/dev/null", posix.O_RDWR | posix.O_CLOEXEC)


def local_image(text: str, arguments: Arguments, environ: dict[str, str]) -> str:
    """Return the path of an image, fetching it first when `text` is a reference."""
    if ":" in text:
        from pysingularity.reference import has_scheme  # only for what may be one

        if has_scheme(text):
            from pysingularity import thirdparty
            from pysingularity.cli import main

            thirdparty.enable()
            main.interruptible()
            from pysingularity.registry.fetch import fetch_for_run

            if arguments.docker_login:
                _ask_login(arguments)
            if arguments.tmpdir:
                environ["SINGULARITY_TMPDIR"] = str(arguments.tmpdir)
            with _Shown() as progress:
                return str(fetch_for_run(text, arguments, environ, progress))
    return text


class _Shown:
    """Shows the progress of a fetch, if there is any: what shows it is loaded then."""

    def __init__(self) -> None:
        self._display: Display | None = None

    def __call__(self, text: str = "", done: int = 0, total: int = 0) -> None:
        if self._display is None:
            from pysingularity.cli.transfer import Display

            self._display = Display()
        self._display(text, done, total)

    def __enter__(self) -> _Shown:
        return self

    def __exit__(self, *error: object) -> None:
        if self._display is not None:
            self._display.__exit__(*error)


def _ask_login(arguments: Arguments) -> None:
    """Ask for name and password of the registry on the terminal, where they are not given."""
    import getpass

    if not arguments.docker_username:
        arguments.docker_username = input("Registry user name: ")
    if not arguments.docker_password:
        arguments.docker_password = getpass.getpass("Registry password: ")


def _dry_run(spec: object) -> NoReturn:
    import sys

    for line in spec.describe():  # type: ignore[attr-defined]
        print(line)
    print("modules:", " ".join(sorted(sys.modules)))
    sys.stdout.flush()
    posix._exit(0)


def _join(action: str, name: str, words: list[str], arguments: Arguments, environ: dict[str, str]) -> NoReturn:
    """Run something in an instance: join it, and stay outside its pid namespace to wait."""
    from pysingularity.runtime.instances import find
    from pysingularity.runtime.joining import enter_instance
    from pysingularity.runtime.prepare import prepare_joining

    instance = find(name, environ)
    arguments.instance_name = instance.name
    enter_instance(instance, prepare_joining(action, instance.image, words, arguments, environ))
