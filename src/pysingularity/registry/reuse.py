# SPDX-License-Identifier: Apache-2.0
"""Layers that were read before: their compressed blocks are copied out of the image they are in.

Every layer's contents are one stretch of an image's data, which depends on the layer and on which of its files upper
layers hide, and on nothing else. So a note of what a layer says and where its contents lie in a cached image is
enough to put it into another image by copying, without fetching, inflating or compressing anything; and the result
is the same to the last byte. Notes lie in the cache (`layer/`), one for a layer and what is hidden of it; they are
worth nothing without the image they speak of.
"""

from __future__ import annotations

import hashlib
import marshal
import os
import sys
import zlib
from array import array
from collections.abc import Callable, Iterable, Sequence

from pysingularity import messages
from pysingularity.cache import Cache
from pysingularity.registry.layers import Entry, Missing, mark_of
from pysingularity.squashfs import layout
from pysingularity.squashfs.node import FileData, Node

#: Changes when notes change; marshal's own form changes with Python.
MARK = f"layer-note 1 {sys.version_info.major}.{sys.version_info.minor} {sys.byteorder}\n".encode()
#: Layers below this many compressed bytes are not worth a note.
WORTH = 1 << 16


class Recorded:
    """A layer as another image has it.

    Attributes:
        entries: what it says, with data where this image will have it.
        fd, place, size: where its stretch lies.
        fragments: (position in the stretch, size word).
    """

    __slots__ = ("entries", "fd", "fragments", "place", "size")

    def __init__(self, entries: list[Entry], fd: int, place: int, size: int, fragments: list[tuple[int, int]]) -> None:
        self.entries, self.fd, self.place, self.size, self.fragments = entries, fd, place, size, fragments


class Reuse:
    """The notes for the layers of one image in the making.

    Arguments:
        digests: of the layers, the lowest first.
        form: settings that change a stretch's bytes.
    """

    def __init__(self, cache: Cache, digests: Sequence[str], sizes: Sequence[int], form: str) -> None:
        self._cache, self._digests, self._sizes, self._form = cache, digests, sizes, form
        self._fds: list[int] = []
        self._new: dict[str, str] = {}
        self._names: list[str] | None = None
        #: Layers that were copied.
        self.used: list[int] = []

    def _name(self, layer: int) -> str:
        return f"{self._digests[layer].partition(':')[2]}-{zlib.crc32(self._form.encode()):08x}-"

    def promising(self, layer: int) -> bool:
        """Return whether there is a note for a layer."""
        return self._any(layer) is not None

    def _any(self, layer: int) -> str | None:
        """Return the path of some note for a layer."""
        folder = os.path.join(self._cache.folder, "layer")
        if self._names is None:
            try:
                self._names = sorted(name for name in os.listdir(folder) if "." not in name)
            except OSError:
                self._names = []
        start = self._name(layer)
        return next((os.path.join(folder, name) for name in self._names if name.startswith(start)), None)

    def _load(self, path: str) -> dict[str, object] | None:
        """Return a note whose image is still there; another one is removed."""
        try:
            with open(path, "rb") as file:
                head = self._checked(file.read())
        except OSError:
            return None
        if head is None or self._cache.image(str(head["image"])) is None:
            try:
                os.unlink(path)
            except OSError:
                pass
            return None
        return head

    @staticmethod
    def _checked(data: bytes) -> dict[str, object] | None:
        """Return a note's content when it is whole; what is damaged never reaches marshal."""
        if not data.startswith(MARK):
            return None
        body = data[len(MARK) + 32 :]
        if hashlib.sha256(body).digest() != data[len(MARK) : len(MARK) + 32]:
            return None
        found = marshal.loads(zlib.decompress(body))
        return found if isinstance(found, dict) else None

    def recall(self, layer: int, start: int, first: int, mark: Callable[[Iterable[bytes]], int]) -> Recorded | None:
        """Return a layer as another image has it, moved to a stretch at `start` whose fragments begin at `first`.

        Arguments:
            mark: tells by the paths of the layer's files which of them are hidden here. A note is one of a layer and
                such a mark; any note of the layer has the paths.
        """
        known = self._any(layer)
        head = self._load(known) if known is not None else None
        if head is None or known is None:
            return None
        rows: list[tuple[object, ...]] = head["rows"]  # type: ignore[assignment]
        wanted = f"{mark(row[0] for row in rows if len(row) > 2 and row[1] == 'file'):08x}"  # type: ignore[misc]
        if known.rpartition("-")[2] != wanted:
            head = self._load(os.path.join(os.path.dirname(known), self._name(layer) + wanted))
            if head is None:
                return None
            rows = head["rows"]  # type: ignore[assignment]
        path = self._cache.image_path(str(head["image"]))
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
        self._fds.append(fd)
        place, size, fragments = head["place"], head["size"], head["fragments"]
        entries = [_unpack(row, start, first, layer) for row in rows]
        return Recorded(entries, fd, place, size, fragments)  # type: ignore[arg-type]

    def note(
        self,
        layer: int,
        entries: list[Entry],
        start: int,
        size: int,
        first: int,
        fragments: list[tuple[int, int]],
    ) -> None:
        """Write down a layer that was just read; the note counts after `publish`."""
        if self._sizes[layer] < WORTH:
            return
        head = {
            "size": size,
            "place": start,
            "fragments": [(position - start, word) for position, word in fragments],
            "rows": [_pack(path, what, start, first) for path, what in entries],
        }
        files = [what for _, what in entries if isinstance(what, Node) and what.kind == "file"]
        mark = mark_of(isinstance(node.source, Missing) for node in files)
        final = self._cache.path("layer", f"{self._name(layer)}{mark:08x}")
        new = f"{final}.{os.getpid()}-{os.urandom(4).hex()}.new"
        try:
            with open(new, "wb") as file:
                file.write(zlib.compress(marshal.dumps(head), 1))
        except OSError as error:
            messages.debug(f"{new}: {error}")
            return
        self._new[final] = new

    def publish(self, image: str, offset: int) -> None:
        """Make the notes count: the image has its key in the cache, and its squashfs begins at `offset`."""
        for final, new in self._new.items():
            try:
                with open(new, "rb") as file:
                    head = marshal.loads(zlib.decompress(file.read()))
                head["image"], head["place"] = image, head["place"] + offset
                body = zlib.compress(marshal.dumps(head), 1)
                with open(new, "wb") as file:
                    file.write(MARK + hashlib.sha256(body).digest() + body)
                os.rename(new, final)
            except OSError as error:
                messages.debug(f"{new}: {error}")
        self._new.clear()

    def close(self) -> None:
        """Let go of other images, and of notes that were not published."""
        for fd in self._fds:
            os.close(fd)
        self._fds.clear()
        for new in self._new.values():
            try:
                os.unlink(new)
            except OSError:
                pass


