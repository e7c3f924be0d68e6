# SPDX-License-Identifier: Apache-2.0
"""Options and an image to a LaunchSpec: every decision about a container, made before anything is done.

Looks at the host (folders, users, settings) and changes nothing. What to mount where is decided in here; how the texts
of binds are read is in `binds`, the environment's rules are in `environment`. Start ring.
"""

from __future__ import annotations

import posix

from pysingularity import config, messages
from pysingularity.errors import HostError, ImageError, UsageError, UserError
from pysingularity.image.open import Image, open_image
from pysingularity.image.scripts import is_name
from pysingularity.linux import capabilities
from pysingularity.linux.libc import MACHINE
from pysingularity.linux.namespaces import NEWIPC, NEWNET, NEWUTS
from pysingularity.runtime import environment as env_rules
from pysingularity.runtime import identity
from pysingularity.runtime.binds import Bind, absolute, normal, parse_bind, parse_mount
from pysingularity.runtime.overlay import below
from pysingularity.runtime.spec import (
    BIND,
    DEV,
    FILE,
    KEEP,
    MQUEUE,
    PROC,
    SANDBOX,
    SELF,
    SQUASHFS,
    TMPFS,
    LaunchSpec,
    Layer,
    Mount,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pysingularity.cli.options import Arguments
    from pysingularity.config import Settings
    from pysingularity.runtime.layers import Layers
    from pysingularity.runtime.network import Connection
    from pysingularity.runtime.security import Security

#: Folders of the host that never stand in for the container's own, even when the user is in one of them.
SYSTEM_FOLDERS = {
    "/",
    "/etc",
    "/bin",
    "/mnt",
    "/usr",
    "/var",
    "/opt",
    "/sbin",
    "/lib",
    "/lib64",
    "/boot",
    "/root",
    "/home",
}
#: uname's machine → architecture as images name it.
ARCHITECTURES = {
    "x86_64": "amd64",
    "aarch64": "arm64",
    "i686": "386",
    "armv7l": "arm",
    "ppc64le": "ppc64le",
    "s390x": "s390x",
    "riscv64": "riscv64",
}
#: Options that set limits (`runtime.limits`).
LIMITS = (
    *("memory", "memory_reservation", "memory_swap", "cpus", "cpu_shares", "cpuset_cpus", "cpuset_mems"),
    *("pids_limit", "blkio_weight", "blkio_weight_device", "oom_kill_disable", "apply_cgroups"),
)
PROMPT = "Singularity> "
_TMPFS_MODE = 0o1777


def prepare(action: str, path: str, words: list[str], arguments: Arguments, environ: dict[str, str]) -> LaunchSpec:
    """Return what to do for `singularity ACTION [options] IMAGE WORDS`.

    Arguments:
        action: "exec", "run", "shell", "test" or "start".
        path: a local image.
        arguments: options of `cli.shared`.
        environ: the caller's environment.

    Raises:
        ImageError, UserError, HostError, UsageError: something is wrong or missing.
    """
    return _Preparation(action, path, words, arguments, environ).spec()


class _Preparation:
    """The state of one `prepare`."""

    def __init__(self, action: str, path: str, words: list[str], arguments: Arguments, environ: dict[str, str]) -> None:
        self.action, self.path, self.words, self.options, self.environ = action, path, words, arguments, environ
        options = arguments
        self.user = identity.current(environ)
        self.settings: Settings = config.load(environ, self.user.home)
        compat = bool(options.compat)
        self.contain_all = bool(options.containall) or compat
        self.contain = bool(options.contain) or self.contain_all
        self.pid = (bool(options.pid) and not options.no_pid) or self.contain_all
        self.writable = bool(options.writable)
        self.fakeroot = bool(options.fakeroot) and self.user.uid != 0
        self.without = set(options.no_mount)  # type: ignore[call-overload]
        for name, key in (("home", "mount home"), ("tmp", "mount tmp"), ("proc", "mount proc"), ("sys", "mount sys")):
            if not self.settings.flag(key):
                self.without.add(name)
        unknown = self.without - {"proc", "sys", "dev", "devpts", "home", "tmp", "hostfs", "cwd", "bind-paths"}
        for name in sorted(unknown):
            if not name.startswith("/"):
                messages.warning(f"--no-mount {name}: there is no such mount")
        self.cwd = self._current_folder()
        self.home_source, self.home = self._home()
        self.mounts: list[Mount] = []
        self.images: dict[str, Layer] = {}
        self.over: Layers | None = None
        self.accelerator_variables: dict[str, str] = {}
        self.image_cwd = self.image_user = ""
        self.inside: tuple[int, int] | None = None

    # --- the whole ----------------------------------------------------------------------------------------------------

    def spec(self) -> LaunchSpec:
        options = self.options
        image = open_image(self.path)
        try:
            layer = Layer(SANDBOX, absolute(image.path)) if image.kind == "sandbox" else self._over().root(image)
            self._check(image, layer)
            self._ask_image(image)
        finally:
            image.plain = None  # the layer's from here on
            image.close()
        if options.overlay:
            self._over().of_options()
        upper, upper_layer = "", None
        if self.over is not None:
            self.over.merge()
            upper, upper_layer = self.over.upper, self.over.upper_layer
        if upper_layer is not None:
            upper = upper_layer.path
        if options.writable_tmpfs or options.compat:
            if self.writable:
                raise UsageError("two-writers", "--writable and --writable-tmpfs cannot both be given")
            if not upper:
                upper = "tmpfs"
            elif options.writable_tmpfs:
                raise UserError("two-writers", "--writable-tmpfs and a writable --overlay cannot both be given")
        binds = self._binds()
        self._standard_mounts()
        self._contained_mounts()
        self._home_mount()
        for name in options.scratch:  # type: ignore[attr-defined]
            self._scratch(str(name))
        self._configured_binds()
        for bind, optional in binds:
            self._bind(bind, optional)
        self._accelerators(layer)
        folders = self._folders(binds)
        self._identity_files()
        root = self.user.uid == 0 and _has_power()
        keep = (root and not options.userns and self.inside is None) or self.fakeroot
        spaces = (NEWIPC if options.ipc or self.contain_all else 0) | (NEWUTS if options.uts or options.hostname else 0)
        connection = None
        if options.net or options.network:
            spaces |= NEWNET
            connection = self._network()
        spec = LaunchSpec(
            image=layer,
            argv=self.words,
            env=self._environment(binds),
            action=self.action,
            app=str(options.app or ""),
            shell=str(getattr(options, "shell", None) or ""),
            writable=self.writable and upper_layer is None,
            overlays=self.over.overlays if self.over else [],
            upper=upper,
            upper_layer=upper_layer,
            programs=self.over.programs if self.over else {},
            mounts=self.mounts,
            cwd=folders,
            cwd_required=bool(options.cwd),
            identity=KEEP if keep else SELF,
            inside=self.inside,
            namespaces=spaces,
            pid_namespace=self.pid,
            init=not (options.no_init or options.compat),
            hostname=str(options.hostname or ""),
            umask=0o022 if options.no_umask or options.compat else _umask(),
            capabilities=self._capabilities(),
            ambient=0 if keep else self._added(),
            session_size=max(self.settings.number("sessiondir max size"), 1),
            driver=str(self.settings["image driver"]),
            loopback=bool(spaces & NEWNET),
            connection=connection,
            warm=self._warm(),
            name=self._name(),
            explain=bool(options.explain_env),
            before_start=self._limits(),
            underlay=bool(options.underlay),
            netns=self._netns(keep),
        )
        spec.security = self._security(spec)
        if self.fakeroot:
            self._become_root(spec)
        return spec

    def joining(self) -> LaunchSpec:
        options = self.options
        spec = LaunchSpec(
            image=Layer(SANDBOX, self.path),
            argv=self.words,
            env=self._environment([]),
            action=self.action,
            app=str(options.app or ""),
            shell=str(getattr(options, "shell", None) or ""),
            cwd=[str(options.cwd or self.cwd or self.home), self.home, "/"],
            cwd_required=bool(options.cwd),
            umask=0o022 if options.no_umask or options.compat else _umask(),
            explain=bool(options.explain_env),
            name=self._name(),
        )
        spec.security = self._security(spec)
        return spec

    def _security(self, spec: LaunchSpec) -> Security | None:
        """Return what confines the program, None for nothing."""
        texts = [str(one) for one in self.options.security]  # type: ignore[attr-defined]
        if not texts:
            return None
        from pysingularity.runtime.security import Security  # brings ctypes and json in

        full = _capability("all") if spec.capabilities is None else spec.capabilities
        return Security(texts, full if spec.identity == KEEP else spec.ambient)

    def _netns(self, keep: bool) -> int:
        """Return a descriptor of the network namespace that --netns-path names, -1 for none."""
        path = self.options.netns_path
        if not path:
            return -1
        if self.options.net or self.options.network:
            raise UsageError("two-networks", "--netns-path and --net cannot both be given")
        if not keep or self.user.uid != 0:
            raise UserError("needs-root", "--netns-path needs root", hint="use --network none or --network pasta")
        try:
            return posix.open(str(path), posix.O_RDONLY | posix.O_CLOEXEC)
        except OSError as error:
            raise UserError("no-network", f"--netns-path {path}: {error.strerror}") from None

    def _over(self) -> Layers:
        """Return what goes over the root; a plain sandbox does without."""
        if self.over is None:
            from pysingularity.runtime.layers import Layers

            self.over = Layers(self.options, self.settings, self.environ, self.user.uid == 0, self._warm() > 0)
        return self.over

    def _name(self) -> str:
        return self.path.rstrip("/").rpartition("/")[2] or "/"

    def _check(self, image: Image, layer: Layer) -> None:
        """Refuse what cannot work, while it can still be said clearly."""
        if image.arch and image.arch != ARCHITECTURES.get(MACHINE, image.arch):
            emulated = posix.access(f"/proc/sys/fs/binfmt_misc/qemu-{_qemu(image.arch)}", posix.F_OK)
            compatible = (image.arch, MACHINE) in (("386", "x86_64"), ("arm", "aarch64"))
            if not emulated and not compatible:
                raise ImageError(
                    "wrong-architecture",
                    f"{self.path}: is made for {image.arch}, and this machine is {ARCHITECTURES.get(MACHINE, MACHINE)}",
                    hint="pull or build the image for this machine (--arch), or install qemu-user-static",
                )
        if self.writable:
            if layer.kind == SQUASHFS and not (self.over and self.over.upper_layer):
                raise ImageError(
                    "not-writable",
                    f"{self.path}: cannot be written: the image is read-only by its nature",
                    hint="use --writable-tmpfs or --overlay, give it an overlay: singularity overlay create IMAGE, "
                    "or make a sandbox: singularity build --sandbox DIR IMAGE",
                )
            if not posix.access(layer.path, posix.W_OK):
                what = "sandbox" if layer.kind == SANDBOX else "image"
                raise ImageError("not-writable", f"{self.path}: you have no permission to write into this {what}")

    # --- mounts -------------------------------------------------------------------------------------------------------

    def _add(self, kind: str, target: str, **values: object) -> None:
        self.mounts.append(Mount(kind, target, **values))  # type: ignore[arg-type]

    def _standard_mounts(self) -> None:
        without = self.without
        if "proc" not in without:
            if self.pid:
                self._add(PROC, "/proc")
            else:
                self._add(BIND, "/proc", source="/proc", trusted=True)
        if "sys" not in without:
            self._add(BIND, "/sys", source="/sys")
        dev = str(self.settings["mount dev"])
        if "dev" not in without and dev != "no":
            if self.contain or dev == "minimal":
                self._add(DEV, "/dev", part="devpts" if "devpts" in without else "")
                if self.options.ipc or self.contain_all:
                    self._add(MQUEUE, "/dev/mqueue")
            else:
                self._add(BIND, "/dev", source="/dev", trusted=True)
        for path in ("/etc/hosts", "/etc/localtime"):
            if path not in without and posix.access(path, posix.R_OK):
                self._add(BIND, path, source=path)
        servers = self.options.dns
        if servers:
            text = "".join(f"nameserver {server}\n" for server in servers)  # type: ignore[attr-defined]
            self._add(FILE, "/etc/resolv.conf", content=text.encode(), mode=0o644)
        elif (
            "/etc/resolv.conf" not in without
            and self.settings.flag("config resolv_conf")
            and posix.access("/etc/resolv.conf", posix.R_OK)
        ):
            self._add(BIND, "/etc/resolv.conf", source="/etc/resolv.conf")

    def _contained_mounts(self) -> None:
        """Put /tmp and /var/tmp in: the host's, empty ones, or those of --workdir."""
        if "tmp" in self.without:
            return
        for path, name in (("/tmp", "tmp"), ("/var/tmp", "var_tmp")):
            if not self.contain:
                self._add(BIND, path, source=path)
            elif self.options.workdir:
                self._add(BIND, path, source=self._work_folder(name, _TMPFS_MODE))
            else:
                self._add(TMPFS, path, mode=_TMPFS_MODE)

    def _work_folder(self, name: str, mode: int) -> str:
        """Make a folder in --workdir and return its path."""
        base = absolute(str(self.options.workdir))
        if not _is_folder(base):
            raise UserError("no-workdir", f"--workdir {self.options.workdir}: there is no such folder")
        path = base
        for part in name.split("/"):
            path = f"{path}/{part}"
            try:
                posix.mkdir(path, 0o755)
                if path.endswith(name):
                    posix.chmod(path, mode)
            except FileExistsError:
                pass
            except OSError as error:
                raise UserError("no-workdir", f"--workdir: {path}: {error.strerror}") from None
        return path

    def _home(self) -> tuple[str, str]:
        """Return (home on the host or "" for an empty one, home in the container)."""
        inside = "/root" if self.fakeroot else self.user.home
        text = self.options.home
        if not text:
            if self.contain:
                return "", inside
            return self.user.home, inside
        parts = str(text).split(":")
        if len(parts) > 2 or not parts[0]:
            raise UserError("bad-home", f"--home {text}: not of the form SRC[:DST]")
        source = absolute(parts[0])
        target = parts[1] if len(parts) == 2 and parts[1] else source
        if not target.startswith("/"):
            raise UserError("bad-home", f"--home {text}: the place in the container must be an absolute path")
        if not _is_folder(source):
            # The peers say nothing and go on, and scripts rely on it; the variable and passwd name the place anyway.
            messages.warning(f"--home {text}: there is no folder {source}, so nothing is mounted")
        return source, normal(target)

    def _home_mount(self) -> None:
        given = bool(self.options.home)
        if given and not _is_folder(self.home_source):
            return  # said in `_home`
        if ("home" in self.without or self.options.no_home) and not given:
            return
        if self.home == "/":
            return
        if self.home_source:
            self._add(BIND, self.home, source=self.home_source, required=given)
        elif self.options.workdir:
            self._add(BIND, self.home, source=self._work_folder("home", 0o700))
        else:
            self._add(TMPFS, self.home, mode=0o700)

    def _scratch(self, name: str) -> None:
        target = normal(name if name.startswith("/") else "/" + name)
        if self.options.workdir:
            source = self._work_folder("scratch" + target, 0o755)
            self._add(BIND, target, source=source, required=True)
        else:
            self._add(TMPFS, target, mode=0o755, required=True)

    def _configured_binds(self) -> None:
        if self.contain or "bind-paths" in self.without:
            return
        for text in self.settings.many("bind path"):
            for one in parse_bind(text):
                if one.target not in self.without:
                    self._add(BIND, normal(one.target), source=one.source, readonly=one.readonly)

    def _binds(self) -> list[tuple[Bind, bool]]:
        """Return the user's binds; True for those that an outer container left in the environment."""
        found = []
        nested = self.environ.get("SINGULARITY_CONTAINER") or self.environ.get("APPTAINER_CONTAINER")
        inherited = {self.environ.get(name) for name in ("SINGULARITY_BIND", "APPTAINER_BIND")} - {None, ""}
        for text in self.options.bind:  # type: ignore[attr-defined]
            optional = bool(nested) and text in inherited
            found += [(one, optional) for one in parse_bind(str(text))]
        found += [(parse_mount(str(text)), False) for text in self.options.mount]  # type: ignore[attr-defined]
        return found

    def _bind(self, one: Bind, optional: bool) -> None:
        source = absolute(one.source)
        target = one.target if one.target.startswith("/") else absolute(one.target)
        target = normal(target)
        if target == "/":
            raise UserError("bad-bind", f"--bind {one.source}:{one.target}: the root itself cannot be covered")
        try:
            posix.stat(source)
        except OSError as error:
            if optional:
                return
            raise UserError(
                "no-bind-source", f"cannot bind {one.source}: {error.strerror}", hint="the source of a bind must exist"
            ) from None
        if not one.part and not one.id:
            self._add(BIND, target, source=source, readonly=one.readonly, required=not optional)
            return
        image = open_image(source)
        image.close()
        if image.filesystem != "squashfs":
            raise ImageError("unsupported-image", f"{one.source}: no part of a {image.filesystem} image can be bound")
        layer = self.images.get(source)
        if layer is None:
            layer = self.images[source] = Layer(SQUASHFS, source, image.offset, image.size)
        self._add(BIND, target, source=source, part=one.part or "/", image=layer, readonly=True, required=True)

    def _folders(self, binds: list[tuple[Bind, bool]]) -> list[str]:
        """Return the folders to start in, best first; mount the current one where nothing else shows it."""
        fallback = [self.home, "/"]
        asked = self.options.cwd or self.image_cwd
        if asked:
            return [str(asked), *fallback]
        cwd = self.cwd
        if not cwd:
            return fallback
        if self.contain:
            shown = any(
                below(cwd, normal(bind.target)) and normal(bind.target) == normal(bind.source) for bind, _ in binds
            )
            return [cwd, *fallback] if shown else fallback
        shown = cwd in SYSTEM_FOLDERS or below(cwd, "/proc") or below(cwd, "/sys") or below(cwd, "/dev")
        for one in self.mounts:
            if one.kind == BIND and below(cwd, one.target):
                shown = True
        if not shown and "cwd" not in self.without:
            self._add(BIND, cwd, source=cwd)
        return [cwd, *fallback]

    def _current_folder(self) -> str:
        """Return where the caller is, by the name the caller uses for it; "" when it is gone."""
        try:
            here = posix.getcwd()
        except OSError:
            messages.warning("the current folder does not exist any more: starting in the home directory")
            return ""
        named = self.environ.get("PWD", "")
        if named.startswith("/") and named != here and normal(named) == named:
            try:
                one, other = posix.stat(named), posix.stat(here)
            except OSError:
                return here
            if (one.st_dev, one.st_ino) == (other.st_dev, other.st_ino):
                return named
        return here

    def _ask_image(self, image: Image) -> None:
        """Find out which folder and user an OCI image names, when that is wanted."""
        options = self.options
        if not (options.image_cwd or options.image_user or options.compat):
            return
        from pysingularity.runtime.imageconfig import wishes_of  # loads json

        if options.image_user and self.fakeroot:
            raise UsageError("two-users", "--image-user and --fakeroot cannot both be given")
        user = bool(options.image_user) or (bool(options.compat) and not self.fakeroot)
        wishes = wishes_of(image, cwd=not options.cwd and bool(options.image_cwd or options.compat), user=user)
        self.image_cwd = wishes.cwd
        if wishes.uid is not None:
            self.inside, self.image_user = (wishes.uid, wishes.gid), wishes.name

    def _identity_files(self) -> None:
        """Ask for passwd and group files with the caller in them; they are completed from the image's on the way in."""
        for path, key in (("/etc/passwd", "config passwd"), ("/etc/group", "config group")):
            if self.settings.flag(key) and not self.writable_root_files():
                self._add(FILE, path, mode=0o644, complete=self._passwd if path == "/etc/passwd" else self._group)

    def writable_root_files(self) -> bool:
        """Say whether a covered passwd would get in the way: emulated root of a writable sandbox adds users to it."""
        return self.writable and (self.fakeroot or self.user.uid == 0)

    def _passwd(self, image: bytes) -> bytes:
        if self.inside is not None and identity.has(image, self.inside[0]):
            return image
        return identity.passwd(image, self.user, self.home, uid=0 if self.fakeroot else self.inside and self.inside[0])

    def _group(self, image: bytes) -> bytes:
        return identity.group(image, self.user, gid=0 if self.fakeroot else self.inside and self.inside[1])

    def _accelerators(self, layer: Layer) -> None:
        options, settings = self.options, self.settings
        wanted = []
        if (options.nv or settings.flag("always use nv")) and not options.no_nv:
            wanted.append("nvidia")
        if (options.rocm or settings.flag("always use rocm")) and not options.no_rocm:
            wanted.append("rocm")
        if not wanted and not options.device:
            return
        from pysingularity.runtime.accelerators import mounts_for  # only for GPUs

        folders = [str(one) for one in options.cdi_dirs] or settings.many("cdi directories")  # type: ignore[attr-defined]
        devices = [str(one) for one in options.device]  # type: ignore[attr-defined]
        more, variables = mounts_for(wanted, devices, folders, layer, own_dev=self.contain)
        self.mounts += more
        self.accelerator_variables = variables

    # --- environment --------------------------------------------------------------------------------------------------

    def _environment(self, binds: list[tuple[Bind, bool]]) -> env_rules.EnvironmentPlan:
        options, environ = self.options, self.environ
        clean = bool(options.cleanenv) or self.contain_all
        forced = env_rules.insisted(environ)
        if options.env_file:
            from pysingularity.runtime.envfile import read_env_file  # rarely used

            for path in options.env_file:  # type: ignore[attr-defined]
                forced.update(read_env_file(str(path), environ))
        for text in options.env:  # type: ignore[attr-defined]
            forced.update(parse_env(str(text)))
        if "HOME" in forced:
            messages.warning("HOME cannot be set by variables: use --home")
            del forced["HOME"]
        path, prepend, append = (forced.pop(name, "") for name in ("PATH", "PREPEND_PATH", "APPEND_PATH"))
        container = absolute(self.path)
        # The places in the container: a container inside this one finds what was bound there.
        listed = ",".join(one.target for one, _ in binds)
        own = {
            "CONTAINER": container,
            "NAME": self._name(),
            "BIND": listed,
            "COMMAND": self.action,
            "ENVIRONMENT": "/.singularity.d/env/91-environment.sh",
        }
        if options.app:
            own["APPNAME"] = str(options.app)
        instance = getattr(options, "instance_name", "")
        if instance:
            own["INSTANCE"] = str(instance)
        if options.no_eval or options.compat:
            own["NO_EVAL"] = "1"
        base = {"HOME": self.home, "PATH": env_rules.DEFAULT_PATH}
        base.update(
            {f"{prefix}_{name}": value for name, value in own.items() for prefix in ("SINGULARITY", "APPTAINER")}
        )
        fixed = [*base, "USER_PATH"]
        fixed.remove("PATH")
        if not clean:
            base["USER_PATH"] = environ.get("PATH", "")
        base["PS1"] = PROMPT
        base["PROMPT_COMMAND"] = f'PS1="{PROMPT}"; unset PROMPT_COMMAND'
        if clean:
            base["LANG"] = "C"
        base.update(self.accelerator_variables)
        host = env_rules.from_host(environ, clean)
        for name in ("PS1", "PROMPT_COMMAND", *options.no_env):  # type: ignore[misc]
            host.pop(name, None)
        if not clean:
            host.setdefault("USER", self.user.name)
            host.setdefault("LOGNAME", self.user.name)
        if self.fakeroot or self.image_user:
            host["USER"] = host["LOGNAME"] = "root" if self.fakeroot else self.image_user
        return env_rules.EnvironmentPlan(
            base=base,
            host=host,
            forced=forced,
            fixed=fixed,
            prepend=prepend,
            append=append,
            path=path,
            app=str(options.app or ""),
        )

    # --- rights and networks ------------------------------------------------------------------------------------------

    def _capabilities(self) -> int | None:
        """Return the capabilities that stay, None for all that there are."""
        options = self.options
        if options.keep_privs and options.no_privs:
            raise UsageError("two-wishes", "--keep-privs and --no-privs cannot both be given")
        every = _capability("all")
        mask = 0 if options.no_privs else every
        for name in options.drop_caps:  # type: ignore[attr-defined]
            mask &= ~_capability(str(name))
        mask |= self._added()
        return None if mask == every else mask

    def _added(self) -> int:
        """Return the capabilities that --add-caps gives to the program of an ordinary user."""
        mask = 0
        for name in self.options.add_caps:  # type: ignore[attr-defined]
            mask |= _capability(str(name))
        return mask

    def _limits(self) -> Callable[[], None] | None:
        """Return what sets the limits of the container, None for no limits."""
        if not any(getattr(self.options, name) for name in LIMITS):
            return None
        import sys

        from pysingularity.runtime.limits import Group, wanted  # rarely used

        return Group(wanted(self.options), self.environ, [sys.executable, *sys.orig_argv[1:]])

    def _warm(self) -> int:
        """Return for how many seconds the mounted image is kept: SINGULARITY_IMAGE_KEEP, else the setting."""
        text = self.environ.get("SINGULARITY_IMAGE_KEEP", "")
        return int(text) if text.isdigit() else self.settings.number("warm seconds")

    def _network(self) -> Connection | None:
        """Return what connects the container's own network, None for nothing."""
        name = str(self.options.network or "")
        ports = [str(one) for one in self.options.publish]  # type: ignore[attr-defined]
        for text in self.options.network_args:  # type: ignore[attr-defined]
            key, _, value = str(text).partition("=")
            if key != "portmap" or not value:
                raise UserError(
                    "no-network-args",
                    f"--network-args {text}: only portmap=HOST:CONTAINER can be had without root's plugins",
                )
            ports.append(value)
        if name == "none":
            if ports:
                raise UsageError("no-network", "--publish needs a network: --network pasta")
            return None
        if name in ("", "pasta", "slirp4netns"):
            from pysingularity.runtime.network import Connection

            return Connection(ports, self.environ.get("PATH", env_rules.DEFAULT_PATH))
        raise HostError(
            "no-network",
            f"--network {name}: networks of this kind need root's plugins, which this version does not use",
            hint="--network none gives an own network without connection, --network pasta one with",
        )

    def _become_root(self, spec: LaunchSpec) -> None:
        """Make this process root of a user namespace; from here on the caller's own rights are those of that root."""
        from pysingularity.runtime.rootless import NOTIFY, VARIABLE, become_root

        if self.options.ignore_subuid:
            self.environ.setdefault(VARIABLE, NOTIFY)
        messages_level, messages.level = messages.level, min(messages.level, messages.WARNING)
        try:
            way = become_root(environ=self.environ)
        finally:
            messages.level = messages_level
        spec.squash_owners = way.needs_emulation
        if way.needs_emulation:
            from pysingularity.runtime import emulate

            spec.emulate_root = emulate.prepare(way, throwaway=False)


def prepare_joining(
    action: str, path: str, words: list[str], arguments: Arguments, environ: dict[str, str]
) -> LaunchSpec:
    """Return what to do in an instance made from the image `path`; options about its files have no effect there."""
    return _Preparation(action, path, words, arguments, environ).joining()


def parse_env(text: str) -> dict[str, str]:
    """Return the variables of one --env: NAME=VALUE, also several with commas (one that no name follows is text).

    Raises:
        UsageError: there is no name.
    """
    found: dict[str, str] = {}
    last = ""
    for piece in text.split(","):
        name, equals, value = piece.partition("=")
        if equals and is_name(name):
            found[name] = value
            last = name
        elif last:
            found[last] += "," + piece
        else:
            raise UsageError("bad-env", f"--env {text}: must be formatted as NAME=VALUE")
    return found


def _is_folder(path: str) -> bool:
    try:
        return posix.stat(path).st_mode & 0o170000 == 0o040000
    except OSError:
        return False


def _capability(name: str) -> int:
    """Return the mask of a capability, or of all of them.

    Raises:
        UserError: there is none of this name.
    """
    if name.lower() == "all":
        return (1 << len(capabilities.NAMES)) - 1
    try:
        return 1 << capabilities.number(name)
    except ValueError:
        raise UserError("no-capability", f"there is no capability {name}", hint="for example: CAP_NET_RAW") from None


def _umask() -> int:
    mask = posix.umask(0o022)
    posix.umask(mask)
    return mask


def _has_power() -> bool:
    """Return whether root really may do what root does (not so in most containers)."""
    return bool(capabilities.effective() >> capabilities.SYS_ADMIN & 1)


def _qemu(arch: str) -> str:
    return {"amd64": "x86_64", "arm64": "aarch64", "386": "i386"}.get(arch, arch)
