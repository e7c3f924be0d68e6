# SPDX-License-Identifier: Apache-2.0
"""Write a squashfs image in one pass: contents in any order as they come, the tree at the end.

Whoever has files (a folder, layers of a registry, another image) gives their bytes to `store` and hangs the `FileData`
that comes back into a tree of nodes; `finish` writes the tree. Memory is bounded by what is in flight and by the number
of files, never by their size. The same calls give the same bytes, whatever the number of threads: blocks are compressed
by several threads and written in the order in which they were given.

Files below one block share fragment blocks in the order of the calls; giving the files of a folder together, in the
order of their names, makes them compress well and load together. Equal contents are stored once.
"""

from __future__ import annotations

import errno
import os
import zlib
from array import array
from bisect import bisect_right
from collections import deque
from hashlib import sha256
from struct import pack

from pysingularity.errors import ImageError, InternalError, UserError

from . import codecs, layout
from .node import FileData, Node
from .tables import Table, Tables
from .workers import Block, Pipeline, processors

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable
    from types import TracebackType
    from typing import Protocol, Self

    from .reader import Inode, SquashfsImage

    class Sink(Protocol):
        """What takes the bytes of a file system that does not stand in its file as it is (`trust.gocryptfs`)."""

        def pwrite(self, data: memoryview, position: int) -> int:
            """Write bytes at a position; return how many."""


__all__ = ["FileData", "Node", "SquashfsWriter"]

#: A file that may be equal to an earlier one is held back up to this size, to spare compressing it in vain.
_HELD_BYTES = 16 << 20
_COPY_BYTES = 1 << 30
#: So many fragments that are mostly dead are worth no work: every piece of an image ends with one that is not full.
_FEW_FRAGMENTS = 8
#: copy_file_range between these two files is not possible; plain copying is.
_CANNOT_COPY = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF, errno.EPERM, errno.EOVERFLOW)


