# SPDX-License-Identifier: Apache-2.0
"""A small world for containers: a root file system of busybox, as a sandbox and as a squashfs image."""

from __future__ import annotations

import functools
import os
import select
import shutil
import subprocess
from pathlib import Path

import pytest

APPLETS = (
    "sh cat ls env id pwd echo touch true false sleep kill mkdir rm readlink stat test head ps hostname mount grep ln "
    "printf tr wc cut seq dd md5sum mkfifo chmod chown tty find sort sed tail stty"
).split()
MINIMAL_ETC = {
    "passwd": "root:x:0:0:root:/root:/bin/sh\ndaemon:x:1:1::/:/bin/false\n",
    "group": "root:x:0:\ndaemon:x:1:\n",
    "hosts": "",
    "resolv.conf": "",
}


def make_tree(top: Path, busybox: str) -> Path:
    """Make a root file system with nothing but busybox in it."""
    for name in ("bin", "dev", "proc", "sys", "tmp", "var/tmp", "etc", "home", "root", "usr/bin", "opt"):
        (top / name).mkdir(parents=True, exist_ok=True)
    shutil.copy(busybox, top / "bin/busybox")
    for name in APPLETS:
        (top / "bin" / name).symlink_to("busybox")
    for name, content in MINIMAL_ETC.items():
        (top / "etc" / name).write_text(content)
    (top / ".singularity.d/env").mkdir(parents=True)
    (top / ".singularity.d/runscript").write_text('#!/bin/sh\necho "run: $*"\n')
    (top / ".singularity.d/runscript").chmod(0o755)
    return top


def own_tree(top: Path, uid: int, gid: int) -> None:
    """Give a whole tree to a user."""
    if os.getuid() != 0:
        return
    for folder, names, files in os.walk(top):
        for name in (*names, *files):
            os.lchown(os.path.join(folder, name), uid, gid)
        os.chown(folder, uid, gid)


def tree_of(user, image: str, below: str = "") -> dict[str, tuple]:
    """Return what an image of a user has: path → kind, mode, owner, group, device, first name, content, attributes.

    What it knows about its own build is left out.

    Arguments:
        below: beginning of the paths that are wanted.
    """
    from pysingularity.image.inside import squashfs_of
    from pysingularity.image.open import open_image

    found = {}
    with open_image(str(user.tmp / image)) as opened:
        files = squashfs_of(opened)
        refs: dict[int, str] = {}
        for path, inode in files.walk():
            name = path.decode()
            first = refs.setdefault(inode.ref, name)
            if name.startswith(below) and not name.startswith(".singularity.d/"):
                content = files.read(inode) if inode.kind == "file" else inode.target
                found[name] = (inode.kind, oct(inode.mode), inode.uid, inode.gid, inode.rdev, first, content)
                found[name] += (files.xattrs(inode),)
    return found


def while_mounts_stay(test):
    """Run a test again when it fails and the host's mounts changed meanwhile: warm images are then mounted anew."""

    @functools.wraps(test)
    def run(*arguments, **fixtures):
        for _ in range(5):
            with open("/proc/self/mountinfo", "rb") as file:
                changes = select.poll()
                changes.register(file, select.POLLPRI)
                try:
                    return test(*arguments, **fixtures)
                except AssertionError:
                    if not changes.poll(0):
                        raise
        return test(*arguments, **fixtures)

    return run


@pytest.fixture
def busybox(tool) -> str:
    """Return a busybox without dynamic libraries."""
    path = tool("busybox")
    if _has_interpreter(Path(path).read_bytes()):
        pytest.skip("needs a static busybox (busybox-static)")
    return path


def _has_interpreter(data: bytes) -> bool:
    """Return whether a 64-bit ELF program names a dynamic linker (program header of type 3)."""
    start, size, count = (int.from_bytes(data[at : at + n], "little") for at, n in ((32, 8), (54, 2), (56, 2)))
    return any(data[start + n * size : start + n * size + 4] == b"\3\0\0\0" for n in range(count))


@pytest.fixture
def box(as_user, busybox) -> Path:
    """A sandbox that belongs to the user; tests may change it."""
    top = make_tree(as_user.tmp / "box", busybox)
    own_tree(top, as_user.uid, as_user.gid)
    return top


@pytest.fixture
def squash(tool):
    """Make a squashfs image of a folder: squash(folder) -> path."""

    def make(folder: Path, *options: str) -> Path:
        path = folder.with_suffix(".squashfs")
        path.unlink(missing_ok=True)
        subprocess.run(
            [tool("mksquashfs"), folder, path, "-quiet", "-no-progress", "-all-root", *options],
            check=True,
            capture_output=True,
        )
        path.chmod(0o644)
        return path

    return make


@pytest.fixture
def image(box, squash, fuse) -> Path:
    """The sandbox as a squashfs image."""
    return squash(box)


@pytest.fixture
def sing(as_user):
    """Run `singularity ...` as the user: sing("exec", box, "true")."""

    def run(*words, **options):
        return as_user(["singularity", *map(str, words)], **options)

    return run
