# SPDX-License-Identifier: Apache-2.0
"""Inodes of an image as values; `reader` fills them. Start ring."""

from __future__ import annotations

from . import layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence


class Inode:
    """One inode. Cheap to make; what only some callers need (block lists, xattrs) is read on demand by the image.

    Attributes:
        ref: reference within the inode table, the inode's identity (hard links share it).
        type: basic type, layout.DIR … layout.SOCKET; kind: its name.
        mode: permission bits (0o7777), without the file type.
        size: bytes of a file, length of a symlink's target, stored size of a directory's listing.
        start, offset: of a file its first block and place in the fragment, of a directory its listing.
        fragment: index of the fragment with the file's tail, or layout.NONE32.
        xattr: index of its extended attributes, or layout.NONE32.
        parent: inode number of a directory's parent, as stored.
    """

    __slots__ = (
        "_list",
        "_map",
        "fragment",
        "gid",
        "mode",
        "mtime",
        "nlink",
        "number",
        "offset",
        "parent",
        "rdev",
        "ref",
        "size",
        "start",
        "target",
        "type",
        "uid",
        "xattr",
    )

    ref: int
    type: int
    mode: int
    uid: int
    gid: int
    mtime: int
    number: int
    nlink: int
    size: int
    rdev: int
    target: bytes
    start: int
    offset: int
    fragment: int
    xattr: int
    parent: int
    _list: tuple[int, int]
    _map: tuple[Sequence[int], list[int]] | None

    @property
    def kind(self) -> str:
        """Return "dir", "file", "symlink", "block", "char", "fifo" or "socket"."""
        return layout.KINDS[self.type]

    @property
    def st_mode(self) -> int:
        """Return the mode as stat gives it, with the file type."""
        return self.mode | layout.FORMATS[self.type]

    def __repr__(self) -> str:
        return f"Inode({self.ref:#x}, {self.kind}, {self.mode:#o}, size={self.size})"
