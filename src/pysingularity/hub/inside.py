# SPDX-License-Identifier: Apache-2.0
"""What is inside images: the listing of their files, and what differs between two of them.

A listing is made when somebody first looks, and kept in the database by the digest of the file. Everything read here
was made by strangers, so numbers of files, bytes and lines are bounded, and answers say when a bound was reached.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from sqlalchemy.exc import IntegrityError

from pysingularity.errors import SingularityError
from pysingularity.hub.context import Hub
from pysingularity.hub.errors import HubError, NotFound
from pysingularity.hub.models import Blob, FileTree, Image
from pysingularity.image.open import open_image
from pysingularity.squashfs import layout
from pysingularity.squashfs.reader import SquashfsImage

#: Files in a listing, and how much of that JSON there may be when it is read again.
MOST_FILES = 250_000
#: Bytes of each image whose content a comparison reads, and files that it names.
MOST_BYTES = 64 << 20
MOST_NAMED = 2000
MOST_LINES = 2000
PACKAGES = 32 << 20


class NoListing(HubError):
    """The files of an image cannot be listed: encrypted, another file system, damaged, or not uploaded."""

    status = 422


class Entry(NamedTuple):
    """A file, folder or anything else with a name in an image; `ref` is where its inode stands.

    A tuple, since a page makes a hundred thousand of them.
    """

    path: str
    kind: str
    mode: int
    uid: int
    gid: int
    size: int
    mtime: int
    target: str
    ref: int


@dataclass(frozen=True)
class Listing:
    """All entries of an image in the order of their paths; `complete` is False when there were too many."""

    entries: list[Entry]
    complete: bool


def readable(name: bytes) -> str:
    """Return a name of the image as text in which nothing is hidden: bytes and letters that do not print as escapes."""
    text = name.decode("utf-8", "backslashreplace")
    return text if text.isprintable() else "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text)


@contextmanager
def opened(hub: Hub, image: Image) -> Iterator[SquashfsImage]:
    """Open the root file system of a stored image.

    Raises:
        NoListing: it cannot be read.
        NotFound: the file is gone.
    """
    if image.blob is None:
        raise NoListing("not-uploaded", f"image {image.id} has not been uploaded completely")
    with hub.read() as session:
        blob = session.get(Blob, image.blob)
    if blob is None or blob.damaged:
        raise NoListing("damaged", "the stored file is damaged")
    try:
        handle = hub.storage.open(image.blob)
    except FileNotFoundError:
        raise NotFound("no-such-blob", "the stored file is gone; ask the administrator")
    try:
        with open_image(f"/proc/self/fd/{handle}") as file:
            if file.filesystem != "squashfs":
                raise NoListing("no-listing", f"the files of an image of kind {file.filesystem} cannot be listed")
            yield SquashfsImage(file.fd, file.offset, file.size, name="the image")
    except HubError:
        raise
    except SingularityError as error:
        raise NoListing(error.id, error.message.replace(f"/proc/self/fd/{handle}", "the image"))
    finally:
        os.close(handle)


def listing(hub: Hub, image: Image) -> Listing:
    """Return the files of an image.

    Raises:
        NoListing: they cannot be read.
    """
    if image.blob is not None:
        with hub.read() as session:
            row = session.get(FileTree, image.blob)
        if row is not None:
            value = json.loads(zlib.decompress(row.content))
            return Listing([Entry(*one) for one in value["entries"]], value["complete"])
    entries: list[Entry] = []
    complete = True
    with opened(hub, image) as squashfs:
        for path, inode in squashfs.walk():
            if len(entries) == MOST_FILES:
                complete = False
                break
            kind = layout.KINDS[inode.type]
            size = inode.size if kind == "file" else 0
            target = readable(inode.target) if kind == "symlink" else ""
            entries.append(
                Entry(
                    readable(path),
                    kind,
                    inode.mode & 0o7777,
                    inode.uid,
                    inode.gid,
                    size,
                    inode.mtime,
                    target,
                    inode.ref,
                )
            )
    content = zlib.compress(json.dumps({"entries": entries, "complete": complete}).encode(), 6)
    try:
        with hub.write() as session:
            if session.get(FileTree, image.blob) is None:
                session.add(FileTree(sha256=image.blob, content=content))
    except IntegrityError:
        pass  # somebody else looked at the same time and kept the same listing, or the blob was just collected
    return Listing(entries, complete)


def packages(squashfs: SquashfsImage) -> dict[str, str]:
    """Return name and version of the packages that dpkg or apk installed; none for images of other kinds."""
    found: dict[str, str] = {}
    for path, name_key, version_key in (
        ("var/lib/dpkg/status", "Package:", "Version:"),
        ("lib/apk/db/installed", "P:", "V:"),
    ):
        inode = squashfs.lookup(path)
        if inode is None or layout.KINDS[inode.type] != "file" or inode.size > PACKAGES:
            continue
        for block in squashfs.read(inode).decode("utf-8", "replace").split("\n\n"):
            name = version = arch = ""
            installed = True
            for line in block.splitlines():
                if line.startswith(name_key):
                    name = line[len(name_key) :].strip()
                elif line.startswith(version_key):
                    version = line[len(version_key) :].strip()
                elif line.startswith("Architecture:"):
                    arch = line.partition(":")[2].strip()
                elif line.startswith("Status:"):
                    installed = line.endswith(" installed")
            if name and installed:
                # Several architectures of one package may be installed beside each other.
                found[name if name not in found else f"{name}:{arch}"] = version
    return found


def changes_of(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """Return what was added, removed and changed between two mappings."""
    return {
        "added": {key: after[key] for key in sorted(after) if key not in before},
        "removed": {key: before[key] for key in sorted(before) if key not in after},
        "changed": {
            key: {"before": before[key], "after": after[key]}
            for key in sorted(before)
            if key in after and before[key] != after[key]
        },
    }


def environment_of(image: Image) -> dict[str, Any]:
    """Return the environment scripts of an image by their names."""
    value = image.details.get("environment")
    if isinstance(value, dict):
        return value
    return {"environment": value} if isinstance(value, str) and value else {}


def definition_changes(before: str, after: str) -> list[str]:
    """Return the lines of a unified diff of two definition files."""
    one, two = before.splitlines(), after.splitlines()
    lines = difflib.unified_diff(one[:MOST_LINES], two[:MOST_LINES], "before", "after", lineterm="")
    found = list(lines)
    if max(len(one), len(two)) > MOST_LINES:
        found.append(f"... only the first {MOST_LINES} lines were compared")
    return found


def compare(hub: Hub, before: Image, after: Image) -> dict[str, Any]:
    """Return what differs between two images: files, packages, labels, environment, definition.

    Files of one path and size count as the same when their bytes are the same. At most `MOST_BYTES` of each image are
    read for that, those of another time of change first; what was not read is counted as `unchecked`.
    """
    value: dict[str, Any] = {
        "labels": changes_of(before.labels, after.labels),
        "environment": changes_of(environment_of(before), environment_of(after)),
        "definition": definition_changes(before.definition, after.definition),
        "size": {"before": before.size, "after": after.size},
    }
    try:
        one, two = listing(hub, before), listing(hub, after)
        with opened(hub, before) as left, opened(hub, after) as right:
            value["files"] = _compare_files(one, two, left, right, same_file=before.blob == after.blob)
            value["packages"] = changes_of(packages(left), packages(right))
    except SingularityError as error:
        value["files"] = {"problem": error.message}
        value["packages"] = changes_of({}, {})
    return value


def _compare_files(
    one: Listing, two: Listing, left: SquashfsImage, right: SquashfsImage, *, same_file: bool
) -> dict[str, Any]:
    before, after = {e.path: e for e in one.entries}, {e.path: e for e in two.entries}
    changed: dict[str, list[str]] = {}
    doubtful = []
    for path in before.keys() & after.keys():
        old, new = before[path], after[path]
        what = [
            name
            for name, differs in (
                ("kind", old.kind != new.kind),
                ("mode", old.mode != new.mode),
                ("owner", (old.uid, old.gid) != (new.uid, new.gid)),
                ("size", old.size != new.size),
                ("target", old.target != new.target),
            )
            if differs
        ]
        if what:
            changed[path] = what
        if old.kind == new.kind == "file" and old.size == new.size and old.size and not same_file:
            doubtful.append((old.mtime == new.mtime, old.size, path))
    budget, unchecked = MOST_BYTES, 0
    for _, size, path in sorted(doubtful):
        if size > budget:
            unchecked += 1
            continue
        budget -= size
        if _digest(left, before[path].ref) != _digest(right, after[path].ref):
            changed.setdefault(path, []).append("content")
    added, removed = sorted(after.keys() - before.keys()), sorted(before.keys() - after.keys())
    named: list[dict[str, Any]] = []
    for paths, word in ((sorted(changed), "changed"), (added, "added"), (removed, "removed")):
        named += [
            {
                "path": path,
                "change": word,
                "what": changed.get(path, []),
                "before": before[path].size if path in before else None,
                "after": after[path].size if path in after else None,
            }
            for path in paths[:MOST_NAMED]
        ]
    both = len(before.keys() & after.keys())
    return {
        "added": len(added),
        "removed": len(removed),
        "changed": len(changed),
        "same": both - len(changed) - unchecked,
        "unchecked": unchecked,
        "similarity": round(2 * (both - len(changed)) / ((len(before) + len(after)) or 1), 4),
        "complete": one.complete and two.complete,
        "left_off": sum(max(0, count - MOST_NAMED) for count in (len(changed), len(added), len(removed))),
        "entries": named,
    }


def _digest(squashfs: SquashfsImage, ref: int) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for piece in squashfs.stream(squashfs.inode(ref)):
        digest.update(piece)
    return digest.digest()
