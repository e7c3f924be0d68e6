# SPDX-License-Identifier: Apache-2.0
"""`singularity rm`: remove sandboxes, also those whose files belong to subordinate ids."""

from __future__ import annotations

import os

from pysingularity import messages
from pysingularity.cli.options import Arguments, Option
from pysingularity.errors import SingularityError, UserError

USAGE = "DIR..."
COUNT = (1, None)
HELP = """\
Remove the sandboxes DIR with everything in them. Files that a build gave to users of the container belong to your
subordinate ids, and neither `rm -rf` nor you may touch them from outside; this command enters the same ids first.

Links are never followed, and what is mounted inside a sandbox is left alone. A folder that does not look like a root
file system is only removed with --force.

    singularity rm box/
    singularity rm --force leftovers/
"""
OPTIONS = (Option("force", "Remove a folder that does not look like a sandbox, too", short="f"),)
#: A root file system has at least one of them.
_SIGNS = (".singularity.d", "bin", "usr", "etc", "environment")


def run(arguments: Arguments, environ: dict[str, str]) -> int:
    """Check every folder first, then remove them."""
    folders = [check(path, environ, bool(arguments.force)) for path in arguments.positional]
    status = 0
    for path in folders:
        try:
            remove(path, environ)
        except SingularityError as error:
            messages.error(str(error))
            status = error.exit_code
    return status


def check(path: str, environ: dict[str, str], force: bool) -> str:
    """Return the absolute path of a folder that may be removed.

    Raises:
        UserError: it is not there, is no folder, or is one that nobody wants to lose.
    """
    plain = path.rstrip("/") or "/"
    if not os.path.lexists(plain):
        raise UserError("no-such-sandbox", f"{path}: no such folder")
    if os.path.islink(plain):
        raise UserError("sandbox-is-link", f"{path} is a link to {os.readlink(plain)}", hint="name the folder itself")
    if not os.path.isdir(plain):
        raise UserError("no-folder", f"{path} is not a folder", hint=f"to remove a file: rm {path}")
    real = os.path.realpath(plain)
    for what, kept in (
        ("the root folder", "/"),
        ("your home", environ.get("HOME", "")),
        ("where you are", os.getcwd()),
    ):
        if kept and _contains(real, os.path.realpath(kept)):
            raise UserError("sandbox-too-dear", f"{path} is or contains {what}; it is not removed")
    if os.path.ismount(real):
        raise UserError("sandbox-is-mounted", f"{path}: something is mounted there", hint=f"umount {path}")
    if not force and not _looks_like_sandbox(real):
        raise UserError(
            "no-sandbox", f"{path} does not look like a sandbox", hint="remove it all the same with --force"
        )
    return real


def _contains(folder: str, path: str) -> bool:
    return folder == "/" or path == folder or path.startswith(folder + "/")


def _looks_like_sandbox(path: str) -> bool:
    try:
        names = os.listdir(path)
    except OSError:  # without permission to look: it may well be the root of a tree of other ids
        return os.lstat(path).st_uid != os.getuid()
    return not names or any(sign in names for sign in _SIGNS)


def remove(path: str, environ: dict[str, str]) -> None:
    """Remove a checked folder: as the user if that suffices, else as root of the user's ids.

    Raises:
        SingularityError: something could not be removed.
    """
    from pysingularity.image.remove import remove_deeply

    try:
        remove_deeply(path)
        return
    except PermissionError:
        if os.getuid() == 0:
            raise failed(path, environ) from None
    except OSError as error:
        raise UserError("sandbox-not-removed", f"{path}: {error.filename or ''}: {error.strerror}") from None
    child = os.fork()  # a namespace is for ever: the next folder starts as the user again
    if child == 0:
        status = 255
        try:
            from pysingularity.runtime.rootless import become_root

            become_root(environ=environ)
            remove_deeply(path)
            status = 0
        except SingularityError as error:
            messages.error(str(error))
        except OSError as error:
            messages.verbose(f"{error.filename}: {error.strerror}")
            status = 1
        finally:
            os._exit(status)
    if os.waitpid(child, 0)[1]:
        raise failed(path, environ)


def failed(path: str, environ: dict[str, str]) -> UserError:  # noqa: ARG001
    """Return the error for a folder with files that are neither the user's nor of the user's ids."""
    for folder, names, files in os.walk(path):
        for name in (*names, *files):
            one = os.path.join(folder, name)
            owner = os.lstat(one).st_uid
            if owner != os.getuid():
                return UserError(
                    "sandbox-not-removed",
                    f"{path}: {one} belongs to user {owner}, who is none of yours",
                    hint="remove it as that user, or as root",
                )
    return UserError("sandbox-not-removed", f"{path}: could not be removed", hint="is its parent folder writable?")
