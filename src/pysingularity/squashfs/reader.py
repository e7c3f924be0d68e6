# SPDX-License-Identifier: Apache-2.0
"""Read a squashfs image: one inode at a time for a file server, or the whole tree at once for conversions.

This is the narrow door for hostile images. Every position, count and inflated size is checked against the image and
against a bound before memory is spent on it, nothing recurses, and whatever is wrong ends as `ImageError`
("damaged-image") in one line. Nothing is read ahead: opening an image costs three reads, and what is kept (metadata
blocks and the last data blocks) is capped in bytes. Any number of threads may read one image; inflating lets the others
run, and a block that is kept is inflated by one of them while the others wait for it.

Names and targets are bytes throughout. Start ring.
"""

from __future__ import annotations

import posix
import sys
from _struct import error as struct_error  # type: ignore[attr-defined]  # typeshed leaves it out
from _struct import unpack
from _thread import allocate_lock

from pysingularity.errors import ImageError

from . import codecs, layout
from .inode import Inode
from .superblock import Superblock

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _thread import LockType
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from typing import Protocol

    class Source(Protocol):
        """Bytes that do not stand in a file as they are (`trust.encryption`)."""

        @property
        def fd(self) -> int:
            """The file they come from."""

        @property
        def size(self) -> int:
            """How many there are."""

        def pread(self, size: int, position: int) -> bytes:
            """Return bytes from a position on, fewer at the end; several threads may ask at once."""


__all__ = ["Inode", "SquashfsImage", "Superblock"]

#: Bounds on what one object may claim; far above anything that is in use, far below what hurts.
_MAX_BLOCKS = 1 << 24  # blocks of one file: 2 TiB at 128 KiB
_MAX_LISTING = 128 << 20  # bytes of one directory's listing, about four million names
_MAX_TARGET = 65535
_MAX_XATTRS = 4096  # on one inode; the kernel lists at most 64 KiB of names
_MAX_XATTR_BYTES = 16 << 20
_MAX_PATH = 65535
_SEEK_END = 2
_DOTS = (b".", b"..")
_MAX_LINKS = 40  # symlinks followed in one look-up, as in the kernel

#: Stored sizes are summed up every so many blocks, so that reading at the end of a large file needs no long sum.
_STRIDE = 256


