# SPDX-License-Identifier: Apache-2.0
"""The FUSE server shows exactly what the kernel's own squashfs shows, and survives hostile images."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
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
