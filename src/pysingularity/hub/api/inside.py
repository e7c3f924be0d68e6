# SPDX-License-Identifier: Apache-2.0
"""What is inside images over JSON: a folder of an image, and the comparison of two images."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Depends

from pysingularity.hub.api.images import seen_image
from pysingularity.hub.context import Hub
from pysingularity.hub.doors import Number, TheHub, Who, limited
from pysingularity.hub.errors import NotFound
from pysingularity.hub.inside import Entry, Listing, compare, listing
from pysingularity.hub.models import Image
from pysingularity.hub.pages.pictures import Folder

router = APIRouter(prefix="/api/v1", tags=["images"], dependencies=[Depends(limited)])
#: Entries of one folder that are named.
MOST = 5000


def folder_of(known: Listing, path: str) -> tuple[Folder, dict[str, Entry]]:
    """Return a folder of an image with sizes of three levels below it, and the entries directly in it by name.

    Raises:
        NotFound: there is no such folder in the image.
    """
    path = path.strip("/")
    prefix = f"{path}/" if path else ""
    root = Folder(f"/{path}")
    here: dict[str, Entry] = {}
    found = False
    for entry in known.entries:
        if entry.path == path and entry.kind == "dir":
            found = True
        elif entry.path.startswith(prefix) and entry.path:
            parts = entry.path[len(prefix) :].split("/", 3)
            if len(parts) == 1:
                here[parts[0]] = entry
            if entry.kind == "file":
                root.add("/".join(parts[:3]), entry.size)
    if not found:
        raise NotFound("no-such-folder", f"/{path[:500]}: there is no such folder in the image")
    return root, here


def folder_view(root: Folder, here: dict[str, Entry], *, complete: bool) -> dict[str, Any]:
    """Return a folder of an image as JSON, the largest entries first."""
    rows: list[dict[str, Any]] = []
    for name, entry in here.items():
        below = root.children.get(name)
        rows.append(
            {
                "name": name,
                "kind": entry.kind,
                "mode": f"{entry.mode:04o}",
                "uid": entry.uid,
                "gid": entry.gid,
                "size": below.size if below is not None else entry.size,
                "files": below.files if below is not None else 0,
                "mtime": entry.mtime,
                "target": entry.target,
            }
        )
    rows.sort(key=lambda row: (-row["size"], row["name"]))
    return {
        "path": root.name,
        "size": root.size,
        "files": root.files,
        "complete": complete,
        "entries": rows[:MOST],
        "left_off": max(0, len(rows) - MOST),
    }


def two_images(hub: Hub, who: Who, before: int, after: int) -> tuple[Image, Image]:
    """Return two images that somebody may see."""
    with hub.read() as session:
        return seen_image(session, who, before), seen_image(session, who, after)


@router.get("/images/{number}/files/{path:path}")
def files(number: Number, path: str, hub: TheHub, who: Who) -> dict[str, Any]:
    """List a folder of an image with the bytes that everything in it takes; the root is the empty path."""
    with hub.read() as session:
        image = seen_image(session, who, number)
    known = listing(hub, image)
    return {"image": image.id, **folder_view(*folder_of(known, path), complete=known.complete)}


@router.get("/images/{before}/compare/{after}")
def compare_images(before: Number, after: Number, hub: TheHub, who: Who) -> dict[str, Any]:
    """Compare two images: files, packages, labels, environment and definition."""
    one, two = two_images(hub, who, before, after)
    return {"before": one.id, "after": two.id, **compare(hub, one, two)}
