# SPDX-License-Identifier: Apache-2.0
"""Pushing to library://: an image is announced by its hash, sent in one of three ways, and believed at the end.

Newest clients send large files in parts to addresses that the hub names (here: its own, with a random secret in them,
since clients show no token there); older ones send one PUT to such an address, the oldest POST the file with their
token. Parts may come in any order and again; each has the digest that was announced for it.
"""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from pysingularity.hub.accounts.audit import record
from pysingularity.hub.accounts.rights import Principal, need_change
from pysingularity.hub.context import Hub
from pysingularity.hub.doors import TheHub, Who, base_url
from pysingularity.hub.errors import Conflict, Invalid, NotFound
from pysingularity.hub.models import Container, Image, Upload, now
from pysingularity.hub.protocols import uploads
from pysingularity.hub.protocols.library import data, image_view, number, seen
from pysingularity.hub.protocols.shelves import facts_of, publish
from pysingularity.hub.storage.base import SHA256, check_sha256, hash_file
from pysingularity.hub.storage.quota import quota

# Clients send JSON without saying so.
router = APIRouter(include_in_schema=False, strict_content_type=False)
#: A file has at most so many parts; the size of a part grows with the file.
MOST_PARTS = 10_000


class NewImage(BaseModel):
    """An image that will be uploaded."""

    hash: str = Field(max_length=80)
    container: str = Field(max_length=30)
    description: str = Field("", max_length=5000)


class Whole(BaseModel):
    """A file in one piece."""

    filesize: int = Field(gt=0)
    sha256sum: str = Field("", max_length=64)
    md5sum: str = Field("", max_length=32)


class Parts(BaseModel):
    """A file in parts."""

    filesize: int = Field(gt=0)


class Part(BaseModel):
    """A part that will be sent."""

    upload: str = Field(alias="uploadID", max_length=40)
    number: int = Field(alias="partNumber", ge=1, le=MOST_PARTS)
    size: int = Field(alias="partSize", gt=0)
    sha256: str = Field("", alias="sha256sum", max_length=64)


class End(BaseModel):
    """The end of an upload."""

    upload: str = Field("", alias="uploadID", max_length=40)
    parts: list[dict[str, Any]] = Field(default_factory=list, alias="completedParts", max_length=MOST_PARTS)


@router.post("/v1/images")
def announce(new: NewImage, hub: TheHub, who: Who) -> Response:
    """Announce an image; what the container has already needs no upload."""
    sha256 = check_sha256(new.hash.removeprefix("sha256."))
    with hub.write() as session:
        container = seen(session, who, new.container)
        need_change(session, who, container.collection, "push")
        rows = session.query(Image).filter(Image.container_id == container.id, Image.sha256 == sha256).all()
        one = next((row for row in rows if row.blob is not None and not row.hidden), None) or next(
            (row for row in rows if row.blob is None), None
        )
        if one is None:
            one = Image(container_id=container.id, sha256=sha256, hidden=True, created_by=who.name)
            one.description = new.description
            session.add(one)
            session.flush()
            session.refresh(one)
        return data(image_view(session, one))


def _announced(session: Session, who: Principal, row_id: str) -> Image:
    """Return an image that somebody may upload now.

    Raises:
        NotFound: none, or none for this person.
        Conflict: it is here already.
    """
    one = session.get(Image, number(row_id))
    if one is None:
        raise NotFound("no-such-image", f"image {row_id[:30]}: there is no such image")
    seen(session, who, str(one.container_id))
    need_change(session, who, one.container.collection, "push")
    if one.blob is not None:
        raise Conflict("uploaded", f"image {one.id} has been uploaded already")
    return one


def _begin(hub: Hub, who: Principal, row_id: str, size: int, part_size: int = 0) -> Upload:
    with hub.read() as session:
        one = _announced(session, who, row_id)
    uploads.check_room(hub, one.container_id, size)
    with hub.write() as session:
        container = session.get_one(Container, one.container_id)
        upload = uploads.begin(session, who, container, image_id=one.id, size=size, sha256=one.sha256)
        upload.part_size = part_size
        return upload


