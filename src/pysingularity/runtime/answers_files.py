# SPDX-License-Identifier: Apache-2.0
"""What the supervisor answers to calls about files: owners are recorded, and told to whoever asks.

chown changes the record and, for real, what chown changes besides owners (set-id bits, file capabilities, ctime): the
kernel does that itself in chown(-1, -1). stat is the kernel's answer with the record laid over it. Files that a process
makes while it is somebody else, or in a folder whose group is inherited, get a record when they are made. Permissions
are not emulated: a process that has become somebody else can still read and write what root can.
"""

from __future__ import annotations

import os
import stat
import struct

from pysingularity.linux import remote
from pysingularity.linux.ownership import CAPABILITY, CAPABILITY_XATTR, Record, RecordedOwners, read_owner
from pysingularity.linux.statx import (
    AT_EMPTY_PATH,
    AT_FDCWD,
    AT_SYMLINK_NOFOLLOW,
    BASIC,
    BTIME,
    GID,
    MODE,
    RDEV_MAJOR,
    RDEV_MINOR,
    UID,
    birth,
    statx,
)
from pysingularity.runtime.credentials import FIRST
from pysingularity.runtime.supervisor import ANSWERED, GREETING

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pysingularity.runtime.supervisor import Handler, Question, Supervisor

_EPERM, _EACCES, _EEXIST, _EINVAL, _EOPNOTSUPP = 1, 13, 17, 22, 95
_O_TMPFILE = 0o20000000
_OWN = {0}


def _find(supervisor: Supervisor, name: str | bytes, status: os.stat_result | None, follow: bool) -> Record | None:
    """Return the record of a file, or None; its status is only asked for when it is needed."""
    owners = supervisor.owners
    found = None
    if status is None or stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode):
        try:
            found = read_owner(name, follow)
        except PermissionError:  # another user's file, on a mount of the host
            return None
    if found is not None or not isinstance(owners, RecordedOwners):
        return found
    for table in (owners.table, supervisor.elsewhere):
        if table:
            if status is None:
                status = os.stat(name, follow_symlinks=follow)
            found = table.find(status.st_ino, lambda: _born(name, follow))
            if found is not None:
                return found
    return None


def _born(name: str | bytes, follow: bool) -> int:
    return birth(statx(name, flags=0 if follow else AT_SYMLINK_NOFOLLOW, mask=BASIC | BTIME))


def _owner(found: Record | None, status: os.stat_result) -> tuple[int, int]:
    if found is not None:
        return found.uid, found.gid
    return (0, 0) if status.st_uid in _OWN else (status.st_uid, status.st_gid)


def _record(supervisor: Supervisor, question: Question, name: str, status: os.stat_result, uid: int, gid: int) -> None:
    """Record an owner where it belongs: in the image, or in memory for files that were only mounted into it."""
    owners = supervisor.owners
    assert isinstance(owners, RecordedOwners)
    if supervisor.in_image(question, name, status.st_dev):
        owners.record(name, status, uid, gid, follow=True)
        return
    before = _owner(_find(supervisor, name, status, True), status)
    new = before[0] if uid == -1 else uid, before[1] if gid == -1 else gid
    if new != before:
        supervisor.elsewhere.add(status.st_ino, _born(name, True), Record(*new))


# ---- chown -----------------------------------------------------------------------------------------------------------


def _chown(
    supervisor: Supervisor, question: Question, folder: int, path: bytes, follow: bool, uid: int, gid: int
) -> int | None:
    descriptor = supervisor.open(question, folder, path, follow=follow)
    try:
        return _chown_opened(supervisor, question, descriptor, uid, gid)
    finally:
        os.close(descriptor)


def _chown_opened(supervisor: Supervisor, question: Question, descriptor: int, uid: int, gid: int) -> int:
    name = f"self/fd/{descriptor}"
    status = os.stat(name)
    if supervisor.anybody_changed:
        now = supervisor.credentials(question)
        if now is not FIRST and not now.may_chown(_owner(_find(supervisor, name, status, True), status), uid, gid):
            return -_EPERM
    try:
        os.chown(name, -1, -1)
    except OSError as error:
        if error.errno not in (_EPERM, _EACCES):  # another user's file (a mount of the host): only told, not changed
            raise
    _record(supervisor, question, name, status, uid, gid)
    return 0


