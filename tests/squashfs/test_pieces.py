# SPDX-License-Identifier: Apache-2.0
"""A squashfs in several files reads as one, and becomes one again without what nobody needs any more."""

from __future__ import annotations

import os
import random

import pytest

from pysingularity.errors import ImageError
from pysingularity.squashfs.node import Node
from pysingularity.squashfs.pieces import PiecedImage
from pysingularity.squashfs.writer import SquashfsWriter, Taken


@pytest.fixture
def chain(tmp_path):
    """Write images behind each other: each adds files of many sizes, the third removes some, the last adds none."""
    files: list[int] = []

    def write(compression: str) -> tuple[list[int], dict[bytes, bytes]]:
        noise = random.Random(5)
        wanted: dict[bytes, bytes] = {}
        for number in range(4):
            fd = os.open(tmp_path / f"piece{number}", os.O_RDWR | os.O_CREAT)
            with SquashfsWriter(fd, compression=compression, block_size=4096) as writer:
                root = Node("dir", 0o755)
                if files:
                    before = PiecedImage(files)
                    writer.follow(before.superblock.inode_table, before.all_fragments())
                    root = Taken(before).root
                for count in range(30 if number < 3 else 0):
                    name, data = b"f%d-%d" % (number, count), noise.randbytes(100 * count) * (1 + count % 7)
                    wanted[name] = data
                    root.children[name] = Node("file", data=writer.store_bytes(data), xattrs={b"user.number": name})
                if number == 2:
                    for count in range(10, 30):
                        del root.children[b"f0-%d" % count], wanted[b"f0-%d" % count]
                writer.finish(root)
            files.append(fd)
        return files, wanted

    yield write
    for fd in files:
        os.close(fd)


def contents(image) -> dict[bytes, bytes]:
    return {path: image.read(inode) for path, inode in image.walk() if inode.kind == "file"}


@pytest.mark.parametrize("compression", ["gzip", "lz4", "zstd", "xz"])
def test_pieces_read_as_one_and_only_new_files_are_in_them(chain, compression):
    files, wanted = chain(compression)
    image = PiecedImage(files)
    assert contents(image) == wanted
    assert {image.xattrs(inode)[b"user.number"] for path, inode in image.walk() if path} == set(wanted)
    first, second = contents(PiecedImage(files[:1])), contents(PiecedImage(files[:2]))
    assert len(first) == 30 and first == {name: data for name, data in second.items() if name in first}
    sizes = [os.fstat(fd).st_size for fd in files]
    assert sizes[3] < 12288 < min(sizes[:3])


def test_an_image_of_pieces_has_what_is_alive(chain, unsquashfs, tmp_path):
    files, wanted = chain("gzip")
    with open(tmp_path / "whole", "w+b") as whole, SquashfsWriter(whole.fileno(), block_size=4096) as writer:
        writer.finish(writer.adopt(PiecedImage(files)))
    out = unsquashfs(tmp_path / "whole", tmp_path / "out")
    assert {os.fsencode(path.name): path.read_bytes() for path in out.iterdir()} == wanted
    alive, all_ = (tmp_path / "whole").stat().st_size, sum(os.fstat(fd).st_size for fd in files)
    dead = os.fstat(files[0]).st_size // 2  # twenty of thirty files, the larger ones
    assert alive < all_ - dead


def test_pieces_that_do_not_belong_together_are_refused(chain):
    files, wanted = chain("gzip")
    for wrong in (files[::-1], [files[2], files[0]], [files[0], files[3]]):
        with pytest.raises(ImageError) as caught:
            assert contents(PiecedImage(wrong)) == wanted
        assert caught.value.id == "damaged-image"
    os.ftruncate(files[1], 50000)
    with pytest.raises(ImageError):
        contents(PiecedImage(files))
