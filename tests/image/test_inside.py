# SPDX-License-Identifier: Apache-2.0
"""Files of an image are read inside the image only."""

from __future__ import annotations

import os
import subprocess

import pytest

from pysingularity.errors import ImageError
from pysingularity.image.entries import Entry
from pysingularity.image.inside import FolderSource, OverlaidSource, source_of
from pysingularity.image.open import open_image


@pytest.fixture
def secret(tmp_path):
    (tmp_path / "secret").write_text("host")
    return tmp_path / "secret"


@pytest.fixture
def root(tmp_path, secret):
    root = tmp_path / "root"
    (root / "a/b").mkdir(parents=True)
    (root / "a/b/file").write_text("inside")
    (root / "secret").write_text("own")
    for name, target in {
        "absolute": "/a/b/file",
        "up": "../../../../a/b/file",
        "out": str(secret),
        "climb": "a/../../secret",
        "loop": "loop",
        "dir": "a/b",
        "chain": "dir/file",
    }.items():
        (root / name).symlink_to(target)
    os.mkfifo(root / "pipe")
    return root


@pytest.fixture(params=["folder", "squashfs"])
def source(request, root, tool, tmp_path):
    if request.param == "folder":
        with FolderSource(str(root)) as source:
            yield source
        return
    subprocess.run([tool("mksquashfs"), root, tmp_path / "a.sqfs", "-quiet", "-no-progress"], check=True)
    with open_image(str(tmp_path / "a.sqfs")) as image, source_of(image) as source:
        yield source


def test_links_are_resolved_inside(source):
    for name in ("absolute", "up", "chain", "dir/file", "a/b/../b/./file", "/a/b/file"):
        assert source.read(name) == b"inside", name
    assert source.read("climb") == b"own"


def test_links_to_the_outside_and_loops_lead_nowhere(source):
    assert source.read("out") is None
    assert source.read("loop") is None
    assert source.read("../secret") in (None, b"own")


def test_what_is_no_file_is_not_read(source):
    assert source.read("pipe") is None
    assert source.read("a") is None
    assert source.read("nosuch/file") is None
    assert source.names("dir") == ["file"]
    assert source.names("secret") == source.names("nosuch") == []
    assert source.is_folder("dir")
    assert not source.is_folder("secret")


def test_sizes_are_bounded(source):
    with pytest.raises(ImageError, match="limit"):
        source.read("secret", 2)


def test_nothing_is_left_open(root):
    before = len(os.listdir("/proc/self/fd"))
    with FolderSource(str(root)) as source:
        for name in ("chain", "loop", "out", "pipe", "nosuch"):
            source.read(name)
            source.names(name)
    assert len(os.listdir("/proc/self/fd")) == before


def test_entries_lie_over_files(root):
    with FolderSource(str(root)) as below:
        entries = [
            Entry.file("secret", b"new"),
            Entry.file("a/b/file", b"ignored", keep=True),
            Entry.file("deep/down", b"x"),
        ]
        source = OverlaidSource([below], entries)
        assert source.read("secret") == b"new"
        assert source.read("a/b/file") == b"inside"
        assert source.names("deep") == ["down"]
        assert "deep" in source.names("")
        assert source.is_folder("deep")
