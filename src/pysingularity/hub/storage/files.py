# SPDX-License-Identifier: Apache-2.0
"""Blobs as files: `ab/abcdef…`, read-only, made by fsync and rename, so that a crash leaves all of one or nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from pysingularity.hub.storage.base import SHA256, Storage, check_sha256


class FileStorage(Storage):
    """Blobs below a folder.

    Arguments:
        top: the folder; files on their way in lie in its `incoming`.
    """

    def __init__(self, top: Path) -> None:
        self.top = top

    def path(self, sha256: str) -> Path:
        """Return where a blob lies or would lie."""
        check_sha256(sha256)
        return self.top / sha256[:2] / sha256

    def take(self, path: Path, sha256: str) -> None:
        """Move a file in and make it durable before anybody may speak of it."""
        target = self.path(sha256)
        if target.exists():
            path.unlink()
            os.utime(target)  # a collection of garbage that is under way sees that it is wanted again
            return
        target.parent.mkdir(mode=0o700, exist_ok=True)
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fchmod(handle, 0o400)
            os.fsync(handle)
        finally:
            os.close(handle)
        os.replace(path, target)
        sync_folder(target.parent)

    def has(self, sha256: str) -> bool:
        """Return whether a blob is there."""
        return self.path(sha256).exists()

    def size(self, sha256: str) -> int:
        """Return the size of a blob."""
        return self.path(sha256).stat().st_size

    def open(self, sha256: str) -> int:
        """Return a descriptor of a blob."""
        return os.open(self.path(sha256), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)

    def link(self, sha256: str, seconds: int) -> str | None:  # noqa: ARG002
        """Return None: the hub sends files itself."""
        return None

    def remove(self, sha256: str) -> None:
        """Remove a blob."""
        self.path(sha256).unlink(missing_ok=True)

    def list(self) -> Iterator[tuple[str, int, float]]:
        """Return all blobs."""
        for folder in sorted(self.top.iterdir()):
            if len(folder.name) != 2 or not folder.is_dir():
                continue
            for file in os.scandir(folder):
                if SHA256.match(file.name):
                    status = file.stat(follow_symlinks=False)
                    yield file.name, status.st_size, status.st_mtime

    def staging(self) -> Path:
        """Return the folder of files on their way in, on the same file system."""
        folder = self.top / "incoming"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return folder


def sync_folder(folder: Path) -> None:
    """Make names in a folder durable."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