class SquashfsWriter:
    """A squashfs file system in the making.

    Arguments:
        fd: writable file; stays the caller's. Its position is not used.
        offset: where in it the file system begins.
        sink: takes the bytes instead of the file, at positions from the start of the file system.
        compression: "gzip", "zstd", "xz" or "lz4".
        level: of compression; None for the usual one.
        block_size: a power of two, 4096 to 1048576.
        threads: how many compress; default: one per processor that we may use.
        mtime: time of the image in its superblock, seconds.

    Attributes:
        label: library and level that compress, for records.
        stored, duplicates: bytes that were given, and how many of them had been given before.
        left_out: names of extended attributes that the format has no place for, after `finish`.
        end: where the blocks end and the tables begin, after `finish`.

    Raises:
        UserError: an unknown compression, level or block size.
        HostError: "no-codec".
    """

    def __init__(
        self,
        fd: int,
        offset: int = 0,
        *,
        sink: Sink | None = None,
        compression: str = "gzip",
        level: int | None = None,
        block_size: int = layout.DEFAULT_BLOCK_SIZE,
        threads: int | None = None,
        mtime: int = 0,
    ) -> None:
        if block_size & (block_size - 1) or not layout.MIN_BLOCK_SIZE <= block_size <= layout.MAX_BLOCK_SIZE:
            raise UserError("block-size", f"block size {block_size} is no power of two between 4096 and 1048576")
        self.fd, self.offset, self.block_size, self.mtime = fd, offset, block_size, mtime
        self.compression = compression
        self._sink = sink
        self._pwrite: Callable[[memoryview, int], int]
        if sink is not None:
            self._pwrite, self.offset = sink.pwrite, 0
        else:
            self._pwrite = lambda data, position: os.pwrite(fd, data, position)
        self._number, self._compress, self.label = codecs.compressor(compression, level)
        self._options = b""
        if compression == "lz4":
            options = layout.LZ4_OPTIONS.pack(1, 1 if "high" in self.label else 0)
            self._options = pack("<H", len(options) | layout.METADATA_UNCOMPRESSED) + options
        self._position = self._highest = layout.SUPERBLOCK_SIZE + len(self._options)
        self._head = self.offset
        self._pipeline = Pipeline(self._compress, threads or processors(), block_size)
        self._queue: deque[Block] = deque()
        self._fragments: list[tuple[int, int]] = []
        self._tails: list[bytes] = []
        self._tail_bytes = 0
        self._known: dict[bytes, FileData] = {}
        self._likely: set[tuple[int, int]] = set()
        self._empty = FileData(0)
        self._zeros = bytes(block_size)
        self.stored = self.duplicates = self.end = 0
        self.left_out: set[bytes] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the threads. What was written so far stays; without `finish` it is no file system."""
        self._queue.clear()
        self._pipeline.stop()

    # -- contents ----------------------------------------------------------------------------------------------------

    def store_bytes(self, data: bytes) -> FileData:
        """Store a whole file.

        Raises:
            OSError: the output cannot be written.
        """
        size = len(data)
        if size >= self.block_size:
            view = memoryview(data)
            return self._blocks(iter([view[at : at + self.block_size] for at in range(0, size, self.block_size)]), size)
        if not size:
            return self._empty
        self.stored += size
        key = sha256(data).digest()
        known = self._known.get(key)
        if known is not None:
            self.duplicates += size
            return known
        if self._tail_bytes + size > self.block_size:
            self._end_fragment()
        self._known[key] = file = FileData(size)
        file.fragment, file.offset = len(self._fragments), self._tail_bytes
        self._tails.append(data)
        self._tail_bytes += size
        return file

    def store(self, read: Callable[[int], bytes], size: int) -> FileData:
        """Store a file of a known size from a stream; blocks of zeros become holes.

        Arguments:
            read: returns up to that many bytes, b"" at the end.
            size: bytes to take; what comes behind is not asked for.

        Raises:
            UserError: "short-file", the stream ends early.
            OSError: the output cannot be written.
        """
        if size < self.block_size:
            return self.store_bytes(_exactly(read, size))
        return self._blocks(self._pieces(read, size), size)

    def _pieces(self, read: Callable[[int], bytes], size: int) -> Iterable[bytes]:
        left = size
        while left:
            piece = _exactly(read, min(left, self.block_size))
            left -= len(piece)
            yield piece

    def _blocks(self, pieces: Iterable[bytes | memoryview], size: int) -> FileData:
        """Store a file of at least one block; the last piece may be shorter."""
        self.stored += size
        file = FileData(size)
        file.words = array("I", bytes(4 * -(-size // self.block_size)))
        digest = sha256()
        held: list[Block] | None = None
        held_bytes = 0
        zeros = self._zeros
        for index, piece in enumerate(pieces):
            digest.update(piece)
            if index == 0:
                guess = size, zlib.crc32(piece)
                if guess in self._likely:
                    held = []
                self._likely.add(guess)
            if piece == zeros or (len(piece) < len(zeros) and piece == zeros[: len(piece)]):
                file.sparse += len(piece)
                continue
            block = Block(piece, file, index)
            if held is None:
                self._give(block)
                continue
            held.append(block)
            held_bytes += len(piece)
            if held_bytes > _HELD_BYTES:
                for block in held:
                    self._give(block)
                held = None
        key = digest.digest()
        known = self._known.get(key)
        if known is not None:
            self.duplicates += size
            self._take_back(file)
            return known
        for block in held or ():
            self._give(block)
        self._known[key] = file
        return file

    def _take_back(self, file: FileData) -> None:
        """Forget the blocks of the file that was given last; what is written of it is written over."""
        while self._queue and self._queue[-1].owner is file:
            self._queue.pop().raw = None
        if file.start:
            self._position = file.start

    def _end_fragment(self) -> None:
        if self._tails:
            tails = b"".join(self._tails)
            self._tails.clear()
            self._tail_bytes = 0
            self._fragments.append((0, 0))
            self._give(Block(tails, None, len(self._fragments) - 1))

    def _give(self, block: Block) -> None:
        self._pipeline.give(block)
        self._queue.append(block)
        while len(self._queue) > self._pipeline.depth:
            self._write_next()

    def _write_next(self) -> None:
        block = self._queue.popleft()
        self._pipeline.wait(block)
        owner = block.owner
        if isinstance(owner, FileData):
            if not owner.start:
                owner.start = self._position
            owner.words[block.index] = block.word  # type: ignore[index]  # an array while it is being written
        else:
            self._fragments[block.index] = self._position, block.word
        self._put(block.stored)

    def _put(self, data: bytes | bytearray | memoryview) -> int:
        """Write at the end; return where that was."""
        position = self._position
        view = memoryview(data)
        while view:
            view = view[self._pwrite(view, self.offset + self._position) :]
            self._position = position + len(data) - len(view)
        self._highest = max(self._highest, self._position)
        return position

    def _flush(self) -> None:
        self._end_fragment()
        while self._queue:
            self._write_next()

    # -- stretches ---------------------------------------------------------------------------------------------------

    def begin_stretch(self) -> tuple[int, int]:
        """Begin a stretch whose bytes depend on nothing that was stored before; return where, and its first fragment.

        Fragments do not reach across, and equal contents of earlier stretches are not found. So the same files give
        the same stretch in every image, and `take_stretch` can copy it.
        """
        self._flush()
        self._known, self._likely = {}, set()
        return self._position, len(self._fragments)

    def fragments(self, first: int = 0) -> list[tuple[int, int]]:
        """Return (position, size word) of the fragments from number `first` on; all must have been written."""
        return self._fragments[first:]

    def take_stretch(self, fd: int, place: int, size: int, fragments: Iterable[tuple[int, int]]) -> None:
        """Append a stretch that was written before, with the same compression and block size.

        Arguments:
            fd, place, size: where its bytes lie in another file.
            fragments: its fragments, with positions from the start of the stretch.

        Raises:
            ImageError: the other file is shorter.
        """
        start = self._position
        self._fragments += [(start + position, word) for position, word in fragments]
        self._copy_bytes(fd, place, place + size, "the other image")

    def place(self, size: int) -> FileData:
        """Make room for a file that somebody else writes here, uncompressed; its first byte stands at `start`."""
        self._flush()
        file = FileData(size)
        rest = size % self.block_size
        words = [self.block_size | layout.BLOCK_UNCOMPRESSED] * (size // self.block_size)
        file.words = [*words, rest | layout.BLOCK_UNCOMPRESSED] if rest else words
        file.start = self._position
        self._position += size
        self._highest = max(self._highest, self._position)
        return file

    # -- another image -----------------------------------------------------------------------------------------------

    def adopt(self, image: SquashfsImage) -> Node:
        """Copy the compressed blocks of an image's files as they are, and return its tree with `data` set.

        Where both lie on one file system that can share extents, the kernel copies nothing. Bytes that no file of the
        image needs are left behind, and what little is alive in many fragments is packed anew; the blocks of files that
        the caller takes out of the tree afterwards stay.

        Raises:
            ImageError: it is damaged, or its compression or block size is not the writer's.
            OSError: the output cannot be written.
        """
        self._check_kind(image)
        self._flush()
        taken = Taken(image)
        sparse = taken.sparse()
        self._copy(image, taken.move(self._position, self._fragments, sparse))
        for index, files in sparse.items():
            block = image.fragment_block(index)
            for file in files:
                data = block[file.offset : file.offset + file.size]
                if len(data) != file.size:
                    raise image.damaged("a block holds fewer bytes than the file")
                new = self.store_bytes(data)
                file.fragment, file.offset = new.fragment, new.offset
        return taken.root

    def follow(self, position: int, fragments: Iterable[tuple[int, int]]) -> None:
        """Go on behind the blocks of another image, without copying any: see `squashfs.pieces`.

        It has to have the same compression and block size, and nothing may have been stored before. What lies where in
        it (`Taken`) holds for the new image, too.

        Arguments:
            position: where its blocks end: the position of its inode table.
            fragments: all of its fragments (position, size word).
        """
        self._head, self.offset = self.offset, self.offset + self._position - position
        self._position = self._highest = position
        self._fragments = list(fragments)

    def _check_kind(self, image: SquashfsImage) -> None:
        block = image.superblock
        if block.compressor != self._number or block.block_size != self.block_size:
            raise ImageError(
                "other-compression",
                f"blocks of {block.compression} with {block.block_size} bytes cannot be taken over into an image of "
                f"{self.compression} with {self.block_size}",
            )

    def _copy(self, image: SquashfsImage, ranges: Iterable[tuple[int, int]]) -> None:
        """Append the bytes of an image between pairs of positions."""
        for start, end in ranges:
            stored = image.stretches(start, end)
            if stored is not None:
                for fd, place, size in stored:
                    self._copy_bytes(fd, place, place + size, "the image")
                continue
            while start < end:
                data = image.raw(start, min(end - start, 1 << 20))
                self._put(data)
                start += len(data)

    def _copy_bytes(self, fd: int, place: int, last: int, what: str) -> None:
        """Append the bytes of a file between two positions."""
        plain = self._sink is not None  # only what goes through it is right
        while place < last:
            if not plain:
                try:
                    size = os.copy_file_range(
                        fd, self.fd, min(last - place, _COPY_BYTES), place, self.offset + self._position
                    )
                except OSError as error:
                    if error.errno not in _CANNOT_COPY:
                        raise
                    plain = True
                    continue
                # Some file systems (and /proc) answer 0 where reading works.
                plain = not size
                place += size
                self._position += size
            else:
                data = os.pread(fd, min(last - place, 1 << 20), place)
                if not data:
                    raise ImageError("damaged-image", f"{what} ends early")
                self._put(data)
                place += len(data)
        self._highest = max(self._highest, self._position)

    # -- the end -----------------------------------------------------------------------------------------------------

    def finish(self, root: Node, pad: int = 4096) -> int:
        """Write the tree and, last of all, the superblock; return the size of the file system with padding.

        Arguments:
            root: every file in it has the `data` that this writer gave.
            pad: the size is rounded up to a multiple of this.

        Raises:
            UserError: the tree has something that squashfs cannot hold.
            OSError: the output cannot be written.
        """
        if root.kind != "dir":
            raise InternalError("no-folder", "the root of an image is not a folder")
        self._flush()
        self._pipeline.stop()
        self.end = self._position
        tables = Tables(root, self._compress)
        self.left_out = tables.left_out
        inode_table = self._put(tables.inodes)
        directory_table = self._put(tables.directories)
        # Each of these ends where the next begins: newer kernels refuse gaps between tables.
        fragment_table = self._table(pack("<QII", start, word, 0) for start, word in self._fragments)
        export_table = self._table(tables.references)
        owners = tables.owners
        id_table = self._table(owners)
        xattr_table = layout.NONE64
        if tables.xattr_ids:
            base = self._put(tables.xattr_pairs)
            head = layout.XATTR_TABLE.pack(base, len(tables.xattr_ids), 0)
            xattr_table = self._table(tables.xattr_ids, head)
        used = self._position
        end = -(-used // pad) * pad
        self._put(bytes(end - used))
        if self._sink is None and self._highest > end and os.fstat(self.fd).st_size == self.offset + self._highest:
            # Blocks that were taken back had reached further than everything that came after them.
            os.ftruncate(self.fd, self.offset + end)
        flags = layout.FLAG_DUPLICATES | layout.FLAG_EXPORTABLE
        flags |= 0 if tables.xattr_ids else layout.FLAG_NO_XATTRS
        flags |= layout.FLAG_COMPRESSOR_OPTIONS if self._options else 0
        superblock = layout.SUPERBLOCK.pack(
            layout.MAGIC,
            tables.count,
            min(max(self.mtime, 0), 0xFFFFFFFF),
            self.block_size,
            len(self._fragments),
            self._number,
            self.block_size.bit_length() - 1,
            flags,
            len(owners),
            4,
            0,
            tables.root,
            used,
            id_table,
            xattr_table,
            inode_table,
            directory_table,
            fragment_table,
            export_table,
        )
        self.offset, self._position = self._head, 0
        self._put(superblock + self._options)
        return end

    def _table(self, entries: Iterable[bytes], head: bytes = b"") -> int:
        """Write a table of entries and then the list of its blocks, behind `head`; return where the list is."""
        table = Table(self._compress)
        for entry in entries:
            table.add(entry)
        at = self._put(table.finish())
        return self._put(head + b"".join([pack("<Q", at + start) for start in table.starts]))


def _exactly(read: Callable[[int], bytes], size: int) -> bytes:
    """Return `size` bytes of a stream.

    Raises:
        UserError: "short-file".
    """
    data = read(size)
    if len(data) == size:
        return data
    parts = []
    left = size
    while data:
        parts.append(data)
        left -= len(data)
        if left <= 0:
            break
        data = read(left)
    if left:
        raise UserError(
            "short-file",
            f"a file of {size} bytes ended after {size - left}",
            hint="it changed while it was read; try again when nobody writes to it",
        )
    return b"".join(parts)


class Taken:
    """An image's tree, with `data` that tells where the bytes of its files lie in the image.

    Attributes:
        root: the tree; `ref` of its nodes is the inode's in the image.
    """

    def __init__(self, image: SquashfsImage) -> None:
        """Read the tree.

        Raises:
            ImageError: it is damaged.
        """
        self.image = image
        self.attributes: dict[int, dict[bytes, bytes]] = {}
        self.last = image.superblock.inode_table
        self.files: list[FileData] = []
        # Honest block lists do not overlap, so all of them together fit into the inode table.
        self.room = 0
        position = self.last
        while position < image.superblock.directory_table:
            data, position = self.image.metadata_block(position)
            self.room += len(data)
        self.root = self._tree()

    def sparse(self) -> dict[int, list[FileData]]:
        """Return the small files of fragments that are less than half alive, nothing when these are few."""
        tails: dict[int, list[FileData]] = {}
        for file in self.files:
            if file.fragment != layout.NONE32:
                tails.setdefault(file.fragment, []).append(file)
        found = {}
        for index in sorted(tails):
            files = sorted(tails[index], key=lambda file: file.offset)
            alive = sum({file.offset: file.size for file in files}.values())
            # What is the tail of a larger file stays where it is.
            if 2 * alive < self.image.block_size and not any(len(file.words) for file in files):
                found[index] = files
        return found if len(found) > _FEW_FRAGMENTS else {}

    def move(
        self, position: int, fragments: list[tuple[int, int]], without: Container[int] = ()
    ) -> list[tuple[int, int]]:
        """Let the files' bytes lie behind each other from a position on, and their fragments behind those of a list.

        Arguments:
            without: fragments that are not to be copied; their files stay as they are.

        Returns:
            pairs of positions in the image: what has to be copied, in that order.
        """
        used: dict[int, int] = {}  # fragment → new index
        ranges = []
        for file in self.files:
            if file.start:
                ranges.append((file.start, file.start + sum([word & layout.BLOCK_SIZE_MASK for word in file.words])))
            if file.fragment != layout.NONE32 and file.fragment not in without:
                used.setdefault(file.fragment, len(fragments) + len(used))
        blocks = {index: self._fragment(index) for index in used}
        ranges += [(start, start + (word & layout.BLOCK_SIZE_MASK)) for start, word in blocks.values()]
        joined: list[tuple[int, int]] = []
        for start, end in sorted(ranges):
            if joined and start <= joined[-1][1]:
                joined[-1] = joined[-1][0], max(end, joined[-1][1])
            else:
                joined.append((start, end))
        starts = [start for start, _ in joined]
        moves = []
        for start, end in joined:
            moves.append(position - start)
            position += end - start
        for file in self.files:
            if file.start:
                file.start += moves[bisect_right(starts, file.start) - 1]
            file.fragment = used.get(file.fragment, file.fragment)
        fragments += [(start + moves[bisect_right(starts, start) - 1], word) for start, word in blocks.values()]
        return joined

    def _tree(self) -> Node:
        made: dict[int, Node] = {}
        folders: dict[bytes, Node] = {}
        root: Node | None = None
        for path, inode in self.image.walk():
            node = made.get(inode.ref)
            if node is None:
                node = made[inode.ref] = self._node(inode)
            if inode.type == layout.DIR:
                folders[path] = node
            if root is None:
                root = node
                continue
            parent, _, name = path.rpartition(b"/")
            children = folders[parent].children
            if children is not None:
                children[name] = node
        if root is None:
            raise self.image.damaged("it has no root")
        return root

    def _node(self, inode: Inode) -> Node:
        node = Node(inode.kind, inode.mode, inode.uid, inode.gid, inode.mtime)
        node.target, node.rdev, node.ref = inode.target, inode.rdev, inode.ref
        if inode.xattr != layout.NONE32:
            found = self.attributes.get(inode.xattr)
            if found is None:
                found = self.attributes[inode.xattr] = self.image.xattrs(inode)
            node.xattrs = found or None
        if inode.type == layout.FILE:
            node.data = self._data(inode)
        return node

    def _data(self, inode: Inode) -> FileData:
        image = self.image
        file = FileData(inode.size)
        self.files.append(file)
        count = image.block_count(inode)
        if count:
            self.room -= 4 * count
            if self.room < 0:
                raise image.damaged("files claim more blocks than there are")
            words = file.words = image.blocks(inode)[0]
            end = inode.start
            for index, word in enumerate(words):
                end += word & layout.BLOCK_SIZE_MASK
                if not word:
                    file.sparse += min(image.block_size, inode.size - index * image.block_size)
            if end > inode.start:
                if end > self.last or inode.start < layout.SUPERBLOCK_SIZE:
                    raise image.damaged("a file lies outside")
                file.start = inode.start
        if inode.fragment != layout.NONE32 and inode.size % image.block_size:
            self._fragment(inode.fragment)
            file.fragment, file.offset = inode.fragment, inode.offset
        return file

    def _fragment(self, index: int) -> tuple[int, int]:
        position, word = self.image.fragment(index)
        if position < layout.SUPERBLOCK_SIZE or position + (word & layout.BLOCK_SIZE_MASK) > self.last:
            raise self.image.damaged("a fragment lies outside")
        return position, word