def _pack(path: bytes, what: Node | bytes | None, start: int, first: int) -> tuple[object, ...]:
    """Return an entry as plain values, positions counted from the stretch's start."""
    if not isinstance(what, Node):
        return path, what
    data: object = None
    if what.kind == "file":
        if isinstance(what.source, Missing):
            data = (what.source.index, what.source.size)
        elif what.data is not None:
            one = what.data
            fragment = one.fragment - first if one.fragment != layout.NONE32 else -1
            words = bytes(array("I", one.words)) if len(one.words) else b""
            data = (one.size, one.start - start if one.start else -1, words, fragment, one.offset, one.sparse)
    common = (path, what.kind, what.mode, what.uid, what.gid, what.mtime)
    return (*common, what.xattrs, what.target, what.rdev, data)


def _unpack(row: tuple[object, ...], start: int, first: int, layer: int) -> Entry:
    """Return the entry that `_pack` made plain."""
    if len(row) == 2:
        return row  # type: ignore[return-value]
    path, kind, mode, uid, gid, mtime, xattrs, target, rdev, data = row
    node = Node(kind, mode, uid, gid, mtime)  # type: ignore[arg-type]
    node.xattrs, node.target, node.rdev = xattrs, target, rdev  # type: ignore[assignment]
    if isinstance(data, tuple):
        if len(data) == 2:
            node.source = Missing(layer, *data)
        else:
            size, at, words, fragment, offset, sparse = data
            file = node.data = FileData(size)
            file.start = at + start if at >= 0 else 0
            file.words = array("I", words)
            file.fragment = fragment + first if fragment >= 0 else layout.NONE32
            file.offset, file.sparse = offset, sparse
    return path, node  # type: ignore[return-value]
