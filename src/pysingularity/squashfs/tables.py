# SPDX-License-Identifier: Apache-2.0
"""The metadata of a new squashfs: a tree of nodes becomes inodes, directories, owners and extended attributes.

Everything is made in memory, in an order that only depends on the tree: numbers are given folder by folder (so that the
entries of one folder lie together), inodes are written folders last (a folder's inode points at its listing, and the
listing at the inodes in it). Where the bytes of files went is known already, see `writer`.
"""

from __future__ import annotations

import sys
from array import array
from struct import pack

from pysingularity.errors import InternalError, UserError

from . import layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from .codecs import Compress
    from .node import Node

_LAST_TIME = 0xFFFFFFFF
#: A value of an attribute that was stored before is only referred to where that is shorter.
_SHORT_VALUE = 8
#: The largest listing that a plain directory inode can describe, and the largest without an index.
_SHORT_LISTING = 65535 - 3


class Table:
    """Metadata blocks of 8 KiB, compressed as they fill.

    Attributes:
        stored: the blocks with their headers; starts: where each begins in it.
    """

    __slots__ = ("_compress", "_waiting", "starts", "stored")

    def __init__(self, compress: Compress) -> None:
        self._compress = compress
        self._waiting = bytearray()
        self.stored = bytearray()
        self.starts: list[int] = []

    @property
    def place(self) -> tuple[int, int]:
        """Where the next byte goes: the start of its block, and the offset in the inflated block."""
        return len(self.stored), len(self._waiting)

    def add(self, data: bytes) -> None:
        """Append bytes; they may begin in one block and end in another."""
        self._waiting += data
        while len(self._waiting) >= layout.METADATA_SIZE:
            self._close(layout.METADATA_SIZE)

    def finish(self) -> bytearray:
        """Close the last block and return all."""
        if self._waiting:
            self._close(len(self._waiting))
        return self.stored

    def _close(self, size: int) -> None:
        raw = bytes(self._waiting[:size])
        del self._waiting[:size]
        stored = self._compress(raw)
        self.starts.append(len(self.stored))
        if len(stored) < size:
            self.stored += pack("<H", len(stored))
            self.stored += stored
        else:
            self.stored += pack("<H", size | layout.METADATA_UNCOMPRESSED)
            self.stored += raw


