# SPDX-License-Identifier: Apache-2.0
"""FUSE: the device, the mount, and the layout of the messages (linux/fuse.h, protocol 7.31). No file system in here.

A server reads requests from the descriptor of /dev/fuse and writes answers to it. The descriptor must be opened inside
the user namespace that later mounts it, or mount(2) says EINVAL. Before it is mounted a read says EPERM: a server has
to wait for the mount. Start ring.
"""

from __future__ import annotations

import posix
from _struct import Struct

from pysingularity.linux.mounts import MS_NODEV, MS_NOSUID, MS_RDONLY, mount

DEVICE = "/dev/fuse"
ROOT_NODE = 1

# Requests (enum fuse_opcode)
LOOKUP, FORGET, GETATTR, READLINK, OPEN, READ, STATFS = 1, 2, 3, 5, 14, 15, 17
RELEASE, FSYNC, GETXATTR, LISTXATTR, FLUSH, INIT, OPENDIR = 18, 20, 22, 23, 25, 26, 27
READDIR, RELEASEDIR, FSYNCDIR, ACCESS, INTERRUPT, DESTROY = 28, 29, 30, 34, 36, 38
BATCH_FORGET, READDIRPLUS, LSEEK = 42, 44, 46

# Capabilities agreed in INIT
ASYNC_READ, EXPORT_SUPPORT, BIG_WRITES, DONT_MASK = 1 << 0, 1 << 4, 1 << 5, 1 << 6
DO_READDIRPLUS, READDIRPLUS_AUTO, ASYNC_DIO = 1 << 13, 1 << 14, 1 << 15
NO_OPEN_SUPPORT, PARALLEL_DIROPS, MAX_PAGES = 1 << 17, 1 << 18, 1 << 22
CACHE_SYMLINKS, NO_OPENDIR_SUPPORT = 1 << 23, 1 << 24

#: fuse_in_header: len, opcode, unique, nodeid, uid, gid, pid, padding
IN_HEADER = Struct("<IIQQIIII")
#: fuse_out_header: len, error, unique
OUT_HEADER = Struct("<IiQ")
#: fuse_entry_out without the attributes: nodeid, generation, entry_valid, attr_valid, entry_nsec, attr_nsec
ENTRY = Struct("<QQQQII")
#: fuse_attr_out without the attributes: attr_valid, attr_valid_nsec, dummy
ATTR_OUT = Struct("<QII")
#: fuse_attr: ino, size, blocks, atime, mtime, ctime, three nsec, mode, nlink, uid, gid, rdev, blksize, flags
ATTR = Struct("<6Q10I")
#: fuse_read_in: fh, offset, size, …
READ_IN = Struct("<QQI")
#: fuse_dirent: ino, off, namelen, type
DIRENT = Struct("<QQII")
#: fuse_direntplus: the three above in one, in front of the name
DIRENT_PLUS = Struct("<QQQQII6Q10IQQII")
#: fuse_getxattr_in: size, padding; fuse_getxattr_out is the same
XATTR = Struct("<II")
#: fuse_init_in (first part): major, minor, max_readahead, flags
INIT_IN = Struct("<IIII")
#: fuse_init_out: major, minor, max_readahead, flags, max_background, congestion_threshold, max_write, time_gran,
#: max_pages, map_alignment, flags2, unused
INIT_OUT = Struct("<IIIIHHIIHHI28x")
#: fuse_kstatfs: blocks, bfree, bavail, files, ffree, bsize, namelen, frsize, padding, spare
STATFS_OUT = Struct("<5Q4I24x")


def usable() -> bool:
    """Return whether this user may serve a file system."""
    return posix.access(DEVICE, posix.R_OK | posix.W_OK)


def open_device() -> int:
    """Return a descriptor of /dev/fuse; call it inside the user namespace that mounts it.

    Raises:
        OSError: the device is missing, or closed to this user.
    """
    return posix.open(DEVICE, posix.O_RDWR | posix.O_CLOEXEC)


def mount_device(descriptor: int, target: str, *, kind: str, uid: int, gid: int, flags: int = MS_RDONLY) -> None:
    """Mount the file system that a server answers for through `descriptor`.

    Arguments:
        kind: the subtype shown in /proc/mounts behind "fuse.".
        uid, gid: the mounting user, as seen in this user namespace.
    """
    data = f"fd={descriptor},rootmode=40000,user_id={uid},group_id={gid},allow_other"
    mount(kind, target, f"fuse.{kind}", flags | MS_NOSUID | MS_NODEV, data)
