# SPDX-License-Identifier: Apache-2.0
"""OCI layers to one tree of nodes, without unpacking anything: the rules of whiteouts, links and replaced folders.

Two passes. `Merge.scan` reads the layers top first and gives every file's content to the writer at once, unless an
upper layer surely hides it: so nothing that cannot be seen is ever compressed, and squashfs does not care in which
order data lies. `Merge.apply` then makes the exact tree bottom up in memory, as an extractor would on a disk, with
symbolic links in parent paths followed inside the root only. A wrong guess of the first pass costs space or a second
look, never truth.

Source: OCI image specification, "Image Layer Filesystem Changeset". Owners, modes, devices and attributes are the
layer's. Memory: about half a KiB an entry; contents are streamed.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterable

from pysingularity.errors import ImageError
from pysingularity.registry.tar import Member, TarReader, show
from pysingularity.squashfs.node import Node

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol

    from pysingularity.registry.reuse import Recorded, Reuse
    from pysingularity.squashfs.writer import FileData

    class Store(Protocol):
        """Where contents go: the squashfs writer, or something that looks like it."""

        def store(self, read: Callable[[int], bytes], size: int) -> FileData:
            """Keep `size` bytes that `read` gives."""

        def store_bytes(self, data: bytes) -> FileData:
            """Keep a small content."""

        def begin_stretch(self) -> tuple[int, int]:
            """Begin a stretch that depends on nothing before; see `SquashfsWriter`."""

        def fragments(self, first: int) -> list[tuple[int, int]]:
            """Return fragments from a number on."""

        def take_stretch(self, fd: int, place: int, size: int, fragments: Iterable[tuple[int, int]]) -> None:
            """Append a stretch written before."""


WHITEOUT = b".wh."
OPAQUE = b".wh..wh..opq"
#: Files up to this size are read whole before they are stored.
SMALL = 1 << 17
#: More entries than any real image has; each costs memory. SINGULARITY_MAX_ENTRIES changes it.
MAX_ENTRIES = 8_000_000
#: Symbolic links followed on the way to one parent folder (the kernel's number).
MAX_LINKS = 40

#: What one layer says about one path: a node, the clean target of a hard link, or None for a whiteout.
Entry = tuple[bytes, "Node | bytes | None"]


class Missing:
    """Where the content of a file lies that was passed over; sits in `Node.source`."""

    __slots__ = ("index", "layer", "size")

    def __init__(self, layer: int, index: int, size: int) -> None:
        self.layer, self.index, self.size = layer, index, size


class Merge:
    """Merge layers into one tree.

    Arguments:
        store: takes the contents.
        when: modification time (seconds) of folders that no layer names.
    """

    def __init__(self, store: Store, *, when: int = 0) -> None:
        self._store = store
        self._when = when
        self._layers: dict[int, list[Entry]] = {}
        self._white: set[bytes] = set()
        self._opaque: set[bytes] = set()
        self._plain: set[bytes] = set()
        self._folders: set[bytes] = set()
        self.entries = 0
        self.content = 0
        limit = os.environ.get("SINGULARITY_MAX_ENTRIES", "")
        self._most = int(limit) if limit.isdigit() else MAX_ENTRIES

    def scan(self, reader: TarReader, layer: int) -> None:
        """Read one layer; upper layers must have been read before. `layer` counts from the lowest, 0.

        Raises:
            ImageError: the layer is damaged or hostile.
        """
        entries: list[Entry] = []
        add = entries.append
        white: set[bytes] = set()
        opaque: set[bytes] = set()
        plain: set[bytes] = set()
        folders: set[bytes] = set()
        hidden = self._hider()
        store, small = self._store.store, self._store.store_bytes
        upper_plain, upper_folders, upper_white = self._plain, self._folders, self._white
        budget = self._most - self.entries
        index = -1
        for index, member in enumerate(reader):
            if index >= budget:
                raise ImageError(
                    "too-many-entries",
                    f"the image has more than {self._most} entries",
                    hint="SINGULARITY_MAX_ENTRIES raises the limit; an entry costs about half a KiB of memory",
                )
            path, kind = member.path, member.kind
            if b".wh." in path and self._whiteout(path, reader, white, opaque, add):
                continue
            if kind == "dir":
                folders.add(path)
                add((path, _node(member)))
                continue
            if not path:
                raise reader.fail("the root of the image is no folder")
            plain.add(path)
            if kind == "link":
                add((path, member.target))
                continue
            node = _node(member)
            if kind == "file":
                size = member.size
                if (
                    path in upper_plain
                    or path in upper_white
                    or path in upper_folders
                    or hidden(path.rpartition(b"/")[0])
                ):  # the same question as in `hidden_mark`
                    node.source = Missing(layer, index, size)
                else:
                    node.data = small(reader.read(size)) if size <= SMALL else store(reader.read, size)
                    self.content += size
            add((path, node))
        self.entries += index + 1
        self._layers[layer] = entries
        self._white |= white
        self._opaque |= opaque
        self._plain |= plain
        self._folders |= folders

    def entries_of(self, layer: int) -> list[Entry]:
        """Return what a layer says, before `apply` has used it up."""
        return self._layers[layer]

    def hidden_mark(self, files: Iterable[bytes]) -> int:
        """Return a number that tells which of a layer's files the layers above hide, given their paths in order."""
        hidden = self._hider()
        plain, white, folders = self._plain, self._white, self._folders
        return mark_of(
            path in plain or path in white or path in folders or hidden(path.rpartition(b"/")[0]) for path in files
        )

    def take(self, recorded: Recorded, layer: int) -> None:
        """Use a layer that was read for another image; its stretch has been taken over."""
        self.entries += len(recorded.entries)
        self._layers[layer] = recorded.entries
        white: set[bytes] = set()
        opaque: set[bytes] = set()
        for path, what in recorded.entries:
            if what is None:
                folder, _, name = path.rpartition(b"/")
                if name == OPAQUE:
                    opaque.add(folder)
                else:
                    white.add(folder + b"/" + name[4:] if folder else name[4:])
            elif isinstance(what, Node) and what.kind == "dir":
                self._folders.add(path)
            else:
                self._plain.add(path)
            if isinstance(what, Node) and isinstance(what.source, Missing):
                what.source.layer = layer
            elif isinstance(what, Node) and what.data is not None:
                self.content += what.data.size
        self._white |= white
        self._opaque |= opaque

    def _hider(self) -> Callable[[bytes], bool]:
        """Return a function: does an upper layer hide everything below this folder?"""
        verdicts: dict[bytes, bool] = {b"": b"" in self._opaque}
        white, opaque, plain = self._white, self._opaque, self._plain

        def hidden(folder: bytes) -> bool:
            trail = []
            verdict = verdicts.get(folder)
            while verdict is None:
                trail.append(folder)
                if folder in white or folder in opaque or folder in plain:
                    verdict = True
                else:
                    folder = folder.rpartition(b"/")[0]
                    verdict = verdicts.get(folder)
            for known in trail:
                verdicts[known] = verdict
            return verdict

        return hidden

    @staticmethod
    def _whiteout(
        path: bytes, reader: TarReader, white: set[bytes], opaque: set[bytes], add: Callable[[Entry], None]
    ) -> bool:
        """Take note of a whiteout; return False when the path is an ordinary one after all."""
        folder, _, name = path.rpartition(b"/")
        if name == OPAQUE:
            opaque.add(folder)
            add((path, None))
            return True
        if any(part.startswith(b".wh..wh.") for part in path.split(b"/")):
            return True  # bookkeeping of aufs, which never was part of an image
        if not name.startswith(WHITEOUT):
            return False
        target = name[4:]
        if target in (b"", b".", b".."):
            raise reader.fail(f"{show(path)}: whiteout of nothing")
        white.add(folder + b"/" + target if folder else target)
        add((path, None))
        return True

    def apply(self) -> Node:
        """Return the tree of all layers that were scanned; their lists are given up on the way.

        Raises:
            ImageError: a hard link leads nowhere, or a path goes in circles.
        """
        root = Node("dir", mode=0o755, mtime=self._when)
        for layer in sorted(self._layers):
            _apply(root, self._layers.pop(layer), self._when)
        return root

    def missing(self, root: Node) -> dict[int, dict[int, list[Node]]]:
        """Return visible files whose content was passed over: layer → index of the member → nodes."""
        found: dict[int, dict[int, list[Node]]] = {}
        stack, seen = [root], set()
        while stack:
            for child in (stack.pop().children or {}).values():
                if child.kind == "dir":
                    stack.append(child)
                elif isinstance(child.source, Missing) and id(child) not in seen:
                    seen.add(id(child))
                    found.setdefault(child.source.layer, {}).setdefault(child.source.index, []).append(child)
        return found

    def fill(self, reader: TarReader, wanted: dict[int, list[Node]]) -> None:
        """Read a layer again for the contents of some members (by index)."""
        last = max(wanted)
        for index, member in enumerate(reader):
            nodes = wanted.get(index)
            if nodes:
                size = member.size
                data = (
                    self._store.store_bytes(reader.read(size))
                    if size <= SMALL
                    else self._store.store(reader.read, size)
                )
                self.content += size
                for node in nodes:
                    node.data, node.source = data, None
            if index == last:
                return
        raise reader.fail("the layer has changed between two looks at it")


