# SPDX-License-Identifier: Apache-2.0
"""Who owns a file when the process may not say so: owners, groups and device nodes of a tree built without root.

Real root and a range of subordinate ids can give files to others: `RealOwners`. With one id everything belongs to the
user, and what root *would* have done is written down: `RecordedOwners`. The record of a regular file or folder is an
extended attribute of its inode, so it is shared by hard links, follows renames and vanishes with the file. Symbolic
links, pipes and sockets cannot carry user attributes (xattr(7)); they, and everything on a file system without such
attributes, get a line in a side table, keyed by inode number and birth time, so that a number which the file system
gives out a second time is never mistaken for the first.

A device node that may not be made is an empty regular file with a second attribute. Its type and device number are in
the record, its permissions are those of the file, so chmod needs no help.

Records are advice about an image that the user owns anyway; nothing on this machine is ever decided by them.
"""

from __future__ import annotations

import os
import stat

from pysingularity.linux.statx import AT_SYMLINK_NOFOLLOW, BASIC, BTIME, birth, statx

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import TypeVar

    _T = TypeVar("_T")

#: Attribute of a regular file or folder: b"uid:gid".
OWNER_XATTR = b"user.singularity.owner"
#: Attribute of an empty regular file that stands for a device: b"<st_mode in octal>:<rdev>".
NODE_XATTR = b"user.singularity.node"
#: Attribute for file capabilities where the real one is refused: the value of security.capability.
CAPABILITY_XATTR = b"user.singularity.capability"
CAPABILITY = b"security.capability"
#: Name, at the top of a tree, of the side table of a kept sandbox. Never goes into an image.
SIDE_TABLE = ".singularity.owners"

_ENODATA, _EOPNOTSUPP, _EPERM, _EACCES, _EINVAL, _EROFS = 61, 95, 1, 13, 22, 30
_NO_RECORD = (_ENODATA, _EOPNOTSUPP, _EPERM)
#: A table that is longer was not written by us.
_LARGEST_TABLE = 64 << 20


class Record:
    """What is known of one inode beyond what the file system says.

    Arguments:
        uid, gid: the recorded owner; -1 when none is recorded.
        mode: type bits of the device this file stands for, or 0.
        rdev: its device number.
    """

    __slots__ = ("gid", "mode", "rdev", "uid")

    def __init__(self, uid: int = -1, gid: int = -1, mode: int = 0, rdev: int = 0) -> None:
        self.uid, self.gid, self.mode, self.rdev = uid, gid, mode, rdev

    def __repr__(self) -> str:
        return f"Record(uid={self.uid}, gid={self.gid}, mode={self.mode:#o}, rdev={self.rdev:#x})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Record) and repr(self) == repr(other)

    def __hash__(self) -> int:
        return hash(repr(self))


