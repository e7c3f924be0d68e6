# SPDX-License-Identifier: Apache-2.0
"""Unpacking gives the folder the image was made of, as root and as anybody, and an error names the file it met."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from pysingularity.errors import HostError, ImageError
from pysingularity.linux.ownership import RecordedOwners
from pysingularity.linux.process import children
from pysingularity.squashfs.node import Node
from pysingularity.squashfs.reader import SquashfsImage
from pysingularity.squashfs.unpack import unpack
from pysingularity.squashfs.writer import SquashfsWriter


@pytest.fixture
def image(folder, scanned, written, opened, tmp_path):
    written(tmp_path / "image", scanned(folder))
    with opened(tmp_path / "image") as image:
        yield image


@pytest.fixture
def made():
    """An image of {name: node} in memory; files have their bytes as `source`."""
    fds = []

    def make(entries):
        fds.append(os.memfd_create("image"))
        with SquashfsWriter(fds[-1], threads=1) as writer:
            root = Node("dir", 0o755)
            root.children = entries
            for _, node in root.walk():
                if node.kind == "file" and node.data is None:
                    node.data = writer.store_bytes(node.source)
            writer.finish(root)
        return SquashfsImage(fds[-1])

    yield make
    for fd in fds:
        os.close(fd)


@pytest.mark.root
@pytest.mark.parametrize("workers", [1, 4])
def test_root_gets_exactly_what_was_packed(workers, root_only, image, folder, on_disk, tmp_path):
    done = []
    result = unpack(image, str(tmp_path / "out"), workers=workers, progress=done.append)
    found, expected = on_disk(tmp_path / "out"), on_disk(folder)
    assert found.keys() == expected.keys()
    for path, entry in expected.items():
        # Which of several names counts as first depends on the order of the folder.
        assert found[path][:7] == entry[:7], path
    for names in (("small", "a/hard"), ("large", "a/b/hard")):
        assert os.path.samefile(*(tmp_path / "out" / name for name in names))
    assert result.entries == len(expected) and not result.devices and not result.xattrs
    assert sum(done) == result.size


@pytest.mark.root
def test_holes_stay_holes(root_only, image, tmp_path):
    unpack(image, str(tmp_path / "out"))
    for name, size in (("sparse", 2 << 20 | 3), ("holes-only", 1 << 20)):
        status = (tmp_path / "out" / name).stat()
        assert status.st_size >= size and status.st_blocks * 512 < size // 4


@pytest.mark.rootless
def test_an_ordinary_user_owns_everything_and_learns_what_is_missing(as_user, image, tmp_path):
    program = """