class Tables:
    """Inodes, directories, owners and attributes of one tree.

    Attributes:
        inodes, directories, xattr_pairs: the compressed tables.
        references: reference of every inode by number - 1.
        owners: uids and gids by index.
        xattr_ids: one packed entry per distinct set of attributes.
        left_out: names of attributes that squashfs has no place for.
        root: the root's reference; count: number of inodes.
    """

    def __init__(self, root: Node, compress: Compress) -> None:
        """Encode a tree.

        Raises:
            UserError: it has something the format cannot hold.
        """
        self._inodes, self._listings, self._pairs = Table(compress), Table(compress), Table(compress)
        self._owners: dict[int, int] = {}
        self._sets: dict[tuple[tuple[bytes, bytes], ...], int] = {}
        self._values: dict[bytes, int] = {}
        self.xattr_ids: list[bytes] = []
        self.left_out: set[bytes] = set()
        folders = self._number(root)
        self._references = array("Q", bytes(8 * self.count))
        # Children first; within the list of folders every one comes behind its parent.
        for folder, parent in reversed(folders):
            self._folder(folder, parent)
        self.root = root.ref
        self.inodes, self.directories = self._inodes.finish(), self._listings.finish()
        self.xattr_pairs = self._pairs.finish()
        if len(self._owners) > 65535:
            raise UserError("too-many-owners", f"{len(self._owners)} different owners and groups; squashfs holds 65535")

    @property
    def owners(self) -> list[bytes]:
        """Packed ids in the order of their indices."""
        return [pack("<I", number) for number in self._owners]

    @property
    def references(self) -> Iterable[bytes]:
        """Packed references in the order of inode numbers, one metadata block at a time."""
        found = self._references
        if sys.byteorder != "little":
            found = found[:]
            found.byteswap()
        raw = found.tobytes()
        return (raw[at : at + layout.METADATA_SIZE] for at in range(0, len(raw), layout.METADATA_SIZE))

    def _number(self, root: Node) -> list[tuple[Node, Node | None]]:
        """Give numbers and count links; return the folders with their parents, parents first."""
        folders: list[tuple[Node, Node | None]] = [(root, None)]
        root.number, root.nlink, root.ref = 1, 1, -1
        fresh = {id(root)}
        count = 1
        for folder, _ in folders:  # grows on the way
            children = folder.children
            if children is None:
                raise InternalError("not-a-folder", "a tree's folder has no children")
            for name in sorted(children):
                node = children[name]
                if id(node) in fresh:
                    if node.kind == "dir":
                        raise InternalError("folder-twice", f"a folder is in two places of a tree ({name!r})")
                    node.nlink += 1
                    continue
                fresh.add(id(node))
                count += 1
                node.number, node.nlink, node.ref = count, 1, -1
                if node.kind == "dir":
                    folders.append((node, folder))
        self.count = count
        return folders

    # -- inodes ------------------------------------------------------------------------------------------------------

    def _head(self, node: Node, kind: int) -> bytes:
        owners = self._owners
        uid, gid = owners.setdefault(node.uid, len(owners)), owners.setdefault(node.gid, len(owners))
        if len(owners) > 65535:
            raise UserError("too-many-owners", "more than 65535 different owners and groups; squashfs holds no more")
        mtime = min(max(node.mtime, 0), _LAST_TIME)
        return layout.INODE_HEAD.pack(kind, node.mode & 0o7777, uid, gid, mtime, node.number)

    def _write(self, node: Node, data: bytes) -> None:
        block, offset = self._inodes.place
        if block >> 32:
            raise UserError("too-many-files", "the tree has more files than a squashfs can name")
        node.ref = block << 16 | offset
        self._references[node.number - 1] = node.ref
        self._inodes.add(data)

    def _leaf(self, node: Node) -> None:
        """Write the inode of anything but a folder."""
        xattr = self._xattr(node) if node.xattrs else layout.NONE32
        plain = xattr == layout.NONE32
        kind = node.kind
        if kind == "file":
            data = node.data
            if data is None:
                raise InternalError("no-data", "a file of a tree was never stored")
            if plain and node.nlink == 1 and not data.sparse and not (data.start | data.size) >> 32:
                head = self._head(node, 2) + pack("<4I", data.start, data.fragment, data.offset, data.size)
            else:
                head = self._head(node, 9) + pack(
                    "<3Q4I", data.start, data.size, data.sparse, node.nlink, data.fragment, data.offset, xattr
                )
            words = data.words
            if len(words) == 1:
                head += pack("<I", words[0])
            elif words:
                head += packed(words)
            self._write(node, head)
            return
        number = layout.TYPES[kind]
        body = self._head(node, number if plain else number + layout.EXTENDED)
        if kind == "symlink":
            if not 0 < len(node.target) <= 65535:
                raise UserError("long-link", f"a symbolic link's target has {len(node.target)} bytes; 1 to 65535 fit")
            body += pack("<2I", node.nlink, len(node.target)) + node.target
        elif kind in ("block", "char"):
            body += pack("<2I", node.nlink, node.rdev)
        else:
            body += pack("<I", node.nlink)
        self._write(node, body if plain else body + pack("<I", xattr))

    def _folder(self, folder: Node, parent: Node | None) -> None:
        """Write a folder's files, its listing and its own inode."""
        children = folder.children or {}
        names = sorted(children)
        below = 0
        for name in names:
            node = children[name]
            if node.kind == "dir":
                below += 1
            elif node.ref < 0:
                self._leaf(node)
        block, offset, size, index = self._listing(names, children)
        xattr = self._xattr(folder) if folder.xattrs else layout.NONE32
        above = parent.number if parent is not None else self.count + 1
        folder.nlink = below + 2
        if size <= _SHORT_LISTING and xattr == layout.NONE32:
            self._write(folder, self._head(folder, 1) + pack("<2I2HI", block, below + 2, size + 3, offset, above))
            return
        # An index is for finding names in a listing of several blocks; a short one only has the long form for xattrs.
        index = index if size > _SHORT_LISTING else []
        fixed = pack("<4I2HI", below + 2, size + 3, block, above, len(index), offset, xattr)
        self._write(folder, self._head(folder, 8) + fixed + b"".join(index))

    def _listing(self, names: list[bytes], children: dict[bytes, Node]) -> tuple[int, int, int, list[bytes]]:
        """Write a listing; return its block, offset, size, and an index entry per metadata block it reaches."""
        table = self._listings
        start, offset = table.place
        size, place = 0, 0
        index: list[bytes] = []
        indexed = start
        pack_entry, types = layout.DIR_ENTRY.pack, layout.TYPES
        while place < len(names):
            first = children[names[place]]
            block, base = first.ref >> 16, first.number
            run: list[bytes] = []
            for name in names[place : place + layout.DIR_RUN_MAX]:
                node = children[name]
                delta = node.number - base
                if node.ref >> 16 != block or not -32768 <= delta < 32768:
                    break
                if not 0 < len(name) < layout.NAME_MAX or b"/" in name or b"\0" in name or name in (b".", b".."):
                    raise UserError("impossible-name", f"{name[:80]!r} cannot be the name of a file")
                run.append(pack_entry(node.ref & 0xFFFF, delta, types[node.kind], len(name) - 1))
                run.append(name)
            here = table.place[0]
            if here != indexed and len(index) < 65535:
                index.append(layout.DIR_INDEX.pack(size, here, len(names[place]) - 1) + names[place])
                indexed = here
            count = len(run) // 2
            data = layout.DIR_HEADER.pack(count - 1, block, base) + b"".join(run)
            table.add(data)
            size += len(data)
            place += count
        if table.place[0] >> 32:
            raise UserError("too-many-files", "the tree has more names than a squashfs can list")
        return start, offset, size, index

    # -- extended attributes -----------------------------------------------------------------------------------------

    def _xattr(self, node: Node) -> int:
        """Return the index of a node's set of attributes, written once per distinct set."""
        key = tuple(sorted((node.xattrs or {}).items()))
        known = self._sets.get(key)
        if known is not None:
            return known
        block, offset = self._pairs.place
        count = size = 0
        for name, value in key:
            prefix = name[: name.find(b".") + 1]
            if prefix not in layout.XATTR_PREFIXES:
                self.left_out.add(name)
                continue
            kind = layout.XATTR_PREFIXES.index(prefix)
            if len(name) > 255 or len(value) > layout.XATTR_VALUE_MAX:
                raise UserError("long-attribute", f"extended attribute {name[:80]!r} is longer than Linux allows")
            before = self._values.get(value) if len(value) > _SHORT_VALUE else None
            if before is not None:
                kind |= layout.XATTR_OUT_OF_LINE
            short = name[len(prefix) :]
            self._pairs.add(layout.XATTR_KEY.pack(kind, len(short)) + short)
            if before is None:
                where, at = self._pairs.place
                if len(value) > _SHORT_VALUE:
                    self._values[value] = where << 16 | at
                data = layout.XATTR_VALUE.pack(len(value)) + value
            else:
                data = layout.XATTR_VALUE.pack(8) + pack("<Q", before)
            self._pairs.add(data)
            count += 1
            size += 4 + len(short) + len(data)
        if not count:
            index = layout.NONE32
        else:
            index = len(self.xattr_ids)
            self.xattr_ids.append(layout.XATTR_ID.pack(block << 16 | offset, count, size))
        self._sets[key] = index
        return index


def packed(words: Iterable[int]) -> bytes:
    """Return size words as the format stores them."""
    numbers = words if isinstance(words, array) else array("I", words)
    if sys.byteorder != "little":
        numbers = numbers[:]
        numbers.byteswap()
    return numbers.tobytes()