class SideTable:
    """Records of inodes that cannot carry attributes: an append-only file whose last line about an inode counts.

    Without a path it lies in memory, shared by all processes forked after it was made. Appending is one write(2), so
    several processes may do it at once; readers look at what was added since.
    """

    def __init__(self, path: str | None = None) -> None:
        self.path = path
        self._fd = -1
        self._read = 0
        self._records: dict[tuple[int, int], Record] = {}
        self._numbers: set[int] = set()
        if path is None:
            first = os.memfd_create("singularity-owners")
            # Opened once more, because memfd_create itself cannot give a descriptor that appends.
            self._fd = os.open(f"/proc/self/fd/{first}", os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
            os.close(first)
        else:
            self._open(create=False)

    def _open(self, *, create: bool) -> None:
        flags = os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            # The table of a sandbox that may not be written can still be read.
            self._fd = os.open(self.path or "", os.O_RDWR | flags | (os.O_CREAT if create else 0), 0o600)
        except FileNotFoundError:
            return
        except OSError as error:
            if create or error.errno not in (_EACCES, _EPERM, _EROFS):
                raise
            self._fd = os.open(self.path or "", os.O_RDONLY | flags)

    @property
    def descriptor(self) -> int:
        """Return the table's descriptor; a table on disk is made if it was not there yet.

        Whoever changes the root directory, or closes what it does not know, has to ask for it before.
        """
        if self._fd < 0:
            self._open(create=True)
        return self._fd

    def __bool__(self) -> bool:
        """Say whether there may be a record at all: cheap enough to ask before every look-up."""
        self._refresh()
        return bool(self._records)

    def _refresh(self) -> None:
        if self._fd < 0:
            if self.path is not None:
                self._open(create=False)
            if self._fd < 0:
                return
        size = os.fstat(self._fd).st_size
        if size == self._read:
            return
        if size < self._read or size > _LARGEST_TABLE:  # somebody else wrote it: read nothing rather than nonsense
            self._records.clear()
            self._numbers.clear()
            self._read = size
            return
        data = os.pread(self._fd, size - self._read, self._read)
        end = data.rfind(b"\n") + 1
        for line in data[:end].splitlines():
            try:
                number, born, uid, gid, mode, rdev = line.split()
                key = int(number), int(born)
                self._records[key] = Record(int(uid), int(gid), int(mode, 8), int(rdev))
            except ValueError:  # a torn or foreign line says nothing about any inode
                continue
            self._numbers.add(key[0])
        self._read += end

    def find(self, number: int, born: Callable[[], int]) -> Record | None:
        """Return the record of an inode.

        Arguments:
            number: inode number.
            born: returns its birth time; only asked when the number is known.
        """
        self._refresh()
        if number not in self._numbers:
            return None
        return self._records.get((number, born()))

    def add(self, number: int, born: int, record: Record) -> None:
        """Record an inode.

        Raises:
            OSError: the table cannot be written.
        """
        line = b"%d %d %d %d %o %d\n" % (number, born, record.uid, record.gid, record.mode, record.rdev)
        os.write(self.descriptor, line)


def read_owner(name: str | bytes, follow: bool = False) -> Record | None:
    """Return the record in a file's own attributes, or None.

    Raises:
        OSError: the file is not there or may not be read.
    """
    record = None
    try:
        uid, gid = os.getxattr(name, OWNER_XATTR, follow_symlinks=follow).split(b":")
        record = Record(int(uid), int(gid))
    except OSError as error:
        if error.errno not in _NO_RECORD:
            raise
        return None  # a device always has an owner as well: one look is enough for all other files
    except ValueError:  # not ours
        return None
    try:
        mode, rdev = os.getxattr(name, NODE_XATTR, follow_symlinks=follow).split(b":")
        record.mode, record.rdev = stat.S_IFMT(int(mode, 8)), int(rdev)
    except OSError as error:
        if error.errno not in _NO_RECORD:
            raise
    except ValueError:
        record.mode = record.rdev = 0
    if record.mode not in (0, stat.S_IFCHR, stat.S_IFBLK):
        record.mode = record.rdev = 0
    return record


def _name(path: str | bytes, dir_fd: int | None) -> str:
    """Return a name for a path below an open folder: the attribute calls know no descriptors of folders."""
    text = os.fsdecode(path)
    return text if dir_fd is None else f"/proc/self/fd/{dir_fd}/{text}"


def _born(name: str, follow: bool = False) -> int:
    return birth(statx(name, flags=0 if follow else AT_SYMLINK_NOFOLLOW, mask=BASIC | BTIME))


def _with_permission(name: str, status: os.stat_result | None, act: Callable[[], _T]) -> _T:
    """Do something to our own file that its permission bits forbid (0444, 0000), by opening them for a moment."""
    try:
        return act()
    except OSError as error:
        if error.errno != _EACCES:
            raise
        found = status or os.lstat(name)
        if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
            raise
        os.chmod(name, stat.S_IMODE(found.st_mode) | 0o600)
        try:
            return act()
        finally:
            os.chmod(name, stat.S_IMODE(found.st_mode))


class RealOwners:
    """Owners that the kernel keeps: real root, or a namespace with a range of ids.

    Arguments:
        mapped: this is a namespace with a range of ids: device nodes are recorded, for no such namespace may make any,
            and so are owners outside the range.
    """

    def __init__(self, *, mapped: bool = False) -> None:
        self.mapped = mapped

    def set(self, path: str | bytes, uid: int, gid: int, *, dir_fd: int | None = None) -> None:
        """Give a file (a link itself, not its target) to an owner; -1 leaves that half alone.

        Raises:
            OSError: the file is not there, or the file system refuses.
        """
        try:
            os.chown(path, uid, gid, dir_fd=dir_fd, follow_symlinks=False)
        except OSError as error:
            if not self.mapped or error.errno != _EINVAL:
                raise
            _write(_name(path, dir_fd), OWNER_XATTR, b"%d:%d" % (uid, gid))
            return
        if self.mapped and not _is_node(_name(path, dir_fd)):
            _erase(_name(path, dir_fd), OWNER_XATTR)

    def mknod(self, path: str | bytes, mode: int, rdev: int, *, dir_fd: int | None = None) -> None:
        """Make a special file.

        Arguments:
            mode: type and permission bits; the umask has no say.

        Raises:
            OSError: it exists already, or its folder may not be written.
        """
        if not self.mapped or not (stat.S_ISCHR(mode) or stat.S_ISBLK(mode)):
            os.mknod(path, mode, rdev, dir_fd=dir_fd)
            os.chmod(_name(path, dir_fd), stat.S_IMODE(mode))
            return
        _stand_in(path, mode, dir_fd)
        name = _name(path, dir_fd)
        os.setxattr(name, OWNER_XATTR, b"0:0", follow_symlinks=False)
        os.setxattr(name, NODE_XATTR, b"%o:%d" % (mode, rdev), follow_symlinks=False)

    def get(self, path: str | bytes, status: os.stat_result, *, dir_fd: int | None = None) -> tuple[int, int, int, int]:
        """Return (uid, gid, st_mode, rdev) that belong into an image, for a file with this lstat result."""
        found = None
        if self.mapped and stat.S_ISREG(status.st_mode) | stat.S_ISDIR(status.st_mode):
            found = read_owner(_name(path, dir_fd))
        if found is None:
            return status.st_uid, status.st_gid, status.st_mode, status.st_rdev
        if found.mode:
            # Its owner is the stand-in's own, which chown could change at any time after.
            mode = found.mode | stat.S_IMODE(status.st_mode)
            return status.st_uid, status.st_gid, mode, found.rdev
        uid = found.uid if found.uid >= 0 else status.st_uid
        gid = found.gid if found.gid >= 0 else status.st_gid
        return uid, gid, status.st_mode, status.st_rdev


class RecordedOwners:
    """Owners that are written down, because every file belongs to the one id there is.

    A file without a record belongs to root:root when it is the user's own; another user's file keeps what the file
    system says.

    Arguments:
        root: folder of the tree whose side table is kept in a file at its top (`SIDE_TABLE`, made when first needed);
            None keeps it in memory, for this process and those forked from it.
    """

    def __init__(self, root: str | None = None) -> None:
        self.own = {0, os.getuid()}
        self.table = SideTable(None if root is None else os.path.join(root, SIDE_TABLE))

    def at(self, root: str) -> RecordedOwners:
        """Return the same kind of owners with the side table kept inside a tree."""
        return RecordedOwners(root)

    def set(self, path: str | bytes, uid: int, gid: int, *, dir_fd: int | None = None) -> None:
        """Record the owner of a file (of a link itself, not its target); -1 leaves that half alone.

        Raises:
            OSError: the file is not there, or nothing can be written.
        """
        name = _name(path, dir_fd)
        status = os.lstat(name)
        self.record(name, status, uid, gid)

    def record(self, name: str, status: os.stat_result, uid: int, gid: int, *, follow: bool = False) -> None:
        """As `set`, for a name whose status is known; `follow` when the name is a magic link of /proc to the file."""
        old = self.find(name, status, follow=follow)
        if -1 in (uid, gid):
            before = self._owner(old, status)
            uid, gid = before[0] if uid == -1 else uid, before[1] if gid == -1 else gid
        new = Record(uid, gid, old.mode if old else 0, old.rdev if old else 0)
        if old == new or (old is None and uid == gid == 0 and status.st_uid in self.own):
            return
        if stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode):
            try:
                value = b"%d:%d" % (uid, gid)
                _with_permission(name, status, lambda: os.setxattr(name, OWNER_XATTR, value, follow_symlinks=follow))
                return
            except OSError as error:
                if error.errno not in (_EOPNOTSUPP, _EPERM):
                    raise
        self.table.add(status.st_ino, _born(name, follow), new)

    def mknod(self, path: str | bytes, mode: int, rdev: int, *, dir_fd: int | None = None) -> None:
        """Make a special file: pipes and sockets for real, devices as a record.

        Arguments:
            mode: type and permission bits; the umask has no say.

        Raises:
            OSError: it exists already, or its folder may not be written.
        """
        name = _name(path, dir_fd)
        if not (stat.S_ISCHR(mode) or stat.S_ISBLK(mode)):
            os.mknod(path, mode, rdev, dir_fd=dir_fd)
            os.chmod(name, stat.S_IMODE(mode))
            return
        _stand_in(path, mode, dir_fd)
        self.make_node(name, mode, rdev)

    def make_node(self, name: str, mode: int, rdev: int, *, uid: int = 0, gid: int = 0, follow: bool = False) -> None:
        """Turn an empty file into the record of a device."""
        node = b"%o:%d" % (mode, rdev)
        try:
            # The node first: who sees an owner looks for a node, who sees none looks no further.
            _with_permission(name, None, lambda: os.setxattr(name, NODE_XATTR, node, follow_symlinks=follow))
            owner = b"%d:%d" % (uid, gid)
            _with_permission(name, None, lambda: os.setxattr(name, OWNER_XATTR, owner, follow_symlinks=follow))
        except OSError as error:
            if error.errno not in (_EOPNOTSUPP, _EPERM):
                raise
            status = os.stat(name, follow_symlinks=follow)
            record = Record(uid, gid, stat.S_IFMT(mode), rdev)
            self.table.add(status.st_ino, _born(name, follow), record)

    def find(self, name: str, status: os.stat_result, *, follow: bool = False) -> Record | None:
        """Return the record of a file, or None."""
        found = None
        if stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode):
            found = _with_permission(name, status, lambda: read_owner(name, follow))
        if found is None and self.table:
            found = self.table.find(status.st_ino, lambda: _born(name, follow))
        return found

    def _owner(self, found: Record | None, status: os.stat_result) -> tuple[int, int]:
        if found is not None:
            return found.uid, found.gid
        return (0, 0) if status.st_uid in self.own else (status.st_uid, status.st_gid)

    def get(self, path: str | bytes, status: os.stat_result, *, dir_fd: int | None = None) -> tuple[int, int, int, int]:
        """Return (uid, gid, st_mode, rdev) that belong into an image, for a file with this lstat result."""
        found = self.find(_name(path, dir_fd), status)
        mode, rdev = status.st_mode, status.st_rdev
        if found is not None and found.mode:
            mode, rdev = found.mode | stat.S_IMODE(mode), found.rdev
        return *self._owner(found, status), mode, rdev