def chown(supervisor: Supervisor, question: Question) -> int | None:
    """chown(path, uid, gid)."""
    path = _path(supervisor, question, 0)
    return _chown(supervisor, question, AT_FDCWD, path, True, question.id(1), question.id(2))


def lchown(supervisor: Supervisor, question: Question) -> int | None:
    """lchown(path, uid, gid)."""
    path = _path(supervisor, question, 0)
    return _chown(supervisor, question, AT_FDCWD, path, False, question.id(1), question.id(2))


def fchown(supervisor: Supervisor, question: Question) -> int | None:
    """fchown(fd, uid, gid)."""
    if question.signed(0) == GREETING:
        supervisor.greet(question)
        return 0
    return _chown(supervisor, question, question.signed(0), b"", True, question.id(1), question.id(2))


def fchownat(supervisor: Supervisor, question: Question) -> int | None:
    """fchownat(folder, path, uid, gid, flags)."""
    flags = question.signed(4)
    if flags & ~(AT_EMPTY_PATH | AT_SYMLINK_NOFOLLOW):
        return -_EINVAL
    path = _path(supervisor, question, 1, empty=bool(flags & AT_EMPTY_PATH))
    follow = not flags & AT_SYMLINK_NOFOLLOW
    return _chown(supervisor, question, question.signed(0), path, follow, question.id(2), question.id(3))


def _path(supervisor: Supervisor, question: Question, number: int, *, empty: bool = False) -> bytes:
    """Return a path argument.

    Raises:
        OSError: ENOENT when it is empty and may not be.
    """
    path = supervisor.string(question, number)
    if not path and not empty:
        raise OSError(2, "empty path")
    return path


# ---- stat ------------------------------------------------------------------------------------------------------------


def _status(
    supervisor: Supervisor, question: Question, folder: int, path: bytes, follow: bool, address: int
) -> int | None:
    name = supervisor.name(question, folder, path)
    follow = follow or not path
    try:
        found = _find(supervisor, name, None, follow)
        if found is None:
            return None
        status = os.stat(name, follow_symlinks=follow)
    except OSError:  # the kernel says it better
        return None
    uid, gid, mode, rdev = _laid_over(found, status)
    supervisor.write(question, (address, question.architecture.pack_stat(status, uid, gid, mode, rdev)))
    return 0


def _laid_over(found: Record, status: os.stat_result) -> tuple[int, int, int, int]:
    if found.mode:
        return found.uid, found.gid, found.mode | stat.S_IMODE(status.st_mode), found.rdev
    return found.uid, found.gid, status.st_mode, status.st_rdev


def stat_(supervisor: Supervisor, question: Question) -> int | None:
    """stat(path, result)."""
    path = supervisor.string(question, 0)
    return _status(supervisor, question, AT_FDCWD, path, True, question.arguments[1]) if path else None


def lstat(supervisor: Supervisor, question: Question) -> int | None:
    """lstat(path, result)."""
    path = supervisor.string(question, 0)
    return _status(supervisor, question, AT_FDCWD, path, False, question.arguments[1]) if path else None


def fstat(supervisor: Supervisor, question: Question) -> int | None:
    """fstat(fd, result)."""
    return _status(supervisor, question, question.signed(0), b"", True, question.arguments[1])


def fstatat(supervisor: Supervisor, question: Question) -> int | None:
    """newfstatat(folder, path, result, flags)."""
    flags, path = question.signed(3), supervisor.string(question, 1)
    if not path and not flags & AT_EMPTY_PATH:
        return None
    follow = not flags & AT_SYMLINK_NOFOLLOW
    return _status(supervisor, question, question.signed(0), path, follow, question.arguments[2])


