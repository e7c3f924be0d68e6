# SPDX-License-Identifier: Apache-2.0
"""A streaming reader of tar archives: one member after the other, data read where it lies, everything bounded.

Understands the old V7 form, ustar, GNU (long names, base-256 numbers, old sparse files) and PAX (names, owners, sizes,
times, extended attributes of star and libarchive, sparse files 0.0, 0.1 and 1.0). Names are bytes and may be of any
encoding. Three times faster than the standard library's reader, which matters for images with 50 000 files, and
stricter: archives come from strangers. Sources: POSIX.1-2017 pax, "Basic Tar Format" of the GNU tar manual.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Protocol
from urllib.parse import unquote_to_bytes

from pysingularity.errors import ImageError

BLOCK = 512
_ZERO = bytes(BLOCK)
#: The longest header extension (PAX records, long names); xattrs of 64 KiB fit many times.
MAX_EXTENSION = 4 << 20
MAX_NAME, MAX_PATH = 255, 1 << 13
#: The largest file; holes are cheap, but their block lists are not.
MAX_FILE = 1 << 40
MAX_ID = (1 << 32) - 1
#: Extended attributes of one member, together (the kernel allows 64 KiB for one).
MAX_XATTRS = 1 << 20

#: What the type flag means; the names are those of squashfs nodes, and "link" is a hard link.
KINDS = {
    0: "file",
    0x30: "file",
    0x31: "link",
    0x32: "symlink",
    0x33: "char",
    0x34: "block",
    0x35: "dir",
    0x36: "fifo",
    0x37: "file",
    0x53: "file",
    0x44: "dir",
}
_EXTENSIONS = frozenset(b"xgLKXVN")


class Source(Protocol):
    """Where a tar comes from: exact reads, and skipping."""

    what: str

    def read(self, size: int) -> bytes:
        """Return `size` bytes, fewer only at the end."""

    def skip(self, size: int) -> bool:
        """Pass over bytes; return whether they were there."""


class Member:
    """One entry. `path` is clean: no leading or trailing slash, no `.`, no `..`; b"" is the root itself.

    Attributes:
        kind: "file", "dir", "symlink", "link" (hard link), "char", "block" or "fifo".
        size: bytes of the file's content, holes included.
        target: of a symbolic link as stored; of a hard link as a clean path.
        sparse: list of (offset, length) that are stored, or None.
    """

    __slots__ = ("gid", "kind", "mode", "mtime", "path", "rdev", "size", "sparse", "stored", "target", "uid", "xattrs")

    path: bytes
    kind: str
    mode: int
    uid: int
    gid: int
    mtime: int
    size: int
    stored: int
    target: bytes
    rdev: int
    xattrs: dict[bytes, bytes] | None
    sparse: list[tuple[int, int]] | None


class TarReader:
    """Iterate over the members of an archive; between two steps, `read` gives the content of the latest.

    Arguments:
        source: the plain archive.

    Raises (while iterating and reading):
        ImageError: the archive is damaged, ends early, or has a name or number that no honest tool writes.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._left = 0  # stored bytes of the current member that nobody has read yet
        self._padding = 0
        self._holes: list[tuple[int, int]] | None = None
        self._position = self._size = 0
        self._global: dict[bytes, bytes] = {}

    def fail(self, why: str) -> ImageError:
        """Return the error for damage of this archive."""
        return ImageError("bad-layer", f"{self._source.what}: {why}")

    def read(self, size: int) -> bytes:
        """Return up to `size` bytes of the current member's content; fewer only at its end."""
        if self._holes is not None:
            return self._read_sparse(size)
        if size > self._left:
            size = self._left
        data = self._source.read(size)
        if len(data) != size:
            raise self.fail("the archive ends in the middle of a file")
        self._left -= size
        return data

    def _read_sparse(self, size: int) -> bytes:
        """Lay the stored pieces between holes."""
        end = min(self._position + size, self._size)
        parts = []
        while self._position < end:
            while self._holes and self._holes[0][1] == 0:
                self._holes.pop(0)
            if not self._holes:
                parts.append(bytes(end - self._position))
                self._position = end
                break
            start, length = self._holes[0]
            if self._position < start:
                gap = min(start, end) - self._position
                parts.append(bytes(gap))
                self._position += gap
                continue
            take = min(length, end - self._position)
            data = self._source.read(take)
            if len(data) != take:
                raise self.fail("the archive ends in the middle of a sparse file")
            self._left -= take
            parts.append(data)
            self._position += take
            self._holes[0] = (start + take, length - take)
        return b"".join(parts)

    def __iter__(self) -> Iterator[Member]:
        source = self._source
        read = source.read
        long_name: bytes | None = None
        long_link: bytes | None = None
        records: list[tuple[bytes, bytes]] = []
        first = True
        while True:
            rest = self._left + self._padding
            if rest:
                if not source.skip(rest):
                    raise self.fail("the archive ends in the middle of a file")
                self._left = self._padding = 0
            self._holes = None
            head = read(BLOCK)
            if len(head) != BLOCK:
                if head or long_name is not None or long_link is not None or records:
                    raise self.fail("the archive ends in the middle of a header")
                return  # without the closing blocks: usual enough
            if head[0] == 0 and head == _ZERO:
                return
            wanted = _octal(head, 148, 156)
            if sum(head) - sum(head[148:156]) + 256 != wanted and _signed_sum(head) != wanted:
                raise self.fail(
                    "neither a tar archive nor a compression that we know" if first else "wrong checksum of a header"
                )
            first = False
            flag = head[156]
            size = _number(head, 124, 136)
            if size < 0:
                raise self.fail("negative size")
            if flag in _EXTENSIONS:
                if size > MAX_EXTENSION:
                    raise self.fail(f"header extension of {size} bytes")
                data = read(size)
                if len(data) != size or not source.skip(-size % BLOCK):
                    raise self.fail("the archive ends in the middle of a header")
                if flag in b"xX":
                    records = self._records(data)
                elif flag == 0x67:  # g
                    self._global.update(self._records(data))
                    if sum(len(key) + len(value) for key, value in self._global.items()) > MAX_EXTENSION:
                        raise self.fail("too many global header records")
                elif flag == 0x4C:  # L
                    long_name = data.rstrip(b"\0")
                elif flag == 0x4B:  # K
                    long_link = data.rstrip(b"\0")
                continue
            yield self._member(head, flag, size, records, long_name, long_link)
            long_name = long_link = None
            records = []

    def _member(
        self,
        head: bytes,
        flag: int,
        size: int,
        records: list[tuple[bytes, bytes]],
        long_name: bytes | None,
        long_link: bytes | None,
    ) -> Member:
        kind = KINDS.get(flag)
        if kind is None:
            raise self.fail(f"member of unknown type {chr(flag)!r}")
        member = Member()
        name = head[:100].partition(b"\0")[0]
        if head[257:263] == b"ustar\0" and head[345]:
            name = head[345:500].partition(b"\0")[0] + b"/" + name
        link = head[157:257].partition(b"\0")[0]
        if long_name is not None:
            name = long_name
        if long_link is not None:
            link = long_link
        member.mode = _number(head, 100, 108) & 0o7777
        member.uid = _number(head, 108, 116)
        member.gid = _number(head, 116, 124)
        member.mtime = _number(head, 136, 148)
        member.xattrs = member.sparse = None
        member.rdev = 0
        member.size = member.stored = size
        if records or self._global:
            extra = dict(self._global) if self._global else {}
            extra.update(records)
            name, link = extra.get(b"path", name), extra.get(b"linkpath", link)
            self._apply_records(member, extra)
            if kind == "file" and any(key.startswith(b"GNU.sparse.") for key in extra):
                name = extra.get(b"GNU.sparse.name", name)
                self._pax_sparse(member, extra, records)
        if not (0 <= member.uid <= MAX_ID and 0 <= member.gid <= MAX_ID):
            raise self.fail(f"{show(name)}: owner {member.uid}:{member.gid} is out of range")
        member.mtime = min(max(member.mtime, 0), MAX_ID)  # squashfs has 32 bits without a sign
        if kind == "file" and name[-1:] == b"/" and flag != 0x53:
            kind = "dir"  # as V7 wrote folders
        if kind == "file":
            if flag == 0x53:
                self._gnu_sparse(member, head)
            if member.size > MAX_FILE:
                raise self.fail(f"{show(name)}: file of {member.size} bytes")
            self._left = member.stored
        else:  # nothing else has data, whatever its size says; only GNU's dumped folders carry a list of names
            self._left = member.stored if flag == 0x44 else 0
            member.size = 0
            if kind in ("char", "block"):
                major, minor = _number(head, 329, 337), _number(head, 337, 345)
                if not (0 <= major < 1 << 12 and 0 <= minor < 1 << 20):
                    raise self.fail(f"{show(name)}: device number {major}:{minor} is out of range")
                member.rdev = minor & 0xFF | major << 8 | (minor & ~0xFF) << 12
        self._padding = -member.stored % BLOCK if self._left or kind == "file" else 0
        self._size, self._position = member.size, 0
        self._holes = list(member.sparse) if member.sparse is not None else None
        member.kind = kind
        member.path = self.clean(name)
        member.target = self.clean(link) if kind == "link" else link
        if b"\0" in link:
            raise self.fail(f"{show(name)}: link with a NUL byte")
        return member

    def _records(self, data: bytes) -> list[tuple[bytes, bytes]]:
        """Take PAX records apart: "LENGTH KEY=VALUE\\n", where the value may hold anything."""
        found = []
        at, end = 0, len(data)
        while at < end:
            space = data.find(b" ", at, at + 20)
            digits = data[at:space] if space > 0 else b""
            if not digits.isdigit():
                if not data[at:].strip(b"\0"):
                    break
                raise self.fail("damaged PAX record")
            length = int(digits)
            if length < space - at + 3 or at + length > end or data[at + length - 1] != 0x0A:
                raise self.fail("damaged PAX record")
            key, equals, value = data[space + 1 : at + length - 1].partition(b"=")
            if not equals or not key:
                raise self.fail("damaged PAX record")
            found.append((key, value))
            at += length
        return found

    def _apply_records(self, member: Member, extra: dict[bytes, bytes]) -> None:
        """Put PAX values in the place of the header's."""
        try:
            if b"size" in extra:
                member.size = member.stored = int(extra[b"size"])
                if member.size < 0:
                    raise ValueError("negative size")
            if b"uid" in extra:
                member.uid = int(extra[b"uid"])
            if b"gid" in extra:
                member.gid = int(extra[b"gid"])
            if b"mtime" in extra:
                whole, _, part = extra[b"mtime"].partition(b".")
                member.mtime = int(whole or b"0")
                if whole[:1] == b"-" and part.strip(b"0"):
                    member.mtime -= 1
        except ValueError:
            raise self.fail("damaged number in a PAX record") from None
        xattrs = {}
        for key, value in extra.items():
            if key.startswith(b"SCHILY.xattr."):
                xattrs[key[13:]] = value
            elif key.startswith(b"LIBARCHIVE.xattr."):
                try:
                    decoded = base64.b64decode(value + b"=" * (-len(value) % 4), validate=True)
                except ValueError:
                    raise self.fail("damaged extended attribute") from None
                xattrs.setdefault(unquote_to_bytes(key[17:]), decoded)
        if xattrs:
            if sum(len(key) + len(value) for key, value in xattrs.items()) > MAX_XATTRS:
                raise self.fail("extended attributes of more than 1 MiB")
            if any(not key or len(key) > 255 or len(value) > 65536 for key, value in xattrs.items()):
                raise self.fail("extended attribute larger than the kernel allows")
            member.xattrs = xattrs

    def _pax_sparse(self, member: Member, extra: dict[bytes, bytes], records: list[tuple[bytes, bytes]]) -> None:
        """Read the map of a sparse file in one of the three PAX forms."""
        try:
            if extra.get(b"GNU.sparse.major") == b"1":
                real = int(extra[b"GNU.sparse.realsize"])
                pieces, used = self._sparse_table()
                member.stored -= used
                if member.stored < 0:
                    raise ValueError
            elif b"GNU.sparse.map" in extra:
                numbers = [int(word) for word in extra[b"GNU.sparse.map"].split(b",")]
                pieces = list(zip(numbers[::2], numbers[1::2], strict=True))
                real = int(extra[b"GNU.sparse.size"])
            elif b"GNU.sparse.size" in extra:
                offsets = [int(value) for key, value in records if key == b"GNU.sparse.offset"]
                lengths = [int(value) for key, value in records if key == b"GNU.sparse.numbytes"]
                pieces = list(zip(offsets, lengths, strict=True))
                real = int(extra[b"GNU.sparse.size"])
            else:
                raise ValueError
        except (ValueError, KeyError):
            raise self.fail("damaged map of a sparse file") from None
        self._set_sparse(member, pieces, real)

    def _sparse_table(self) -> tuple[list[tuple[int, int]], int]:
        """Read the map of form 1.0, which stands before the data: decimal numbers on lines of their own."""
        data = bytearray()
        wanted = 1
        while data.count(b"\n") < wanted:
            block = self._source.read(BLOCK)
            if len(block) != BLOCK or len(data) > MAX_EXTENSION:
                raise ValueError
            data += block
            if wanted == 1 and b"\n" in data:
                count = int(data[: data.index(b"\n")])
                if not 0 <= count <= MAX_EXTENSION // 4:
                    raise ValueError
                wanted = 1 + 2 * count
        numbers = [int(word) for word in bytes(data).split(b"\n")[1:wanted]]
        return list(zip(numbers[::2], numbers[1::2], strict=True)), len(data)

    def _gnu_sparse(self, member: Member, head: bytes) -> None:
        """Read the map of the old GNU form: four pieces in the header, 21 in every extension block."""
        pieces = []
        block, at, count, more = head, 386, 4, head[482]
        while True:
            for index in range(count):
                start = at + 24 * index
                if block[start + 12]:
                    pieces.append((_number(block, start, start + 12), _number(block, start + 12, start + 24)))
            if not more:
                break
            block = self._source.read(BLOCK)
            if len(block) != BLOCK or len(pieces) > MAX_EXTENSION // 16:
                raise self.fail("damaged map of a sparse file")
            at, count, more = 0, 21, block[504]
        self._set_sparse(member, pieces, _number(head, 483, 495))

    def _set_sparse(self, member: Member, pieces: list[tuple[int, int]], real: int) -> None:
        """Check a map: pieces in order, inside the file, and exactly as long as what is stored."""
        position = 0
        for offset, length in pieces:
            if offset < position or length < 0 or offset + length > real:
                raise self.fail("damaged map of a sparse file")
            position = offset + length
        if sum(length for _, length in pieces) != member.stored or real > MAX_FILE:
            raise self.fail("damaged map of a sparse file")
        member.sparse, member.size = pieces, real

    def clean(self, path: bytes) -> bytes:
        """Return a path relative to the root without `.`, `..` and doubled slashes.

        Raises:
            ImageError: the path climbs above the root, or a part of it is longer than any file system allows.
        """
        if path[:2] == b"./":
            path = path[2:]
        if path[-1:] == b"/":
            path = path.rstrip(b"/")
        if len(path) <= MAX_NAME and b"/." not in path and b"//" not in path and path[:1] not in (b"/", b".", b""):
            if b"\0" in path:
                raise self.fail(f"{show(path)}: name with a NUL byte")
            return path
        if len(path) > MAX_PATH or b"\0" in path:
            raise self.fail(f"{show(path[:60])}…: no name for a file")
        parts: list[bytes] = []
        for part in path.split(b"/"):
            if part == b"..":
                if not parts:
                    raise ImageError(
                        "escaping-path", f"{self._source.what}: {show(path)} climbs out of the image: refused"
                    )
                parts.pop()
            elif part not in (b"", b"."):
                if len(part) > MAX_NAME:
                    raise self.fail(f"{show(part[:60])}…: name of {len(part)} bytes")
                parts.append(part)
        return b"/".join(parts)