def mark_of(hidden: Iterable[bool]) -> int:
    """Return a number for a row of truths."""
    return zlib.crc32(bytes(hidden))


def _node(member: Member) -> Node:
    """Return the node of a member, without content."""
    kind = member.kind
    node = Node(
        kind,
        mode=0o777 if kind == "symlink" else member.mode,  # modes of links in archives are noise
        uid=member.uid,
        gid=member.gid,
        mtime=member.mtime,
    )
    if member.xattrs:
        node.xattrs = member.xattrs
    if kind == "symlink":
        node.target = member.target
    elif kind in ("char", "block"):
        node.rdev = member.rdev
    return node


def _apply(root: Node, entries: list[Entry], when: int) -> None:
    """Apply one layer to a tree: its whiteouts first, for they speak of lower layers wherever they stand."""
    for path, what in entries:
        if what is None:
            folder, _, name = path.rpartition(b"/")
            parent = walk(root, folder, make=False)
            if parent is None or parent.children is None:
                continue
            if name == OPAQUE:
                parent.children.clear()
            else:
                parent.children.pop(name[4:], None)
    parents: dict[bytes, Node] = {}
    for path, what in entries:
        if what is None:
            continue
        if not path:
            if isinstance(what, Node):
                _take_over(root, what)
            continue
        folder, _, name = path.rpartition(b"/")
        parent = parents.get(folder)
        if parent is None:
            parent = parents[folder] = walk(root, folder, make=True, when=when) or root
        children = parent.children
        assert children is not None
        old = children.get(name)
        if isinstance(what, bytes):
            what = _linked(root, what, path)
            if what is old:
                continue
        elif what.kind == "dir" and old is not None and old.kind == "dir":
            _take_over(old, what)
            continue
        if old is not None and old.kind in ("dir", "symlink"):
            parents.clear()  # paths known so far may have led through it
        children[name] = what