def statx_(supervisor: Supervisor, question: Question) -> int | None:
    """statx(folder, path, flags, mask, result)."""
    flags, path = question.signed(2), supervisor.string(question, 1)
    if not path and not flags & AT_EMPTY_PATH:
        return None
    name = supervisor.name(question, question.signed(0), path)
    follow = not path or not flags & AT_SYMLINK_NOFOLLOW
    try:
        found = _find(supervisor, name, None, follow)
        if found is None:
            return None
        wanted = question.arguments[3] & 0x7FFFFFFF
        raw = bytearray(statx(name, flags=0 if follow else AT_SYMLINK_NOFOLLOW, mask=wanted | BASIC))
        status = os.stat(name, follow_symlinks=follow)
    except OSError:
        return None
    uid, gid, mode, rdev = _laid_over(found, status)
    struct.pack_into("=II", raw, UID, uid, gid)
    struct.pack_into("=H", raw, MODE, mode)
    struct.pack_into("=I", raw, RDEV_MAJOR, os.major(rdev))
    struct.pack_into("=I", raw, RDEV_MINOR, os.minor(rdev))
    assert GID == UID + 4
    supervisor.write(question, (question.arguments[4], bytes(raw)))
    return 0


# ---- new files -------------------------------------------------------------------------------------------------------


class _Place:
    """Where a new file goes, and whose it will be.

    Arguments:
        folder: descriptor of the folder.
        base: name in it.
        uid, gid: its owner.
        umask: the caller's.
    """

    __slots__ = ("base", "folder", "gid", "uid", "umask")

    def __init__(self, folder: int, base: bytes, uid: int, gid: int, umask: int) -> None:
        self.folder, self.base, self.uid, self.gid, self.umask = folder, base, uid, gid, umask

    @property
    def name(self) -> str:
        """Our name for the new file."""
        return f"self/fd/{self.folder}/{os.fsdecode(self.base)}"


def _place(
    supervisor: Supervisor, question: Question, folder: int, path: bytes, *, always: bool = False
) -> _Place | None:
    """Return where a new file goes when it will not simply be root's; otherwise, or when nothing can be made, None.

    Arguments:
        always: return the place for root's files, too.
    """
    words, _, base = path.rstrip(b"/").rpartition(b"/")
    above = words or (b"/" if path[:1] == b"/" else b"")
    now = supervisor.credentials(question)
    name = supervisor.name(question, folder, above)
    try:
        status = os.stat(name)
    except OSError:  # the kernel says it better
        return None
    uid, gid = now.user[3], now.group[3]
    if status.st_mode & stat.S_ISGID:
        gid = _owner(_find(supervisor, name, status, True), status)[1]
    if (uid == gid == 0 and not always) or base in (b"", b".", b".."):
        return None
    return _Place(supervisor.open(question, folder, above), base, uid, gid, _umask(question.pid))


def _umask(pid: int) -> int:
    """Return a process's umask (proc(5), Linux 4.7)."""
    descriptor = os.open(b"%d/status" % pid, os.O_RDONLY | os.O_CLOEXEC)
    try:
        data = os.read(descriptor, 512)
    finally:
        os.close(descriptor)
    at = data.index(b"Umask:") + 6
    return int(data[at : data.index(b"\n", at)], 8)


