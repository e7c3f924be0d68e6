# SPDX-License-Identifier: Apache-2.0
"""Random layers, merged by us and unpacked by umoci: the same tree."""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pysingularity.errors import ImageError
from pysingularity.registry.inflate import Inflate
from pysingularity.registry.layers import merge_layers
from pysingularity.registry.tar import TarReader
from pysingularity.squashfs.node import FileData
from registries import tar_of

PLACES = ("a", "b", "c", "a/x", "a/y", "b/x", "c/x", "a/x/z", "b/x/z")
name = st.sampled_from(PLACES)


@st.composite
def entry(draw):
    place = draw(name)
    folder, _, last = place.rpartition("/")
    kind = draw(st.sampled_from(("file", "file", "dir", "dir", "link", "hard", "white", "opaque")))
    mode = draw(st.sampled_from((0o644, 0o755, 0o4711)))
    if kind == "file":
        return place, {"data": draw(st.binary(max_size=8)), "mode": mode, "uid": draw(st.integers(0, 3))}
    if kind == "dir":
        return place, {"type": tarfile.DIRTYPE, "mode": mode | 0o700, "gid": draw(st.integers(0, 3))}
    if kind == "link":
        return place, {"type": tarfile.SYMTYPE, "linkname": draw(st.sampled_from(("nowhere", "/a", "../b")))}
    if kind == "hard":
        return place, {"type": tarfile.LNKTYPE, "linkname": draw(name)}
    if kind == "white":
        return (f"{folder}/.wh.{last}" if folder else f".wh.{last}"), {"data": b""}
    return f"{place}/.wh..wh..opq", {"data": b""}


def unique(entries):
    """A layer names a path once, and a whiteout not beside the thing itself: anything else is undefined."""
    found = {}
    for place, what in entries:
        found.setdefault(place.replace(".wh..wh..opq", "*").replace(".wh.", ""), (place, what))
    return list(found.values())


layers = st.lists(st.lists(entry(), min_size=1, max_size=6).map(unique), min_size=1, max_size=3)


class Kept:
    """A store that keeps contents by number."""

    def __init__(self) -> None:
        self.data: list[bytes] = []

    def store_bytes(self, data):
        self.data.append(bytes(data))
        found = FileData(len(data))
        found.start = len(self.data)
        return found

    def store(self, read, size):
        return self.store_bytes(read(size))

    def begin_stretch(self):
        return 0, 0

    def fragments(self, first):
        return []


def ours(tars):
    store = Kept()

    def reader(number):
        at = 0

        def read(size):
            nonlocal at
            at += size
            return tars[number][at - size : at]

        return TarReader(Inflate(read, "layer"))

    root, _ = merge_layers(reader, len(tars), store)
    found, same = {}, {}
    for path, node in root.walk():
        if path:
            content = store.data[node.data.start - 1] if node.kind == "file" else node.target
            mode = node.mode if node.kind != "symlink" else 0
            found[path] = (node.kind, mode, node.uid, node.gid, content)
            if node.kind == "file":
                same.setdefault(id(node), set()).add(path)
    return found, {frozenset(group) for group in same.values()}


def umocis(folder, tars, umoci):
    def call(*words):
        return subprocess.run([umoci, *words], cwd=folder, capture_output=True, text=True, check=False)

    assert call("init", "--layout", "img").returncode == 0
    assert call("new", "--image", "img:t").returncode == 0
    for number, data in enumerate(tars):
        Path(folder, f"{number}.tar").write_bytes(data)
        assert call("raw", "add-layer", "--image", "img:t", f"{number}.tar").returncode == 0
    if call("unpack", "--image", "img:t", "bundle").returncode:
        return None
    top = os.fsencode(os.path.join(folder, "bundle/rootfs"))
    found, same = {}, {}
    for place, folders, files in os.walk(top):
        for one in folders + files:
            path = os.path.join(place, one)
            status = os.lstat(path)
            kind = "symlink" if os.path.islink(path) else "dir" if os.path.isdir(path) else "file"
            content = (
                os.readlink(path)
                if kind == "symlink"
                else Path(os.fsdecode(path)).read_bytes()
                if kind == "file"
                else b""
            )
            short = os.path.relpath(path, top)
            found[short] = (
                kind,
                status.st_mode & 0o7777 if kind != "symlink" else 0,
                status.st_uid,
                status.st_gid,
                content,
            )
            if kind == "file":
                same.setdefault(status.st_ino, set()).add(short)
    return found, {frozenset(group) for group in same.values()}


@pytest.mark.long
@pytest.mark.peer
@pytest.mark.root
@pytest.mark.usefixtures("root_only")
def test_random_layers_make_the_tree_that_umoci_makes(tool):
    umoci = tool("umoci")
    judged = []

    @settings(
        max_examples=int(os.environ.get("EXAMPLES", "60")), deadline=None, suppress_health_check=list(HealthCheck)
    )
    @given(layers)
    def check(found):
        tars = [tar_of([(place, dict(what)) for place, what in layer]) for layer in found]
        folder = tempfile.mkdtemp(dir="/dev/shm")
        try:
            wanted = umocis(folder, tars, umoci)
        finally:
            shutil.rmtree(folder)
        try:
            got = ours(tars)
        except ImageError:
            got = None
        judged.append(wanted is not None)
        if wanted is not None:  # what umoci refuses (entries below a file) is for us to decide
            assert got == wanted

    check()
    assert sum(judged) > len(judged) // 3
