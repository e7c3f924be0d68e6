# SPDX-License-Identifier: Apache-2.0
"""Nodes: the tree of files that layers are merged into, folders are scanned into and the writer takes.

A node is what an inode is in memory, before it has a number: hard links are one node in several places. Where the bytes
of a file lie in the new image is a `FileData`, handed out by the writer when it took the bytes; nodes with equal data
share one.
"""

from __future__ import annotations

from . import layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


class FileData:
    """Where a file's bytes are stored in an image.

    Attributes:
        start: position of the first stored block, from the start of the file system.
        words: one size word per whole block (0 is a hole; see layout.BLOCK_UNCOMPRESSED).
        fragment, offset: index of the fragment block with the tail, and where the tail begins in it.
        size: bytes in the file; sparse: how many of them lie in holes.
    """

    __slots__ = ("fragment", "offset", "size", "sparse", "start", "words")

    def __init__(self, size: int) -> None:
        self.start = 0
        self.words: Sequence[int] = ()
        self.fragment = layout.NONE32
        self.offset = 0
        self.size = size
        self.sparse = 0

    def __repr__(self) -> str:
        return f"FileData(size={self.size}, start={self.start}, blocks={len(self.words)}, fragment={self.fragment:#x})"


class Node:
    """One file of a tree.

    Attributes:
        kind: "dir" "file" "symlink" "char" "block" "fifo" or "socket".
        mode: permission bits with setuid, setgid and sticky (0o7777).
        mtime: seconds; what the format cannot hold (before 1970, after 2106) is moved to the nearest it can.
        xattrs: full names ("user.x") to values.
        data: a file's stored bytes, from the writer.
        target: a symlink's text.
        rdev: a device's number as os.makedev gives it.
        children: a directory's entries by name.
        nlink, number, ref: filled in by the writer.
        source: free for whoever fills the tree.
    """

    __slots__ = (
        "children",
        "data",
        "gid",
        "kind",
        "mode",
        "mtime",
        "nlink",
        "number",
        "rdev",
        "ref",
        "source",
        "target",
        "uid",
        "xattrs",
    )

    def __init__(
        self,
        kind: str,
        mode: int = 0o644,
        uid: int = 0,
        gid: int = 0,
        mtime: int = 0,
        *,
        xattrs: dict[bytes, bytes] | None = None,
        data: FileData | None = None,
        target: bytes = b"",
        rdev: int = 0,
        source: object = None,
    ) -> None:
        self.kind, self.mode, self.uid, self.gid, self.mtime = kind, mode, uid, gid, mtime
        self.xattrs, self.data, self.target, self.rdev, self.source = xattrs, data, target, rdev, source
        self.children: dict[bytes, Node] | None = {} if kind == "dir" else None
        self.nlink = 1
        self.number = 0
        self.ref = -1

    def __repr__(self) -> str:
        return f"Node({self.kind!r}, {self.mode:#o}, {self.uid}:{self.gid})"

    def walk(self) -> Iterable[tuple[bytes, Node]]:
        """Yield (path, node) for this node (path b"") and everything below, parents first, names in byte order."""
        stack = [(b"", self)]
        while stack:
            path, node = stack.pop()
            yield path, node
            if node.children:
                prefix = path + b"/" if path else b""
                stack.extend((prefix + name, node.children[name]) for name in sorted(node.children, reverse=True))

    def find(self, path: bytes) -> Node | None:
        """Return the node at a relative path, or None; symlinks are not followed."""
        node = self
        for part in path.split(b"/"):
            if part in (b"", b"."):
                continue
            if node.children is None or part not in node.children:
                return None
            node = node.children[part]
        return node
