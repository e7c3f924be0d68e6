# SPDX-License-Identifier: Apache-2.0
"""Cached steps: the root file system behind a step, kept under the step's hash.

A recipe asks for it by `#step` lines in %post (and every RUN of a Dockerfile is one). What is kept is a squashfs in
pieces (`squashfs.pieces`): the whole tree, and only those files that the snapshot before did not have. It can be
mounted, unpacked, or become an image by copying blocks; those that no file needs any more are left out then, so that
the size of the final image does not depend on how %post was cut.

What a step's hash takes in is decided by `plan`; here the things are added that a plan cannot know: what the base image
turned out to be, and how this machine lets us be root.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from typing import TYPE_CHECKING

from pysingularity import messages
from pysingularity.build.overlaid import lay_over, take_off
from pysingularity.cache import Cache
from pysingularity.errors import SingularityError
from pysingularity.files import hash_file, read_lines
from pysingularity.image.assemble import newest
from pysingularity.image.convert import unpack_into
from pysingularity.image.inside import squashfs_of
from pysingularity.image.open import open_image
from pysingularity.image.pieces import Pieces
from pysingularity.image.tree import Unread, lay_upper, scan_directory, store_tree
from pysingularity.linux.ownership import RealOwners
from pysingularity.squashfs.writer import SquashfsWriter, Taken

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from pysingularity.build.bootstrap import Owners
    from pysingularity.build.plan import Plan, Step
    from pysingularity.build.request import BuildRequest, Writer
    from pysingularity.squashfs.node import Node

#: path → what tells that a file is still the same: inode, size, times of change in nanoseconds.
State = dict[bytes, tuple[int, int, int, int]]


def salt(base: str, emulation: str, others: Iterable[str] = ()) -> str:
    """Return what the steps of a stage depend on beyond a plan.

    Arguments:
        base: path of the base image when it comes from elsewhere, or "".
        emulation: how root is emulated; only pretending changes what a step leaves behind.
        others: the same of the stages that this one takes files from.
    """
    # Who fetched it has just found it whole: then its record is believed, and a gigabyte is not hashed again.
    record = read_lines(base[:-4] + ".record") if base else None
    digest = (record or {}).get("sha256") or (hash_file(base) if base else "")
    return " ".join([digest, "pretending" if emulation == "bpf" else "", *others])


def cached(request: BuildRequest, plan: Plan) -> set[int]:
    """Return the numbers of the steps that the cache would spare, without fetching anything."""
    from pysingularity.build.bootstrap import AGENTS
    from pysingularity.build.bootstrap.remote import fetch_text, options_of, reference_text

    found: set[int] = set()
    cache = Cache.open(request.environ) if any(step.keep for step in plan.steps) else None
    if cache is None or request.recipe is None:
        return found
    emulation = request.environ.get("SINGULARITY_ROOTLESS", "")
    marks: list[str | None] = []
    for index, stage in enumerate(request.recipe.stages):
        base: str | None = ""
        others = [marks[number] for number in plan.sources_of(index)]
        mark = None
        if AGENTS.get(stage.agent) == "remote":
            try:
                options = {**options_of(stage.header, request.options), "pull": "never"}
                base = fetch_text(reference_text(stage.header), options, request.environ, lambda *_: None)
            except SingularityError:  # not here yet: then nothing built on it is
                base = None
        if base is not None and None not in others:
            mark = salt(base, emulation, [one for one in others if one is not None])
        marks.append(mark)
        if mark is None:
            continue
        store = StepStore(cache, mark, request.writer, RealOwners())
        steps = plan.of_stage(index)
        last = max((step.number for step in steps if step.keep and store.find(step)), default=0)
        found |= {step.number for step in steps if step.number <= last}
    return found


def state_of(root: str) -> State:
    """Return what tells later which files of a folder have changed."""
    found: State = {}
    top = os.fsencode(root)
    for folder, _, names in os.walk(top):
        for name in names:
            path = os.path.join(folder, name)
            status = os.lstat(path)
            if stat.S_ISREG(status.st_mode):
                found[path[len(top) + 1 :]] = _mark(status)
    return found


def _result_mark(status: os.stat_result) -> str:
    """Return what any change of a file changes, also one that sets its times back."""
    return f"{status.st_dev}:{status.st_ino}:{status.st_size}:{status.st_mtime_ns}:{status.st_ctime_ns}"


def _mark(status: os.stat_result) -> tuple[int, int, int, int]:
    return Unread(status).mark


class Snapshot:
    """The kept root behind a step. Its files are held open: nothing that happens to the cache takes them away.

    Attributes:
        keys: of its files in the cache, the oldest first; files: their descriptors.
    """

    __slots__ = ("files", "keys")

    def __init__(self, keys: tuple[str, ...] = (), files: tuple[int, ...] = ()) -> None:
        self.keys, self.files = keys, files

    def image(self) -> Pieces:
        """Return the image that the files are.

        Raises:
            ImageError: it is damaged.
        """
        return Pieces(self.files, self.keys[-1])


class StepStore:
    """Snapshots of one stage.

    Arguments:
        cache: where they are kept.
        salt: what the steps' hashes do not take in.
        writer: compression of snapshots and of the image.
        owners: owners of files.
        progress: called with numbers of bytes.
    """

    def __init__(
        self, cache: Cache, salt: str, writer: Writer, owners: Owners, progress: Callable[[int], None] | None = None
    ) -> None:
        self._cache, self._salt, self._writer, self._owners = cache, salt, writer, owners
        self._progress = progress
        #: The last snapshot, its tree, where its blocks end, and its fragments.
        self._last = Snapshot()
        self._tree: Node | None = None
        self._end = 0
        self._fragments: list[tuple[int, int]] = []
        #: A base image whose blocks the first snapshot may take over.
        self._base = ""
        #: What tells which files have changed since then.
        self._state = State()
        #: Where the stage's root is laid over a snapshot: the folder that takes changes, and the tree below it.
        self._upper = ""
        self._lower: Node | None = None

    def key(self, step: Step) -> str:
        """Return the name under which the root behind a step is kept."""
        text = f"{step.id}\0{self._salt}\0{self._writer!r}"
        return "step-" + hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()

    def find(self, step: Step) -> Snapshot | None:
        """Return the snapshot behind a step, or None when not all of it is there."""
        facts = self._cache.recall(self.key(step)) or {}
        keys = facts.get("pieces", "").split()
        files: list[int] = []
        for key in keys:
            path = self._cache.image(key)
            try:
                files.append(os.open(path or "", os.O_RDONLY | os.O_CLOEXEC))
            except OSError:
                for file in files:
                    os.close(file)
                return None
        return Snapshot(tuple(keys), tuple(files)) if keys else None

    def labels(self, step: Step) -> str:
        """Return the labels that the programs of this and earlier steps wrote."""
        facts = self._cache.recall(self.key(step)) or {}
        value = json.loads(facts.get("labels", '""'))
        return value if isinstance(value, str) else ""

    def passed(self, step: Step) -> bool:
        """Return whether this very %test has passed on this very root before."""
        return self._cache.recall("passed-" + self.key(step)) is not None

    def remember_passed(self, step: Step) -> None:
        """Remember that a %test has passed."""
        self._cache.remember("passed-" + self.key(step), {"passed": "yes"})

    def result(self, step: Step, more: str) -> tuple[str, str, str] | None:
        """Return path, identity and partition's digest of the image that this plan gave last, if it is there still.

        Arguments:
            more: what the image depends on beyond the plan.
        """
        facts = self._cache.recall(self._result_key(step, more)) or {}
        path = facts.get("path", "")
        try:
            same = path != "" and facts.get("mark") == _result_mark(os.stat(path))
        except OSError:
            return None
        return (path, facts.get("id", ""), facts.get("digest", "")) if same else None

    def remember_result(self, step: Step, more: str, path: str, identity: str, digest: str) -> None:
        """Remember where the image of a plan lies, without keeping it."""
        facts = {"path": path, "mark": _result_mark(os.stat(path)), "id": identity, "digest": digest}
        self._cache.remember(self._result_key(step, more), facts)

    def _result_key(self, step: Step, more: str) -> str:
        digest = hashlib.sha256(more.encode("utf-8", "surrogateescape")).hexdigest()
        return f"result-{self.key(step)}-{digest}"

    @property
    def laid_over(self) -> bool:
        """Say whether the root is laid over a snapshot."""
        return bool(self._upper)

    def begin(self, path: str, root: str) -> None:
        """Let the first snapshot take over blocks of the image that has just been unpacked."""
        with open_image(path) as image:
            if image.filesystem != "squashfs":
                return
            facts = squashfs_of(image).superblock
            if (facts.compression, facts.block_size) == (self._writer.compression or "gzip", self._writer.block_size):
                self._base, self._state = path, state_of(root)

    def follow(self, snapshot: Snapshot, root: str) -> None:
        """Let the first snapshot go on behind another stage's, which has just been copied into the root."""
        self._take(snapshot)
        self._state = state_of(root)

    def restore(self, snapshot: Snapshot, root: str, *, plain: bool = False) -> None:
        """Bring a snapshot into an empty folder.

        Arguments:
            plain: unpack it in any case; else it is mounted below the folder where that is as good (`overlaid`).
        """
        image, tree = self._take(snapshot)
        self._upper = "" if plain else lay_over(image, tree, root, self._owners) or ""
        if not self._upper:
            unpack_into(image, root, owner=self._owners, progress=self._progress)
        self._lower = tree if self._upper else None
        self._state = state_of(self._upper or root)

    def unpack_after_all(self, snapshot: Snapshot, root: str) -> None:
        """Bring a snapshot into the folder that is laid over one, without an overlay; what was changed is dropped."""
        take_off(root)
        self.restore(snapshot, root, plain=True)

    def _take(self, snapshot: Snapshot) -> tuple[Pieces, Node]:
        """Remember a snapshot as the last one; return its image and tree."""
        image = snapshot.image()
        self._last, self._base = snapshot, ""
        self._end, self._fragments = image.reader.superblock.inode_table, image.reader.all_fragments()
        self._tree = tree = Taken(image.reader).root
        return image, tree

    def keep(self, step: Step, root: str, labels: str) -> Snapshot | None:
        """Keep the root behind a step; return the snapshot, or None when it cannot be kept."""
        key = self.key(step)
        new = self._cache.new_file("image", key)
        try:
            written = self._write(new, root)
            digest = hash_file(new)
            # A name that no other content can have: snapshots that go on behind this one rely on it.
            own = f"{key}-{digest[:16]}"
            file = os.open(new, os.O_RDONLY | os.O_CLOEXEC)
            self._cache.publish_image(own, new, digest, {"step": step.title})
        except OSError as error:
            messages.warning(f"this step is not kept: {(error.strerror or str(error)).lower()}")
            return None
        finally:
            if os.path.exists(new):
                os.unlink(new)
        for one in self._last.keys:
            self._cache.image(one)  # used again: what has just been kept is worth nothing without them
        self._last, self._base = Snapshot((*self._last.keys, own), (*self._last.files, file)), ""
        self._tree, self._state, self._end, self._fragments = written
        self._cache.remember(key, {"labels": json.dumps(labels), "pieces": " ".join(self._last.keys)})
        return self._last

    def _write(self, path: str, root: str) -> tuple[Node, State, int, list[tuple[int, int]]]:
        """Write a snapshot; return what is to be known of it when it is the last one."""
        settings = self._writer
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with SquashfsWriter(
                fd,
                compression=settings.compression or "gzip",
                level=settings.level,
                block_size=settings.block_size,
                threads=settings.threads,
            ) as writer:
                before = self._tree
                if before is not None:
                    writer.follow(self._end, self._fragments)
                elif self._base:
                    with open_image(self._base) as image:
                        before = writer.adopt(squashfs_of(image))
                tree = scan_directory(self._upper or root, owners=self._owners, upper=bool(self._upper))
                state = _state_of_tree(tree)
                if before is not None:
                    take_over(tree, before, {one for one, mark in state.items() if self._state.get(one) == mark})
                store_tree(writer, tree, progress=self._progress)
                if self._lower is not None:
                    lay_upper(self._lower, tree)
                writer.mtime = newest(tree)
                writer.finish(tree)
                os.fsync(fd)
                return tree, state, writer.end, writer.fragments()
        finally:
            os.close(fd)


def _state_of_tree(tree: Node) -> State:
    """Return the same as `state_of` of a folder that has just been scanned."""
    found: State = {}
    stack = [(tree, b"")]
    while stack:
        folder, prefix = stack.pop()
        for name, node in (folder.children or {}).items():
            if node.kind == "dir":
                stack.append((node, prefix + name + b"/"))
            elif isinstance(node.source, Unread):
                found[prefix + name] = node.source.mark
    return found


def take_over(tree: Node, old: Node, same: set[bytes]) -> None:
    """Give the files of a tree that did not change the data of an older tree."""
    stack = [(tree, old, b"")]
    while stack:
        new, before, prefix = stack.pop()
        for name, node in (new.children or {}).items():
            other = (before.children or {}).get(name)
            if other is None:
                continue
            if node.kind == other.kind == "dir":
                stack.append((node, other, prefix + name + b"/"))
            elif node.kind == other.kind == "file" and node.data is None and prefix + name in same:
                node.data = other.data
