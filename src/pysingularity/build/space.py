# SPDX-License-Identifier: Apache-2.0
"""Where a build works: a temporary folder that fits, locked while it is in use, and what killed builds left behind.

Which folder that is, `cache.temporary_folder` says, for pulls as well.
"""

from __future__ import annotations

import fcntl
import os
import stat
import tempfile
import time
from collections.abc import Iterable

from pysingularity import messages
from pysingularity.errors import HostError
from pysingularity.folders import in_memory

#: How much larger than its compressed file an image is on disk, by experience.
UNPACKED = 3
#: Beginning of the names of our folders.
PREFIX = "singularity-build-"
#: The same for the moment before one is locked.
_UNLOCKED = "." + PREFIX


def free(path: str) -> int:
    """Return the bytes that are free for this user in the file system of a folder."""
    status = os.statvfs(path)
    return status.f_bavail * status.f_frsize


def need(path: str, amount: int, what: str) -> None:
    """Refuse before the work when a folder has too little room.

    Raises:
        HostError: there is less than `amount` bytes.
    """
    there = free(path)
    if there < amount:
        raise HostError(
            "disk-full",
            f"{what} needs about {amount >> 20} MiB in {path}, and {there >> 20} MiB are free",
            hint="make room there, or set SINGULARITY_TMPDIR to a folder that has it",
        )


def tell_memory(path: str) -> None:
    """Say it when temporary files would fill memory: nobody expects that of a folder."""
    if in_memory(path):
        messages.warning(
            f"temporary files go to {path}, which lives in memory ({free(path) >> 20} MiB are free); "
            "SINGULARITY_TMPDIR names a folder on a disk"
        )


def amount(paths: Iterable[str]) -> int:
    """Return the bytes that files and folders with everything in them take on a disk; what cannot be read counts 0."""
    total, stack = 0, list(paths)
    while stack:
        path = stack.pop()
        try:
            status = os.lstat(path)
            total += status.st_blocks * 512
            if stat.S_ISDIR(status.st_mode):
                stack += [os.path.join(path, name) for name in os.listdir(path)]
        except OSError:
            continue
    return total


class Workplace:
    """A fresh folder for one build, removed by whoever calls `remove_tree` on its path.

    Arguments:
        parent: folder to make it in.

    Attributes:
        path: the folder, mode 0700.
    """

    def __init__(self, parent: str) -> None:
        self._fd = -1
        try:
            made = tempfile.mkdtemp(prefix=_UNLOCKED, dir=parent)
            self._fd = os.open(made, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            # The lock belongs to the open descriptor, which our worker inherits: it holds until the last of us has
            # ended. Only with it the folder gets its name: another build that sees one without takes it for abandoned.
            _lock(self._fd)
            self.path = os.path.join(parent, PREFIX + os.path.basename(made)[len(_UNLOCKED) :])
            os.rename(made, self.path)
        except OSError as error:
            self.close()
            raise HostError("no-tmpdir", f"{parent}: cannot make a temporary folder: {error.strerror}") from None

    def close(self) -> None:
        """Let go of the lock."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def abandoned(parent: str) -> list[str]:
    """Return folders of builds of this user that nobody works in any more."""
    found = []
    try:
        names = os.listdir(parent)
    except OSError:
        return []
    for name in names:
        path = os.path.join(parent, name)
        if not name.startswith(PREFIX) and not (name.startswith(_UNLOCKED) and _old(path)):
            continue
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:  # somebody else's, or gone
            continue
        try:
            status = os.fstat(fd)
            # One that has lost its name meanwhile was removed by its own build.
            if status.st_uid == os.geteuid() and _lock(fd) and os.path.samestat(status, os.lstat(path)):
                found.append(path)
        except OSError:
            continue
        finally:
            os.close(fd)
    return found


def _old(path: str) -> bool:
    try:
        return time.time() - os.lstat(path).st_mtime > 3600
    except OSError:
        return False


def _lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # held by somebody, or a file system without locks: then nothing is ever taken for abandoned
        return False
    return True


def is_sandbox(path: str) -> bool:
    """Return whether a folder may be replaced by --force: it is empty, or a root file system of ours."""
    try:
        names = os.listdir(path)
    except OSError:
        return False
    if not names:
        return True
    if ".singularity.d" in names:
        return True
    # A root file system that was never an image: what every one has.
    return {"etc", "usr", "bin"} <= set(names) and stat.S_ISDIR(os.lstat(os.path.join(path, "usr")).st_mode)
