# SPDX-License-Identifier: Apache-2.0
"""What we write, unsquashfs, the kernel and we ourselves read back equal; always the same bytes, in little memory."""

from __future__ import annotations

import hashlib
import os
import random
import resource
import subprocess
import sys
import threading

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pysingularity.errors import HostError, ImageError, InternalError, UserError
from pysingularity.squashfs import layout
from pysingularity.squashfs.node import Node
from pysingularity.squashfs.reader import SquashfsImage
from pysingularity.squashfs.writer import SquashfsWriter

NOISE = random.Random(11).randbytes(1 << 20)


@pytest.fixture
def target(tmp_path):
    fd = os.open(tmp_path / "image", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    yield fd
    os.close(fd)


def same(folder, found, disk):
    """Compare what is in an image or an unpacked folder with the folder it was made of."""
    groups = []
    for side in (found, disk):
        partners = {}
        for path, entry in side.items():
            partners.setdefault(entry[7], []).append(path)
        groups.append({path: tuple(sorted(group)) for group in partners.values() for path in group})
    assert groups[0] == groups[1]
    assert {path: entry[:7] for path, entry in found.items()} == {path: entry[:7] for path, entry in disk.items()}


@pytest.mark.parametrize("compression", ["gzip", "xz", "zstd", "lz4"])
@pytest.mark.parametrize("block_size", [4096, 131072, 1 << 20])
@pytest.mark.peer
def test_unsquashfs_unpacks_what_we_wrote(
    compression, block_size, folder, scanned, written, unsquashfs, on_disk, opened, flat, tmp_path
):
    if os.getuid() != 0:
        pytest.skip("owners are only unpacked by root")
    try:
        written(tmp_path / "image", scanned(folder), compression=compression, block_size=block_size)
    except HostError as error:
        pytest.skip(str(error))
    out = unsquashfs(tmp_path / "image", tmp_path / "out")
    same(folder, on_disk(out), on_disk(folder))
    with opened(tmp_path / "image") as image:
        same(folder, flat(image), on_disk(folder))


@pytest.mark.root
@pytest.mark.parametrize("compression", ["gzip", "xz", "zstd", "lz4"])
def test_the_kernel_mounts_what_we_wrote(compression, root_only, folder, scanned, written, on_disk, tmp_path):
    written(tmp_path / "image", scanned(folder), compression=compression)
    (tmp_path / "mnt").mkdir()
    command = ["mount", "-t", "squashfs", "-o", "ro,loop", tmp_path / "image", tmp_path / "mnt"]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        if "unknown filesystem" in result.stderr or "failed to setup loop" in result.stderr:
            pytest.skip(f"needs kernel squashfs and loop devices: {result.stderr.strip()}")
        log = subprocess.run(["dmesg"], capture_output=True, text=True).stdout[-500:]
        if "not supported" in log:
            pytest.skip(f"this kernel does not read {compression}")
        raise AssertionError(result.stderr)
    try:
        same(folder, on_disk(tmp_path / "mnt"), on_disk(folder))
        # Look-ups by name go through the index of a large folder.
        names = os.listdir(folder / "many")
        assert all(os.path.exists(tmp_path / "mnt/many" / name) for name in names)
        assert not os.path.exists(tmp_path / "mnt/many/none")
    finally:
        subprocess.run(["umount", tmp_path / "mnt"], check=True)


@pytest.mark.peer
def test_an_image_without_files_fragments_or_xattrs_is_one(written, unsquashfs, opened, tmp_path):
    assert written(tmp_path / "image", Node("dir", 0o711, mtime=5)) == 4096 == (tmp_path / "image").stat().st_size
    assert os.listdir(unsquashfs(tmp_path / "image", tmp_path / "out")) == []
    with opened(tmp_path / "image") as image:
        assert [(path, inode.mode) for path, inode in image.walk()] == [(b"", 0o711)]


def test_an_image_at_an_odd_offset_leaves_the_bytes_before_it_alone(folder, scanned, opened, flat, target, tmp_path):
    os.write(target, b"launcher" * 100)
    tree = scanned(folder)
    with SquashfsWriter(target, 777) as writer:
        for _, node in tree.walk():
            if node.kind == "file" and node.data is None:
                node.data = writer.store_bytes(node.source)
        size = writer.finish(tree)
    assert size % 4096 == 0 and os.fstat(target).st_size == 777 + size
    assert (tmp_path / "image").read_bytes()[:777] == (b"launcher" * 100)[:777]
    with opened(tmp_path / "image", 777) as image:
        assert len(flat(image)) > 2500


# -- trees by Hypothesis -----------------------------------------------------------------------------------------------

NAMES = st.binary(min_size=1, max_size=255).filter(
    lambda name: name not in (b".", b"..") and b"/" not in name and b"\0" not in name
)
SHORT = st.binary(max_size=60)
XATTRS = st.dictionaries(
    st.builds(bytes.__add__, st.sampled_from(layout.XATTR_PREFIXES), st.binary(min_size=1, max_size=200)).filter(
        lambda name: b"\0" not in name
    ),
    st.one_of(st.binary(max_size=40), st.sampled_from([b"v" * 5000, b"w" * 9])),
    max_size=4,
)
CONTENTS = st.one_of(
    st.binary(max_size=100),
    st.builds(lambda size, fill: (NOISE[:5000] + fill * size)[: size * 7], st.integers(0, 3000), st.binary(max_size=9)),
    st.builds(lambda holes, tail: bytes(4096 * holes) + tail, st.integers(0, 5), st.binary(max_size=20)),
)


@st.composite
def leaves(draw):
    kind = draw(st.sampled_from(["file", "file", "file", "symlink", "char", "block", "fifo", "socket"]))
    node = Node(
        kind,
        draw(st.integers(0, 0o7777)),
        draw(st.sampled_from([0, 1000, 65536, 0xFFFFFFFE])),
        draw(st.sampled_from([0, 5, 1 << 31])),
        draw(st.integers(0, 0xFFFFFFFF)),
        xattrs=draw(XATTRS) if draw(st.integers(0, 3)) == 0 else None,
        rdev=draw(st.integers(0, 0xFFFFFFFF)) if kind in ("char", "block") else 0,
    )
    if kind == "symlink":
        node.target = draw(st.binary(min_size=1, max_size=300).filter(lambda text: b"\0" not in text))
    if kind == "file":
        node.source = draw(CONTENTS)
    return node


@st.composite
def folders(draw, below):
    node = Node("dir", draw(st.integers(0, 0o7777)), draw(st.sampled_from([0, 7])), mtime=draw(st.integers(0, 9)))
    node.children = draw(st.dictionaries(NAMES, below, max_size=8))
    return node


TREES = folders(st.recursive(leaves(), folders, max_leaves=25))


def flat_tree(tree):
    """The tree as `flat` shows an image."""
    found, first, links = {}, {}, {}
    for path, node in tree.walk():
        content = node.source if node.kind == "file" else node.target or node.rdev
        same = first.setdefault(id(node), path)
        links[same] = links.get(same, 0) + 1
        found[path] = [
            node.kind,
            node.mode,
            node.uid,
            node.gid,
            node.mtime,
            content,
            tuple(sorted((node.xattrs or {}).items())),
            same,
            0,
        ]
        if node.kind == "dir":
            links[path] = 2 + sum(child.kind == "dir" for child in node.children.values())
    for entry in found.values():
        entry[8] = links[entry[7]]
    return {path: tuple(entry) for path, entry in found.items()}


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(tree=TREES, data=st.data(), threads=st.sampled_from([1, 3]))
def test_any_tree_is_read_back_equal(tree, data, threads, flat, tmp_path_factory):
    nodes = [node for _, node in tree.walk() if node.kind != "dir"]
    if nodes:  # hard links, anywhere
        for name in data.draw(st.lists(NAMES, max_size=3)):
            tree.children.setdefault(name, data.draw(st.sampled_from(nodes)))
    fd = os.memfd_create("image")
    try:
        with SquashfsWriter(fd, 0, block_size=4096, threads=threads) as writer:
            for _, node in tree.walk():
                if node.kind == "file" and node.data is None:
                    node.data = writer.store_bytes(node.source)
            writer.finish(tree)
        image = SquashfsImage(fd)
        assert flat(image) == flat_tree(tree)
        assert image.superblock.inode_count == len({id(node) for _, node in tree.walk()})
        # Taking it over gives the same again, behind other contents.
        other = os.memfd_create("adopted")
        try:
            with SquashfsWriter(other, 10, block_size=4096, threads=threads) as writer:
                extra = writer.store_bytes(NOISE[:10_000]), writer.store_bytes(b"small")
                again = writer.adopt(image)
                assert extra[0].size == 10_000
                writer.finish(again)
            assert flat(SquashfsImage(other, 10)) == flat_tree(tree)
        finally:
            os.close(other)
    finally:
        os.close(fd)


# -- contents ----------------------------------------------------------------------------------------------------------


def one_file(writer, data):
    root = Node("dir", 0o755)
    root.children[b"file"] = Node("file", data=data)
    return writer.finish(root)


def stream(data, step=None):
    at = 0

    def read(size):
        nonlocal at
        piece = data[at : at + min(size, step or size)]
        at += len(piece)
        return piece

    return read


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 8192, 100_000])
def test_a_stream_may_come_in_small_pieces(size, target):
    with SquashfsWriter(target, block_size=4096) as writer:
        one_file(writer, writer.store(stream(NOISE[:size], 1000), size))
    image = SquashfsImage(target)
    assert image.read(image.lookup("file")) == NOISE[:size]


