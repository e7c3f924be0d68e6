# SPDX-License-Identifier: Apache-2.0
"""Namespaces: making and joining them, and the id maps of a user namespace (user_namespaces(7)). Start ring."""

from __future__ import annotations

import posix

from pysingularity.linux.libc import call

NEWNS, NEWCGROUP, NEWUTS, NEWIPC = 0x20000, 0x2000000, 0x4000000, 0x8000000
NEWUSER, NEWPID, NEWNET = 0x10000000, 0x20000000, 0x40000000

#: Name below /proc/PID/ns → flag, in the order in which a process has to join them (user first: it gives the rights).
FLAGS = {"user": NEWUSER, "mnt": NEWNS, "ipc": NEWIPC, "uts": NEWUTS, "net": NEWNET, "cgroup": NEWCGROUP, "pid": NEWPID}


def unshare(flags: int) -> None:
    """Leave the namespaces in `flags` for new ones: unshare(2). A new pid namespace holds for children only."""
    call("unshare", flags)


def setns(descriptor: int, flag: int = 0) -> None:
    """Join the namespace of an open /proc/PID/ns file: setns(2)."""
    call("setns", descriptor, flag)


def map_self(inside_uid: int, inside_gid: int, outside_uid: int, outside_gid: int) -> None:
    """Map one user and one group into this process's new user namespace.

    The process may write these maps itself, without a helper, when it gives up setgroups first.
    """
    _write("/proc/self/setgroups", b"deny")
    _write("/proc/self/uid_map", b"%d %d 1" % (inside_uid, outside_uid))
    _write("/proc/self/gid_map", b"%d %d 1" % (inside_gid, outside_gid))


def sethostname(name: str) -> None:
    """Set the host name of this uts namespace: sethostname(2)."""
    data = name.encode()
    call("sethostname", data, len(data))


def _write(path: str, data: bytes) -> None:
    descriptor = posix.open(path, posix.O_WRONLY | posix.O_CLOEXEC)
    try:
        posix.write(descriptor, data)
    finally:
        posix.close(descriptor)
