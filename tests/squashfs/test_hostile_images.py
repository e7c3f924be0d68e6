# SPDX-License-Identifier: Apache-2.0
"""Damaged and hostile images end as one clear error: no other exception, no full memory, no walk without end."""

from __future__ import annotations

import os
import random
import resource
import struct
import time
import zlib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fuzz.readers import squashfs
from pysingularity.errors import ImageError
from pysingularity.squashfs import layout
from pysingularity.squashfs.node import Node
from pysingularity.squashfs.reader import SquashfsImage
from pysingularity.squashfs.unpack import unpack
from pysingularity.squashfs.writer import SquashfsWriter

CORPUS = Path(__file__).parent / "corpus"


def sample(compression="gzip", plain=False) -> bytes:
    """A small image with every kind of inode in it; plain: tables stored as they are, so that every byte counts."""
    noise = random.Random(5)
    fd = os.memfd_create("sample")
    with SquashfsWriter(fd, compression=compression, block_size=4096, threads=1) as writer:
        if plain:
            writer._compress = bytes
        root, sub = Node("dir", 0o755), Node("dir", 0o700, xattrs={b"user.d": b"d" * 30})
        file = Node("file", 0o644, 1, 2, 3, xattrs={b"user.a": b"d" * 30, b"security.b": b""})
        file.data = writer.store_bytes(noise.randbytes(9000) + bytes(8192) + b"words " * 3000)
        small = Node("file", 0o4711, 5, data=writer.store_bytes(b"small"))
        root.children = {
            b"dir": sub,
            b"file": file,
            b"hard": file,
            b"small": small,
            b"link": Node("symlink", target=b"dir/small"),
            b"null": Node("char", rdev=259),
            b"disk": Node("block", rdev=9, xattrs={b"trusted.x": b"1"}),
            b"pipe": Node("fifo"),
            b"sock": Node("socket"),
        }
        for number in range(300):
            sub.children[b"%03d" % number + b"n" * (number % 40)] = Node(
                "file", data=writer.store_bytes(b"%d" % number)
            )
        writer.finish(root)
    data = os.pread(fd, os.fstat(fd).st_size, 0)
    os.close(fd)
    return data


SAMPLES = {"gzip": sample(), "xz": sample("xz"), "plain": sample(plain=True)}


def check(data: bytes) -> str:
    started = time.process_time()
    try:
        squashfs(data)
    except ImageError as error:
        assert "\n" not in error.message and len(error.message) < 500
        return error.message
    finally:
        assert time.process_time() - started < 5
    return ""


