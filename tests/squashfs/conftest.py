# SPDX-License-Identifier: Apache-2.0
"""Trees to put into images, images made by us and by mksquashfs, and one way to look at both."""

from __future__ import annotations

import os
import random
import stat
import subprocess
from pathlib import Path

import pytest

from pysingularity.squashfs import layout
from pysingularity.squashfs.node import Node
from pysingularity.squashfs.reader import SquashfsImage
from pysingularity.squashfs.writer import SquashfsWriter


class Pair:
    """An image and the descriptor it reads from."""

    def __init__(self, path: Path, offset: int = 0, limit: int | None = None) -> None:
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self.image = SquashfsImage(self.fd, offset, limit, name=path.name)
        except BaseException:
            os.close(self.fd)
            raise

    def __enter__(self) -> SquashfsImage:
        return self.image

    def __exit__(self, *exc) -> None:
        os.close(self.fd)


@pytest.fixture
def opened():
    """Return the reader of an image, as a context manager."""
    return Pair


@pytest.fixture
def flat():
    """Return what is in an image as {path: everything that counts}."""

    def look(image: SquashfsImage) -> dict[bytes, tuple]:
        found = {}
        first: dict[int, bytes] = {}
        for path, inode in image.walk():
            content = b"".join(image.stream(inode)) if inode.type == layout.FILE else inode.target or inode.rdev
            same = first.setdefault(inode.ref, path)
            found[path] = (
                inode.kind,
                inode.mode,
                inode.uid,
                inode.gid,
                inode.mtime,
                content,
                tuple(sorted(image.xattrs(inode).items())),
                same,
                inode.nlink,
            )
        return found

    return look


@pytest.fixture
def on_disk():
    """Return what is in a folder in the same form (user attributes only unless root)."""

    def look(top: Path) -> dict[bytes, tuple]:
        found = {}
        first: dict[tuple[int, int], bytes] = {}
        base = os.fsencode(top)
        kinds = {0o04: "dir", 0o10: "file", 0o12: "symlink", 0o06: "block", 0o02: "char", 0o01: "fifo", 0o14: "socket"}
        todo = [b""]
        while todo:
            path = todo.pop()
            full = os.path.join(base, path) if path else base
            status = os.lstat(full)
            kind = kinds[stat.S_IFMT(status.st_mode) >> 12]
            content: object = 0
            if kind == "file":
                # An ordinary user may not even open one of mode 0.
                content = Path(os.fsdecode(full)).read_bytes() if status.st_size else b""
            elif kind == "symlink":
                content = os.readlink(full)
            elif kind in ("char", "block"):
                content = status.st_rdev
            elif kind == "dir":
                todo += [os.path.join(path, name) if path else name for name in os.listdir(full)]
            xattrs = tuple(
                sorted(
                    (os.fsencode(name), os.getxattr(full, name, follow_symlinks=False))
                    for name in os.listxattr(full, follow_symlinks=False)
                )
            )
            found[path] = (
                kind,
                stat.S_IMODE(status.st_mode),
                status.st_uid,
                status.st_gid,
                int(status.st_mtime),
                content,
                xattrs,
                first.setdefault((status.st_dev, status.st_ino), path) if kind != "dir" else path,
            )
        return found

    return look


