# SPDX-License-Identifier: Apache-2.0
"""A static archive: a folder of plain files that answers `shub://` from any file server, for when the hub is no more.

`api/container/OWNER/NAME:TAG` and its kin (`OWNER/NAME`, `OWNER/NAME@DIGEST`, `OWNER/NAME:TAG@DIGEST`) are JSON files
with the address of `images/MD5.simg`. Addresses must be absolute, so the archive is written for the URL where it will
be. Only what everybody may pull is in it. `index.json` and one page list everything.
"""

from __future__ import annotations

import html
import json
import os
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import sqlalchemy as sa
from sqlalchemy.orm import Session

from pysingularity.errors import HostError, UserError
from pysingularity.hub.api.views import when
from pysingularity.hub.builds.accept import copy
from pysingularity.hub.catalog import LATEST, find_image
from pysingularity.hub.context import Hub
from pysingularity.hub.errors import NotFound
from pysingularity.hub.models import Blob, Collection, Container, Image, Tag

_STYLE = "body{font:16px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em}code{overflow-wrap:anywhere}"


def export(hub: Hub, target: Path, url: str, *, names: list[str] | None = None) -> dict[str, Any]:
    """Write the archive.

    Arguments:
        target: folder, new or of an earlier export; images that it has are not copied again.
        url: where a file server will show the folder.
        names: OWNER/NAME of collections; None is every public one.

    Returns:
        `path`, `collections`, `images`, `files` (answers) and `bytes`.

    Raises:
        UserError: a URL that clients cannot use, or a collection that is private.
    """
    address = url.rstrip("/")
    if urlsplit(address).scheme not in ("http", "https") or not urlsplit(address).netloc:
        raise UserError("wrong-url", f"{url!r}: clients need a whole address, such as https://archive.example.org/hub")
    if target.exists() and any(target.iterdir()) and not (target / "index.json").exists():
        raise HostError("not-an-archive", f"{target}: is no earlier export", hint="choose a new folder")
    (target / "images").mkdir(parents=True, exist_ok=True)
    files = total = 0
    index: list[dict[str, Any]] = []
    done: set[str] = set()
    written: set[Path] = set()
    with hub.read() as session:
        for collection in _chosen(session, names):
            answers, images = _answers(session, collection, address)
            for image in images:
                if image.blob and image.blob not in done:
                    done.add(image.blob)
                    place = target / "images" / f"{image.version}.simg"
                    written.add(place)
                    total += _put(hub, image, place)
            for name, value in answers.items():
                for spelling in _spellings(collection, name):
                    written.add(target / "api" / "container" / spelling)
                    _write(target / "api" / "container" / spelling, json.dumps(value))
            files += len(answers)
            index.append(_entry(collection, images, answers))
    # What an earlier export had and nobody may pull any more.
    for path in [*(target / "images").iterdir(), *(target / "api").glob("container/*/*")]:
        if path not in written:
            path.unlink()
    _write(target / "index.json", json.dumps({"url": address, "collections": index}, indent=1))
    _write(target / "index.html", _page(hub.settings.name, address, index))
    return {"path": str(target), "collections": len(index), "images": len(done), "files": files, "bytes": total}


def _spellings(collection: Collection, name: str) -> set[str]:
    """Return the file of an answer in lower case, and as the collection's title has it: servers do tell them apart."""
    owner, _, title = collection.title.partition("/")
    rest = name.removeprefix(collection.name)
    return {f"{collection.owner}/{name}", f"{owner}/{title}{rest}"}


def _chosen(session: Session, names: list[str] | None) -> list[Collection]:
    public = sa.select(Collection).where(Collection.private.is_(False)).order_by(Collection.owner, Collection.name)
    found = {one.full_name: one for one in session.scalars(public)}
    if names is None:
        return list(found.values())
    for name in names:
        if name.lower() not in found:
            raise NotFound("no-such-collection", f"{name}: there is no public collection of this name")
    return [found[name.lower()] for name in names]


