# SPDX-License-Identifier: Apache-2.0
"""statx(2): the parts of a file's status that Python's own stat leaves out (birth time, the mount it lies on).

The structure has the same layout on every architecture; the call goes through the C library, which knows its number.
Not for the start ring: needs `ctypes` for a buffer that the kernel may write into.
"""

from __future__ import annotations

import ctypes
import os
import sys

AT_FDCWD, AT_SYMLINK_NOFOLLOW, AT_EMPTY_PATH = -100, 0x100, 0x1000
#: Everything a plain stat returns; birth time (Linux 4.11); mount id (Linux 5.8).
BASIC, BTIME, MNT_ID = 0x7FF, 0x800, 0x1000
SIZE = 256
#: Offsets of fields, for those who answer the call for somebody else.
UID, GID, MODE, INO, RDEV_MAJOR, RDEV_MINOR, DEV_MAJOR, DEV_MINOR = 20, 24, 28, 32, 128, 132, 136, 140
_BTIME, _MNT_ID = 80, 144

_library = ctypes.CDLL(None, use_errno=True)
_statx = getattr(_library, "statx", None)
_Buffer = ctypes.c_char * SIZE


def statx(path: str | bytes, *, flags: int = 0, mask: int = BASIC, dir_fd: int = AT_FDCWD) -> bytes:
    """Return the raw structure for a path, or for `dir_fd` itself with AT_EMPTY_PATH and an empty path.

    Raises:
        OSError: as for stat; ENOSYS where the C library has no statx.
    """
    if _statx is None:
        raise OSError(38, "the C library has no statx")
    buffer = _Buffer()
    if _statx(dir_fd, os.fsencode(path), flags, mask, buffer) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{os.strerror(number)} (statx)", path)
    return buffer.raw


def field32(raw: bytes, offset: int) -> int:
    """Return a 32-bit field."""
    return int.from_bytes(raw[offset : offset + 4], sys.byteorder)


def field64(raw: bytes, offset: int) -> int:
    """Return a 64-bit field."""
    return int.from_bytes(raw[offset : offset + 8], sys.byteorder)


def birth(raw: bytes) -> int:
    """Return the birth time in nanoseconds, or 0 where the file system keeps none."""
    if not field32(raw, 0) & BTIME:
        return 0
    return field64(raw, _BTIME) * 1_000_000_000 + field32(raw, _BTIME + 8)


def mount_id(raw: bytes) -> int:
    """Return the id of the mount the file lies on, or 0 where the kernel does not tell."""
    return field64(raw, _MNT_ID) if field32(raw, 0) & MNT_ID else 0