def _keep(supervisor: Supervisor, question: Question, place: _Place) -> None:
    """Record the owner of what was just made."""
    descriptor = os.open(place.name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        name = f"self/fd/{descriptor}"
        _record(supervisor, question, name, os.stat(name), place.uid, place.gid)
    finally:
        os.close(descriptor)


def _make(
    supervisor: Supervisor, question: Question, folder: int, path: bytes, make: Callable[[_Place], None]
) -> int | None:
    place = _place(supervisor, question, folder, path)
    if place is None:
        return None
    try:
        make(place)
        _keep(supervisor, question, place)
    finally:
        os.close(place.folder)
    return 0


def _open(supervisor: Supervisor, question: Question, folder: int, path: bytes, flags: int, mode: int) -> int | None:
    if not path:
        return None
    if flags & _O_TMPFILE:
        path += b"/new"  # the path is the folder: any name in it
    place = _place(supervisor, question, folder, path)
    if place is None:
        return None
    cloexec, flags = bool(flags & os.O_CLOEXEC), flags & ~os.O_CLOEXEC
    mode &= ~place.umask & 0o7777
    try:
        if flags & _O_TMPFILE:
            found = os.open(f"self/fd/{place.folder}", flags, mode)
        else:
            found = os.open(place.base, flags | os.O_EXCL | os.O_CREAT, mode, dir_fd=place.folder)
    except FileExistsError:
        return -_EEXIST if flags & os.O_EXCL else None
    finally:
        os.close(place.folder)
    try:
        name = f"self/fd/{found}"
        _record(supervisor, question, name, os.fstat(found), place.uid, place.gid)
        supervisor.listener.answer_with_file(question.notification, found, close_on_exec=cloexec)
    finally:
        os.close(found)
    return ANSWERED


def open_(supervisor: Supervisor, question: Question) -> int | None:
    """open(path, flags, mode), with O_CREAT."""
    path = supervisor.string(question, 0)
    return _open(supervisor, question, AT_FDCWD, path, question.signed(1), question.signed(2))


def creat(supervisor: Supervisor, question: Question) -> int | None:
    """creat(path, mode)."""
    flags = os.O_CREAT | os.O_WRONLY | os.O_TRUNC
    return _open(supervisor, question, AT_FDCWD, supervisor.string(question, 0), flags, question.signed(1))


def openat(supervisor: Supervisor, question: Question) -> int | None:
    """openat(folder, path, flags, mode), with O_CREAT."""
    path = supervisor.string(question, 1)
    return _open(supervisor, question, question.signed(0), path, question.signed(2), question.signed(3))


def openat2(supervisor: Supervisor, question: Question) -> int | None:
    """openat2(folder, path, how, size)."""
    if question.arguments[3] < 24:
        return None
    how = remote.read(question.pid, question.arguments[2], 24)
    flags, mode, resolve = struct.unpack(question.architecture.order + "QQQ", how)
    if not flags & (os.O_CREAT | _O_TMPFILE) or resolve:  # a walk with rules of its own is the kernel's
        return None
    path = supervisor.string(question, 1)
    return _open(supervisor, question, question.signed(0), path, flags & 0x7FFFFFFF, mode & 0o7777)


def _mkdir(supervisor: Supervisor, question: Question, folder: int, path: bytes, mode: int) -> int | None:
    def make(place: _Place) -> None:
        os.mkdir(place.base, mode & ~place.umask & 0o1777, dir_fd=place.folder)

    return _make(supervisor, question, folder, path, make)


def mkdir(supervisor: Supervisor, question: Question) -> int | None:
    """mkdir(path, mode)."""
    return _mkdir(supervisor, question, AT_FDCWD, supervisor.string(question, 0), question.signed(1))


def mkdirat(supervisor: Supervisor, question: Question) -> int | None:
    """mkdirat(folder, path, mode)."""
    return _mkdir(supervisor, question, question.signed(0), supervisor.string(question, 1), question.signed(2))


def _symlink(supervisor: Supervisor, question: Question, target: bytes, folder: int, path: bytes) -> int | None:
    def make(place: _Place) -> None:
        os.symlink(target, place.base, dir_fd=place.folder)

    return _make(supervisor, question, folder, path, make) if target else None


def symlink(supervisor: Supervisor, question: Question) -> int | None:
    """symlink(target, path)."""
    target, path = supervisor.string(question, 0), supervisor.string(question, 1)
    return _symlink(supervisor, question, target, AT_FDCWD, path)


def symlinkat(supervisor: Supervisor, question: Question) -> int | None:
    """symlinkat(target, folder, path)."""
    target, path = supervisor.string(question, 0), supervisor.string(question, 2)
    return _symlink(supervisor, question, target, question.signed(1), path)


def _mknod(supervisor: Supervisor, question: Question, folder: int, path: bytes, mode: int, device: int) -> int | None:
    if not stat.S_ISCHR(mode) and not stat.S_ISBLK(mode):

        def make(place: _Place) -> None:
            os.mknod(place.base, mode & ~place.umask, dir_fd=place.folder)

        return _make(supervisor, question, folder, path, make)
    if not supervisor.credentials(question).may_mknod():
        return -_EPERM
    place = _place(supervisor, question, folder, path, always=True)
    if place is None:
        return None
    try:
        # The kernel's number in the call and Python's device numbers are the same encoding up to 20 bits of minor.
        supervisor.owners.mknod(place.name, mode & ~place.umask, device)
        if isinstance(supervisor.owners, RecordedOwners):
            _keep(supervisor, question, place)
    finally:
        os.close(place.folder)
    return 0


def mknod(supervisor: Supervisor, question: Question) -> int | None:
    """mknod(path, mode, device)."""
    path = supervisor.string(question, 0)
    return _mknod(supervisor, question, AT_FDCWD, path, question.signed(1), question.arguments[2] & 0xFFFFFFFF)


def mknodat(supervisor: Supervisor, question: Question) -> int | None:
    """mknodat(folder, path, mode, device)."""
    path = supervisor.string(question, 1)
    device = question.arguments[3] & 0xFFFFFFFF
    return _mknod(supervisor, question, question.signed(0), path, question.signed(2), device)


# ---- attributes and programs -----------------------------------------------------------------------------------------


def _setxattr(supervisor: Supervisor, question: Question, folder: int, path: bytes, follow: bool) -> int | None:
    attribute = supervisor.string(question, 1)
    if attribute != CAPABILITY and not attribute.startswith(b"system.posix_acl_"):
        return None
    size = question.arguments[3]
    if size > remote.PATH_MAX:
        return None
    value = remote.read(question.pid, question.arguments[2], size)
    descriptor = supervisor.open(question, folder, path, follow=follow)
    name = f"self/fd/{descriptor}"
    try:
        os.setxattr(name, attribute, value, question.signed(4))
    except OSError as error:
        if attribute == CAPABILITY and error.errno in (_EPERM, _EOPNOTSUPP):
            os.setxattr(name, CAPABILITY_XATTR, value)  # a file system that keeps no security attributes
        elif attribute != CAPABILITY and error.errno == _EINVAL:
            # An access list that names users whom this namespace has not. An image has no access lists anyway.
            return 0
        else:
            raise
    finally:
        os.close(descriptor)
    return 0


def setxattr(supervisor: Supervisor, question: Question) -> int | None:
    """setxattr(path, name, value, size, flags)."""
    return _setxattr(supervisor, question, AT_FDCWD, _path(supervisor, question, 0), True)


def lsetxattr(supervisor: Supervisor, question: Question) -> int | None:
    """lsetxattr(path, name, value, size, flags)."""
    return _setxattr(supervisor, question, AT_FDCWD, _path(supervisor, question, 0), False)


def fsetxattr(supervisor: Supervisor, question: Question) -> int | None:
    """fsetxattr(fd, name, value, size, flags)."""
    return _setxattr(supervisor, question, question.signed(0), b"", True)


def _execute(supervisor: Supervisor, question: Question, folder: int, path: bytes) -> int | None:
    if not supervisor.anybody_changed:
        return None
    now = supervisor.credentials(question)
    if now is FIRST or supervisor.foreign(question):
        return None
    name = supervisor.name(question, folder, path)
    try:
        status = os.stat(name)
        found = _find(supervisor, name, status, True)
    except OSError:
        return None
    if not stat.S_ISREG(status.st_mode) or not status.st_mode & 0o111:
        return None
    owner = _owner(found, status)
    gives_user = status.st_mode & stat.S_ISUID
    gives_group = status.st_mode & stat.S_ISGID and status.st_mode & stat.S_IXGRP
    new = now.execute(owner[0] if gives_user else -1, owner[1] if gives_group else -1)
    if new != now:
        supervisor.become(question, new)
    return None


def execve(supervisor: Supervisor, question: Question) -> int | None:
    """execve(path, …): set-user-id programs, for those who have become somebody else."""
    return _execute(supervisor, question, AT_FDCWD, supervisor.string(question, 0))


def execveat(supervisor: Supervisor, question: Question) -> int | None:
    """execveat(folder, path, …)."""
    return _execute(supervisor, question, question.signed(0), supervisor.string(question, 1))


HANDLERS: dict[str, Handler] = {
    "chown": chown,
    "lchown": lchown,
    "fchown": fchown,
    "fchownat": fchownat,
    "stat": stat_,
    "lstat": lstat,
    "fstat": fstat,
    "newfstatat": fstatat,
    "stat64": stat_,
    "lstat64": lstat,
    "fstat64": fstat,
    "fstatat64": fstatat,
    "statx": statx_,
    "open": open_,
    "creat": creat,
    "openat": openat,
    "openat2": openat2,
    "mkdir": mkdir,
    "mkdirat": mkdirat,
    "symlink": symlink,
    "symlinkat": symlinkat,
    "mknod": mknod,
    "mknodat": mknodat,
    "setxattr": setxattr,
    "lsetxattr": lsetxattr,
    "fsetxattr": fsetxattr,
    "execve": execve,
    "execveat": execveat,
}