def strip(xattrs: Mapping[bytes, bytes]) -> dict[bytes, bytes]:
    """Return the attributes of a file as they belong into an image: without our records, with real capabilities.

    File capabilities that a user namespace set carry the id of its owner (version 3, capabilities(7)); seen from
    outside of the namespace they are turned back into the plain version 2 that root would have written.
    """
    ours = (OWNER_XATTR, NODE_XATTR, CAPABILITY_XATTR)
    kept = {name: value for name, value in xattrs.items() if name not in ours}
    if CAPABILITY_XATTR in xattrs:
        kept[CAPABILITY] = xattrs[CAPABILITY_XATTR]
    value = kept.get(CAPABILITY)
    if value is not None and len(value) == 24 and value[3] == 3:
        kept[CAPABILITY] = value[:3] + b"\x02" + value[4:20]
    return kept


def _stand_in(path: str | bytes, mode: int, dir_fd: int | None) -> None:
    """Make the empty file that stands for a device."""
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o600, dir_fd=dir_fd)
    try:
        os.fchmod(descriptor, stat.S_IMODE(mode))
    finally:
        os.close(descriptor)


def _write(name: str, attribute: bytes, value: bytes) -> None:
    _with_permission(name, None, lambda: os.setxattr(name, attribute, value, follow_symlinks=False))


def _is_node(name: str) -> bool:
    try:
        os.getxattr(name, NODE_XATTR, follow_symlinks=False)
    except OSError as error:
        if error.errno not in (*_NO_RECORD, _EACCES):
            raise
        return False
    return True


def _erase(name: str, attribute: bytes) -> None:
    try:
        os.removexattr(name, attribute, follow_symlinks=False)
    except OSError as error:
        if error.errno not in (*_NO_RECORD, _EACCES):
            raise
