# SPDX-License-Identifier: Apache-2.0
"""What COPY and ADD take from: the build context as `.dockerignore` leaves it, or the root file system of a stage.

Every name is resolved with the folder as the root (openat2(2)): `..` and links never lead out of it. A link that is
named itself is followed; links below a folder stay links.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable, Iterator

from pysingularity.image.metadata import LINKS, META
from pysingularity.linux.mounts import open_in_root
from pysingularity.recipe.dockerignore import Ignore, clean, name_pattern

_MAGIC = frozenset("*?[\\")
#: What every image of ours has at its top, and no stage brought.
_OURS = (META, *LINKS)


class Found:
    """A source that was found.

    Arguments:
        name: its name from the folder's root, without a leading slash; "" for the root itself.
        path: where it is on this machine, links resolved.
        status: of what it leads to.
    """

    __slots__ = ("name", "path", "status")

    def __init__(self, name: str, path: str, status: os.stat_result) -> None:
        self.name, self.path, self.status = name, path, status

    @property
    def is_folder(self) -> bool:
        """Whether its content is meant."""
        return stat.S_ISDIR(self.status.st_mode)


class Files:
    """A folder to take from.

    Arguments:
        root: its path.
        ignore: what is not seen.
        stage: it is a root file system: owners and attributes count, and what we put into every image does not.
    """

    def __init__(self, root: str, ignore: Ignore | None = None, *, stage: bool = False) -> None:
        self.root, self.ignore, self.stage = root, ignore or Ignore(), stage
        self._fd = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)

    def close(self) -> None:
        """Let go of the folder."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Files:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def find(self, pattern: str) -> list[Found]:
        """Return what a source names, in the order of names; nothing when there is none."""
        found = [""]
        for part in clean(pattern).split("/"):
            if not part:
                continue
            following: list[str] = []
            for name in found:
                if _MAGIC.isdisjoint(part):
                    following.append(f"{name}/{part}")
                else:
                    fits = name_pattern(part)
                    following += [f"{name}/{one}" for one in self._names(name) if fits.fullmatch(one)]
            found = following
        return [one for name in found if (one := self._one(name.lstrip("/"))) is not None]

    def _names(self, name: str) -> list[str]:
        try:
            fd = open_in_root(self._fd, name or "/", os.O_RDONLY | os.O_DIRECTORY)
        except OSError:
            return []
        try:
            return sorted(os.listdir(fd))
        finally:
            os.close(fd)

    def _one(self, name: str) -> Found | None:
        try:
            fd = open_in_root(self._fd, name or "/")
        except OSError:
            return None
        try:
            status = os.fstat(fd)
            path = os.readlink(f"/proc/self/fd/{fd}")
        finally:
            os.close(fd)
        if name and self.ignore.excludes(name) and not (stat.S_ISDIR(status.st_mode) and self.ignore.brings_back):
            return None
        return Found(name, path, status)

    def below(self, found: Found, exclude: Ignore | None = None) -> Iterator[tuple[str, os.DirEntry[str]]]:
        """Yield path (from the source) and entry of everything below a folder, folders before what is in them."""
        yield from self._walk(found.path, found.name, "", exclude or Ignore())

    def _walk(self, path: str, name: str, inner: str, exclude: Ignore) -> Iterator[tuple[str, os.DirEntry[str]]]:
        with os.scandir(path) as entries:
            ordered = sorted(entries, key=lambda one: one.name)
        for entry in ordered:
            full, rest = (f"{start}/{entry.name}" if start else entry.name for start in (name, inner))
            if self.stage and full == entry.name and entry.name in _OURS:
                continue
            hidden = self.ignore.excludes(full) or exclude.excludes(rest)
            if not entry.is_dir(follow_symlinks=False):
                if not hidden:
                    yield rest, entry
                continue
            if hidden and not (self.ignore.brings_back or exclude.brings_back):
                continue
            content = self._walk(entry.path, full, rest, exclude)
            if hidden:  # only when something below it is brought back
                first = next(content, None)
                if first is None:
                    continue
                yield rest, entry
                yield first
            else:
                yield rest, entry
            yield from content

    def digest(self, patterns: Iterable[str], exclude: Ignore | None = None) -> str:
        """Return a hash of names, modes and contents of what sources name; times and owners do not count."""
        whole = hashlib.sha256()
        for pattern in patterns:
            whole.update(f"\0{pattern}\0".encode("utf-8", "surrogateescape"))
            for found in self.find(pattern):
                _add(whole, found.name, found.path, found.status)
                try:
                    for name, entry in self.below(found, exclude) if found.is_folder else ():
                        _add(whole, name, entry.path, entry.stat(follow_symlinks=False))
                except OSError:  # a folder that may not be read: copying tells it, with the line
                    whole.update(b"unreadable")
        return whole.hexdigest()


def _add(whole: hashlib._Hash, name: str, path: str, status: os.stat_result) -> None:
    whole.update(name.encode("utf-8", "surrogateescape") + b"\0%o\0" % status.st_mode)
    try:
        if stat.S_ISLNK(status.st_mode):
            whole.update(os.fsencode(os.readlink(path)))
        elif stat.S_ISREG(status.st_mode):
            with open(path, "rb") as stream:
                whole.update(hashlib.file_digest(stream, "sha256").digest())
    except OSError:  # copying tells what is wrong with it
        whole.update(b"unreadable")
