# SPDX-License-Identifier: Apache-2.0
"""The reader sees in images of mksquashfs exactly what is on disk, at every compression and block size."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from pysingularity.errors import HostError, ImageError
from pysingularity.squashfs import layout
from pysingularity.squashfs.node import Node

pytestmark = pytest.mark.peer


def comparable(found, xattrs=True):
    """Without what folders on disk count differently: links to them, and the order hard links were met in."""
    groups = {}
    for path, entry in found.items():
        groups.setdefault(entry[7], []).append(path)
    partner = {path: tuple(sorted(group)) for group in groups.values() for path in group}
    return {path: (*entry[: 7 if xattrs else 6], partner[path]) for path, entry in found.items()}


@pytest.mark.parametrize("compression", ["gzip", "xz", "zstd", "lz4", "lzo", "lzma"])
def test_images_of_every_compressor_are_read(compression, folder, mksquashfs, opened, flat, on_disk, tmp_path):
    path = mksquashfs(folder, tmp_path / "image", "-comp", compression)
    try:
        with opened(path) as image:
            assert image.superblock.compression == compression
            assert comparable(flat(image)) == comparable(on_disk(folder))
    except HostError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(
    "options",
    [
        ("-b", "4096"),
        ("-b", "1M"),
        ("-noI", "-noD", "-noF", "-noX"),
        ("-no-fragments",),
        ("-always-use-fragments",),
        ("-no-exports", "-no-sparse", "-no-duplicates"),
        ("-no-xattrs",),
    ],
    ids=lambda options: options[0],
)
def test_images_of_every_form_are_read(options, folder, mksquashfs, opened, flat, on_disk, tmp_path):
    path = mksquashfs(folder, tmp_path / "image", *options)
    xattrs = "-no-xattrs" not in options
    with opened(path) as image:
        assert comparable(flat(image), xattrs) == comparable(on_disk(folder), xattrs)


def test_an_image_within_a_larger_file_is_read_from_its_offset(folder, mksquashfs, opened, flat, on_disk, tmp_path):
    path = mksquashfs(folder, tmp_path / "image")
    inside = tmp_path / "inside"
    inside.write_bytes(b"#!" * 1000 + b"1" + path.read_bytes() + b"behind")
    with opened(inside, 2001, path.stat().st_size) as image:
        assert comparable(flat(image)) == comparable(on_disk(folder))


def test_another_reader_agrees(folder, mksquashfs, opened, tmp_path):
    oracle = pytest.importorskip("PySquashfsImage", reason="needs PySquashfsImage")
    plain = tmp_path / "plain"
    plain.mkdir()
    for name in ("large", "sparse", "noise", "many"):  # it dies on names that are not UTF-8
        os.symlink(folder / name, plain / name)
    path = mksquashfs(plain, tmp_path / "image", "-b", "64K")
    with opened(path) as image, oracle.SquashFsImage.from_file(str(path)) as other:
        names = {os.fsencode(entry.path.strip("/")): entry for entry in other}
        for name, inode in image.walk():
            entry = names.pop(name)
            assert (entry.mode, entry.uid, entry.time) == (inode.st_mode, inode.uid, inode.mtime)
            if inode.type == layout.FILE:
                assert entry.read_bytes() == image.read(inode)
        assert not names


@pytest.fixture
def image(folder, mksquashfs, opened, tmp_path):
    with opened(mksquashfs(folder, tmp_path / "image", "-b", "16K")) as image:
        yield image


def test_any_part_of_a_file_is_read(image, folder):
    for name in ("large", "sparse", "noise", "small"):
        inode, expected = image.lookup(name), (folder / name).read_bytes()
        for begin, size in [(0, 1), (16383, 2), (16384, 16384), (5, 70000), (len(expected) - 3, 10), (1 << 40, 5)]:
            assert image.read(inode, begin, size) == expected[begin : begin + size]
        assert image.read(inode) == expected
        assert b"".join(image.read_block(inode, index) for index in range(len(expected) // 16384 + 2)) == expected


def test_reading_backwards_needs_no_large_cache(folder, mksquashfs, opened, tmp_path):
    path = mksquashfs(folder, tmp_path / "image", "-b", "4096")
    with opened(path) as image:
        image._data_cap = image._metadata_cap = 20000
        inode, expected = image.lookup("large"), (folder / "large").read_bytes()
        for index in reversed(range(0, len(expected), 4096)):
            assert image.read(inode, index, 100) == expected[index : index + 100]
        assert sum(map(len, image._data.values())) == image._data_bytes <= 20000
        assert sum(len(data) for data, _ in image._metadata.values()) == image._metadata_bytes <= 20000


def test_many_threads_read_one_image(folder, mksquashfs, opened, tmp_path):
    """They get the bytes on disk, and a block that is kept is inflated by one of them while the others wait."""
    (folder / "shared").write_bytes(os.urandom(3000) * 100)
    with opened(mksquashfs(folder, tmp_path / "image", "-no-fragments")) as image:
        inode = image.lookup("shared")
        counted, inflate = [], image._inflate

        def slow(data, limit):
            counted.append(len(data))
            time.sleep(0.05)
            return inflate(data, limit)

        image._inflate = slow
        start = threading.Barrier(8)

        def read():
            start.wait()
            return [image.read_block(inode, index, keep=True) for index in range(image.block_count(inode))]

        with ThreadPoolExecutor(8) as pool:
            found = [one.result() for one in [pool.submit(read) for _ in range(8)]]
    assert {b"".join(blocks) for blocks in found} == {(folder / "shared").read_bytes()}
    assert len(counted) == len(found[0])


def test_all_threads_that_wait_for_a_damaged_block_are_told(folder, mksquashfs, opened, tmp_path):
    (folder / "shared").write_bytes(os.urandom(3000) * 100)
    path = mksquashfs(folder, tmp_path / "image", "-no-fragments")
    with opened(path) as image:
        position, _ = image.stored_block(image.lookup("shared"), 0)
    with open(path, "r+b") as file:
        file.seek(position)
        file.write(b"\xff" * 100)
    with opened(path) as image:
        inode = image.lookup("shared")
        start = threading.Barrier(4)

        def read():
            start.wait()
            with pytest.raises(ImageError):
                image.read_block(inode, 0, keep=True)
            return len(image.read_block(inode, 1, keep=True))

        with ThreadPoolExecutor(4) as pool:
            assert {one.result() for one in [pool.submit(read) for _ in range(4)]} == {image.block_size}
        assert not image._coming


def test_lookup_follows_links_inside_the_image_only(tmp_path, written, opened):
    def directory(**children):
        node = Node("dir", 0o755)
        node.children = {name.encode(): child for name, child in children.items()}
        return node

    file = Node("file", source=b"inside")
    tree = directory(
        etc=directory(passwd=file, self=Node("symlink", target=b"../../../etc/./passwd")),
        absolute=Node("symlink", target=b"/etc"),
        loop=Node("symlink", target=b"loop"),
        pair=Node("symlink", target=b"riap"),
        riap=Node("symlink", target=b"pair"),
        gone=Node("symlink", target=b"/nowhere"),
    )
    written(tmp_path / "image", tree)
    with opened(tmp_path / "image") as image:
        wanted = image.lookup("etc/passwd").ref
        for path in ("/etc/passwd", "absolute/passwd", "etc/self", "../../etc//passwd", "absolute/../etc/self"):
            assert image.lookup(path).ref == wanted, path
        for path in ("loop", "pair/x", "gone", "etc/passwd/x", "etc/none", ""):
            found = image.lookup(path)
            assert found is None or not path
        assert image.lookup("absolute", follow=False).kind == "symlink"
        assert image.lookup("absolute/", follow=False).kind == "symlink"
        assert image.lookup("loop", follow=False).kind == "symlink"


def test_contents_of_a_folder_and_entries_of_a_file_are_refused(image):
    with pytest.raises(ImageError):
        image.read(image.root)
    with pytest.raises(ImageError):
        image.entries(image.lookup("large"))


@pytest.mark.long
def test_a_folder_of_100000_names_is_read_and_written(tmp_path, mksquashfs, unsquashfs, opened, scanned, written):
    top = tmp_path / "top"
    (top / "d").mkdir(parents=True)
    for number in range(100_000):
        (top / f"d/{number:x}-{'n' * (number % 90)}").touch()
    with opened(mksquashfs(top, tmp_path / "theirs")) as image:
        theirs = [path for path, _ in image.walk()]
    written(tmp_path / "ours", scanned(top))
    with opened(tmp_path / "ours") as image:
        ours = [path for path, _ in image.walk()]
    assert ours == theirs and len(ours) == 100_002
    assert len(os.listdir(unsquashfs(tmp_path / "ours", tmp_path / "out") / "d")) == 100_000
