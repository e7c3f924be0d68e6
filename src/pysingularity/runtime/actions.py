# SPDX-License-Identifier: Apache-2.0
"""What exec, run, shell, test and start mean in an image: which program that is. Called inside the container.

Start ring.
"""

from __future__ import annotations

import posix

from pysingularity.errors import SingularityError

#: The scripts of an image, newest layout first.
SCRIPTS = {
    "run": ("/.singularity.d/runscript", "/singularity"),
    "test": ("/.singularity.d/test",),
    "start": ("/.singularity.d/startscript",),
}


class NothingToDoError(SingularityError):
    """The image has no such script; that is no failure."""

    exit_code = 0


class NoAppError(SingularityError):
    """The image has no such app."""

    exit_code = 1


def program(action: str, words: list[str], app: str = "", shell: str = "") -> list[str]:
    """Return program and arguments of an action.

    Arguments:
        action: "exec", "run", "shell", "test" or "start".
        words: what the user gave behind the image.
        app: name of a SCIF app, or "".
        shell: the shell asked for, or "".

    Raises:
        NothingToDoError: there is no test, or no startscript.
        NoAppError: there is no such app.
    """
    if app and not _is("/scif/apps/" + app, 0o040000):
        raise NoAppError("no-app", f"Could not locate the container application: {app}")
    if action == "shell":
        if shell:
            return [shell]
        return ["/bin/bash", "--norc"] if _is("/bin/bash", 0o100000) else ["/bin/sh"]
    if action not in SCRIPTS:
        return words
    if app:
        name = {"run": "runscript", "test": "test", "start": "startscript"}[action]
        candidates: tuple[str, ...] = (f"/scif/apps/{app}/scif/{name}",)
    else:
        candidates = SCRIPTS[action]
    for path in candidates:
        if _is(path, 0o100000):
            # A script that lost its permission bits on the way is still a script.
            return [path, *words] if posix.access(path, posix.X_OK) else ["/bin/sh", path, *words]
    if app:
        raise NoAppError("no-app-script", f"No {action} script for contained app: {app}")
    if action == "run":
        return ["/bin/sh", *words]
    if action == "test":
        raise NothingToDoError("no-test", "No test found in container")
    return []


def _is(path: str, kind: int) -> bool:
    try:
        return posix.stat(path).st_mode & 0o170000 == kind
    except OSError:
        return False
