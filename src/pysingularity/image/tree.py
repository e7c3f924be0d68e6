# SPDX-License-Identifier: Apache-2.0
"""A folder becomes a tree of nodes, and the nodes' files go into a squashfs.

`scan_directory` looks at every entry once (owners, times, attributes, hard links), `store_tree` reads the files in the
order of the tree. Both walk with one descriptor per folder, so that paths of any length work and links lead nowhere.
What is changed in the tree between the two (files put in or taken out) is `image.entries`; making a SIF file of it is
`image.convert`.
"""

from __future__ import annotations

import errno
import os
import stat

from pysingularity.errors import UserError
from pysingularity.linux.ownership import OWNER_XATTR, SIDE_TABLE, RecordedOwners, strip
from pysingularity.squashfs.node import Node

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator
    from typing import Protocol

    from pysingularity.squashfs.writer import SquashfsWriter

    class Owners(Protocol):
        """How owners and devices were recorded (linux.ownership)."""

        def get(self, path: str, status: os.stat_result, *, dir_fd: int | None = None) -> tuple[int, int, int, int]:
            """Return uid, gid, mode with the kind of file, and device number."""


KINDS = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "dir",
    stat.S_IFLNK: "symlink",
    stat.S_IFCHR: "char",
    stat.S_IFBLK: "block",
    stat.S_IFIFO: "fifo",
}
#: What squashfs can keep of extended attributes.
KEPT_XATTRS = ("user.", "security.", "trusted.")
#: What belongs to this machine or to overlayfs, and not to the content of an image.
DROPPED_XATTRS = (
    "user.overlay.",
    "trusted.overlay.",
    "security.selinux",
    "security.ima",
    "security.evm",
    "user.containers.override_stat",
)
#: Files up to this size are read at once.
SMALL = 131072
DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
LAST_TIME = 0xFFFFFFFF
OWNER = OWNER_XATTR.decode()
#: What a sandbox was when it was made (`build.history`): of the sandbox, not of images made of it.
RECORD = ".singularity.record"


#: `Node.source` of what an overlay's upper folder has in place of a file of a lower one (kernel's overlayfs.rst): it is
#: gone; and of folders of which nothing below is to be seen.
WHITEOUT, OPAQUE = "whiteout", "opaque"


