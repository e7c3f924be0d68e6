# SPDX-License-Identifier: Apache-2.0
"""The gocryptfs format: what is written is read back at any place, what was altered is an error."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pysingularity.errors import ImageError
from pysingularity.squashfs.node import Node
from pysingularity.squashfs.reader import SquashfsImage
from pysingularity.squashfs.writer import SquashfsWriter
from pysingularity.trust.gocryptfs import (
    BLOCK,
    HEADER,
    STORED,
    Conf,
    Plain,
    Sealer,
    WrongKeyError,
    plain_size,
)

MASTER = bytes(range(32))


class Outer:
    """A file of encrypted blocks in the place of a squashfs that holds it."""

    fd = -1

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.inode = SimpleNamespace(size=len(data))

    def damaged(self, what: str) -> ImageError:
        return ImageError("damaged-image", what)

    def stretch(self, inode: object) -> None:
        return None

    def read(self, inode: object, offset: int, size: int) -> bytes:
        return self.data[offset : offset + size]

    def plain(self, master: bytes = MASTER) -> Plain:
        return Plain(self, self.inode, master)  # type: ignore[arg-type]


def sealed(data: bytes, cuts: tuple[int, ...] = ()) -> bytes:
    """Encrypt bytes, written as the squashfs writer does it: the first ones last."""
    with tempfile.TemporaryFile() as file:
        sealer = Sealer(file.fileno(), 100, MASTER)
        at = min(96, len(data))
        for end in (*sorted(cut for cut in cuts if cut > at), len(data)):
            assert sealer.pwrite(data[at:end], at) == end - at
            at = end
        sealer.pwrite(data[:96], 0)
        size = sealer.finish(len(data))
        file.seek(100)
        found = file.read()
    assert len(found) == size
    return found


texts = st.integers(1, 5 * BLOCK).flatmap(
    lambda size: st.tuples(
        st.randoms(use_true_random=False).map(lambda random: random.randbytes(size)),
        st.lists(st.integers(0, size), max_size=5).map(tuple),
        st.integers(0, size + 10),
        st.integers(0, size + 10),
    )
)


@given(texts)
def test_any_stretch_reads_as_it_was_written(case):
    data, cuts, position, size = case
    plain = Outer(sealed(data, cuts)).plain()
    assert plain.size == len(data)
    assert plain.pread(size, position) == data[position : position + size]


@given(texts, st.integers(0, 1 << 30))
def test_what_was_taken_back_is_written_over(case, seed):
    data, _, position, size = case
    position = max(position % len(data), min(96, len(data)))
    with tempfile.TemporaryFile() as file:
        sealer = Sealer(file.fileno(), 0, MASTER)
        start = min(96, len(data))
        sealer.pwrite(data[start:position] + bytes(size), start)  # too much, and wrong
        sealer.pwrite(data[position:], position)
        sealer.pwrite(data[:start], 0)
        stored = sealer.finish(len(data))
        file.seek(0)
        found = file.read(stored)
    assert Outer(found).plain().pread(len(data), 0) == data


@given(st.integers(0, 20 * STORED))
def test_sizes_are_those_of_whole_blocks_and_one_short_one(size):
    with contextlib.suppress(ValueError):
        count = plain_size(size)
        assert count > 0
        assert HEADER + count + 32 * -(-count // BLOCK) == size


@given(st.integers(0, 3 * STORED + 1000 - 1), st.integers(1, 255))
def test_altered_byte_is_an_error_and_never_other_data(place, flip):
    data = bytes(range(256)) * 52 + b"x" * 9
    stored = bytearray(sealed(data))
    place %= len(stored)
    stored[place] ^= flip
    try:
        plain = Outer(bytes(stored)).plain()
    except ImageError:
        assert place < 2
        return
    for number in range(-(-len(data) // BLOCK)):
        want = data[number * BLOCK : (number + 1) * BLOCK]
        if HEADER + number * STORED <= place < HEADER + (number + 1) * STORED or place < HEADER:
            with pytest.raises(ImageError, match="altered"):
                plain.pread(BLOCK, number * BLOCK)
        else:
            assert plain.pread(BLOCK, number * BLOCK) == want


def test_blocks_cannot_be_moved_cut_or_replaced_by_holes():
    data = os.urandom(3 * BLOCK)
    stored = sealed(data)
    blocks = [stored[HEADER + n * STORED : HEADER + (n + 1) * STORED] for n in range(3)]
    swapped = Outer(stored[:HEADER] + blocks[1] + blocks[0] + blocks[2]).plain()
    hole = Outer(stored[:HEADER] + blocks[0] + bytes(STORED) + blocks[2]).plain()
    foreign = Outer(stored[:HEADER] + sealed(data)[HEADER:]).plain()
    for plain, place in ((swapped, 0), (hole, BLOCK), (foreign, 0)):
        with pytest.raises(ImageError, match="altered"):
            plain.pread(10, place)
    for length in (0, 5, HEADER, HEADER + 20, len(stored) - STORED + 32):
        with pytest.raises(ImageError, match="cut short"):
            Outer(stored[:length]).plain()


def test_squashfs_with_much_that_is_taken_back_is_read_as_it_was(tmp_path):
    """Of a large file that turns out to be there already, what was written is written over by what comes next."""
    large, small = os.urandom(20 << 20), [os.urandom(size) for size in (10, 5000, 200_000, 131_072)]
    with open(tmp_path / "image", "w+b") as file:
        sealer = Sealer(file.fileno(), 4096, MASTER)
        with SquashfsWriter(file.fileno(), 4096, sink=sealer) as writer:
            root = Node("dir", 0o755)
            for number, data in enumerate([small[0], large, *small[1:], large, *small, bytes(300_000) + small[2]]):
                root.children[b"%02d" % number] = Node("file", data=writer.store_bytes(data))
            assert writer.duplicates > len(large)
            size = writer.finish(root)
        stored = sealer.finish(size)
        file.seek(4096)
        plain = Outer(file.read(stored)).plain()
    image = SquashfsImage(-1, source=plain)
    found = [image.read(image.inode(ref)) for _, ref, _ in image.entries(image.root)]
    assert found == [small[0], large, *small[1:], large, *small, bytes(300_000) + small[2]]
    assert large[:1000] not in (tmp_path / "image").read_bytes()


def test_configuration_opens_with_its_passphrase_alone():
    conf = Conf.parse(Conf.make(b"secret", MASTER, n=1024).text())
    assert conf.unlock(b"secret") == MASTER
    assert conf.unlock(b"secret\nmore") == MASTER  # gocryptfs reads a line
    with pytest.raises(WrongKeyError):
        conf.unlock(b"other")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"Version": 3}, "version 3"),
        ({"FeatureFlags": ["HKDF", "AESSIV", "GCMIV128"]}, "AESSIV"),
        ({"FeatureFlags": ["HKDF", "XChaCha20Poly1305"]}, "XChaCha20"),
        ({"FeatureFlags": ["GCMIV128"]}, "old form"),
        ({"FeatureFlags": 7}, "damaged"),
        ({"EncryptedKey": "AAAA"}, "lengths"),
        ({"EncryptedKey": "§"}, "damaged"),
        ({"ScryptObject": None}, "damaged"),
        ({"N": 1 << 40}, "bounds"),
        ({"N": 65537}, "bounds"),
        ({"N": 512}, "bounds"),
        ({"N": True}, "damaged"),
        ({"R": 1 << 30}, "bounds"),
        ({"P": 1 << 30}, "bounds"),
        ({"P": -1}, "bounds"),
        ({"KeyLen": 1 << 30}, "lengths"),
        ({"Salt": ""}, "lengths"),
    ],
)
def test_hostile_configuration_is_refused_before_anything_is_spent(change, complaint):
    value = json.loads(Conf.make(b"secret", MASTER, n=1024).text())
    for name, new in change.items():
        (value["ScryptObject"] if name in value["ScryptObject"] else value)[name] = new
    with pytest.raises(ValueError, match=complaint):
        Conf.parse(json.dumps(value).encode())


@given(st.binary(max_size=200) | st.recursive(st.none() | st.text(), lambda x: st.dictionaries(st.text(), x)).map(repr))
def test_any_bytes_are_a_configuration_or_refused(data):
    with pytest.raises(ValueError):
        Conf.parse(data if isinstance(data, bytes) else data.encode("utf-8", "surrogateescape"))


# -- judged by gocryptfs ---------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder of gocryptfs with one file of ours; `tmp_path / "plain"` is what it holds."""
    data = os.urandom(3 * BLOCK + 77)
    (tmp_path / "cipher").mkdir()
    (tmp_path / "plain").write_bytes(data)
    (tmp_path / "cipher/gocryptfs.conf").write_bytes(Conf.make(b"secret", MASTER).text())
    (tmp_path / "cipher/squashfs-1").write_bytes(sealed(data))
    return tmp_path


