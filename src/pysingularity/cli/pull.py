# SPDX-License-Identifier: Apache-2.0
"""`singularity pull`: any reference to one file, or to a sandbox."""

from __future__ import annotations

import errno
import os

from pysingularity import messages
from pysingularity.cli.options import TEXT, Arguments, Option
from pysingularity.errors import HostError, UsageError, UserError

USAGE = "[OUT] REFERENCE"
COUNT = (1, 2)
HELP = """\
Fetch an image and put it into one read-only file. References are docker://, oras://, library://, shub://, http(s)://,
docker-archive:, docker-daemon:, oci: and oci-archive:. The file is called NAME_TAG.sif unless you say otherwise.

    singularity pull docker://debian:12
    singularity pull tools.sif docker://registry.example.org:5000/lab/tools@sha256:…
    singularity pull --sandbox --name debian docker://debian
"""
SIGN_IN = (
    Option("no-https", "Speak plain http to the registry", env=("NOHTTPS", "NO_HTTPS"), aliases=("nohttps",)),
    Option(
        "docker-username",
        "Log in as this user",
        kind=TEXT,
        metavar="NAME",
        env=("DOCKER_USERNAME",),
        bare_env=("DOCKER_USERNAME",),
    ),
    Option(
        "docker-password",
        "Log in with this password",
        kind=TEXT,
        metavar="PASSWORD",
        env=("DOCKER_PASSWORD",),
        bare_env=("DOCKER_PASSWORD",),
    ),
    Option("docker-login", "Ask for name and password on the terminal", env=("DOCKER_LOGIN",)),
    Option("authfile", "Read names and passwords from FILE", kind=TEXT, metavar="FILE", env=("AUTH_FILE",)),
)
FETCH = (
    *SIGN_IN,
    Option("arch", "Take the image for this architecture", kind=TEXT, metavar="ARCH", env=("PULL_ARCH", "ARCH")),
    Option("arch-variant", "Take this variant of it", kind=TEXT, metavar="VARIANT", env=("PULL_ARCH_VARIANT",)),
    Option("library", "Use this library", kind=TEXT, metavar="URL", env=("LIBRARY",)),
    Option("docker-host", "Use this Docker daemon", kind=TEXT, metavar="URL", env=("DOCKER_HOST",)),
    Option("disable-cache", "Neither use nor fill the cache", env=("DISABLE_CACHE",)),
    Option(
        "pull",
        "Ask what a tag means now: always, when it is missing from the cache, or never",
        kind=TEXT,
        metavar="WHEN",
        choices=("always", "missing", "never"),
        env=("PULL",),
    ),
    Option("offline", "Ask nobody: same as --pull never", env=("OFFLINE",)),
)
OPTIONS = (
    Option("force", "Replace a file of that name", short="F", env=("FORCE",)),
    Option("name", "Call the file NAME", kind=TEXT, metavar="NAME", env=("PULL_NAME", "NAME")),
    Option("dir", "Put the file into DIR", kind=TEXT, metavar="DIR", env=("PULLDIR", "PULLFOLDER")),
    Option("sandbox", "Make a folder instead of a file"),
    Option("json", "Print path, size and digests as JSON", short="j"),
    Option(
        "compress",
        "Compress with this method",
        kind=TEXT,
        metavar="METHOD",
        choices=("gzip", "zstd", "xz", "lz4"),
        env=("COMPRESS",),
    ),
    Option("level", "Compress with this effort", kind=TEXT, metavar="N"),
    Option("threads", "Compress with this many threads", kind=TEXT, metavar="N"),
    *FETCH,
    Option("allow-unsigned", "Take images without a signature (always done)", short="U", hidden=True),
)
FETCH_NAMES = tuple(option.name for option in FETCH)


def options_of(arguments: Arguments) -> dict[str, object]:
    """Return the options of a fetch by name."""
    names = (*FETCH_NAMES, "compress", "level", "threads")
    found: dict[str, object] = {name: getattr(arguments, name, None) for name in names}
    if found.get("docker_login"):
        from getpass import getpass

        found["docker_username"] = input("Username: ")
        found["docker_password"] = getpass("Password: ")
    return found


def target_of(arguments: Arguments, default: str) -> str:
    """Return where the result goes: the positional, --name or the default, below --dir."""
    given = arguments.positional[0] if len(arguments.positional) == 2 else ""
    if given and arguments.name:
        raise UsageError("two-names", "both a name for the file and --name were given")
    name = given or str(arguments.name or "") or default
    folder = str(arguments.dir or "")
    return os.path.join(folder, name) if folder else name


def run(arguments: Arguments, environ: dict[str, str]) -> int:
    """Pull the image."""
    from pysingularity.cli.transfer import Display
    from pysingularity.image.output import Orderly, check_target
    from pysingularity.reference import parse_reference
    from pysingularity.registry.fetch import obtain
    from pysingularity.registry.settings import settings_from

    reference = parse_reference(arguments.positional[-1])
    if reference.scheme in ("localimage", "instance"):
        raise UserError(
            "no-reference",
            f"{arguments.positional[-1]}: is no reference to an image elsewhere",
            hint="write for example: singularity pull docker://debian",
        )
    target = target_of(arguments, reference.file_name())
    if os.path.lexists(target) and not arguments.force:
        raise UserError(
            "target-exists",
            f'Image file already exists: "{target}" - will not overwrite',
            hint="use --force to replace it",
        )
    check_target(target, force=bool(arguments.force), folder=bool(arguments.sandbox))
    settings = settings_from(options_of(arguments), environ)
    with Orderly(), Display() as display:
        for left in (2, 1, 0):
            found = obtain(reference, settings, display)
            try:
                if arguments.sandbox:
                    from pysingularity.image.convert import to_sandbox
                    from pysingularity.image.open import open_image

                    display("unpacking")
                    with open_image(found.path) as image:
                        to_sandbox(image, target, force=bool(arguments.force))
                else:
                    place(found.path, target, temporary=found.temporary)
                break
            except (FileNotFoundError, UserError):
                if os.path.exists(found.path) or not left:
                    raise
                # Another process has cleaned the cache since: once more.
            finally:
                if found.temporary and os.path.exists(found.path):
                    os.unlink(found.path)
    if arguments.json:
        from pysingularity.cli.results import write_json

        size = os.stat(target).st_size
        write_json({"path": target, "reference": str(reference), "size": size, "cached": found.cached, **found.digests})
    else:
        messages.info(f"{target}{' (from the cache)' if found.cached else ''}")
    return 0


def place(path: str, target: str, *, temporary: bool) -> None:
    """Put a fetched file in its place, whole or not at all."""
    from pysingularity.files import hand_out
    from pysingularity.image.output import partial_name, sync_folder

    new = partial_name(target)
    try:
        moved = False
        if temporary:
            try:
                os.rename(path, new)
                moved = True
            except OSError:  # another file system
                pass
        if not moved:
            hand_out(path, new)
        os.rename(new, target)
        if os.path.lexists(new):  # target was already this very file: POSIX then renames nothing
            os.unlink(new)
    except BaseException as error:
        if os.path.lexists(new):
            os.unlink(new)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise HostError(
                "disk-full", f"{target}: no space left in {os.path.dirname(os.path.abspath(target))}"
            ) from None
        raise
    sync_folder(os.path.dirname(target) or ".")