def _take_over(folder: Node, new: Node) -> None:
    """Give an existing folder the attributes of a later entry; its children stay."""
    folder.mode, folder.uid, folder.gid = new.mode, new.uid, new.gid
    folder.mtime, folder.xattrs = new.mtime, new.xattrs


def _linked(root: Node, target: bytes, path: bytes) -> Node:
    """Return the node that a hard link means."""
    folder, _, name = target.rpartition(b"/")
    parent = walk(root, folder, make=False) if target else None
    node = parent.children.get(name) if parent is not None and parent.children else None
    if node is None or node.kind == "dir":
        what = "a folder" if node is not None else "nothing in the image"
        raise ImageError("bad-hard-link", f"{show(path)}: hard link to {what}: {show(target) or '/'}")
    return node


def walk(root: Node, path: bytes, *, make: bool, when: int = 0) -> Node | None:
    """Return the folder at a clean path, links followed inside the root.

    Arguments:
        make: make what is missing (and what is no folder) as root's folder with mode 0755; otherwise return None.
        when: modification time of folders made.

    Raises:
        ImageError: more than 40 links on the way.
    """
    todo = path.split(b"/")[::-1] if path else []
    trail = [root]
    links = 0
    while todo:
        part = todo.pop()
        if part in (b"", b"."):
            continue
        if part == b"..":
            if len(trail) > 1:
                trail.pop()
            continue
        children = trail[-1].children
        assert children is not None
        child = children.get(part)
        if child is not None and child.kind == "dir":
            trail.append(child)
        elif child is not None and child.kind == "symlink":
            links += 1
            if links > MAX_LINKS:
                raise ImageError("link-loop", f"{show(path)}: too many symbolic links on the way")
            if child.target[:1] == b"/":
                del trail[1:]
            todo += child.target.split(b"/")[::-1]
        elif not make:
            return None
        else:
            made = children[part] = Node("dir", mode=0o755, mtime=when)
            trail.append(made)
    return trail[-1]


