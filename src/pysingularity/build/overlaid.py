# SPDX-License-Identifier: Apache-2.0
"""A root laid over a snapshot: the kept files stay where they are, and a folder takes what programs change.

The snapshot is mounted by our own server in a mount namespace of the worker's, so nothing is left mounted when that one
ends, however it ends. What an overlay over it would not treat as a plain folder does is put into the upper folder right
away: files with several names (changing one would part it from the others), devices, and files with capabilities or
owners that the kernel could not copy up. Where an overlay is not to be had, or too much would have to be put there,
the caller unpacks.

One thing stays different: a folder of the snapshot cannot be renamed, only copied (EXDEV, kernel's overlayfs.rst); mv
and most installers copy by themselves then, for the others see `frame`.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from typing import TYPE_CHECKING

from pysingularity import messages
from pysingularity.errors import HostError
from pysingularity.image.mount import serve_image
from pysingularity.image.output import remove_tree
from pysingularity.linux.mounts import MS_REC, MS_SLAVE, mount, unmount
from pysingularity.linux.namespaces import NEWNS, unshare
from pysingularity.linux.ownership import RealOwners
from pysingularity.squashfs.unpack import unpack

if TYPE_CHECKING:
    from pysingularity.build.bootstrap import Owners
    from pysingularity.image.pieces import Pieces
    from pysingularity.squashfs.node import Node

#: What may be put into the upper folder at once; with more of it unpacking everything is as quick.
MOST_FILES, MOST_BYTES = 20000, 256 << 20
#: Names of attributes that mean something to an overlay, or that it cannot copy.
_STRANGE = (b"user.overlay.", b"trusted.")
_DETACHED = 107  # ENOTCONN


def lay_over(image: Pieces, tree: Node, root: str, owners: Owners) -> str | None:
    """Lay an empty folder over a snapshot, to be changed as if it had been unpacked there.

    Arguments:
        image: the snapshot.
        tree: its tree (`squashfs.writer.Taken`).
        root: the folder. Three more are made beside it, with its name and an ending.
        owners: how owners are kept; only the kernel's own can be shown by an overlay.

    Returns:
        the folder with what is changed, or None: nothing has been done.

    Raises:
        OSError: the disk is full.
    """
    if not isinstance(owners, RealOwners) or not (owners.mapped or _reach("uid") == 1 << 32):
        return None
    special = _special(tree, min(_reach("uid"), _reach("gid")))
    if special is None:
        messages.verbose("the kept step has too much that an overlay treats differently: it is unpacked")
        return None
    lower, upper, work = (f"{root}.{name}" for name in ("lower", "upper", "work"))
    try:
        with contextlib.ExitStack() as stack:
            for path in (lower, upper, work):
                os.mkdir(path, 0o755)
                stack.callback(remove_tree, path)
            # The server must not be in the namespace of its own mount: it would never end.
            server = serve_image(image.reader, image.files, (os.getuid(), os.getgid()), squash=False)
            stack.callback(unmount_quietly, lower)
            try:
                unshare(NEWNS)
                mount(None, "/", None, MS_REC | MS_SLAVE)
                server.mount(lower)
            finally:
                server.close()
            unpack(image.reader, upper, owner=owners, only=special)
            os.chmod(upper, stat.S_IMODE(os.stat(upper).st_mode) | 0o700)
            _mount_overlay(lower, upper, work, root)
            stack.pop_all()
    except HostError as error:
        messages.verbose(f"no overlay over the kept step, it is unpacked: {error.message}")
        return None
    except OSError as error:
        if error.errno in (28, 122):  # ENOSPC, EDQUOT
            raise
        messages.verbose(f"no overlay over the kept step, it is unpacked: {error.strerror}")
        return None
    return upper


def take_off(root: str) -> None:
    """Undo `lay_over`, and forget what was changed: the folder is empty again."""
    unmount(root)
    unmount(f"{root}.lower")
    for name in ("lower", "upper", "work"):
        remove_tree(f"{root}.{name}")


def take_off_below(folder: str) -> None:
    """Unmount whatever this process has mounted below a folder."""
    folder = os.path.realpath(folder)
    with open("/proc/self/mountinfo", "rb") as file:
        points = [line.split(b" ")[4] for line in file]
    for point in reversed(points):
        path = os.fsdecode(re.sub(rb"\\([0-7]{3})", lambda found: bytes([int(found[1], 8)]), point))
        if path.startswith(folder + "/"):
            unmount_quietly(path)


def server_ended(root: str) -> bool:
    """Return whether what a root is laid over can no longer be read: its server was killed."""
    try:
        os.statvfs(f"{root}.lower")  # which nobody answers from memory
    except OSError as error:
        return error.errno == _DETACHED
    return False


def unmount_quietly(path: str) -> None:
    """Unmount something that may not be mounted."""
    with contextlib.suppress(OSError):
        unmount(path)


def _mount_overlay(lower: str, upper: str, work: str, root: str) -> None:
    """Mount the overlay, its notes in attributes of users (Linux 5.11).

    Raises:
        OSError: the kernel or the file system does not let us.
    """
    # Without such attributes the kernel goes on all the same, and cannot tell a new folder from a changed one.
    os.setxattr(work, "user.overlay.opaque", b"y")
    os.removexattr(work, "user.overlay.opaque")
    flags = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
    places = [os.open(path, flags) for path in (lower, upper, work)]  # their paths may hold colons and commas
    try:
        one, two, three = (f"/proc/self/fd/{place}" for place in places)
        mount("overlay", root, "overlay", 0, f"lowerdir={one},upperdir={two},workdir={three},userxattr")
    finally:
        for place in places:
            os.close(place)


def _special(tree: Node, reach: int) -> set[int] | None:
    """Return the inodes that have to lie in the upper folder, None when unpacking everything is better.

    Arguments:
        reach: the first id that the user namespace does not have.
    """
    found: set[int] = set()
    seen: set[int] = set()
    size = 0
    for _, node in tree.walk():
        attributes = node.xattrs or {}
        if any(name.startswith(_STRANGE) for name in attributes):
            return None
        again = node.kind != "dir" and node.ref in seen
        seen.add(node.ref)
        if node.kind in ("char", "block"):
            if not node.rdev:  # what an overlay takes for a file that was removed
                return None
        elif (
            not again
            and node.uid < reach
            and node.gid < reach
            and not any(name.startswith(b"security.") for name in attributes)
        ):
            continue
        if node.ref not in found:
            found.add(node.ref)
            size += node.data.size if node.data is not None else 0
        if len(found) > MOST_FILES or size > MOST_BYTES:
            return None
    return found


def _reach(kind: str) -> int:
    """Return how many ids, from 0 up, this user namespace has."""
    from pysingularity.runtime.rootless import mapped  # with the runtime

    return mapped(f"/proc/self/{kind}_map")
