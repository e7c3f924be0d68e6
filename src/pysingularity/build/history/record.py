# SPDX-License-Identifier: Apache-2.0
"""What a sandbox was when it was made: source, packages and a line for every file, kept in the sandbox itself.

So that changes can be told later without the base image, which may have gone from the cache. The record never gets into
an image (`image.tree`). For a sandbox without one, `of_image` makes the same of a base image.
"""

from __future__ import annotations

import gzip
import json
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pysingularity.build.history import installed
from pysingularity.errors import UserError
from pysingularity.image import metadata
from pysingularity.image.inside import FolderSource, source_of, squashfs_of
from pysingularity.image.open import open_image
from pysingularity.image.tree import RECORD
from pysingularity.linux.ownership import SIDE_TABLE

if TYPE_CHECKING:
    from pysingularity.image.inside import Source

VERSION = 1
_LARGEST = 256 << 20
#: Files whose text counts: what was in them before has to be known.
TEXTS = (metadata.CUSTOM_ENVIRONMENT, metadata.RUNSCRIPT, metadata.STARTSCRIPT, metadata.TEST, metadata.DEFINITION)
#: Folders that belong to a machine or a moment.
PASSING = ("proc", "sys", "dev", "run")

#: path (no leading slash) → kind letter, mode, size, time (ns), target of a link.
Files = dict[str, tuple[str, int, int, int, str]]


@dataclass
class Record:
    """What a root file system was.

    Arguments:
        source: where it came from: a reference, the path of an image, or "" for a definition file.
        packages: `Installed.value()`.
        files: see `Files`.
        texts: content of the files of TEXTS.
    """

    source: str = ""
    packages: dict[str, Any] = field(default_factory=dict)
    files: Files = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)


def keep(root: str, source: str) -> None:
    """Write the record of a sandbox that has just been made; without room or rights there is none."""
    with FolderSource(root) as files:
        record = _of(files, dict(walk(root)), source)
    value = {
        "version": VERSION,
        "source": record.source,
        "packages": record.packages,
        "texts": record.texts,
        "files": [[path, *facts] for path, facts in record.files.items()],
    }
    data = gzip.compress(json.dumps(value, separators=(",", ":")).encode("ascii"), 1, mtime=0)
    path = os.path.join(root, RECORD)
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    except OSError:
        return
    with open(fd, "wb") as stream:
        stream.write(data)


def load(root: str) -> Record | None:
    """Return the record of a sandbox, None when it has none that can be read."""
    with FolderSource(root) as files:
        data = files.read(RECORD, _LARGEST)
    if data is None:
        return None
    try:
        value = json.loads(gzip.decompress(data))
        if value["version"] != VERSION:
            return None
        listed = {one[0]: (one[1], one[2], one[3], one[4], one[5]) for one in value["files"]}
        return Record(value["source"], value["packages"], listed, value["texts"])
    except (ValueError, KeyError, TypeError, IndexError, OSError, EOFError):
        return None


def of_image(path: str) -> Record:
    """Return the same of a base image of any kind.

    Raises:
        ImageError: it cannot be read. UserError: it is of a kind whose files cannot be listed.
    """
    with open_image(path) as image:
        if image.kind == "sandbox":
            with FolderSource(path) as files:
                return _of(files, dict(walk(path)), path)
        if image.filesystem != "squashfs":
            raise UserError(
                "base-kind", f"{path}: the files of such an image cannot be listed", hint="convert it first"
            )
        listed: Files = {}
        for name, inode in squashfs_of(image).walk():
            if name:
                target = os.fsdecode(inode.target) if inode.kind == "symlink" else ""
                size = inode.size if inode.kind == "file" else 0
                text = os.fsdecode(name)
                if text.split("/")[0] not in PASSING:
                    listed[text] = _letter(inode.kind), inode.mode, size, inode.mtime * 10**9, target
        with source_of(image) as files_:
            return _of(files_, listed, path)


def _of(files: Source, listed: Files, source: str) -> Record:
    texts = {name: (files.read(name) or b"").decode("utf-8", "surrogateescape") for name in TEXTS}
    return Record(source, installed.read(files).value(), listed, texts)


def _letter(kind: str) -> str:
    return {"file": "f", "dir": "d", "symlink": "l"}.get(kind, "o")


def walk(root: str) -> Iterator[tuple[str, tuple[str, int, int, int, str]]]:
    """Yield path and facts of everything in a folder; links are not followed."""
    stack = [("", root)]
    while stack:
        prefix, folder = stack.pop()
        try:
            entries = list(os.scandir(folder))
        except PermissionError:
            continue
        for entry in entries:
            name = f"{prefix}{entry.name}"
            if name in (*PASSING, RECORD, SIDE_TABLE):
                continue
            status = entry.stat(follow_symlinks=False)
            mode, time = stat.S_IMODE(status.st_mode), status.st_mtime_ns
            if stat.S_ISDIR(status.st_mode):
                yield name, ("d", mode, 0, time, "")
                stack.append((f"{name}/", entry.path))
            elif stat.S_ISREG(status.st_mode):
                yield name, ("f", mode, status.st_size, time, "")
            elif stat.S_ISLNK(status.st_mode):
                yield name, ("l", mode, 0, time, os.readlink(entry.path))
            else:
                yield name, ("o", mode, 0, time, "")