@pytest.mark.parametrize("size", [10, 5000, 500_000])
def test_a_stream_that_ends_early_is_an_error(size, target):
    with SquashfsWriter(target, block_size=4096, threads=2) as writer, pytest.raises(UserError) as caught:
        writer.store(stream(NOISE[: size - 1], 1000), size)
    assert caught.value.id == "short-file"


def test_equal_files_are_stored_once_whatever_their_size(target):
    with SquashfsWriter(target, block_size=4096, threads=2) as writer:
        small = writer.store_bytes(b"abc" * 100)
        large = writer.store_bytes(NOISE[:100_001])
        other = writer.store_bytes(NOISE[:100_000] + b"!")
        before = writer._position
        assert writer.store_bytes(b"abc" * 100) is small
        assert writer.store_bytes(NOISE[:100_001]) is large
        assert writer.store(stream(NOISE[:100_001]), 100_001) is large
        assert writer.duplicates == 300 + 2 * 100_001
        last = writer.store_bytes(NOISE[7:50_000])
        root = Node("dir", 0o755)
        for name, data in ((b"a", small), (b"b", large), (b"c", other), (b"d", large), (b"e", last)):
            root.children[name] = Node("file", data=data)
        size = writer.finish(root)
    assert before < 210_000 and size < 260_000 + 8192
    image = SquashfsImage(target)
    assert image.read(image.lookup("b")) == image.read(image.lookup("d")) == NOISE[:100_001]
    assert image.read(image.lookup("c")) == NOISE[:100_000] + b"!"
    assert image.read(image.lookup("e")) == NOISE[7:50_000]