import os, sys
from pysingularity.squashfs.reader import SquashfsImage
from pysingularity.squashfs.unpack import unpack
result = unpack(SquashfsImage(os.open(sys.argv[1], os.O_RDONLY)), sys.argv[2])
print(sorted(result.devices), sorted(result.xattrs))
"""
    copy = as_user.write("image", (tmp_path / "image").read_bytes())
    out = as_user.tmp / "out"
    source = Path(__file__).resolve().parents[2] / "src"
    result = as_user(["/usr/bin/python3", "-c", program, copy, out], env={"PYTHONPATH": str(source)}, check=True)
    if b"null" in dict(image.walk()):
        assert result.stdout.split("]")[0] == "[b'disk', b'null'"
        assert "b'trusted.thing'" in result.stdout
    for path in (out, out / "small", out / "noise", out / "link"):
        assert path.lstat().st_uid == as_user.uid
    assert os.getxattr(out / "small", "user.note") == b"hello\0world"
    assert stat.S_IMODE((out / "a/b/c").stat().st_mode) == 0o500
    assert stat.S_IMODE((out / "empty").stat().st_mode) == 0
    assert (out / "a/hard").samefile(out / "small")


def test_recorded_owners_come_back(made, tmp_path):
    image = made(
        {
            b"file": Node("file", 0o400, 7, 8, source=b"x"),
            b"link": Node("symlink", 0o777, 9, 10, target=b"file"),
            b"dev": Node("char", 0o620, 11, 12, rdev=os.makedev(5, 1)),
            b"sub": Node("dir", 0o700, 13, 14),
        }
    )
    try:
        os.setxattr(tmp_path, "user.try", b"")
    except OSError:
        pytest.skip("this file system has no user attributes")
    owners = RecordedOwners(str(tmp_path / "out"))
    unpack(image, str(tmp_path / "out"), owner=owners)
    expected = {"file": (7, 8), "link": (9, 10), "dev": (11, 12), "sub": (13, 14)}
    for name, ids in expected.items():
        path = str(tmp_path / "out" / name)
        uid, gid, mode, rdev = owners.get(path, os.lstat(path))
        assert (uid, gid) == ids, name
        if name == "dev":
            assert stat.S_ISCHR(mode) and stat.S_IMODE(mode) == 0o620 and rdev == os.makedev(5, 1)


def test_folders_that_may_not_be_entered_are_filled_all_the_same(made, tmp_path):
    inner = Node("dir", 0, mtime=77)
    inner.children = {b"f": Node("file", 0, source=b"inside", mtime=5)}
    outer = Node("dir", 0o500, mtime=78)
    outer.children = {b"inner": inner}
    unpack(made({b"outer": outer}), str(tmp_path / "out"))
    assert stat.S_IMODE((tmp_path / "out/outer").stat().st_mode) == 0o500
    assert (tmp_path / "out/outer").stat().st_mtime == 78
    status = os.stat(tmp_path / "out/outer/inner")
    assert stat.S_IMODE(status.st_mode) == 0 and status.st_mtime == 77
    os.chmod(tmp_path / "out/outer/inner", 0o700)
    os.chmod(tmp_path / "out/outer", 0o700)


def test_deep_folders_are_unpacked(made, tmp_path):
    top = node = Node("dir", 0o755)
    for _ in range(300):
        node.children[b"d" * 20] = node = Node("dir", 0o755)
    node.children[b"end"] = Node("file", source=b"deep")
    result = unpack(made({b"top": top}), str(tmp_path / "out"))
    assert result.entries == 303  # 6300 bytes of path, more than the kernel takes at once
    subprocess.run(["rm", "-rf", tmp_path / "out"], check=True)


def test_a_name_that_is_taken_is_an_error_with_the_name(made, tmp_path):
    image = made({b"file": Node("file", source=b"new")})
    (tmp_path / "out").mkdir()
    (tmp_path / "victim").write_text("untouched")
    os.symlink(tmp_path / "victim", tmp_path / "out/file")
    with pytest.raises(FileExistsError) as caught:
        unpack(image, str(tmp_path / "out"))
    assert caught.value.filename == "file"
    assert (tmp_path / "victim").read_text() == "untouched"


def test_damage_found_by_a_worker_is_an_image_error(written, opened, tmp_path):
    before = children(os.getpid())
    root = Node("dir", 0o755)
    for number in range(50):
        root.children[b"%d" % number] = Node("file", source=os.urandom(200_000))
    written(tmp_path / "image", root)
    with opened(tmp_path / "image") as image:
        image._used = 2_000_000  # as if contents behind were named by wild positions
        with pytest.raises(ImageError):
            unpack(image, str(tmp_path / "out"), workers=2)
    assert children(os.getpid()) == before


@pytest.mark.root
def test_a_full_disk_names_the_file(root_only, made, tmp_path):
    image = made({b"big": Node("file", source=os.urandom(1 << 20))})
    (tmp_path / "small").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", tmp_path / "small"], check=True)
    try:
        with pytest.raises(OSError) as caught:
            unpack(image, str(tmp_path / "small"))
        assert caught.value.errno == 28 and caught.value.filename == "big"
    finally:
        subprocess.run(["umount", tmp_path / "small"], check=True)


def test_a_killed_worker_is_reported_and_none_is_left(made, tmp_path, monkeypatch):
    before = children(os.getpid())
    image = made({b"%d" % number: Node("file", source=b"x") for number in range(500)})
    parent = os.getpid()

    def die(inode):
        if os.getpid() != parent:
            os.kill(os.getpid(), 9)

    monkeypatch.setattr(image, "xattrs", die)
    monkeypatch.setattr(image, "read_block", lambda inode, index: die(inode))
    with pytest.raises(HostError) as caught:
        unpack(image, str(tmp_path / "out"), workers=2)
    assert caught.value.id == "worker-died"
    assert children(os.getpid()) == before


def test_an_interrupted_unpacking_ends_its_workers(written, tmp_path):
    root = Node("dir", 0o755)
    for number in range(3000):
        root.children[b"%d" % number] = Node("file", source=b"%d" % number)
    written(tmp_path / "image", root)
    program = """
import os, sys
from pysingularity.squashfs.reader import SquashfsImage
from pysingularity.squashfs.unpack import unpack
def stop(size):
    raise KeyboardInterrupt
try:
    unpack(SquashfsImage(os.open(sys.argv[1], os.O_RDONLY)), sys.argv[2], progress=stop)
except KeyboardInterrupt:
    try:
        os.waitpid(-1, 0)
    except ChildProcessError:
        print("none left")
"""
    command = [sys.executable, "-c", program, tmp_path / "image", tmp_path / "out"]
    assert subprocess.run(command, capture_output=True, text=True).stdout == "none left\n"