def _upload_of(session: Session, who: Principal, row_id: str, upload_id: str) -> Upload:
    """Return an upload of an image; without its id, the newest one."""
    one = _announced(session, who, row_id)
    if upload_id:
        upload: Upload | None = uploads.find(session, upload_id)
    else:
        query = session.query(Upload).filter(Upload.image_id == one.id, Upload.part_size == 0)
        upload = query.order_by(Upload.created_at.desc()).first()
    if upload is None or upload.image_id != one.id:
        raise NotFound("no-such-upload", "there is no such upload of this image")
    return upload


def _complete(hub: Hub, who: Principal, upload: Upload, path: Path) -> Response:
    """Believe a file that arrived, make the image of it, and end the upload in any case."""
    try:
        digests = uploads.store(hub, path, sha256=upload.sha256, size=upload.size or None)
        facts = facts_of(hub, digests.sha256)
        with hub.write() as session:
            container = session.get_one(Container, upload.container_id)
            announced = session.get(Image, upload.image_id)
            one = publish(session, container, facts, tags=[], by=who.name, image=announced)
            record(session, who, "image.push", container.collection.full_name, image=one.id, sha256=one.sha256)
            allowed, used = quota(hub, session, container.collection)
            name = f"{container.collection.full_name}/{container.name}"
        return data({"quota": {"quotaTotal": allowed, "quotaUsage": used}, "containerUrl": f"/{name}"})
    finally:
        _forget(hub, upload.id)


def _forget(hub: Hub, upload_id: str) -> None:
    for path in uploads.path_of(hub, upload_id).parent.glob(f"{upload_id}.*"):
        path.unlink(missing_ok=True)
    uploads.forget(hub, upload_id)


# --- in one piece ----------------------------------------------------------------------------------------------------


@router.post("/v1/imagefile/{row_id}")
async def post_file(row_id: str, request: Request, hub: TheHub, who: Who) -> Response:
    """Take the whole file at once (the oldest way)."""
    length = request.headers.get("content-length", "0")
    size = int(length) if length.isdigit() and len(length) < 19 else 0
    upload = await run_in_threadpool(_begin, hub, who, row_id, size)
    path = uploads.path_of(hub, upload.id)
    await uploads.append(request, path, at=0, limit=hub.settings.builds.image_limit)
    return await run_in_threadpool(_complete, hub, who, upload, path)


@router.post("/v2/imagefile/{row_id}")
def begin_whole(row_id: str, new: Whole, request: Request, hub: TheHub, who: Who) -> Response:
    """Name the address for a file in one piece."""
    upload = _begin(hub, who, row_id, new.filesize)
    if new.sha256sum and new.sha256sum != upload.sha256:
        uploads.forget(hub, upload.id)
        raise Invalid("wrong-digest", "the file has another hash than the image was announced with")
    return data({"uploadURL": f"{base_url(request)}/v2/upload/{upload.id}"})


@router.put("/v2/imagefile/{row_id}/_complete")
def end_whole(row_id: str, hub: TheHub, who: Who) -> Response:
    """End an upload in one piece."""
    with hub.read() as session:
        upload = _upload_of(session, who, row_id, "")
    return _complete(hub, who, upload, uploads.path_of(hub, upload.id))


@router.put("/v2/upload/{upload_id}")
async def put_file(upload_id: str, request: Request, hub: TheHub) -> Response:
    """Take a file at its address; whoever knows the address may send it."""

    def look() -> Upload:
        with hub.read() as session:
            return uploads.find(session, upload_id)

    upload = await run_in_threadpool(look)
    if upload.image_id is None or upload.part_size:
        raise NotFound("no-such-upload", "there is no such upload")
    path = uploads.path_of(hub, upload_id)
    path.unlink(missing_ok=True)  # a second attempt begins anew
    size = await uploads.append(request, path, at=0, limit=upload.size)
    if size != upload.size:
        path.unlink(missing_ok=True)
        raise Invalid("wrong-size", f"{size} bytes arrived, {upload.size} were announced")
    return Response(None, 200)


# --- in parts --------------------------------------------------------------------------------------------------------