def test_a_large_duplicate_is_taken_back_after_it_was_written(target, monkeypatch):
    monkeypatch.setattr("pysingularity.squashfs.writer._HELD_BYTES", 10_000)
    with SquashfsWriter(target, block_size=4096, threads=2) as writer:
        first = writer.store_bytes(NOISE)
        assert writer.store_bytes(NOISE) is first
        root = Node("dir", 0o755)
        root.children = {b"a": Node("file", data=first), b"b": Node("file", data=writer.store_bytes(NOISE[1:6000]))}
        size = writer.finish(root)
    assert size < len(NOISE) + 20_000
    assert os.fstat(target).st_size == size, "what was written over the end stays in the file"
    image = SquashfsImage(target)
    assert image.read(image.lookup("a")) == NOISE
    assert image.read(image.lookup("b")) == NOISE[1:6000]


def test_a_file_larger_than_4_gib_of_holes_costs_nothing(target):
    size = (5 << 30) + 123
    left = size - 4

    def read(count):
        nonlocal left
        if left <= 0:
            return b"tail"[:count]
        piece = zeros if left >= count == len(zeros) else bytes(min(count, left))
        left -= len(piece)
        return piece

    zeros = bytes(1 << 20)
    with SquashfsWriter(target, block_size=1 << 20) as writer:
        used = one_file(writer, writer.store(read, size))
    assert used < 100_000
    image = SquashfsImage(target)
    inode = image.lookup("file")
    assert inode.size == size
    assert image.read(inode, size - 6) == b"\0\0tail"
    assert image.read(inode, 1 << 32, 10) == bytes(10)