def show(path: bytes) -> str:
    """Return bytes of a name as text for a message: control characters cannot play with the terminal."""
    text = path.decode("utf-8", "backslashreplace")
    return text if text.isprintable() else ascii(text)[1:-1]


def _octal(head: bytes, start: int, end: int) -> int:
    """Read an octal field; -1 when it is none."""
    try:
        return int(head[start:end].partition(b"\0")[0].strip() or b"0", 8)
    except ValueError:
        return -1


def _number(head: bytes, start: int, end: int) -> int:
    """Read a numeric field: octal, or base 256 with the top bit set (GNU), two's complement.

    Raises:
        ImageError: neither of them.
    """
    lead = head[start]
    if lead & 0x80:
        if lead == 0xFF:
            return int.from_bytes(head[start:end], "big", signed=True)
        return int.from_bytes(bytes([lead & 0x7F]) + head[start + 1 : end], "big")
    try:
        return int(head[start : end - 1] if head[end - 1] in b"\0 " else head[start:end], 8)
    except ValueError:
        value = _octal(head, start, end)
        if value < 0:
            raise ImageError("bad-layer", f"damaged number in a tar header: {head[start:end]!r}") from None
        return value


def _signed_sum(head: bytes) -> int:
    """Return the checksum as some old tools made it, over signed bytes."""
    rest = head[:148] + b"        " + head[156:]
    return sum(value - 256 if value > 127 else value for value in rest)
