# SPDX-License-Identifier: Apache-2.0
"""Files are put into an image without ever leaving it."""

from __future__ import annotations

import os
import stat

import pytest

from pysingularity.image.entries import Entry, put_into_folder, put_into_tree
from pysingularity.image.metadata import base_entries
from pysingularity.squashfs.node import FileData, Node


def store(data: bytes) -> FileData:
    made = FileData(len(data))
    made.words = (len(data),)
    return made


def test_base_entries_make_the_usual_skeleton(tmp_path):
    before = os.umask(0o077)
    try:
        put_into_folder(str(tmp_path), base_entries())
    finally:
        os.umask(before)
    modes = {
        name: stat.S_IMODE((tmp_path / name).stat().st_mode)
        for name in ("tmp", "var/tmp", "root", "etc", ".singularity.d")
    }
    assert modes == {"tmp": 0o1777, "var/tmp": 0o1777, "root": 0o700, "etc": 0o755, ".singularity.d": 0o755}
    assert os.readlink(tmp_path / "singularity") == ".singularity.d/runscript"
    assert os.readlink(tmp_path / "environment") == ".singularity.d/env/90-environment.sh"
    assert os.access(tmp_path / ".exec", os.X_OK)
    assert (tmp_path / "etc/hosts").read_bytes() == b""


def test_what_says_something_of_the_image_is_kept(tmp_path):
    put_into_folder(str(tmp_path), base_entries())
    (tmp_path / ".singularity.d/env/90-environment.sh").write_text("export A=1\n")
    (tmp_path / ".singularity.d/env/99-base.sh").write_text("old\n")
    (tmp_path / "etc/hosts").write_text("127.0.0.1 me\n")
    put_into_folder(str(tmp_path), base_entries())
    assert (tmp_path / ".singularity.d/env/90-environment.sh").read_text() == "export A=1\n"
    assert (tmp_path / "etc/hosts").read_text() == "127.0.0.1 me\n"
    assert "old" not in (tmp_path / ".singularity.d/env/99-base.sh").read_text()


@pytest.fixture
def outside(tmp_path):
    """A folder and a file that no image may touch."""
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "file").write_text("untouched")
    yield folder
    assert sorted(os.listdir(folder)) == ["file"]
    assert (folder / "file").read_text() == "untouched"


def test_links_in_place_of_our_folders_are_replaced(tmp_path, outside):
    root = tmp_path / "root"
    root.mkdir()
    (root / ".singularity.d").symlink_to(outside)
    put_into_folder(str(root), base_entries())
    assert not (root / ".singularity.d").is_symlink()
    assert (root / ".singularity.d/env/99-base.sh").exists()


def test_links_in_place_of_our_files_are_replaced(tmp_path, outside):
    root = tmp_path / "root"
    (root / ".singularity.d/env").mkdir(parents=True)
    (root / ".singularity.d/env/99-base.sh").symlink_to(outside / "file")
    os.link(outside / "file", root / ".singularity.d/env/95-apps.sh")
    put_into_folder(str(root), base_entries())
    assert not (root / ".singularity.d/env/99-base.sh").is_symlink()


def test_nothing_is_written_through_links_of_the_image(tmp_path, outside):
    root = tmp_path / "root"
    root.mkdir()
    for name in ("etc", "var", "tmp"):
        (root / name).symlink_to(outside)
    written = put_into_folder(str(root), base_entries())
    assert "etc/hosts" not in written
    assert "var/tmp" not in written
    assert (root / "etc").is_symlink()


def test_nothing_is_left_open(tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    put_into_folder(str(tmp_path), base_entries())
    assert len(os.listdir("/proc/self/fd")) == before


def test_tree_gets_the_same_files_as_a_folder(tmp_path):
    put_into_folder(str(tmp_path), base_entries())
    on_disk = {
        str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if ".singularity.d/actions" not in str(path)
    }
    root = Node("dir", 0o755)
    put_into_tree(root, base_entries(), store, 7)
    in_tree = {os.fsdecode(path) for path, _ in root.walk() if path and b".singularity.d/actions" not in path}
    assert in_tree == on_disk
    assert {node.mtime for path, node in root.walk() if path} == {7}


def test_tree_keeps_and_replaces_like_a_folder():
    root = Node("dir", 0o755)
    root.children = {
        b"etc": Node("symlink", 0o777, target=b"/x"),
        b".singularity.d": Node("symlink", 0o777, target=b"/x"),
    }
    hosts, script = Entry.file("etc/hosts", b"", keep=True), Entry.file(".singularity.d/env/a.sh", "x", 0o755)
    assert put_into_tree(root, [hosts, script], store, 0) == [".singularity.d/env/a.sh"]
    assert root.children[b"etc"].kind == "symlink"
    found = root.find(b".singularity.d/env/a.sh")
    assert (found.mode, found.data.size) == (0o755, 1)