# -- the same bytes, little memory, no threads left --------------------------------------------------------------------


@pytest.mark.parametrize("compression", ["gzip", "zstd"])
def test_any_number_of_threads_gives_the_same_bytes(compression, folder, scanned, written, tmp_path):
    digests = set()
    for threads in (1, 2, 8):
        try:
            written(tmp_path / "image", scanned(folder), compression=compression, threads=threads, block_size=16384)
        except HostError as error:
            pytest.skip(str(error))
        digests.add(hashlib.sha256((tmp_path / "image").read_bytes()).hexdigest())
    assert len(digests) == 1


def test_memory_does_not_grow_with_the_size_of_files(tmp_path):
    program = """
import os, sys
from pysingularity.squashfs.writer import SquashfsWriter
from pysingularity.squashfs.node import Node
fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT, 0o600)
count = [0]
def peak():  # not getrusage: that counts what the process was forked from
    return int(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0])
def read(size):
    count[0] += 1
    return (count[0].to_bytes(8, "little") * (size // 8 + 1))[:size]
root = Node("dir", 0o755)
with SquashfsWriter(fd, threads=2, level=1) as writer:
    base = peak()
    root.children[b"big"] = Node("file", data=writer.store(read, int(sys.argv[2])))
    writer.finish(root)
print(peak() - base, peak())
"""
    peaks = []
    for size in (64 << 20, 640 << 20):
        command = [sys.executable, "-c", program, tmp_path / "image", str(size)]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        grown, peak = map(int, result.stdout.split())
        assert peak < 150 << 10
        peaks.append(grown)
    assert peaks[1] < peaks[0] + 8192


def test_a_full_disk_is_an_oserror_and_leaves_no_threads(target):
    before = threading.active_count()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError) as caught, SquashfsWriter(target, block_size=4096, threads=3) as writer:
            one_file(writer, writer.store_bytes(NOISE))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == 27  # EFBIG, here in place of ENOSPC
    assert threading.active_count() == before


@pytest.mark.root
def test_a_disk_that_is_full_is_reported_as_such(root_only, tmp_path):
    (tmp_path / "small").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", tmp_path / "small"], check=True)
    try:
        fd = os.open(tmp_path / "small/image", os.O_RDWR | os.O_CREAT)
        try:
            with pytest.raises(OSError) as caught, SquashfsWriter(fd, threads=2) as writer:
                one_file(writer, writer.store_bytes(NOISE))
        finally:
            os.close(fd)
        assert caught.value.errno == 28
    finally:
        subprocess.run(["umount", tmp_path / "small"], check=True)


def test_an_error_in_a_compressing_thread_reaches_the_caller(target):
    before = threading.active_count()
    with pytest.raises(RuntimeError, match="broken"), SquashfsWriter(target, block_size=4096, threads=2) as writer:

        def broken(block):
            raise RuntimeError("broken")

        writer._pipeline._compress = broken
        one_file(writer, writer.store_bytes(NOISE))
    assert threading.active_count() == before


# -- what cannot be written --------------------------------------------------------------------------------------------


def tree_of(**children):
    root = Node("dir", 0o755)
    root.children = {name.encode(): node for name, node in children.items()}
    return root