@pytest.fixture(autouse=True)
def little_memory():
    """A bomb that goes off must not take the machine along."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as statm:
        now = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + (512 << 20), hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def test_the_samples_are_sound():
    for data in SAMPLES.values():
        assert check(data) == ""


@pytest.mark.parametrize("path", sorted(CORPUS.glob("*.sqfs")), ids=lambda path: path.stem)
def test_images_that_once_caused_trouble(path):
    assert check(path.read_bytes())


@pytest.mark.parametrize("name", SAMPLES)
def test_every_truncation_is_an_error(name):
    data = SAMPLES[name]
    used = struct.unpack_from("<Q", data, 40)[0]
    for size in [*range(200), *range(200, used, 97), used - 1]:
        assert check(data[:size]), size
    assert check(data[:used]) == ""


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_flipped_bytes_never_cause_another_error(data):
    name = data.draw(st.sampled_from(["plain", "plain", *SAMPLES]))
    image = bytearray(SAMPLES[name])
    tables = struct.unpack_from("<Q", image, 64)[0]
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.one_of(st.integers(0, 95), st.integers(tables, len(image) - 1), st.integers(96, tables)))
        image[place] = data.draw(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF, image[place] ^ 1, image[place] ^ 0x10]))
    check(bytes(image))


class Raw:
    """An image whose tables can be written by hand: stored uncompressed, one block each."""

    def __init__(self) -> None:
        self.inodes, self.listings = bytearray(), bytearray()
        self.data = bytearray()
        self.fragments = [b""]
        self.xattrs = b""
        self.changes: dict[str, int] = {}

    def add(self, *parts: bytes) -> int:
        """Add an inode; return its offset."""
        offset = len(self.inodes)
        self.inodes += b"".join(parts)
        return offset

    @staticmethod
    def head(kind: int, number: int = 1, mode: int = 0o755) -> bytes:
        return layout.INODE_HEAD.pack(kind, mode, 0, 0, 0, number)

    def entries(self, *entries: tuple[bytes, int, int], count: int | None = None) -> tuple[int, int]:
        """Add a listing of (name, offset of the inode, type); return its offset and size."""
        offset = len(self.listings)
        body = b"".join(
            layout.DIR_ENTRY.pack(inode, 0, kind, (len(name) - 1) & 0xFFFF) + name for name, inode, kind in entries
        )
        self.listings += layout.DIR_HEADER.pack(len(entries) - 1 if count is None else count, 0, 1) + body
        return offset, len(self.listings) - offset

    def image(self, root: int, compressor: int = 1) -> bytes:
        def block(data: bytes) -> bytes:
            return struct.pack("<H", len(data) | 0x8000) + bytes(data)

        inodes = b"".join(block(self.inodes[at : at + 8192]) for at in range(0, len(self.inodes), 8192))
        listings = b"".join(block(self.listings[at : at + 8192]) for at in range(0, len(self.listings), 8192))
        at = {"inode": 96 + len(self.data)}
        at["directory"] = at["inode"] + len(inodes)
        fragments = block(b"".join(self.fragments)) if self.fragments[0] else b""
        start = at["directory"] + len(listings)
        at["fragment"] = start + len(fragments)
        ids = block(struct.pack("<I", 0))
        tail = struct.pack("<Q", start) if fragments else b""
        at["id"] = at["fragment"] + len(tail) + len(ids)
        used = at["id"] + 8
        fields = {
            "magic": layout.MAGIC,
            "inodes": 5,
            "mtime": 0,
            "block": 4096,
            "fragments": len(self.fragments) if fragments else 0,
            "compressor": compressor,
            "log": 12,
            "flags": 0,
            "ids": 1,
            "major": 4,
            "minor": 0,
            "root": root,
            "used": used,
            "id_table": at["id"],
            "xattr_table": layout.NONE64,
            "inode_table": at["inode"],
            "directory_table": at["directory"],
            "fragment_table": at["fragment"],
            "export_table": layout.NONE64,
        } | self.changes
        ending = struct.pack("<Q", at["id"] - len(ids))
        head = layout.SUPERBLOCK.pack(*fields.values())
        return head + bytes(self.data) + inodes + listings + fragments + tail + ids + ending + bytes(4096)

    def folder(self, listing: tuple[int, int], number: int = 1) -> int:
        offset, size = listing
        body = struct.pack("<4I2HI", 2, size + 3, 0, 1, 0, offset, layout.NONE32)
        return self.add(self.head(8, number), body)


def test_an_honest_image_by_hand_is_read():
    raw = Raw()
    file = raw.add(raw.head(6), struct.pack("<I", 1))
    assert check(raw.image(raw.folder(raw.entries((b"pipe", file, 6))))) == ""


@pytest.mark.parametrize("name", [b"..", b".", b"a/b", b"/etc/passwd", b"a\0b", b"x" * 257])
def test_names_that_lead_elsewhere_are_refused(name):
    raw = Raw()
    file = raw.add(raw.head(6), struct.pack("<I", 1))
    assert "name" in check(raw.image(raw.folder(raw.entries((name, file, 6)))))


def test_a_name_twice_is_refused():
    # A link and then a folder of the same name is how an unpacker is led outside.
    raw = Raw()
    link = raw.add(raw.head(3), struct.pack("<2I", 1, 4), b"/etc")
    empty = raw.folder((0, 0))
    root = raw.folder(raw.entries((b"a", link, 3), (b"a", empty, 1)))
    assert "twice" in check(raw.image(root))
    raw = Raw()
    file = raw.add(raw.head(6), struct.pack("<I", 1))
    root = raw.folder(raw.entries((b"b", file, 6), (b"a", file, 6), (b"b", file, 6)))
    assert "twice" in check(raw.image(root))


def test_a_folder_within_itself_is_refused():
    raw = Raw()
    root = raw.folder(raw.entries((b"again", 0, 1)))
    assert "two places" in check(raw.image(root))


def test_folders_that_share_a_listing_are_refused():
    # Each level twice: thirty levels would be a thousand million entries. Inodes are 40 bytes, listings 30.
    raw = Raw()
    for level in range(30):
        raw.entries((b"a", 80 * (level + 1), 1), (b"b", 80 * (level + 1) + 40, 1))
        for number in (1, 2):
            raw.folder((30 * level, 30), 2 * level + number)
    for number in (61, 62):
        raw.folder((0, 0), number)
    assert check(raw.image(0)) in (
        "hostile: damaged squashfs image: directories share their listings",
        "hostile: damaged squashfs image: a directory is in two places",
    )


def test_an_inode_of_another_kind_than_its_entry_is_refused():
    raw = Raw()
    link = raw.add(raw.head(3), struct.pack("<2I", 1, 4), b"/etc")
    assert "kinds" in check(raw.image(raw.folder(raw.entries((b"a", link, 1)))))


@pytest.mark.parametrize("kind", [0, 15, 255, 65535])
def test_unknown_inode_types_are_refused(kind):
    raw = Raw()
    odd = raw.add(raw.head(kind), bytes(60))
    assert check(raw.image(raw.folder(raw.entries((b"a", odd, 2)))))


@pytest.mark.parametrize("size", [1 << 62, 1 << 40, (1 << 64) - 1])
def test_a_file_of_absurd_size_is_refused_before_memory_is_spent(size):
    raw = Raw()
    body = struct.pack("<3Q4I", 96, size, 0, 1, layout.NONE32, 0, layout.NONE32)
    file = raw.add(raw.head(9), body, bytes(64))
    assert check(raw.image(raw.folder(raw.entries((b"a", file, 2)))))


@pytest.mark.parametrize("word", [1 << 25, 5000, 0xFFFFFF, 4096 | 1 << 24, 0x8000_0001])
def test_blocks_of_impossible_size_are_refused(word):
    raw = Raw()
    raw.data += bytes(100)
    file = raw.add(raw.head(2), struct.pack("<4I", 96, layout.NONE32, 0, 4096), struct.pack("<I", word))
    assert check(raw.image(raw.folder(raw.entries((b"a", file, 2)))))


def test_a_block_that_inflates_to_more_than_its_file_is_refused():
    raw = Raw()
    raw.data += zlib.compress(bytes(1 << 20))
    word = len(raw.data)
    file = raw.add(raw.head(2), struct.pack("<4I", 96, layout.NONE32, 0, 4096), struct.pack("<I", word))
    assert check(raw.image(raw.folder(raw.entries((b"a", file, 2)))))


def test_a_block_with_less_than_its_file_is_refused():
    raw = Raw()
    raw.data += zlib.compress(b"little")
    word = len(raw.data)
    file = raw.add(raw.head(2), struct.pack("<4I", 96, layout.NONE32, 0, 4096), struct.pack("<I", word))
    assert "fewer" in check(raw.image(raw.folder(raw.entries((b"a", file, 2)))))


@pytest.mark.parametrize(("index", "offset"), [(1, 0), (0, 3), (0, 5000), (1 << 31, 0)])
def test_fragments_that_are_not_there_are_refused(index, offset):
    raw = Raw()
    raw.data += b"frag"
    raw.fragments = [struct.pack("<QII", 96, 4 | 1 << 24, 0)]
    file = raw.add(raw.head(2), struct.pack("<4I", 0, index, offset, 4))
    assert check(raw.image(raw.folder(raw.entries((b"a", file, 2)))))


def test_a_huge_fragment_count_costs_nothing():
    raw = Raw()
    raw.data += b"frag"
    raw.fragments = [struct.pack("<QII", 96, 4 | 1 << 24, 0)]
    raw.changes["fragments"] = 0xFFFFFFFF
    file = raw.add(raw.head(2), struct.pack("<4I", 0, 0, 0, 4))
    assert check(raw.image(raw.folder(raw.entries((b"a", file, 2))))) == ""


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("magic", 0),
        ("block", 0),
        ("block", 4097),
        ("log", 13),
        ("log", 99),
        ("compressor", 0),
        ("compressor", 9),
        ("major", 3),
        ("ids", 0),
        ("inodes", 0),
        ("root", 1 << 40),
        ("root", 8192),
        ("used", 1 << 50),
        ("used", 0),
        ("id_table", 0),
        ("id_table", 1 << 63),
        ("inode_table", 0),
        ("inode_table", 1 << 63),
        ("directory_table", 96),
        ("fragment_table", 5),
        ("export_table", 5),
        ("xattr_table", 1 << 40),
    ],
)
def test_an_impossible_superblock_is_refused(field, value):
    raw = Raw()
    raw.changes[field] = value
    assert check(raw.image(raw.folder((0, 0))))


def test_links_with_a_nul_or_nothing_are_refused():
    for target in (b"a\0b", b""):
        raw = Raw()
        link = raw.add(raw.head(3), struct.pack("<2I", 1, len(target)), target)
        assert "target" in check(raw.image(raw.folder(raw.entries((b"a", link, 3)))))


def test_a_listing_that_claims_gigabytes_is_refused():
    raw = Raw()
    offset, _ = raw.entries((b"a", 0, 1))
    root = raw.folder((offset, 0xFFFFFFF0))
    assert "listing" in check(raw.image(root))


def test_nothing_is_unpacked_outside_of_the_folder(tmp_path):
    # A link to a folder outside, and a later name that wants to go through it.
    outside = tmp_path / "outside"
    outside.mkdir()
    fd = os.memfd_create("image")
    with SquashfsWriter(fd) as writer:
        root, sub = Node("dir", 0o755), Node("dir", 0o777)
        sub.children = {b"file": Node("file", data=writer.store_bytes(b"evil"))}
        root.children = {b"a": Node("symlink", target=os.fsencode(outside)), b"b": sub}
        writer.finish(root)
    (tmp_path / "box").mkdir()
    # Somebody puts a link where the image has a folder.
    os.symlink(outside, tmp_path / "box/b")
    with pytest.raises(OSError):
        unpack(SquashfsImage(fd), str(tmp_path / "box"))
    os.close(fd)
    assert not os.listdir(outside)