def merge_layers(
    open_layer: Callable[[int], TarReader],
    count: int,
    store: Store,
    *,
    when: int = 0,
    done: Callable[[int], None] | None = None,
    reuse: Reuse | None = None,
) -> tuple[Node, Merge]:
    """Return the tree of `count` layers and the merge that made it (for its numbers).

    Arguments:
        open_layer: returns a reader at the start of layer n (0 is the lowest); may be asked twice for one.
        store: takes contents (see `Merge`).
        done: told after a layer was read.
        reuse: knows layers that were read for other images, and remembers these.

    Raises:
        ImageError: a layer is damaged or hostile.
    """
    merge = Merge(store, when=when)
    for layer in reversed(range(count)):
        start, first = store.begin_stretch()
        recorded = reuse.recall(layer, start, first, merge.hidden_mark) if reuse is not None else None
        if reuse is not None and recorded is not None:
            reuse.used.append(layer)
            store.take_stretch(recorded.fd, recorded.place, recorded.size, recorded.fragments)
            merge.take(recorded, layer)
        else:
            merge.scan(open_layer(layer), layer)
            if reuse is not None:
                end, _ = store.begin_stretch()
                reuse.note(layer, merge.entries_of(layer), start, end - start, first, store.fragments(first))
        if done is not None:
            done(layer)
    store.begin_stretch()
    root = merge.apply()
    for layer, wanted in sorted(merge.missing(root).items(), reverse=True):
        merge.fill(open_layer(layer), wanted)
    return root, merge


def put(root: Node, path: bytes, node: Node, *, when: int = 0) -> None:
    """Put a node of ours into a tree; folders that exist stay as they are, links on the way are followed inside."""
    folder, _, name = path.rpartition(b"/")
    parent = walk(root, folder, make=True, when=when)
    assert parent is not None
    assert parent.children is not None
    old = parent.children.get(name)
    if node.kind == "dir" and old is not None and old.kind in ("dir", "symlink"):
        return
    parent.children[name] = node


def paths(root: Node) -> Iterable[tuple[bytes, Node]]:
    """Yield every path below a root with its node, in order of names; without recursion."""
    stack = [(b"", root)]
    while stack:
        path, node = stack.pop()
        yield path, node
        for name in sorted(node.children or {}, reverse=True):
            assert node.children is not None
            stack.append((path + b"/" + name if path else name, node.children[name]))