def _answers(session: Session, collection: Collection, address: str) -> tuple[dict[str, dict[str, Any]], list[Image]]:
    """Return file name → answer for all ways in which clients name the images of a collection, and the images."""
    box = session.scalar(
        sa.select(Container).where(Container.collection_id == collection.id, Container.name == collection.name)
    )
    if box is None:
        return {}, []
    whole = Blob.damaged == ""
    images = session.scalars(
        sa.select(Image)
        .join(Blob, Blob.sha256 == Image.blob)
        .where(Image.container_id == box.id, Image.hidden.is_(False), whole)
        .order_by(Image.id)
    ).all()
    answers: dict[str, dict[str, Any]] = {}

    def value(image: Image, tag: str) -> dict[str, Any]:
        return {
            "id": image.id,
            "name": collection.full_name,
            "branch": image.branch,
            "commit": image.key or image.version,
            "tag": tag,
            "version": image.version,
            "size_mb": round(image.size / (1 << 20), 3),
            "image": f"{address}/images/{image.version}.simg",
        }

    for image in images:  # the newest comes last and wins
        tag = image.tag or LATEST
        for digest in {image.version, image.commit, image.key} - {""}:
            answers[f"{collection.name}@{digest}"] = value(image, tag)
            answers[f"{collection.name}:{tag}@{digest}"] = value(image, tag)
    known = {image.id for image in images}
    tags = session.scalars(sa.select(Tag.name).where(Tag.container_id == box.id, Tag.image_id.in_(known)).distinct())
    for name in [*tags, ""]:
        try:
            image = find_image(session, collection, tag=name)
        except NotFound:
            continue
        if image.id in known:
            answers[f"{collection.name}:{name}" if name else collection.name] = value(
                image, name or image.tag or LATEST
            )
    if collection.name in answers:
        answers.setdefault(f"{collection.name}:{LATEST}", answers[collection.name])
    return answers, list(images)


def _put(hub: Hub, image: Image, target: Path) -> int:
    """Copy an image's file; returns its size."""
    if target.exists() and target.stat().st_size == image.size:
        return image.size
    partial = target.with_name(f".{target.name}.partial")
    source = hub.storage.open(image.blob or "")
    try:
        out = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        try:
            copy(source, out, os.fstat(source).st_size)
        finally:
            os.close(out)
    finally:
        os.close(source)
    os.replace(partial, target)
    return image.size


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text + "\n")
    os.replace(partial, path)


def _entry(collection: Collection, images: list[Image], answers: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {
        "name": collection.full_name,
        "description": collection.description,
        "topics": collection.topics,
        "tags": sorted({name.partition(":")[2] for name in answers if ":" in name and "@" not in name}),
        "images": [
            {
                "version": image.version,
                "sha256": image.sha256,
                "commit": image.commit,
                "tag": image.tag,
                "size": image.size,
                "arch": image.arch,
                "created_at": when(image.created_at),
                "labels": image.labels,
                "definition": image.definition,
                "frozen": image.frozen,
            }
            for image in images
        ],
    }


def _page(title: str, address: str, index: list[dict[str, Any]]) -> str:
    """Return the page that lists everything."""
    place = address.partition("://")[2]
    lines = ["<!doctype html>", '<html lang="en"><meta charset="utf-8">']
    lines.append('<meta name="viewport" content="width=device-width, initial-scale=1">')
    lines.append(f"<title>{html.escape(title)}: archive</title><style>{_STYLE}</style>")
    lines.append(f"<h1>{html.escape(title)}: archive</h1>")
    for one in index:
        lines.append(f"<h2>{html.escape(one['name'])}</h2><p>{html.escape(one['description'])}</p><ul>")
        for tag in one["tags"]:
            command = f"singularity pull shub://{place}/{one['name']}:{tag}"
            lines.append(f"<li><code>{html.escape(command)}</code></li>")
        lines.append("</ul>")
    lines.append("</html>")
    return "\n".join(lines)