class SquashfsImage:
    """A squashfs file system within a file.

    Arguments:
        fd: readable file or block device; stays the caller's, its position is never used.
        offset: where the file system begins.
        limit: bytes available from there; default: up to the end of the file.
        source: where the bytes come from, instead of the file at `offset`.
        name: what to call the image in messages.
        metadata_cache, data_cache: caps in bytes on what is kept inflated.

    Raises:
        ImageError: "damaged-image".
        HostError: "no-codec", nothing here can inflate it.
    """

    def __init__(
        self,
        fd: int,
        offset: int = 0,
        limit: int | None = None,
        *,
        source: Source | None = None,
        name: str = "",
        metadata_cache: int = 8 << 20,
        data_cache: int = 8 << 20,
    ) -> None:
        self.fd, self.offset, self.name = fd, offset, name
        self.source = source
        self._pread: Callable[[int, int], bytes]
        if source is not None:
            self._pread, available = source.pread, source.size
        else:
            self._pread = lambda size, position: posix.pread(fd, size, offset + position)
            # The end by seeking, not by stat: the image may be a block device.
            available = max(posix.lseek(fd, 0, _SEEK_END) - offset, 0)
        if limit is not None:
            available = min(available, limit)
        try:
            raw = self._pread(layout.SUPERBLOCK_SIZE, 0) if available >= layout.SUPERBLOCK_SIZE else b""
            self.superblock = superblock = Superblock(raw, available)
        except ValueError as error:
            raise self.damaged(str(error)) from None
        self.block_size = superblock.block_size
        self._inflate = codecs.decompressor(superblock.compressor)
        self._metadata: dict[int, tuple[bytes, int]] = {}
        self._metadata_bytes, self._metadata_cap = 0, metadata_cache
        self._data: dict[int, bytes] = {}
        self._data_bytes, self._data_cap = 0, data_cache
        #: Guards both caches and what is counted of them.
        self._lock = allocate_lock()
        #: By position: held by the thread that inflates that block.
        self._coming: dict[int, LockType] = {}
        self._fragments: dict[int, tuple[int, int]] = {}
        self._used, self._inode_table = superblock.bytes_used, superblock.inode_table
        self._directory_table = superblock.directory_table
        # Listings lie between the directory table and whichever table comes next; the exact end is the first block of
        # that next one, which costs another read: a block that is none fails to inflate anyway.
        later = (superblock.id_table, superblock.fragment_table, superblock.export_table, superblock.xattr_table)
        self._directory_end = min(place for place in later if self._directory_table < place < self._used)
        self._ids = self._read_ids()
        self._xattr_head: tuple[int, int] | None = None
        self.root = self.inode(superblock.root)
        if self.root.type != layout.DIR:
            raise self.damaged("its root is not a directory")

    def damaged(self, what: str) -> ImageError:
        """Return the error for something that is wrong with the image."""
        return ImageError(
            "damaged-image",
            f"{self.name}: damaged squashfs image: {what}" if self.name else f"damaged squashfs image: {what}",
            hint="fetch or build the image again",
        )

    # -- bytes -------------------------------------------------------------------------------------------------------

    def stretches(self, start: int, end: int) -> Iterable[tuple[int, int, int]] | None:
        """Return where the bytes between two positions are stored: descriptors of files, places in them, lengths.

        None where they do not stand in any file as they are.
        """
        return ((self.fd, self.offset + start, end - start),) if self.source is None else None

    def raw(self, position: int, size: int) -> bytes:
        """Return stored bytes of the file system.

        Raises:
            ImageError: they do not lie within it, or the file ends early.
        """
        if position < layout.SUPERBLOCK_SIZE or position + size > self._used:
            raise self.damaged(f"{size} bytes at {position} lie outside")
        data = self._pread(size, position)
        while len(data) < size:
            more = self._pread(size - len(data), position + len(data))
            if not more:
                raise self.damaged("the file ends early")
            data += more
        return data

    def metadata_block(self, position: int) -> tuple[bytes, int]:
        """Return the inflated metadata block stored at a position, and the position of the next one."""
        found = self._metadata.get(position)
        if found is not None:
            return found
        if position < layout.SUPERBLOCK_SIZE or position + 2 > self._used:
            raise self.damaged(f"a metadata block at {position} lies outside")
        # One read for header and block, whatever its size: the longest possible.
        raw = self._pread(min(layout.METADATA_SIZE + 2, self._used - position), position)
        if len(raw) < 2:
            raise self.damaged("the file ends early")
        head = raw[0] | raw[1] << 8
        size = head & 0x7FFF
        if not 0 < size <= len(raw) - 2:
            raise self.damaged(f"the metadata block at {position} has an impossible size")
        data = raw[2 : 2 + size]
        if not head & layout.METADATA_UNCOMPRESSED:
            try:
                data = self._inflate(data, layout.METADATA_SIZE)
            except ValueError as error:
                raise self.damaged(f"{error} (metadata block at {position})") from None
            if not data:
                raise self.damaged(f"the metadata block at {position} is empty")
        cache, found = self._metadata, (data, position + 2 + size)
        with self._lock:
            if position not in cache:
                cache[position] = found
                self._metadata_bytes += len(data)
                while self._metadata_bytes > self._metadata_cap and len(cache) > 2:
                    self._metadata_bytes -= len(cache.pop(next(iter(cache)))[0])
        return found

    def _bytes(self, position: int, offset: int, size: int, end: int) -> bytes:
        """Return bytes of a table from an offset in the metadata block at `position`; blocks begin before `end`."""
        if not size:
            return b""
        parts: list[bytes] = []
        while True:
            if not position < end:
                raise self.damaged("a table ends early")
            data, position = self.metadata_block(position)
            if offset >= len(data):
                offset -= len(data)
                continue
            part = data[offset : offset + size]
            if len(part) == size and not parts:
                return part
            parts.append(part)
            size -= len(part)
            if not size:
                return b"".join(parts)
            offset = 0

    def _indexed(self, table: int, entry: int, width: int) -> bytes:
        """Return entry number `entry`, `width` bytes (a divisor of 8192), of a table that begins with pointers."""
        block, offset = divmod(entry * width, layout.METADATA_SIZE)
        position = int.from_bytes(self.raw(table + 8 * block, 8), "little")
        if position >= table:
            raise self.damaged("a table's blocks lie behind it")
        data, _ = self.metadata_block(position)
        found = data[offset : offset + width]
        if len(found) != width:
            raise self.damaged("a table ends early")
        return found

    def _read_ids(self) -> tuple[int, ...]:
        count, table = self.superblock.id_count, self.superblock.id_table
        parts, left = [], count * 4  # 65535 ids at most, by the width of the field
        blocks = -(-left // layout.METADATA_SIZE)
        for position in unpack(f"<{blocks}Q", self.raw(table, 8 * blocks)):
            data = self._bytes(position, 0, min(left, layout.METADATA_SIZE), table)
            parts.append(data)
            left -= len(data)
        return unpack(f"<{count}I", b"".join(parts))

    # -- inodes ------------------------------------------------------------------------------------------------------

    def inode(self, ref: int) -> Inode:
        """Return the inode at a reference.

        Raises:
            ImageError: there is none, or it is damaged.
        """
        position, offset = self._inode_table + (ref >> 16), ref & 0xFFFF
        if position >= self._directory_table:
            raise self.damaged(f"inode {ref:#x} lies outside the table")
        data, following = self._metadata.get(position) or self.metadata_block(position)
        place = offset
        if len(data) - place < layout.INODE_MAX:
            # It may go on in the next block; a last inode that is shorter stays as it is.
            data = data[place:]
            place = 0
            while len(data) < layout.INODE_MAX and following < self._directory_table:
                more, following = self.metadata_block(following)
                data += more
        it = Inode.__new__(Inode)  # one line per type below is worth a short name
        it.ref = ref
        it.nlink, it.size, it.rdev, it.target = 1, 0, 0, b""
        it.start = it.offset = it.parent = 0
        it.fragment = it.xattr = layout.NONE32
        it._map = None
        try:
            kind = data[place] | data[place + 1] << 8
            if kind == 2:
                _, mode, uid, gid, it.mtime, it.number, it.start, it.fragment, it.offset, it.size = (
                    layout.INODE_FILE.unpack_from(data, place)
                )
                it._list = (position, offset + 32)
            elif kind == 1:
                _, mode, uid, gid, it.mtime, it.number, it.start, it.nlink, it.size, it.offset, it.parent = (
                    layout.INODE_DIR.unpack_from(data, place)
                )
            elif kind == 3 or kind == 10:
                _, mode, uid, gid, it.mtime, it.number, it.nlink, size = layout.INODE_SYMLINK.unpack_from(data, place)
                if not 0 < size <= _MAX_TARGET:
                    raise self.damaged(f"a symlink's target has {size} bytes")
                it.size = size
                target = data[place + 24 : place + 24 + size]
                if len(target) < size:
                    target = self._bytes(position, offset + 24, size, self._directory_table)
                if b"\0" in target:
                    raise self.damaged("a symlink's target holds a NUL")
                it.target = target
                if kind == 10:
                    tail = self._bytes(position, offset + 24 + size, 4, self._directory_table)
                    it.xattr = int.from_bytes(tail, "little")
            elif kind == 9:
                fields = layout.INODE_FILE_EXTENDED.unpack_from(data, place)
                _, mode, uid, gid, it.mtime, it.number, it.start, it.size, _, it.nlink = fields[:10]
                it.fragment, it.offset, it.xattr = fields[10:]
                it._list = (position, offset + 56)
            elif kind == 8:
                fields = layout.INODE_DIR_EXTENDED.unpack_from(data, place)
                _, mode, uid, gid, it.mtime, it.number, it.nlink, it.size, it.start, it.parent = fields[:10]
                _, it.offset, it.xattr = fields[10:]
            elif kind in (4, 5):
                _, mode, uid, gid, it.mtime, it.number, it.nlink, it.rdev = layout.INODE_DEVICE.unpack_from(data, place)
            elif kind in (11, 12):
                _, mode, uid, gid, it.mtime, it.number, it.nlink, it.rdev, it.xattr = (
                    layout.INODE_DEVICE_EXTENDED.unpack_from(data, place)
                )
            elif kind in (6, 7):
                _, mode, uid, gid, it.mtime, it.number, it.nlink = layout.INODE_IPC.unpack_from(data, place)
            elif kind in (13, 14):
                _, mode, uid, gid, it.mtime, it.number, it.nlink, it.xattr = layout.INODE_IPC_EXTENDED.unpack_from(
                    data, place
                )
            else:
                raise self.damaged(f"inode {ref:#x} has type {kind}")
            it.uid, it.gid = self._ids[uid], self._ids[gid]
        except (struct_error, IndexError):
            raise self.damaged(f"inode {ref:#x} is cut short or names an owner that is not there") from None
        it.type = kind if kind < 8 else kind - layout.EXTENDED
        it.mode = mode & 0o7777
        return it

    def status(self, ref: int) -> tuple[int, int, int, int, int, int, int, int]:
        """Return (number, st_mode, nlink, uid, gid, rdev, size, mtime) of an inode, without making one where it can be.

        A file server is asked for nothing else of most inodes, a whole directory of them at a time.
        """
        found = self._metadata.get(self._inode_table + (ref >> 16))
        offset = ref & 0xFFFF
        # What is in the cache lies inside the table, or `inode` would have refused to read it.
        if found is not None and len(found[0]) - offset >= layout.INODE_MAX:
            data = found[0]
            kind = data[offset] | data[offset + 1] << 8
            ids = self._ids
            try:
                if kind == 2:
                    _, mode, uid, gid, mtime, number, _, _, _, size = layout.INODE_FILE.unpack_from(data, offset)
                    return number, 0o100000 | mode & 0o7777, 1, ids[uid], ids[gid], 0, size, mtime
                if kind == 1:
                    _, mode, uid, gid, mtime, number, _, nlink, size, _, _ = layout.INODE_DIR.unpack_from(data, offset)
                    return number, 0o040000 | mode & 0o7777, nlink, ids[uid], ids[gid], 0, size, mtime
            except IndexError:  # an owner that is not there: told below
                pass
        it = self.inode(ref)
        return it.number, it.st_mode, it.nlink, it.uid, it.gid, it.rdev, it.size, it.mtime

    # -- directories -------------------------------------------------------------------------------------------------

    def entries(self, inode: Inode) -> list[tuple[bytes, int, str]]:
        """Return a directory's entries as (name, reference, kind), in the order stored (byte order of names).

        Raises:
            ImageError: the listing is damaged, or holds a name that cannot be one ("..", "a/b", twice the same).
        """
        if inode.type != layout.DIR:
            raise self.damaged("a listing is asked of something that is no directory")
        size = inode.size - 3  # the stored size counts "." and ".."
        if size <= 0:
            return []
        if size > _MAX_LISTING:
            raise self.damaged(f"a directory's listing claims {size} bytes")
        data = self._bytes(self._directory_table + inode.start, inode.offset, size, self._directory_end)
        found: list[tuple[bytes, int, str]] = []
        add, unpack_entry, kinds = found.append, layout.DIR_ENTRY.unpack_from, layout.KINDS
        place = 0
        last = b""
        ordered = True
        try:
            while place < size:
                count, block, _ = layout.DIR_HEADER.unpack_from(data, place)
                if count >= layout.DIR_RUN_MAX:
                    raise self.damaged("a directory run is too long")
                place += 12
                block <<= 16
                for _ in range(count + 1):
                    offset, _, kind, length = unpack_entry(data, place)
                    end = place + 9 + length
                    name = data[place + 8 : end]
                    if (
                        end > size
                        or length >= layout.NAME_MAX
                        or b"/" in name
                        or b"\0" in name
                        or name in (b".", b"..")
                    ):
                        raise self.damaged(f"a directory entry has an impossible name {name[:80]!r}")
                    if name <= last:
                        ordered = False
                    last = name
                    add((name, block | offset, kinds[kind]))
                    place = end
        except (struct_error, IndexError):
            raise self.damaged("a directory's listing is cut short") from None
        if not ordered and len({entry[0] for entry in found}) != len(found):
            raise self.damaged("a directory holds a name twice")
        return found

    def lookup(self, path: bytes | str, follow: bool = True) -> Inode | None:
        """Return the inode at a path, or None; symlinks are followed within the image only.

        Arguments:
            follow: also follow a symlink at the end.
        """
        if isinstance(path, str):
            path = path.encode("utf-8", "surrogateescape")
        todo = path.split(b"/")[::-1]
        above = [self.root]
        links = 0
        while todo:
            part = todo.pop()
            if part in (b"", b"."):
                continue
            if part == b"..":
                if len(above) > 1:
                    above.pop()
                continue
            if above[-1].type != layout.DIR:
                return None
            for name, ref, _ in self.entries(above[-1]):
                if name == part:
                    found = self.inode(ref)
                    break
            else:
                return None
            if found.type == layout.SYMLINK and (follow or any(word not in (b"", b".") for word in todo)):
                links += 1
                if links > _MAX_LINKS:
                    return None
                if found.target.startswith(b"/"):
                    del above[1:]
                todo.extend(found.target.split(b"/")[::-1])
                continue
            if len(above) > _MAX_PATH:
                return None
            above.append(found)
        return above[-1]

    def walk(self) -> Iterator[tuple[bytes, Inode]]:
        """Yield (path, inode) for everything, the root (path b"") first, parents before children, in byte order.

        Paths are relative and have no leading slash. Hard links come as inodes with the same `ref`.

        Raises:
            ImageError: also for directories that contain themselves, are in two places, or share listings: what no
                writer makes, and what would make a small image a walk without end.
        """
        stack: list[tuple[bytes, Inode]] = [(b"", self.root)]
        seen = {self.root.ref}
        listed = 0
        blocks: set[int] = set()
        room = 0
        while stack:
            path, inode = stack.pop()
            yield path, inode
            if inode.type != layout.DIR or inode.size <= 3:
                continue
            if len(path) > _MAX_PATH:
                raise self.damaged("directories are nested too deeply")
            entries = self.entries(inode)
            # Honest listings do not overlap, so together they are no longer than the blocks they lie in.
            listed += inode.size - 3
            position, left = self._directory_table + inode.start, inode.offset + inode.size - 3
            while left > 0:
                data, following = self.metadata_block(position)
                if position not in blocks:
                    blocks.add(position)
                    room += len(data)
                left -= len(data)
                position = following
            if listed > room:
                raise self.damaged("directories share their listings")
            prefix = path + b"/" if path else b""
            below = []
            for name, ref, kind in entries:
                child = self.inode(ref)
                if layout.KINDS[child.type] != kind:
                    raise self.damaged("a directory entry and its inode are of different kinds")
                if child.type == layout.DIR:
                    if ref in seen:
                        raise self.damaged("a directory is in two places")
                    seen.add(ref)
                below.append((prefix + name, child))
            below.reverse()
            stack.extend(below)

    # -- contents ----------------------------------------------------------------------------------------------------

    def block_count(self, inode: Inode) -> int:
        """Return how many whole blocks a file has; a tail in a fragment is one more, and not counted."""
        size: int = self.block_size
        return -(-inode.size // size) if inode.fragment == layout.NONE32 else inode.size // size

    def blocks(self, inode: Inode) -> tuple[Sequence[int], list[int]]:
        """Return a file's size words, and the position of every 256th block. Kept on the inode.

        Raises:
            ImageError: the list is damaged or longer than any real one.
        """
        found = inode._map
        if found is not None:
            return found
        if inode.type != layout.FILE:
            raise self.damaged("contents are asked of something that is no file")
        count = self.block_count(inode)
        if count > _MAX_BLOCKS:
            raise self.damaged(f"a file claims {inode.size} bytes")
        raw = self._bytes(*inode._list, count * 4, self._directory_table)
        # For a long list a view needs a ninth of the memory, where bytes lie as the processor has them.
        view = count >= 1024 and sys.byteorder == "little"
        words: Sequence[int] = memoryview(raw).cast("I") if view else unpack(f"<{count}I", raw)
        position = inode.start
        positions: list[int] = [position]
        for first in range(0, count - _STRIDE + 1, _STRIDE):
            position += sum([word & 0xFFFFFF for word in words[first : first + _STRIDE]])
            positions.append(position)
        inode._map = found = (words, positions)
        return found

    def stored_block(self, inode: Inode, index: int) -> tuple[int, int]:
        """Return (position, size word) of a file's whole block; word 0 is a hole."""
        words, positions = self.blocks(inode)
        word: int
        stride = index // _STRIDE
        position = positions[stride]
        for word in words[stride * _STRIDE : index]:
            position += word & 0xFFFFFF
        return position, words[index]

    def stretch(self, inode: Inode) -> int | None:
        """Return where a file stands in one piece and uncompressed, None when it does not."""
        words, _ = self.blocks(inode)
        rest = inode.size % self.block_size
        if inode.fragment != layout.NONE32 or not words:
            return None
        whole = self.block_size | layout.BLOCK_UNCOMPRESSED
        last = rest | layout.BLOCK_UNCOMPRESSED if rest else whole
        return inode.start if words[-1] == last and set(words[:-1]) <= {whole} else None

    def inflate(self, position: int, word: int, limit: int) -> bytes:
        """Return the data block stored at a position, at most `limit` bytes; nothing is cached.

        Raises:
            ImageError: it is damaged or larger.
        """
        size = word & layout.BLOCK_SIZE_MASK
        if word >> 25 or not 0 < size <= self.block_size:
            raise self.damaged(f"the data block at {position} has an impossible size")
        data = self.raw(position, size)
        if word & layout.BLOCK_UNCOMPRESSED:
            if size > limit:
                raise self.damaged(f"the data block at {position} is too large")
            return data
        try:
            return self._inflate(data, limit)
        except ValueError as error:
            raise self.damaged(f"{error} (data block at {position})") from None

    def _keep(self, position: int, data: bytes) -> None:
        cache = self._data
        with self._lock:
            if position not in cache:
                cache[position] = data
                self._data_bytes += len(data)
                while self._data_bytes > self._data_cap and len(cache) > 1:
                    self._data_bytes -= len(cache.pop(next(iter(cache))))

    def _forget(self, position: int) -> None:
        if position in self._data:
            with self._lock:
                self._data_bytes -= len(self._data.pop(position, b""))

    def _stored(self, position: int, word: int, limit: int, *, keep: bool) -> bytes:
        """Return a stored data block, inflated: kept, from the thread that is at it, or from the image."""
        data = self._data.get(position)
        if data is not None:
            return data
        coming = self._coming.get(position)
        if coming is None and keep:
            mine = allocate_lock()
            mine.acquire()
            coming = self._coming.setdefault(position, mine)
            if coming is mine:
                try:
                    data = self.inflate(position, word, limit)
                    self._keep(position, data)
                    return data
                finally:
                    del self._coming[position]
                    mine.release()
        if coming is not None:
            with coming:  # until that thread has done
                pass
            data = self._data.get(position)
        # Nothing kept: it met damage, which everybody who asks is told.
        return self.inflate(position, word, limit) if data is None else data

    def read_block(self, inode: Inode, index: int, *, keep: bool = False) -> bytes:
        """Return block `index` of a file, inflated: block_size bytes, or what is left for the last one.

        The tail in a fragment counts as the last block. Fragments are cached, whole blocks only while `keep` is set:
        a server asked for a part of one will be asked for the rest, and one that has given away all of it will not.
        """
        size = self.block_size
        expected = min(size, inode.size - index * size)
        if index < 0 or expected <= 0:
            return b""
        if index >= self.block_count(inode):
            block = self.fragment_block(inode.fragment)
            data = block[inode.offset : inode.offset + expected]
        else:
            position, word = self.stored_block(inode, index)
            if not word:
                return bytes(expected)
            data = self._stored(position, word, expected, keep=keep)
            if not keep:
                self._forget(position)
        if len(data) != expected:
            raise self.damaged("a block holds fewer bytes than the file")
        return data

    def fragment(self, index: int) -> tuple[int, int]:
        """Return (position, size word) of a fragment block."""
        found = self._fragments.get(index)
        if found is None:
            if index >= self.superblock.fragment_count:
                raise self.damaged(f"there is no fragment {index}")
            raw = self._indexed(self.superblock.fragment_table, index, layout.FRAGMENT.size)
            position, word, _ = layout.FRAGMENT.unpack(raw)
            if len(self._fragments) >= 1024:
                self._fragments.clear()
            found = self._fragments[index] = (position, word)
        return found

    def all_fragments(self) -> list[tuple[int, int]]:
        """Return (position, size word) of every fragment block."""
        return [self.fragment(index) for index in range(self.superblock.fragment_count)]

    def fragment_block(self, index: int) -> bytes:
        """Return a fragment block, inflated and cached."""
        position, word = self.fragment(index)
        return self._stored(position, word, self.block_size, keep=True)

    def read(self, inode: Inode, offset: int = 0, size: int | None = None) -> bytes:
        """Return bytes of a file, fewer at its end. A huge file wants a size: memory is spent on what is asked for."""
        if inode.type != layout.FILE:
            raise self.damaged("contents are asked of something that is no file")
        end = inode.size if size is None else min(inode.size, offset + size)
        if offset >= end:
            return b""
        unit = self.block_size
        index, begin = divmod(offset, unit)
        if end <= (index + 1) * unit:  # within one block
            data = self.read_block(inode, index, keep=True)
            return data if not begin and len(data) == end - offset else data[begin : end - index * unit]
        parts = []
        while offset < end:
            data = self.read_block(inode, index, keep=end < (index + 1) * unit)
            if begin or len(data) > end - offset:
                data = data[begin : begin + end - offset]
                begin = 0
            parts.append(data)
            offset += len(data)
            index += 1
        return b"".join(parts)

    def pieces(self, inode: Inode) -> Iterator[tuple[int, bytes | None]]:
        """Yield (length, bytes) for a file's blocks in order, None for the bytes of a hole; nothing is cached."""
        words, _ = self.blocks(inode)
        position, left, unit = inode.start, inode.size, self.block_size
        for word in words:
            expected = min(left, unit)
            if word:
                data = self.inflate(position, word, expected)
                if len(data) != expected:
                    raise self.damaged("a block holds fewer bytes than the file")
                position += word & layout.BLOCK_SIZE_MASK
                yield expected, data
            else:
                yield expected, None
            left -= expected
        if left:
            yield left, self.read_block(inode, len(words))

    def stream(self, inode: Inode) -> Iterator[bytes]:
        """Yield a file's blocks in order, holes as zeros."""
        for length, data in self.pieces(inode):
            yield bytes(length) if data is None else data

    # -- extended attributes -----------------------------------------------------------------------------------------

    def xattrs(self, inode: Inode) -> dict[bytes, bytes]:
        """Return an inode's extended attributes by full name; kinds that this format does not name are left out.

        Raises:
            ImageError: the table is damaged, or has more than any file system could hold.
        """
        if inode.xattr == layout.NONE32:
            return {}
        table = self.superblock.xattr_table
        if table == layout.NONE64:
            return {}  # written without xattrs although inodes name them; the kernel sees none either
        if self._xattr_head is None:
            base, count, _ = layout.XATTR_TABLE.unpack(self.raw(table, layout.XATTR_TABLE.size))
            if not self._directory_table < base < table:
                raise self.damaged("the xattr table is out of order")
            self._xattr_head = base, count
        base, count = self._xattr_head
        if inode.xattr >= count:
            raise self.damaged("an inode names xattrs that are not there")
        ref, pairs, _ = layout.XATTR_ID.unpack(
            self._indexed(table + layout.XATTR_TABLE.size, inode.xattr, layout.XATTR_ID.size)
        )
        if pairs > _MAX_XATTRS:
            raise self.damaged(f"an inode claims {pairs} xattrs")
        position, offset = base + (ref >> 16), ref & 0xFFFF
        found: dict[bytes, bytes] = {}
        total = 0
        for _ in range(pairs):
            kind, length = layout.XATTR_KEY.unpack(self._bytes(position, offset, 4, table))
            offset += 4
            if length > 255:
                raise self.damaged("an xattr's name is too long")
            name = self._bytes(position, offset, length, table)
            offset += length
            (size,) = layout.XATTR_VALUE.unpack(self._bytes(position, offset, 4, table))
            offset += 4
            at, skip = position, offset
            offset += size if not kind & layout.XATTR_OUT_OF_LINE else 8
            if kind & layout.XATTR_OUT_OF_LINE:
                place = int.from_bytes(self._bytes(at, skip, 8, table), "little")
                at, skip = base + (place >> 16), place & 0xFFFF
                (size,) = layout.XATTR_VALUE.unpack(self._bytes(at, skip, 4, table))
                skip += 4
            total += size
            if size > layout.XATTR_VALUE_MAX or total > _MAX_XATTR_BYTES:
                raise self.damaged("an xattr's value is too long")
            value = self._bytes(at, skip, size, table)
            kind &= 0xFF
            if kind < len(layout.XATTR_PREFIXES) and b"\0" not in name:
                found[layout.XATTR_PREFIXES[kind] + name] = value
            # Keep the offset small: a long list must not be walked from its beginning for every pair.
            while True:
                data, following = self.metadata_block(position)
                if offset < len(data) or following >= table:
                    break
                offset -= len(data)
                position = following
        return found
