# SPDX-License-Identifier: Apache-2.0
"""The FUSE server shows exactly what the kernel's own squashfs shows, and survives hostile images."""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pysingularity.image.mount import serve
from pysingularity.linux import mounts

pytestmark = [pytest.mark.root, pytest.mark.fuse]


@pytest.fixture
def tree(tmp_path):
    """A folder with one of everything."""
    top = tmp_path / "tree"
    (top / "a/b/c").mkdir(parents=True)
    (top / "empty").touch()
    (top / "small").write_bytes(b"x" * 100)
    (top / "large").write_text("".join(f"{number}\n" for number in range(150_000)))
    with open(top / "sparse", "wb") as file:
        file.truncate(3 << 20)
        file.seek(2 << 20)
        file.write(b"end")
    os.link(top / "small", top / "a/hard")
    (top / "link").symlink_to("a/b")
    (top / b"\xff\xfe name".decode("utf-8", "surrogateescape")).write_text("odd")
    os.mkfifo(top / "fifo")
    os.mknod(top / "null", 0o666 | 0o020000, os.makedev(1, 3))
    os.setxattr(top / "small", "user.note", b"hello\0world")
    os.chown(top / "large", 1234, 4321)
    os.chmod(top / "large", 0o4755)
    (top / "many").mkdir()
    for number in range(3000):
        (top / f"many/file-{number:05}").write_text(str(number))
    return top


@pytest.fixture
def image(root_only, tree, tmp_path, tool):
    path = tmp_path / "image.squashfs"
    subprocess.run([tool("mksquashfs"), tree, path, "-quiet", "-noappend"], check=True, stdout=subprocess.DEVNULL)
    return path


@pytest.fixture
def mounted(root_only):
    """Mount images by our server; everything is unmounted at the end."""
    targets = []

    def mount(image: Path, target: Path) -> Path:
        target.mkdir()
        pending = serve(str(image), 0, 0, (0, 0), squash=False)
        try:
            pending.mount(str(target))
            targets.append(target)
        finally:
            pending.close()
        return target

    yield mount
    for target in targets:
        try:
            mounts.unmount(str(target))
        except OSError as error:
            assert error.errno == errno.EINVAL  # a test took it away itself


def everything(top: Path) -> dict[str, tuple]:
    """Return what stat, readlink, read and listxattr say about everything below a folder."""
    found = {}
    for folder, folders, files in os.walk(top):
        for name in [".", *folders, *files]:
            path = os.path.join(folder, name)
            state = os.lstat(path)
            kind = state.st_mode & 0o170000
            content: object = None
            if kind == 0o120000:
                content = os.readlink(path)
            elif kind == 0o100000:
                content = hashlib.sha256(Path(path).read_bytes()).hexdigest()
            attributes = {name: os.getxattr(path, name) for name in os.listxattr(path, follow_symlinks=False)}
            size = state.st_size if kind != 0o040000 else 0
            found[os.path.relpath(path, top)] = (
                *(state.st_mode, state.st_uid, state.st_gid, state.st_nlink if kind != 0o040000 else 0),
                *(size, state.st_mtime_ns, state.st_rdev, state.st_ino, content, attributes),
            )
    return found


def test_mount_shows_what_the_kernel_shows(image, mounted, tmp_path):
    judge = tmp_path / "judge"
    judge.mkdir()
    subprocess.run(["mount", "-t", "squashfs", "-o", "loop,ro", image, judge], check=True)
    try:
        expected = everything(judge)
    finally:
        subprocess.run(["umount", judge], check=True)
    assert everything(mounted(image, tmp_path / "ours")) == expected


def test_listing_begins_with_the_folder_and_its_parent(image, mounted, tmp_path):
    top = mounted(image, tmp_path / "ours")
    lines = subprocess.run(["ls", "-a", top / "a"], capture_output=True, text=True, check=True).stdout.split()
    assert lines == [".", "..", "b", "hard"]


def test_many_readers_at_once_get_what_was_written(image, mounted, tmp_path):
    top = mounted(image, tmp_path / "ours")
    script = f"for i in 1 2 3 4; do (cat {top}/large {top}/many/* | sha256sum) & done; wait"
    lines = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(lines) == 4
    assert len(set(lines)) == 1


def test_server_ends_with_its_mount(image, mounted, tmp_path):
    top = mounted(image, tmp_path / "ours")
    for name in os.listdir(top / "many"):  # enough to let it call helpers
        (top / "many" / name).read_bytes()
    ours = servers(image)
    assert ours
    mounts.unmount(str(top))
    deadline = time.monotonic() + 30
    while servers(image) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not servers(image)


def servers(image: Path) -> set[str]:
    """Return the processes that have an image open; other tests have servers of their own."""
    found = set()
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            opened = [os.readlink(f"/proc/{pid}/fd/{number}") for number in os.listdir(f"/proc/{pid}/fd")]
        except OSError:  # ended meanwhile
            continue
        if str(image) in opened and int(pid) != os.getpid():
            found.add(pid)
    return found


def test_image_cut_short_while_it_runs_gives_errors_and_no_hang(image, mounted, tmp_path):
    top = mounted(image, tmp_path / "ours")
    os.listdir(top)
    os.truncate(image, 2000)
    with pytest.raises(OSError, match="Input/output"):
        (top / "large").read_bytes()
    assert "small" in os.listdir(top)  # what the kernel remembers stays


