# SPDX-License-Identifier: Apache-2.0
"""Copy a sandbox as a whole: owners, modes, times, hard links, extended attributes, devices and sockets' absence.

Unlike `files`, which follows %files' rules, this keeps everything as it is and never follows a link.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from typing import TYPE_CHECKING

from pysingularity.linux.ownership import CAPABILITY_XATTR

if TYPE_CHECKING:
    from pysingularity.build.bootstrap import Owners

#: Attributes that belong to a place or to our own records, not to the content.
SKIPPED = ("system.", "trusted.overlay.", "user.overlay.", "user.singularity.")
#: A capability of a file that the kernel would not take: a record that does belong to the content.
CAPABILITY = os.fsdecode(CAPABILITY_XATTR)
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def clone(source: str, target: str, owners: Owners, progress: Callable[[int], None] | None = None) -> None:
    """Copy everything in a folder into an existing empty folder.

    Arguments:
        source, target: the folders.
        owners: keeps owners and device nodes where chown and mknod do not work.
        progress: called with numbers of bytes.

    Raises:
        OSError: something may not be read, or there is no room.
    """
    links: dict[tuple[int, int], str] = {}
    top = os.path.abspath(target)
    stack = [(os.path.abspath(source), top)]
    times: list[tuple[str, os.stat_result]] = []
    while stack:
        here, there = stack.pop()
        fd = os.open(here, _FOLDER if here != os.path.abspath(source) else _FOLDER & ~os.O_NOFOLLOW)
        try:
            status = os.fstat(fd)
            _attributes(here, there, status, owners)
            times.append((there, status))
            for name in sorted(os.listdir(fd)):
                own, copy = os.path.join(here, name), os.path.join(there, name)
                entry = os.stat(name, dir_fd=fd, follow_symlinks=False)
                if stat.S_ISDIR(entry.st_mode):
                    os.mkdir(copy, 0o700)
                    stack.append((own, copy))
                    continue
                mark = (entry.st_dev, entry.st_ino)
                if entry.st_nlink > 1 and mark in links:
                    os.link(links[mark], copy, follow_symlinks=False)
                    continue
                links[mark] = copy
                if not _entry(own, copy, name, fd, entry, owners):
                    continue
                if progress is not None and stat.S_ISREG(entry.st_mode):
                    progress(entry.st_size)
        finally:
            os.close(fd)
    for path, status in reversed(times):
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        os.chmod(path, stat.S_IMODE(status.st_mode))
    os.chmod(top, stat.S_IMODE(os.stat(top).st_mode) | 0o700)


def _entry(own: str, copy: str, name: str, fd: int, status: os.stat_result, owners: Owners) -> bool:
    _, _, mode, rdev = owners.get(own, status)  # a device of an earlier build may be the record of one
    if stat.S_ISREG(mode):
        _content(name, fd, copy)
    elif stat.S_ISLNK(mode):
        os.symlink(os.readlink(name, dir_fd=fd), copy)
    elif stat.S_ISFIFO(mode):
        os.mkfifo(copy, 0o600)
    elif stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
        owners.mknod(copy, mode, rdev)
    else:  # a socket belongs to a program that is not there any more
        return False
    _attributes(own, copy, status, owners)
    if not stat.S_ISLNK(mode):
        os.chmod(copy, stat.S_IMODE(mode))
    os.utime(copy, ns=(status.st_atime_ns, status.st_mtime_ns), follow_symlinks=False)
    return True


def _content(name: str, fd: int, copy: str) -> None:
    source = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=fd)
    try:
        output = os.open(copy, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            fast = True
            while True:
                if fast:
                    try:
                        count = os.copy_file_range(source, output, 1 << 30)
                    except OSError as error:
                        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
                            raise
                        fast = False
                        continue
                else:
                    data = os.read(source, 1 << 20)
                    count = len(data)
                    view = memoryview(data)
                    while view:
                        view = view[os.write(output, view) :]
                if not count:
                    return
        finally:
            os.close(output)
    finally:
        os.close(source)


def _attributes(own: str, copy: str, status: os.stat_result, owners: Owners) -> None:
    """Copy extended attributes and the owner; attributes this user may not set are left out."""
    try:
        names = os.listxattr(own, follow_symlinks=False)
    except OSError:
        names = []
    uid, gid, _, _ = owners.get(own, status)
    owners.set(copy, uid, gid)
    for name in names:
        if (name.startswith(SKIPPED) and name != CAPABILITY) or name == "security.selinux":
            continue
        try:
            os.setxattr(copy, name, os.getxattr(own, name, follow_symlinks=False), follow_symlinks=False)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
