# SPDX-License-Identifier: Apache-2.0
"""Mounts: the kernel calls, one function each, and paths resolved inside a root only.

What to mount is decided in `runtime.prepare`; this module only asks the kernel. Every function raises OSError naming
the call and the path. Bind mounts use descriptors (open_tree, move_mount: mount_setattr(2), open_tree(2)), because a
path inside a hostile image may be a symbolic link that leads out of it; `open_in_root` resolves with the image as root.
Start ring.
"""

from __future__ import annotations

import posix

from pysingularity.linux.libc import (
    NR_MOUNT_SETATTR,
    NR_MOVE_MOUNT,
    NR_OPEN_TREE,
    NR_OPENAT2,
    NR_PIVOT_ROOT,
    call,
    encode,
    syscall,
)

# mount(2)
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_REMOUNT, MS_BIND, MS_REC = 32, 4096, 16384
MS_PRIVATE, MS_SLAVE, MS_STRICTATIME = 1 << 18, 1 << 19, 1 << 24
MNT_DETACH = 2
# mount_setattr(2)
ATTR_RDONLY, ATTR_NOSUID, ATTR_NODEV, ATTR_NOEXEC = 1, 2, 4, 8
AT_FDCWD, AT_EMPTY_PATH, AT_RECURSIVE = -100, 0x1000, 0x8000
OPEN_TREE_CLONE = 1
MOVE_FROM_EMPTY, MOVE_TO_EMPTY = 0x4, 0x40
# openat2(2)
RESOLVE_NO_MAGICLINKS, RESOLVE_IN_ROOT = 0x02, 0x10
O_PATH = posix.O_PATH
O_CLOEXEC, O_NOFOLLOW, O_DIRECTORY = posix.O_CLOEXEC, posix.O_NOFOLLOW, posix.O_DIRECTORY

_EAGAIN = 11


def mount(
    source: str | bytes | None,
    target: str | bytes,
    kind: str | None = None,
    flags: int = 0,
    data: str | bytes | None = None,
) -> None:
    """Mount a file system, or change a mount: mount(2)."""
    call("mount", encode(source), encode(target), encode(kind), flags, encode(data), path=target)


def unmount(target: str | bytes, flags: int = MNT_DETACH) -> None:
    """Take a mount away: umount2(2)."""
    call("umount2", encode(target), flags, path=target)


def pivot_root(new: str | bytes, old: str | bytes) -> None:
    """Make `new` the root of this mount namespace and put the former root on `old`: pivot_root(2)."""
    syscall(NR_PIVOT_ROOT, encode(new), encode(old), name="pivot_root", path=new)


def open_tree(path: str | bytes, *, directory: int = AT_FDCWD, recursive: bool = True) -> int:
    """Return a descriptor of a detached copy of the mounts at `path`: open_tree(2), Linux 5.2."""
    flags = OPEN_TREE_CLONE | O_CLOEXEC | (AT_RECURSIVE if recursive else 0) | (0 if path else AT_EMPTY_PATH)
    return syscall(NR_OPEN_TREE, directory, encode(path), flags, name="open_tree", path=path)


def move_mount(tree: int, target: int) -> None:
    """Attach the detached mounts `tree` on the file or folder that the descriptor `target` names: move_mount(2)."""
    syscall(NR_MOVE_MOUNT, tree, b"", target, b"", MOVE_FROM_EMPTY | MOVE_TO_EMPTY, name="move_mount")


def set_attributes(tree: int, attributes: int, *, recursive: bool = True) -> None:
    """Add attributes (ATTR_*) to the mounts of a descriptor: mount_setattr(2), Linux 5.12; none is ever taken away."""
    structure = attributes.to_bytes(8, "little") + bytes(24)
    flags = AT_EMPTY_PATH | (AT_RECURSIVE if recursive else 0)
    syscall(NR_MOUNT_SETATTR, tree, b"", flags, structure, len(structure), name="mount_setattr")


def remount_bind(target: int, attributes: int) -> None:
    """Add attributes to one bind mount on kernels without mount_setattr; keeps the flags that are locked on it.

    Arguments:
        target: a descriptor of the mounted file or folder (opened after it was mounted).
    """
    path = f"/proc/self/fd/{target}"
    # A remount that would drop a flag of the source's mount is refused in a user namespace (mount_namespaces(7)).
    present = posix.statvfs(path).f_flag & (MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC)
    mount(None, path, None, MS_REMOUNT | MS_BIND | present | attributes)


def open_in_root(root: int, path: str | bytes, flags: int = O_PATH, mode: int = 0) -> int:
    """Open a path with the folder `root` as the root: absolute and `..` links stay inside: openat2(2), Linux 5.6.

    Raises:
        OSError: as open(2); nothing outside `root` is ever touched.
    """
    how = (flags | O_CLOEXEC).to_bytes(8, "little") + mode.to_bytes(8, "little") + RESOLVE_IN_ROOT.to_bytes(8, "little")
    for _ in range(64):
        try:
            return syscall(NR_OPENAT2, root, encode(path) or b".", how, len(how), name="openat2", path=path)
        except OSError as error:
            # A rename or mount anywhere on the machine during the walk over ".." makes the kernel ask for a retry.
            if error.errno != _EAGAIN:
                raise
    raise OSError(_EAGAIN, f"{posix.strerror(_EAGAIN)} (openat2)", path)