@router.post("/v2/imagefile/{row_id}/_multipart")
def begin_parts(row_id: str, new: Parts, hub: TheHub, who: Who) -> Response:
    """Begin an upload in parts."""
    size = hub.settings.storage.part_size
    while new.filesize > size * MOST_PARTS:
        size *= 2
    upload = _begin(hub, who, row_id, new.filesize, size)
    count = -(-new.filesize // size)
    return data({"uploadID": upload.id, "totalParts": count, "partSize": size, "options": {"s3compliant": "false"}})


@router.put("/v2/imagefile/{row_id}/_multipart")
def name_part(row_id: str, new: Part, request: Request, hub: TheHub, who: Who) -> Response:
    """Name the address of a part."""
    with hub.write() as session:
        upload = _upload_of(session, who, row_id, new.upload)
        count = -(-upload.size // upload.part_size) if upload.part_size else 0
        if new.number > count or new.size > upload.part_size or (new.sha256 and not SHA256.match(new.sha256)):
            raise Invalid("wrong-part", f"part {new.number} of {new.size} bytes does not belong to this upload")
        secret = secrets.token_hex(8)
        upload.parts = {**upload.parts, str(new.number): [new.size, new.sha256, secret]}
        upload.changed_at = now()
    return data({"presignedURL": f"{base_url(request)}/v2/upload/{new.upload}/{new.number}/{secret}"})


@router.put("/v2/upload/{upload_id}/{part}/{secret}")
async def put_part(upload_id: str, part: int, secret: str, request: Request, hub: TheHub) -> Response:
    """Take a part at its address."""

    def look() -> list[Any]:
        with hub.read() as session:
            found: list[Any] = uploads.find(session, upload_id).parts.get(str(part), [0, "", ""])
            return found

    size, sha256, expected = await run_in_threadpool(look)
    if not expected or not secrets.compare_digest(str(expected).encode(), secret.encode("utf-8", "surrogatepass")):
        raise NotFound("no-such-upload", "there is no such part")
    path = uploads.path_of(hub, upload_id)
    partial = path.with_name(f"{upload_id}.{part}.{secrets.token_hex(4)}")
    try:
        arrived = await uploads.append(request, partial, at=0, limit=size)
        if arrived != size:
            raise Invalid("wrong-size", f"{arrived} bytes arrived, {size} were announced")
        digests = await run_in_threadpool(hash_file, partial)
        if sha256 and digests.sha256 != sha256:
            raise Invalid("wrong-digest", f"part {part} is {digests.sha256}, not {sha256}")
        os.replace(partial, path.with_name(f"{upload_id}.{part}"))
    finally:
        partial.unlink(missing_ok=True)
    return Response(None, 200, headers={"ETag": f'"{digests.sha256}"'})


@router.put("/v2/imagefile/{row_id}/_multipart_complete")
def end_parts(row_id: str, end: End, hub: TheHub, who: Who) -> Response:
    """Put the parts together and believe the file."""
    with hub.read() as session:
        upload = _upload_of(session, who, row_id, end.upload)
    if not upload.part_size:
        raise NotFound("no-such-upload", "there is no such upload in parts")
    path = uploads.path_of(hub, upload.id)
    count = -(-upload.size // upload.part_size)
    missing = [part for part in range(1, count + 1) if not path.with_name(f"{upload.id}.{part}").exists()]
    if missing:
        raise Invalid("missing-parts", f"parts have not arrived: {json.dumps(missing[:20])}")
    with path.open("wb") as target:
        for part in range(1, count + 1):
            piece = path.with_name(f"{upload.id}.{part}")
            _add(piece, target.fileno())
            piece.unlink()  # a file of many gigabytes is not there twice
    return _complete(hub, who, upload, path)


def _add(piece: Path, target: int) -> None:
    """Append a file to another in the kernel."""
    source = os.open(piece, os.O_RDONLY | os.O_CLOEXEC)
    try:
        at, done, size = os.lseek(target, 0, os.SEEK_END), 0, os.fstat(source).st_size
        while done < size:
            done += os.copy_file_range(source, target, size - done, done, at + done)
    finally:
        os.close(source)


@router.put("/v2/imagefile/{row_id}/_multipart_abort")
def abort_parts(row_id: str, end: End, hub: TheHub, who: Who) -> Response:
    """Give an upload in parts up."""
    with hub.read() as session:
        upload = _upload_of(session, who, row_id, end.upload)
    _forget(hub, upload.id)
    return data(None)