@pytest.mark.parametrize(
    ("tree", "case"),
    [
        (tree_of(a=Node("symlink")), "long-link"),
        (tree_of(a=Node("symlink", target=b"x" * 65536)), "long-link"),
        (tree_of(**{"a/b": Node("fifo")}), "impossible-name"),
        (tree_of(**{"..": Node("fifo")}), "impossible-name"),
        (tree_of(**{"n" * 256: Node("fifo")}), "impossible-name"),
        (tree_of(a=Node("fifo", xattrs={b"user." + b"n" * 251: b""})), "long-attribute"),
        (tree_of(a=Node("fifo", xattrs={b"user.a": bytes(65537)})), "long-attribute"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_the_format_cannot_hold_is_refused(tree, case, target):
    with SquashfsWriter(target) as writer, pytest.raises(UserError) as caught:
        writer.finish(tree)
    assert caught.value.id == case


def test_more_than_65535_owners_are_refused_and_65535_kept(target):
    tree = tree_of(**{f"{number:x}": Node("fifo", 0o600, number) for number in range(1, 65536 - 1)})
    with SquashfsWriter(target) as writer:
        writer.finish(tree)
    image = SquashfsImage(target)
    assert image.superblock.id_count == 65535
    assert image.lookup("fffe").uid == 65534
    tree.children[b"one-more"] = Node("fifo", 0o600, 70000)
    with SquashfsWriter(target) as writer, pytest.raises(UserError) as caught:
        writer.finish(tree)
    assert caught.value.id == "too-many-owners"


def test_attributes_without_a_place_are_named(target):
    tree = tree_of(a=Node("fifo", xattrs={b"system.posix_acl_access": b"x", b"user.kept": b"y"}))
    with SquashfsWriter(target) as writer:
        writer.finish(tree)
    assert writer.left_out == {b"system.posix_acl_access"}
    image = SquashfsImage(target)
    assert image.xattrs(image.lookup("a")) == {b"user.kept": b"y"}


def test_times_outside_of_the_format_become_the_nearest(target):
    with SquashfsWriter(target) as writer:
        writer.finish(tree_of(old=Node("fifo", mtime=-5), new=Node("fifo", mtime=1 << 33)))
    image = SquashfsImage(target)
    assert (image.lookup("old").mtime, image.lookup("new").mtime) == (0, 0xFFFFFFFF)


def test_mistakes_of_a_caller_are_internal_errors(target):
    inner = Node("dir", 0o755)
    for tree in (tree_of(a=Node("file")), tree_of(a=inner, b=inner), Node("file")):
        with SquashfsWriter(target) as writer, pytest.raises(InternalError):
            writer.finish(tree)
    for options in ({"block_size": 5000}, {"block_size": 2048}, {"compression": "lzo"}):
        with pytest.raises(UserError):
            SquashfsWriter(target, **options)


@pytest.mark.peer
def test_an_image_of_mksquashfs_is_taken_over_with_a_file_more(
    folder, mksquashfs, unsquashfs, on_disk, target, tmp_path
):
    if os.getuid() != 0:
        pytest.skip("owners are only unpacked by root")
    path = mksquashfs(folder, tmp_path / "theirs", "-comp", "xz")
    fd = os.open(path, os.O_RDONLY)
    try:
        image = SquashfsImage(fd)
        with SquashfsWriter(target, compression="xz") as writer:
            tree = writer.adopt(image)
            del tree.children[b"one-block"]
            tree.children[b"added"] = Node("file", 0o644, data=writer.store_bytes(b"more"))
            writer.finish(tree)
        with SquashfsWriter(target) as writer, pytest.raises(ImageError) as caught:
            writer.adopt(image)
        assert caught.value.id == "other-compression"
    finally:
        os.close(fd)
    found = on_disk(unsquashfs(tmp_path / "image", tmp_path / "out"))
    assert found.pop(b"added")[5] == b"more"
    expected = on_disk(folder)
    del expected[b"one-block"]
    same(folder, found, expected)


def test_copying_works_without_copy_file_range(folder, scanned, written, flat, target, tmp_path, monkeypatch):
    written(tmp_path / "source", scanned(folder))

    def refuse(*arguments):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "copy_file_range", refuse)
    fd = os.open(tmp_path / "source", os.O_RDONLY)
    try:
        image = SquashfsImage(fd)
        with SquashfsWriter(target) as writer:
            writer.finish(writer.adopt(image))
        assert flat(SquashfsImage(target)) == flat(image)
    finally:
        os.close(fd)
