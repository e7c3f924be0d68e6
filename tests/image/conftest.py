# SPDX-License-Identifier: Apache-2.0
"""A small root file system with everything that is awkward, and ways to compare such trees."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from pysingularity.image import metadata
from pysingularity.image.entries import Entry, put_into_folder


@pytest.fixture
def box(tmp_path) -> Path:
    """A sandbox: metadata, hard links, holes, odd names, modes; as root also owners and devices."""
    root = tmp_path / "box"
    (root / "bin").mkdir(parents=True)
    put_into_folder(
        str(root),
        [
            *metadata.base_entries(),
            Entry.file(metadata.LABELS, metadata.labels_file({"A": "1"})),
            Entry.file(metadata.DEFINITION, "bootstrap: scratch\n"),
            Entry.file(metadata.RUNSCRIPT, '#!/bin/sh\necho run "$@"\n', 0o755),
        ],
    )
    (root / "data").mkdir()
    (root / "data/large").write_bytes(os.urandom(300_000) + bytes(400_000))
    (root / "data/small").write_bytes(b"small")
    (root / "data/empty").write_bytes(b"")
    os.link(root / "data/small", root / "data/again")
    with open(root / "data/hole", "wb") as file:
        file.truncate(5_000_000)
        file.seek(4_000_000)
        file.write(b"end")
    os.symlink("../nowhere", root / "data/link")
    os.mkfifo(root / "data/pipe")
    Path(os.fsdecode(os.fsencode(root / "data") + b"/caf\xe9 'x' \n")).write_bytes(b"odd name")
    (root / "data/odd").write_bytes(b"mode")
    (root / "data/odd").chmod(0o6711)
    for number, path in enumerate(sorted(root.rglob("*"))):
        if not path.is_symlink():
            os.utime(path, (1, 1_600_000_000 + number))
    os.utime(root, (1, 1_600_000_000))
    return root


@pytest.fixture
def snapshot() -> Callable[[str | os.PathLike[str]], dict[str, tuple]]:
    """Return a function that tells what a tree is, comparable."""
    return _snapshot


def _snapshot(root: str | os.PathLike[str]) -> dict[str, tuple]:
    """Return what a tree is, comparable: kind, mode, owner, time, content, links, device of every path."""
    found, groups = {}, {}
    top = os.fsdecode(os.fspath(root))
    for folder, names, files in os.walk(top):
        for name in [*names, *files]:
            path = os.path.join(folder, name)
            status = os.lstat(path)
            kind = stat.S_IFMT(status.st_mode)
            content: object = None
            if stat.S_ISREG(kind):
                content = Path(path).read_bytes()
            elif stat.S_ISLNK(kind):
                content = os.readlink(path)
            elif stat.S_ISCHR(kind) or stat.S_ISBLK(kind):
                content = status.st_rdev
            group = None
            if status.st_nlink > 1 and not stat.S_ISDIR(kind):
                group = groups.setdefault((status.st_dev, status.st_ino), len(groups))
            found[os.path.relpath(path, top)] = (
                kind,
                None if stat.S_ISLNK(kind) else stat.S_IMODE(status.st_mode),
                (status.st_uid, status.st_gid),
                int(status.st_mtime),
                content,
                group is not None,
            )
    return found
