# SPDX-License-Identifier: Apache-2.0
"""Looking into another process: its memory, its descriptors. Needs the right to trace it (ptrace(2)).

Not for the start ring: needs `ctypes`.
"""

from __future__ import annotations

import ctypes
import os
import struct

from pysingularity.linux.libc import NR_OPENAT2, NR_PIDFD_GETFD, syscall
from pysingularity.linux.process import pidfd_open

#: Longest path the kernel takes, with its final zero byte (linux/limits.h).
PATH_MAX = 4096
_PAGE = os.sysconf("SC_PAGESIZE")
_EFAULT, _ENAMETOOLONG, _EAGAIN = 14, 36, 11
_RESOLVE_NO_MAGICLINKS = 2

_library = ctypes.CDLL(None, use_errno=True)
_readv = _library.process_vm_readv
_readv.restype = ctypes.c_ssize_t
_readv.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_ulong)
_local = ctypes.create_string_buffer(PATH_MAX + 1)
_here = ctypes.create_string_buffer(struct.pack("@PN", ctypes.addressof(_local), PATH_MAX), 16)
_there = ctypes.create_string_buffer(32)
_SPANS = struct.Struct("@PNPN")
_here_at, _there_at = ctypes.addressof(_here), ctypes.addressof(_there)
#: Most strings are shorter: the rest is only fetched for longer ones.
_FIRST = 256


def read_string(pid: int, address: int) -> bytes:
    """Return the zero-terminated string at an address of a process: process_vm_readv(2).

    Not for several threads at once: the buffer is kept.

    Raises:
        OSError: EFAULT for a bad address, ENAMETOOLONG without a zero byte in 4096, ESRCH, EPERM.
    """
    # A string may end right before a page that is not mapped: what lies on the next page is a piece of its own, which
    # the kernel leaves out when it cannot be read.
    for size in (_FIRST, PATH_MAX):
        left = min(size, _PAGE - address % _PAGE)
        _SPANS.pack_into(_there, 0, address, left, address + left, size - left)
        count = _readv(pid, _here_at, 1, _there_at, 2 if size > left else 1, 0)
        if count < 0:
            number = ctypes.get_errno()
            raise OSError(number, f"{os.strerror(number)} (process_vm_readv)")
        value = _local.value
        if len(value) < count:
            return value
        if count < size:
            raise OSError(_EFAULT, "string runs into unmapped memory")
    raise OSError(_ENAMETOOLONG, "string without end")


def read(pid: int, address: int, size: int) -> bytes:
    """Return bytes of a process's memory, at most 4096.

    Raises:
        OSError: EFAULT when not all of it can be read; ESRCH, EPERM.
    """
    _SPANS.pack_into(_there, 0, address, size, 0, 0)
    count = _readv(pid, _here_at, 1, _there_at, 1, 0)
    if count < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{os.strerror(number)} (process_vm_readv)")
    if count < size:
        raise OSError(_EFAULT, "unmapped memory")
    return _local.raw[:size]


def copy_descriptor(pid: int, descriptor: int) -> int:
    """Return a copy of another process's descriptor: pidfd_getfd(2), Linux 5.6.

    Raises:
        OSError: there is no such process or descriptor, or it may not be traced.
    """
    process = pidfd_open(pid)
    try:
        return syscall(NR_PIDFD_GETFD, process, descriptor, 0, name="pidfd_getfd")
    finally:
        os.close(process)


def open_without_magic(folder: int, path: bytes, flags: int) -> int:
    """Open a path without walking through the links of /proc that lead to a process's own files: openat2(2).

    Raises:
        OSError: as open(2); ELOOP where such a link was met.
    """
    how = struct.pack("=QQQ", flags | os.O_CLOEXEC, 0, _RESOLVE_NO_MAGICLINKS)
    for _ in range(64):
        try:
            return syscall(NR_OPENAT2, folder, path, how, len(how), name="openat2", path=path)
        except OSError as error:
            if error.errno != _EAGAIN:  # something was renamed during the walk: the kernel asks for a retry
                raise
    raise OSError(_EAGAIN, f"{os.strerror(_EAGAIN)} (openat2)", path)