def gocryptfs(program: str, *words: object, secret: str = "secret") -> subprocess.CompletedProcess:
    return subprocess.run(
        [program, *map(str, words)], input=f"{secret}\n{secret}\n", capture_output=True, text=True, check=False
    )


@pytest.mark.peer
def test_gocryptfs_finds_nothing_wrong_with_what_we_write(folder, tool):
    program = tool("gocryptfs")
    result = gocryptfs(program, "-fsck", folder / "cipher")
    assert result.returncode == 0, result.stdout + result.stderr
    assert gocryptfs(program, "-fsck", folder / "cipher", secret="other").returncode == 12
    shown = gocryptfs(tool("gocryptfs-xray"), "-dumpmasterkey", folder / "cipher/gocryptfs.conf")
    assert MASTER.hex() in shown.stdout


@pytest.mark.peer
@pytest.mark.fuse
def test_gocryptfs_and_we_read_each_other(folder, tool):
    program, point = tool("gocryptfs"), folder / "mnt"
    point.mkdir()
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("needs /dev/fuse")
    result = gocryptfs(program, folder / "cipher", point)
    assert result.returncode == 0, result.stdout + result.stderr
    try:
        assert (point / "squashfs-1").read_bytes() == (folder / "plain").read_bytes()
        shutil.copy(folder / "plain", point / "squashfs-2")
    finally:
        subprocess.run(["umount", point], check=False) if os.getuid() == 0 else subprocess.run(
            ["fusermount3", "-u", point], check=False
        )
    data = (folder / "plain").read_bytes()
    assert Outer((folder / "cipher/squashfs-2").read_bytes()).plain().pread(len(data), 0) == data