@pytest.fixture
def long_file(root_only, tmp_path, tool):
    """Return an image with one file of 24 MiB in it, of blocks that all differ, and the file's bytes."""
    made = random.Random(11)
    content = b"".join(made.randbytes(1 << 15) + bytes([number]) * (3 << 15) for number in range(192))
    (tmp_path / "long").mkdir()
    (tmp_path / "long/file").write_bytes(content + b"tail")
    image = tmp_path / "long.squashfs"
    command = [tool("mksquashfs"), tmp_path / "long", image, "-quiet", "-noappend"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return image, content + b"tail"


def test_file_mapped_and_read_forwards_and_crosswise_at_once_has_its_bytes(long_file, mounted, tmp_path):
    """What a dynamic linker does; blocks come from the thread that looks ahead as well as from the one that answers."""
    image, content = long_file
    top = mounted(image, tmp_path / "ours")
    places = random.Random(12)
    with open(top / "file", "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as view:
        half = len(content) // 2
        for step in range(0, half - 60_000, 60_000):
            for place in (step, half + step, places.randrange(len(content))):
                assert view[place : place + 60_000] == content[place : place + 60_000]
    assert (top / "file").read_bytes() == content


def test_image_cut_short_while_the_server_looks_ahead_gives_errors_and_no_hang(long_file, mounted, tmp_path):
    image, content = long_file
    top = mounted(image, tmp_path / "ours")
    script = """
import errno, os, sys
content, file = sys.stdin.buffer.read(), os.open(sys.argv[1], os.O_RDONLY)
for number in range(12):
    assert os.pread(file, 100_000, number * 100_000) == content[number * 100_000 :][:100_000]
os.truncate(sys.argv[2], 2 << 20)
failed = 0
for number in range(len(content) // 100_000):
    try:
        part = os.pread(file, 100_000, number * 100_000)
        assert content[number * 100_000 :].startswith(part)
        failed += len(part) < 100_000
    except OSError as error:
        assert error.errno == errno.EIO
        failed += 1
assert failed > len(content) // 200_000
"""
    command = [sys.executable, "-c", script, top / "file", image]
    subprocess.run(command, input=content, check=True, timeout=60)
    assert os.listdir(top) == ["file"]


def test_server_holds_little_memory_and_rests_when_nothing_is_read(long_file, mounted, tmp_path):
    image, content = long_file
    top = mounted(image, tmp_path / "ours")
    (server,) = servers(image)

    def status(name: str) -> int:
        lines = Path(f"/proc/{server}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))

    before = status("RssAnon")  # it is a fork of this process, whose memory counts as its own
    file = os.open(top / "file", os.O_RDONLY)
    try:
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)  # a page at a time: each block is kept for the rest of it
        for _ in range(3):
            for place in range(5000, len(content), 131072):
                assert os.pread(file, 10, place) == content[place : place + 10]
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(file)
    assert status("RssAnon") - before < 48 << 10  # KiB
    assert min(2, len(os.sched_getaffinity(0))) <= status("Threads") <= 5

    def used() -> int:
        fields = Path(f"/proc/{server}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])

    time.sleep(0.2)
    before = used()
    time.sleep(0.5)
    assert used() == before


def test_server_of_many_readers_ends_at_once_when_it_is_killed(image, mounted, tmp_path):
    """Its threads go with it, so that a program that reads gets an error instead of waiting."""
    top = mounted(image, tmp_path / "ours")
    script = f"for i in 1 2 3 4; do cat {top}/large {top}/many/* & done; wait"
    readers = subprocess.Popen(["sh", "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    readers.stdout.read(1000)
    (server,) = servers(image)
    os.kill(int(server), 9)
    readers.communicate(timeout=60)
    with pytest.raises(OSError, match="not connected"):
        os.listdir(top / "a")
    assert not servers(image)


def test_damage_in_one_place_leaves_the_rest_readable(image, mounted, tmp_path):
    data = bytearray(image.read_bytes())
    # The first stored block, whichever file's it is, made to inflate to nothing.
    data[96:4096] = b"\xff" * 4000
    image.write_bytes(data)
    top = mounted(image, tmp_path / "ours")
    outcomes = {}
    for path in [top / "large", top / "small", top / "sparse", *(top / "many").iterdir()]:
        try:
            outcomes[path.name] = len(path.read_bytes())
        except OSError as error:
            assert error.errno == errno.EIO
            outcomes[path.name] = -1
    assert -1 in outcomes.values()
    assert outcomes["sparse"] in (3 << 20, -1)
    assert os.readlink(top / "link") == "a/b"


def test_server_has_a_process_group_of_its_own_in_the_session_of_its_user(image, tmp_path):
    """Keys of the terminal do not reach it, and the scheduler counts it to the session it works for."""
    target = tmp_path / "mounted"
    target.mkdir()
    pending = serve(str(image), 0, 0, (0, 0), squash=False)
    pending.mount(str(target))
    try:
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                files = [os.readlink(one) for one in (folder / "fd").iterdir()]
            except OSError:
                continue
            if str(image) in files and (folder / "comm").read_text() == "singularity-fs\n":
                found.append((int(fields[2]), int(fields[3])))
        assert [session for _, session in found] == [os.getsid(0)] * len(found)
        assert found and os.getpgrp() not in [group for group, _ in found]
    finally:
        mounts.unmount(str(target))
        pending.close()