def _folder(top: Path, root: bool) -> Path:
    noise = random.Random(7)
    (top / "a/b/c").mkdir(parents=True)
    (top / "empty-folder").mkdir()
    (top / "empty").touch()
    (top / "small").write_bytes(b"x" * 100)
    (top / "equal").write_bytes(b"x" * 100)
    (top / "one-block").write_bytes(noise.randbytes(131072))
    (top / "large").write_text("".join(f"{number}\n" for number in range(150_000)))
    (top / "large-equal").write_text("".join(f"{number}\n" for number in range(150_000)))
    (top / "noise").write_bytes(noise.randbytes(300_001))
    with open(top / "sparse", "wb") as file:
        file.truncate(3 << 20)
        file.seek(2 << 20)
        file.write(b"end")
    with open(top / "holes-only", "wb") as file:
        file.truncate(1 << 20)
    os.link(top / "small", top / "a/hard")
    os.link(top / "large", top / "a/b/hard")
    (top / "link").symlink_to("a/b")
    (top / "long-link").symlink_to("x/" * 1500)
    (top / os.fsdecode(b"\xff\xfe name")).write_text("odd")
    (top / ("n" * 255)).write_text("long")
    os.mkfifo(top / "fifo", 0o640)
    os.setxattr(top / "small", "user.note", b"hello\0world")
    os.setxattr(top / "large", "user.note", b"v" * 200)
    os.setxattr(top / "noise", "user.other", b"v" * 200)
    os.setxattr(top / "a", "user.empty", b"")
    os.chmod(top / "empty", 0)
    os.chmod(top / "a/b/c", 0o500)
    os.chmod(top / "large", 0o4755)
    os.chmod(top / "a/b", 0o3777)
    (top / "many").mkdir()
    for number in range(2500):
        (top / f"many/file-{number:05}-{'y' * (number % 50)}").write_text(str(number))
    if root:
        os.mknod(top / "null", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        os.mknod(top / "disk", 0o660 | stat.S_IFBLK, os.makedev(259, 70000))
        os.mknod(top / "socket", 0o755 | stat.S_IFSOCK)
        os.chown(top / "noise", 123456, 65534)
        os.lchown(top / "link", 5, 6)
        os.setxattr(top / "one-block", "security.capability", b"\x01\0\0\x02\0\x04" + bytes(14))
        os.setxattr(top / "link", "trusted.thing", b"t" * 500, follow_symlinks=False)
        os.setxattr(top / "fifo", "trusted.thing", b"t" * 500)
    for path in sorted(top.rglob("*"), reverse=True):
        os.utime(path, (1_500_000_000, 1_500_000_000 + len(path.name)), follow_symlinks=False)
    os.utime(top, (1, 4_000_000_000))
    return top


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A folder with one of everything that this user may make."""
    return _folder(tmp_path_factory.mktemp("folder"), os.getuid() == 0)


@pytest.fixture
def mksquashfs(tool):
    """Make an image with squashfs-tools: mksquashfs(folder, image, "-comp", "xz")."""

    def make(source: Path, target: Path, *options: str) -> Path:
        command = [tool("mksquashfs"), source, target, "-noappend", "-no-progress", "-quiet", *options]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            pytest.skip(f"mksquashfs {' '.join(options)}: {(result.stderr or result.stdout).strip()[:200]}")
        return target

    return make


@pytest.fixture
def unsquashfs(tool):
    """Unpack an image with squashfs-tools."""

    def run(image: Path, target: Path, *options: str) -> Path:
        command = [tool("unsquashfs"), "-no-progress", "-quiet", *options, "-d", target, image]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr + result.stdout
        assert not result.stderr, result.stderr
        return target

    return run


def write_image(path: Path, tree: Node, contents: dict[int, bytes] | None = None, **options) -> int:
    """Write a tree whose files have their bytes as `source`; return the size."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    try:
        with SquashfsWriter(fd, **options) as writer:
            for _, node in tree.walk():
                if node.kind == "file" and node.data is None:
                    node.data = writer.store_bytes(node.source)
            return writer.finish(tree)
    finally:
        os.close(fd)


@pytest.fixture
def written():
    """Write a tree of nodes as an image."""
    return write_image


def scan(top: Path) -> Node:
    """Return a folder as a tree of nodes with contents as `source`."""
    links: dict[tuple[int, int], Node] = {}

    def node(path: Path) -> Node:
        status = path.lstat()
        kinds = {
            stat.S_IFREG: "file",
            stat.S_IFDIR: "dir",
            stat.S_IFLNK: "symlink",
            stat.S_IFCHR: "char",
            stat.S_IFBLK: "block",
            stat.S_IFIFO: "fifo",
            stat.S_IFSOCK: "socket",
        }
        made = Node(
            kinds[stat.S_IFMT(status.st_mode)],
            stat.S_IMODE(status.st_mode),
            status.st_uid,
            status.st_gid,
            int(status.st_mtime),
            rdev=status.st_rdev,
        )
        made.xattrs = {
            os.fsencode(name): os.getxattr(path, name, follow_symlinks=False)
            for name in os.listxattr(path, follow_symlinks=False)
        } or None
        if made.kind == "symlink":
            made.target = os.fsencode(os.readlink(path))
        elif made.kind == "file":
            made.source = path.read_bytes() if status.st_size else b""
        elif made.kind == "dir":
            for below in path.iterdir():
                key = below.lstat().st_dev, below.lstat().st_ino
                made.children[os.fsencode(below.name)] = links[key] = links.get(key) or node(below)
        return made

    return node(top)


@pytest.fixture
def scanned():
    """Return a folder as a tree of nodes."""
    return scan