class Unread:
    """`Node.source` of a file that is still to be read.

    Attributes:
        size: its size in bytes when it was scanned.
        mark: what any change of it changes: inode, size, times of change in nanoseconds.
    """

    __slots__ = ("mark", "size")

    def __init__(self, status: os.stat_result) -> None:
        self.size = status.st_size
        self.mark = (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def scan_directory(
    path: str,
    *,
    owners: Owners | None = None,
    exclude: Collection[str] = (),
    latest: int | None = None,
    say: Callable[[str], None] | None = None,
    upper: bool = False,
) -> Node:
    """Return the tree of a folder.

    Arguments:
        path: the folder. Its path is kept as the `source` of the root node.
        owners: tells the owner, mode and device of each entry. None: what the file system says when we are root, and
            otherwise what a build of ours recorded, and root:root for everything else, as is usual for images made by
            ordinary users.
        exclude: paths inside the folder, without leading slash, that are left out with all below.
        latest: later modification times become this one (Unix seconds).
        say: called with a line about each entry that cannot be kept (sockets).
        upper: it is the upper folder of an overlay with `userxattr`: its marks are kept for `lay_upper`.

    Raises:
        UserError: a folder may not be read.
    """
    scan = _Scan(owners, {os.fsencode(name) for name in exclude}, LAST_TIME if latest is None else latest, say)
    scan.upper = upper
    return scan.run(path)


class _Scan:
    """One walk over a folder; the state that is shared between its parts."""

    def __init__(
        self, owners: Owners | None, exclude: set[bytes], latest: int, say: Callable[[str], None] | None
    ) -> None:
        self.owners, self.exclude, self.latest, self.say = owners, exclude, latest, say
        self.real = os.geteuid() == 0
        self.links: dict[tuple[int, int], Node] = {}
        self.without_xattrs: set[int] = set()
        self.recorded = RecordedOwners()
        self.upper = False

    def run(self, path: str) -> Node:
        _allow_many_files()
        if not self.real and os.path.exists(os.path.join(path, SIDE_TABLE)):
            self.recorded = RecordedOwners(path)
        self.exclude |= {os.fsencode(SIDE_TABLE), os.fsencode(RECORD)}
        top = Folder(path)
        root = self.node(top.status, ".", top.fd)
        if root is None:  # the record says that this folder is a device
            top.close()
            raise UserError("unreadable-folder", f"{path}: not a folder")
        root.source = path
        frames: list[tuple[Folder, bytes, list[tuple[str, Node]]]] = []
        try:
            frames.append((top, b"", []))
            frames[-1][2].extend(self.fill(root, top.fd, b""))
            while frames:
                folder, prefix, folders = frames[-1]
                if not folders:
                    frames.pop()
                    folder.close()
                    continue
                name, node = folders.pop()
                fd, below = folder.fd, prefix + os.fsencode(name)
                folder = Folder(name, fd, os.path.join(path, os.fsdecode(below)))
                frames.append((folder, below + b"/", []))
                frames[-1][2].extend(self.fill(node, folder.fd, below + b"/"))
        finally:
            for folder, _, _ in reversed(frames):
                folder.close()
        return root

    def fill(self, folder: Node, fd: int, prefix: bytes) -> list[tuple[str, Node]]:
        """Put the entries of an open folder into its node; return the folders among them."""
        folders = []
        children = folder.children
        if children is None:
            return []
        links, exclude = self.links, self.exclude
        with os.scandir(fd) as entries:
            for entry in entries:
                name = os.fsencode(entry.name)
                if exclude and prefix + name in exclude:
                    continue
                status = entry.stat(follow_symlinks=False)
                if self.upper and stat.S_ISCHR(status.st_mode) and not status.st_rdev:
                    children[name] = Node("char", source=WHITEOUT)
                    continue
                key = None
                if status.st_nlink > 1 and not stat.S_ISDIR(status.st_mode):
                    key = status.st_dev, status.st_ino
                    known = links.get(key)
                    if known is not None:
                        children[name] = known
                        continue
                node = self.node(status, entry.name, fd)
                if node is None:
                    if self.say is not None:
                        self.say(f"/{os.fsdecode(prefix + name)}: a socket is left out")
                    if self.upper:  # what it took the place of is not there either
                        children[name] = Node("char", source=WHITEOUT)
                    continue
                if node.kind == "dir":
                    folders.append((entry.name, node))
                elif key is not None:
                    links[key] = node
                children[name] = node
        return folders

    def node(self, status: os.stat_result, name: str, fd: int) -> Node | None:
        """Return the node of one entry, None for kinds that an image cannot hold."""
        mode, rdev = status.st_mode, status.st_rdev
        place = f"/proc/self/fd/{fd}/{name}"
        names = self.attribute_names(status, place)
        if self.owners is not None:
            uid, gid, mode, rdev = self.owners.get(name, status, dir_fd=fd)
        elif self.real:
            uid, gid = status.st_uid, status.st_gid
        else:
            uid = gid = 0
            if (names and OWNER in names) or self.recorded.table:
                uid, gid, mode, rdev = self.recorded.get(name, status, dir_fd=fd)
        kind = KINDS.get(stat.S_IFMT(mode))
        if kind is None:
            return None
        mtime = min(max(int(status.st_mtime), 0), self.latest)
        node = Node(kind, stat.S_IMODE(mode), uid, gid, mtime)
        if kind == "file":
            node.source = Unread(status)
        elif kind == "symlink":
            node.target = os.fsencode(os.readlink(name, dir_fd=fd))
        elif kind in ("char", "block"):
            node.rdev = rdev
        if names:
            node.xattrs = self.attributes(names, place) or None
            if self.upper and kind == "dir" and "user.overlay.opaque" in names:
                node.source = OPAQUE
        return node

    def attribute_names(self, status: os.stat_result, place: str) -> list[str]:
        """Return the names of an entry's extended attributes; none where the file system has no such thing."""
        if status.st_dev in self.without_xattrs:
            return []
        try:
            return os.listxattr(place, follow_symlinks=False)
        except OSError as error:
            if error.errno == errno.ENOTSUP:
                self.without_xattrs.add(status.st_dev)
            elif error.errno not in (errno.EPERM, errno.EACCES, errno.ENOENT):
                raise
            return []

    def attributes(self, names: list[str], place: str) -> dict[bytes, bytes]:
        """Return the extended attributes that belong into an image, in the order of their names."""
        found = {}
        for key in sorted(names):
            if key.startswith(KEPT_XATTRS) and not key.startswith(DROPPED_XATTRS):
                try:
                    found[os.fsencode(key)] = os.getxattr(place, key, follow_symlinks=False)
                except OSError as error:
                    if error.errno not in (errno.EPERM, errno.EACCES, errno.ENODATA, errno.ENOENT):
                        raise
        return strip(found)


def lay_upper(lower: Node, upper: Node) -> None:
    """Turn the scanned upper folder of an overlay into what the overlay shows.

    The lower tree is left as it is; what the upper folder does not touch is part of both trees afterwards.
    """
    stack: list[tuple[Node, Node | None]] = [(upper, lower)]
    while stack:
        folder, below = stack.pop()
        hidden = (below.children or {}) if below is not None and folder.source is not OPAQUE else {}
        children = dict(hidden)
        for name, node in (folder.children or {}).items():
            if node.source is WHITEOUT:
                children.pop(name, None)
                continue
            children[name] = node
            if node.kind == "dir":
                there = hidden.get(name)
                stack.append((node, there if there is not None and there.kind == "dir" else None))
        folder.children = children


class Folder:
    """An open folder of a walk: `fd`, and its `status` when it was opened.

    One of ours whose mode forbids us to look into it gets that mode back when it is closed.

    Raises:
        UserError: it cannot be read.
    """

    __slots__ = ("_mode", "fd", "status")

    def __init__(self, name: str, parent: int | None = None, shown: str = "") -> None:
        if parent is None:
            try:
                self.fd = os.open(name, DIRECTORY & ~os.O_NOFOLLOW)
            except OSError as error:
                raise UserError("unreadable-folder", f"{name}: cannot be read: {error.strerror}") from None
        else:
            self.fd = open_readable(name, DIRECTORY, parent, shown)
        self.status = os.fstat(self.fd)
        self._mode: int | None = None
        if self.status.st_mode & 0o500 != 0o500 and self.status.st_uid == os.geteuid() != 0:
            self._mode = stat.S_IMODE(self.status.st_mode)
            os.fchmod(self.fd, self._mode | 0o500)

    def close(self) -> None:
        """Close the folder."""
        if self._mode is not None:
            os.fchmod(self.fd, self._mode)
        os.close(self.fd)


def open_readable(name: str, flags: int, fd: int, shown: str) -> int:
    """Open an entry of a folder, also one that its owner, us, forbade to read.

    Raises:
        UserError: it cannot be opened.
    """
    try:
        return os.open(name, flags, dir_fd=fd)
    except PermissionError:
        status = os.stat(name, dir_fd=fd, follow_symlinks=False)
        if status.st_uid == os.geteuid() and not stat.S_ISLNK(status.st_mode):
            # Our own file with a mode such as 0000 (some distributions' /etc/shadow): look at it all the same.
            os.chmod(name, stat.S_IMODE(status.st_mode) | 0o500, dir_fd=fd)
            try:
                return os.open(name, flags, dir_fd=fd)
            finally:
                os.chmod(name, stat.S_IMODE(status.st_mode), dir_fd=fd)
        raise UserError(
            "unreadable-file",
            f"{shown}: may not be read by you",
            hint="build as the user who owns the folder, or as root",
        ) from None
    except OSError as error:
        raise UserError("unreadable-file", f"{shown}: cannot be read: {error.strerror}") from None


def store_tree(writer: SquashfsWriter, root: Node, *, progress: Callable[[int], None] | None = None) -> None:
    """Give the content of all files of a scanned tree to a writer, folder by folder in the order of names.

    Files that have data already (put in by `image.entries`, or adopted from an image) are left alone.

    Arguments:
        writer: takes the contents.
        root: what `scan_directory` returned; `source` is the path of the folder.
        progress: called with the number of bytes that were read of each file.

    Raises:
        UserError: a file may not be read, or changed while it was read.
    """
    path = root.source
    if not isinstance(path, str):
        return
    for node, name, fd, below in _unread(root, path):
        source = node.source
        if not isinstance(source, Unread):
            continue
        shown = os.path.join(path, os.fsdecode(below))
        if source.size == 0:
            node.data = writer.store_bytes(b"")
            continue
        handle = open_readable(os.fsdecode(name), FILE, fd, shown)
        try:
            if source.size <= SMALL:
                data = os.read(handle, source.size + 1)
                if len(data) != source.size:
                    data = _rest(handle, data, source.size, shown)
                node.data = writer.store_bytes(data)
            else:
                node.data = writer.store(_reader(handle, shown), source.size)
        finally:
            os.close(handle)
        if progress is not None:
            progress(source.size)


def _rest(handle: int, data: bytes, size: int, shown: str) -> bytes:
    """Return all `size` bytes of a file whose first read gave another number."""
    while 0 < len(data) < size:
        more = os.read(handle, size - len(data))
        if not more:
            break
        data += more
    if len(data) != size:
        raise _changed(shown)
    return data


def _reader(handle: int, shown: str) -> Callable[[int], bytes]:
    def read(size: int) -> bytes:
        data = os.read(handle, size)
        if not data and size:
            raise _changed(shown)
        return data

    return read


def _changed(shown: str) -> UserError:
    return UserError(
        "file-changed",
        f"{shown}: changed its size while it was read",
        hint="stop the programs that write into the folder and try again",
    )


def _unread(root: Node, path: str) -> Iterator[tuple[Node, bytes, int, bytes]]:
    """Yield (node, name, descriptor of its folder, path) of files that wait to be read, each hard link once."""
    _allow_many_files()
    frames: list[tuple[Folder, bytes, list[tuple[bytes, Node]]]] = [(Folder(path), b"", _folders(root))]
    try:
        yield from _files(root, frames[0][0].fd, b"")
        while frames:
            folder, prefix, folders = frames[-1]
            if not folders:
                frames.pop()
                folder.close()
                continue
            name, node = folders.pop()
            below = prefix + name
            try:
                deeper = Folder(os.fsdecode(name), folder.fd, os.path.join(path, os.fsdecode(below)))
            except UserError:
                if _wanted(node):
                    raise
                continue  # a folder that was put into the tree and is not on disk
            frames.append((deeper, below + b"/", _folders(node)))
            yield from _files(node, deeper.fd, below + b"/")
    finally:
        for folder, _, _ in reversed(frames):
            folder.close()


def _folders(node: Node) -> list[tuple[bytes, Node]]:
    children = node.children or {}
    found = [(name, children[name]) for name in children if children[name].kind == "dir"]
    found.sort(key=lambda pair: pair[0], reverse=True)
    return found


def _files(folder: Node, fd: int, prefix: bytes) -> Iterator[tuple[Node, bytes, int, bytes]]:
    children = folder.children or {}
    for name in sorted(children):
        node = children[name]
        if node.kind == "file" and node.data is None:
            yield node, name, fd, prefix + name


def _wanted(folder: Node) -> bool:
    """Return whether anything below a folder waits to be read."""
    stack = [folder]
    while stack:
        for node in (stack.pop().children or {}).values():
            if node.kind == "dir":
                stack.append(node)
            elif node.kind == "file" and node.data is None:
                return True
    return False


def _allow_many_files() -> None:
    """Let this process open as many files as the system admits: a walk holds one descriptor per level."""
    import resource  # not for the start of containers

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 8192 and (hard == resource.RLIM_INFINITY or soft < hard):
        resource.setrlimit(resource.RLIMIT_NOFILE, (8192 if hard == resource.RLIM_INFINITY else min(hard, 8192), hard))
