# SPDX-License-Identifier: Apache-2.0
"""Cached steps: the root file system behind a step, kept under the step's hash.

A recipe asks for it by `#step` lines in %post (and every RUN of a Dockerfile is one). What is kept is a whole squashfs
that can be unpacked, or become an image by copying its blocks. The one behind the next step takes over the blocks of
files that did not change, so that only new files are compressed; when much of it would be dead weight it is written
anew, and the size of the final image does not depend on how %post was cut.

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
from pysingularity.cache import Cache, hash_file, read_lines
from pysingularity.errors import SingularityError
from pysingularity.image.assemble import SifAssembly
from pysingularity.image.convert import unpack_into
from pysingularity.image.inside import squashfs_of
from pysingularity.image.open import open_image
from pysingularity.image.tree import scan_directory, store_tree
from pysingularity.linux.ownership import RealOwners

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from pysingularity.build.bootstrap import Owners
    from pysingularity.build.plan import Plan, Step
    from pysingularity.build.request import BuildRequest, Writer
    from pysingularity.squashfs.node import Node

#: Share of dead blocks above which a snapshot is written anew instead of taking blocks over.
DEAD = 0.01

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
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


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
        self._last, self._state = "", State()

    def key(self, step: Step) -> str:
        """Return the name under which the root behind a step is kept."""
        text = f"{step.id}\0{self._salt}\0{self._writer!r}"
        return "step-" + hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()

    def find(self, step: Step) -> str | None:
        """Return the path of the snapshot behind a step, or None."""
        key = self.key(step)
        return self._cache.image(key) if self._cache.recall(key) is not None else None

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

    def begin(self, path: str, root: str) -> None:
        """Let the first snapshot take over blocks of the image that has just been unpacked."""
        with open_image(path) as image:
            if image.filesystem != "squashfs":
                return
            facts = squashfs_of(image).superblock
            if (facts.compression, facts.block_size) == (self._writer.compression or "gzip", self._writer.block_size):
                self._last, self._state = path, state_of(root)

    def restore(self, path: str, root: str) -> None:
        """Unpack a snapshot into an empty folder."""
        with open_image(path) as image:
            unpack_into(image, root, owner=self._owners, progress=self._progress)
        self._last, self._state = path, state_of(root)

    def keep(self, step: Step, root: str, labels: str) -> str | None:
        """Keep the root behind a step; return the path of the snapshot, or None when it cannot be kept."""
        key = self.key(step)
        new = self._cache.new_file("image", key)
        try:
            self._write(new, root)
            path = self._cache.publish_image(key, new, hash_file(new), {"step": step.title})
        except OSError as error:
            messages.warning(f"this step is not kept: {(error.strerror or str(error)).lower()}")
            return None
        finally:
            if os.path.exists(new):
                os.unlink(new)
        self._cache.remember(key, {"labels": json.dumps(labels)})
        self._last, self._state = path, state_of(root)
        return path

    def _write(self, path: str, root: str) -> None:
        writer = self._writer
        tree = scan_directory(root, owners=self._owners)
        same = self._unchanged(root)
        with SifAssembly(
            path,
            bare=True,
            compression=writer.compression or "gzip",
            level=writer.level,
            block_size=writer.block_size,
            threads=writer.threads,
        ) as output:
            if same and self._last:
                with open_image(self._last) as image:
                    take_over(tree, output.writer.adopt(squashfs_of(image)), same)
            store_tree(output.writer, tree, progress=self._progress)
            output.finish(tree)

    def _unchanged(self, root: str) -> set[bytes]:
        """Return the files that are as in the last snapshot; none when too much of that would be dead weight."""
        if not self._state:
            return set()
        now = state_of(root)
        same = {path for path, mark in self._state.items() if now.get(path) == mark}
        total = sum(mark[1] for mark in self._state.values())
        dead = sum(mark[1] for path, mark in self._state.items() if path not in same)
        return same if dead <= DEAD * max(total, 1) else set()


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
