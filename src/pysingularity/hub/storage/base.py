# SPDX-License-Identifier: Apache-2.0
"""What every storage can do, and hashing of files on their way in."""

from __future__ import annotations

import hashlib
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pysingularity.hub.errors import Invalid

SHA256 = re.compile(r"[0-9a-f]{64}\Z")
CHUNK = 1 << 20


@dataclass(frozen=True)
class Digests:
    """Size and digests of a file."""

    size: int
    sha256: str
    md5: str


def hash_file(path: Path | int, beat: Callable[[], None] | None = None) -> Digests:
    """Read a file and return its digests. `beat` is called now and then (to renew a lease).

    Arguments:
        path: a path, or an open descriptor, which stays open and is read from its start.
    """
    sha256, md5, size = hashlib.sha256(), hashlib.md5(usedforsecurity=False), 0
    own = os.open(path, os.O_RDONLY | os.O_CLOEXEC) if isinstance(path, Path) else path
    try:
        buffer = memoryview(bytearray(CHUNK))
        while count := os.preadv(own, [buffer], size):
            sha256.update(buffer[:count])
            md5.update(buffer[:count])
            size += count
            if beat is not None and size % (64 * CHUNK) < count:
                beat()
    finally:
        if isinstance(path, Path):
            os.close(own)
    return Digests(size, sha256.hexdigest(), md5.hexdigest())


def check_sha256(text: str) -> str:
    """Return a digest, after checking that it is one: it becomes part of a path.

    Raises:
        Invalid: anything but 64 lower-case hex digits.
    """
    if not SHA256.match(text):
        raise Invalid("wrong-digest", f"{text[:80]!r} is no SHA-256 digest")
    return text


class Storage(ABC):
    """Blobs by their SHA-256."""

    @abstractmethod
    def take(self, path: Path, sha256: str) -> None:
        """Move a finished file in. The caller has hashed it; when it is there already, the file is only removed."""

    @abstractmethod
    def has(self, sha256: str) -> bool:
        """Return whether a blob is there."""

    @abstractmethod
    def size(self, sha256: str) -> int:
        """Return the size of a blob in bytes.

        Raises:
            FileNotFoundError: it is not there.
        """

    @abstractmethod
    def open(self, sha256: str) -> int:
        """Return a descriptor of a blob for reading; the caller closes it. Object stores fetch it first.

        Raises:
            FileNotFoundError: it is not there.
        """

    @abstractmethod
    def link(self, sha256: str, seconds: int) -> str | None:
        """Return a signed address of the blob, or None when the hub itself has to send it."""

    @abstractmethod
    def remove(self, sha256: str) -> None:
        """Remove a blob; one that is not there is no error."""

    @abstractmethod
    def list(self) -> Iterator[tuple[str, int, float]]:
        """Return digest, size and time of change of every blob."""

    @abstractmethod
    def staging(self) -> Path:
        """Return a folder on the disk from which `take` is cheap."""
