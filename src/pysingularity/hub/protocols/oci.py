# SPDX-License-Identifier: Apache-2.0
"""OCI distribution: `oras://` pulls and pushes of images, and whatever else OCI clients keep in a registry.

Source: the OCI distribution specification 1.1. A name `OWNER/NAME[/MORE]` is a collection and a container in it. A
manifest with one SIF layer is an image as of every other door; others (container images, signatures) are kept as they
are. Uploads are in `uploads`, the tokens' endpoint is here. Anybody without credentials gets 401 for what he cannot
see, since clients show theirs only then; whether it exists he is not told.
"""

from __future__ import annotations

import base64
import functools
import json
import re
from typing import Annotated, Any

import sqlalchemy as sa
from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.responses import JSONResponse
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from pysingularity.hub.accounts.passes import LIFETIME, make_pass
from pysingularity.hub.accounts.rights import Principal, need_change, visible
from pysingularity.hub.builds.publish import CONFIG, CONFIG_DIGEST, link_blob
from pysingularity.hub.catalog import delete_image
from pysingularity.hub.doors import TheHub, Who, base_url, limited
from pysingularity.hub.errors import Conflict, Invalid, NotFound, Unauthenticated
from pysingularity.hub.models import Blob, BlobLink, Collection, Container, Image, Manifest, Tag
from pysingularity.hub.protocols import uploads
from pysingularity.hub.protocols.manifests import INDEX_TYPE, LONGEST, find_manifest, put_manifest
from pysingularity.hub.protocols.sending import count_pull, send_blob
from pysingularity.hub.protocols.shelves import (
    main_container,
    need_delete,
    pushed_collection,
    seen_collection,
    split_name,
)
from pysingularity.hub.storage.base import Digests

CODES = {
    "no-such-collection": "NAME_UNKNOWN",
    "no-such-container": "NAME_UNKNOWN",
    "no-such-user": "NAME_UNKNOWN",
    "no-such-image": "MANIFEST_UNKNOWN",
    "no-such-manifest": "MANIFEST_UNKNOWN",
    "wrong-manifest": "MANIFEST_INVALID",
    "missing-blob": "MANIFEST_BLOB_UNKNOWN",
    "no-such-blob": "BLOB_UNKNOWN",
    "no-such-upload": "BLOB_UPLOAD_UNKNOWN",
    "wrong-offset": "BLOB_UPLOAD_INVALID",
    "wrong-digest": "DIGEST_INVALID",
    "wrong-size": "SIZE_INVALID",
    "wrong-name": "NAME_INVALID",
    "wrong-tag": "TAG_INVALID",
}
STATUSES = {401: "UNAUTHORIZED", 403: "DENIED", 404: "NAME_UNKNOWN", 405: "UNSUPPORTED", 429: "TOOMANYREQUESTS"}
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})\Z")
_PIECE = re.compile(r"(?:bytes[ =])?(\d{1,18})-(\d{1,18})(?:/.*)?\Z")
_SCOPE = re.compile(r"[-_./a-z0-9]{1,255}\Z")


def _shape(challenge: str, status: int, id: str, message: str, headers: dict[str, str]) -> Response:  # noqa: A002
    """Return an error as the specification wants it."""
    if status == 401:
        headers["WWW-Authenticate"] = challenge
    code = CODES.get(id) or STATUSES.get(status, "UNKNOWN")
    return JSONResponse({"errors": [{"code": code, "message": message, "detail": id}]}, status, headers=headers)


def errors(request: Request) -> None:
    """Let errors of this request look as OCI clients expect."""
    challenge = f'Bearer realm="{base_url(request)}/token",service="hub"'
    name = str(request.path_params.get("name", ""))
    if _SCOPE.match(name):
        actions = "pull" if request.method in ("GET", "HEAD") else "pull,push"
        challenge += f',scope="repository:{name}:{actions}"'
    request.scope["refusal"] = functools.partial(_shape, challenge)


router = APIRouter(include_in_schema=False, dependencies=[Depends(errors), Depends(limited)])
VERSION = {"Docker-Distribution-Api-Version": "registry/2.0"}


@router.get("/v2")
@router.get("/v2/")
def ping(request: Request, who: Who) -> Response:  # noqa: ARG001
    """Say that this is a registry, and how to log in."""
    if "authorization" not in request.headers:
        raise Unauthenticated("sign-in-first", "get a token first; for public images anybody gets one")
    return JSONResponse({}, headers=VERSION)


@router.get("/token")
def token(request: Request, hub: TheHub, who: Who) -> Response:
    """Give a client what it shows from now on: the hub token that it has as password, or a pass."""
    secret: str = ""
    if who.via == "token":
        kind, _, given = request.headers["authorization"].partition(" ")
        secret = given.strip()
        if kind.lower() == "basic":
            secret = base64.b64decode(secret).decode().partition(":")[2]
    if not secret:
        secret = make_pass(hub.settings.secret(), who.user.id if who.user else 0)
    value: dict[str, object] = {"token": secret, "access_token": secret, "expires_in": LIFETIME}
    return JSONResponse(value, headers={"Cache-Control": "no-store"})


@router.get("/v2/_catalog")
def catalog(
    hub: TheHub,
    who: Who,
    n: Annotated[int, Query(ge=1, le=1000)] = 100,
    last: Annotated[str, Query(max_length=300)] = "",
) -> Response:
    """List the names that somebody may pull."""
    with hub.read() as session:
        rows = session.execute(
            sa.select(Collection.owner, Collection.name, Container.name)
            .join(Container, Container.collection_id == Collection.id)
            .where(visible(who))
        )
        names = sorted(f"{owner}/{name}" if box == name else f"{owner}/{name}/{box}" for owner, name, box in rows)
    return _page("repositories", {}, names, n, last, "/v2/_catalog")


def _page(key: str, more: dict[str, Any], names: list[str], count: int | None, last: str, path: str) -> Response:
    """Return a page of a sorted list, with a link to the next."""
    names = [name for name in names if name > last]
    headers = {}
    if count is not None and len(names) > count:
        names = names[:count]
        if names:
            headers["Link"] = f'<{path}?n={count}&last={names[-1]}>; rel="next"'
    return JSONResponse({**more, key: names}, headers=headers)


def _pulled(request: Request, session: Session, who: Principal, name: str) -> Container:
    """Return a container that somebody may read."""
    try:
        owner, collection, box = split_name(name)
        return main_container(session, seen_collection(session, who, owner, collection), box, make=False)
    except NotFound:
        if "authorization" not in request.headers:
            raise Unauthenticated("sign-in-first", f"{name}: not for everybody, or not there")
        raise


def _digest(text: str) -> str:
    match = _DIGEST.match(text)
    if match is None:
        raise Invalid("wrong-digest", f"{text[:80]!r} is no sha256 digest")
    return match[1]


# --- manifests -------------------------------------------------------------------------------------------------------


@router.get("/v2/{name:path}/tags/list")
def tags(
    name: str,
    request: Request,
    hub: TheHub,
    who: Who,
    n: Annotated[int | None, Query(ge=0)] = None,
    last: Annotated[str, Query(max_length=300)] = "",
) -> Response:
    """List tags."""
    with hub.read() as session:
        container = _pulled(request, session, who, name)
        names = sorted(set(session.scalars(sa.select(Tag.name).where(Tag.container_id == container.id))))
    return _page("tags", {"name": name}, names, n, last, f"/v2/{name}/tags/list")


@router.head("/v2/{name:path}/manifests/{reference}")
@router.get("/v2/{name:path}/manifests/{reference}")
def get_manifest(name: str, reference: str, request: Request, hub: TheHub, who: Who) -> Response:
    """Return a manifest by tag or digest, byte by byte as it was pushed."""
    with hub.read() as session:
        row = find_manifest(session, _pulled(request, session, who, name), reference)
    headers = {**VERSION, "Docker-Content-Digest": row.digest, "ETag": f'"{row.digest}"'}
    headers["Content-Length"] = str(len(row.content))
    body = b"" if request.method == "HEAD" else row.content
    return Response(body, media_type=row.media_type, headers=headers)


@router.put("/v2/{name:path}/manifests/{reference}")
async def send_manifest(name: str, reference: str, request: Request, hub: TheHub, who: Who) -> Response:
    """Take a manifest; an image is looked into before anybody can pull it."""
    content = bytearray()
    async for piece in request.stream():
        content += piece
        if len(content) > LONGEST:
            raise Invalid("wrong-manifest", f"a manifest has at most {LONGEST} bytes")
    kind = request.headers.get("content-type", "").partition(";")[0].strip()
    container = await run_in_threadpool(_push_to, hub, who, name)
    row = await run_in_threadpool(put_manifest, hub, who, container, reference, bytes(content), kind)
    headers = {"Location": f"/v2/{name}/manifests/{row.digest}", "Docker-Content-Digest": row.digest}
    if row.subject:
        headers["OCI-Subject"] = row.subject
    return Response(None, 201, headers=headers)


@router.delete("/v2/{name:path}/manifests/{reference}")
def delete_manifest(name: str, reference: str, request: Request, hub: TheHub, who: Who) -> Response:
    """Delete a tag, or a manifest with its tags and its image."""
    with hub.write() as session:
        container = _pulled(request, session, who, name)
        row = find_manifest(session, container, reference)
        image = session.get(Image, row.image_id) if row.image_id is not None else None
        if image is not None:
            need_delete(session, who, image)
        else:
            need_change(session, who, container.collection, "push")
        of_container = sa.select(Tag.id).where(Tag.container_id == container.id)
        if ":" not in reference:
            session.execute(sa.delete(Tag).where(Tag.id.in_(of_container.where(Tag.name == reference))))
            return Response(None, 202)
        if image is not None and image.frozen:
            raise Conflict("frozen", f"image {image.id} is frozen and stays", hint="take the padlock off first")
        session.execute(sa.delete(Tag).where(Tag.id.in_(of_container.where(Tag.manifest == row.digest))))
        session.delete(row)
        session.flush()
        others = sa.select(Tag.id).where(Tag.image_id == image.id).limit(1) if image is not None else None
        if image is not None and others is not None and session.scalar(others) is None:
            delete_image(session, image)
    return Response(None, 202)


@router.get("/v2/{name:path}/referrers/{digest}")
def referrers(
    name: str,
    digest: str,
    request: Request,
    hub: TheHub,
    who: Who,
    artifact: Annotated[str, Query(alias="artifactType", max_length=300)] = "",
) -> Response:
    """List the manifests that speak of another one: signatures, bills of material."""
    _digest(digest)
    with hub.read() as session:
        container = _pulled(request, session, who, name)
        query = sa.select(Manifest).where(Manifest.container_id == container.id, Manifest.subject == digest)
        if artifact:
            query = query.where(Manifest.artifact_type == artifact)
        rows = session.scalars(query.order_by(Manifest.id)).all()
    found = [
        {
            "mediaType": row.media_type,
            "digest": row.digest,
            "size": len(row.content),
            **({"artifactType": row.artifact_type} if row.artifact_type else {}),
            **({"annotations": row.annotations} if row.annotations else {}),
        }
        for row in rows
    ]
    headers = {"OCI-Filters-Applied": "artifactType"} if artifact else {}
    value = {"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": found}
    return Response(json.dumps(value), media_type=INDEX_TYPE, headers=headers)


# --- uploads ---------------------------------------------------------------------------------------------------------


def _push_to(hub: Any, who: Principal, name: str) -> int:
    """Return the number of a container that somebody may push to, made when missing."""
    owner, collection, box = split_name(name)
    if who.user is None:
        raise Unauthenticated("sign-in-first", f"{name}: pushing needs a token")
    with hub.write() as session:
        return main_container(session, pushed_collection(hub, session, who, owner, collection), box, make=True).id


@router.post("/v2/{name:path}/blobs/uploads/")
@router.post("/v2/{name:path}/blobs/uploads")
async def start_upload(
    name: str,
    request: Request,
    hub: TheHub,
    who: Who,
    digest: str = "",
    mount: str = "",
    source: Annotated[str, Query(alias="from")] = "",
) -> Response:
    """Begin an upload; or take the whole file at once (`digest`), or know it already (`mount`, `from`)."""
    wanted = _digest(digest) if digest else ""
    container = await run_in_threadpool(_push_to, hub, who, name)
    if mount:
        mounted: bool = await run_in_threadpool(_mount, hub, who, container, _digest(mount), source)
        if mounted:
            return _made(name, mount)
    size = _length(request)
    await run_in_threadpool(uploads.check_room, hub, container, size)

    def begin() -> str:
        with hub.write() as session:
            return uploads.begin(session, who, session.get_one(Container, container)).id

    number: str = await run_in_threadpool(begin)
    if wanted:
        await uploads.append(request, uploads.path_of(hub, number), at=0, limit=hub.settings.builds.image_limit)
        await run_in_threadpool(_finish, hub, number, container, wanted)
        return _made(name, digest)
    return _state(name, number, 0, 202)


def _length(request: Request) -> int:
    text = request.headers.get("content-length", "0")
    return int(text) if text.isdigit() and len(text) < 19 else 0


def _mount(hub: Any, who: Principal, container: int, sha256: str, source: str) -> bool:
    """Let a blob that somebody may read elsewhere be read here too."""
    with hub.write() as session:
        try:
            owner, collection, box = split_name(source)
            other = main_container(session, seen_collection(session, who, owner, collection), box, make=False)
            _readable(session, other, sha256)
        except NotFound:
            return False
        link_blob(session, session.get_one(Container, container), sha256)
    return True


def _made(name: str, digest: str) -> Response:
    headers = {"Location": f"/v2/{name}/blobs/{digest}", "Docker-Content-Digest": digest}
    return Response(None, 201, headers=headers)


def _state(name: str, number: str, size: int, status: int) -> Response:
    headers = {"Location": f"/v2/{name}/blobs/uploads/{number}", "Docker-Upload-UUID": number}
    headers["Range"] = f"0-{max(0, size - 1)}"
    return Response(None, status, headers=headers)


def _finish(hub: Any, number: str, container: int, sha256: str) -> Digests:
    """Believe an upload that is complete, and end it in any case."""
    try:
        uploads.check_room(hub, container, uploads.arrived(hub, number))
        digests = uploads.store(hub, uploads.path_of(hub, number), sha256=sha256)
        with hub.write() as session:
            link_blob(session, session.get_one(Container, container), sha256)
        return digests
    finally:
        uploads.forget(hub, number)


def _own_upload(hub: Any, who: Principal, name: str, number: str) -> int:
    """Return the container of an upload, after checking that it is this person's and for this name."""
    container = _push_to(hub, who, name)
    with hub.read() as session:
        upload = uploads.find(session, number)
    if upload.container_id != container or upload.user_id != (who.user.id if who.user else None):
        raise NotFound("no-such-upload", "there is no such upload")
    return container


@router.get("/v2/{name:path}/blobs/uploads/{number}")
def upload_state(name: str, number: str, hub: TheHub, who: Who) -> Response:
    """Say how much of an upload is here."""
    _own_upload(hub, who, name, number)
    return _state(name, number, uploads.arrived(hub, number), 204)


@router.patch("/v2/{name:path}/blobs/uploads/{number}")
async def send_piece(name: str, number: str, request: Request, hub: TheHub, who: Who) -> Response:
    """Take a piece, or all that a stream has."""
    container = await run_in_threadpool(_own_upload, hub, who, name, number)
    at = _offset(request)
    try:
        size = await _append(request, hub, number, container, at)
    except uploads.WrongOffset as error:
        have = uploads.arrived(hub, number)
        error.headers = {"Range": f"0-{max(0, have - 1)}", "Location": f"/v2/{name}/blobs/uploads/{number}"}
        raise
    return _state(name, number, size, 202)


async def _append(request: Request, hub: Any, number: str, container: int, at: int | None) -> int:
    have = uploads.arrived(hub, number)
    await run_in_threadpool(uploads.check_room, hub, container, have + _length(request))
    await run_in_threadpool(uploads.touch, hub, number)
    return await uploads.append(request, uploads.path_of(hub, number), at=at, limit=hub.settings.builds.image_limit)


def _offset(request: Request) -> int | None:
    text = request.headers.get("content-range", "")
    if not text:
        return None
    match = _PIECE.match(text.strip())
    if match is None or int(match[2]) < int(match[1]) - 1:
        raise Invalid("wrong-offset", f"{text[:60]!r} is no range")
    return int(match[1])


@router.put("/v2/{name:path}/blobs/uploads/{number}")
async def end_upload(name: str, number: str, request: Request, hub: TheHub, who: Who, digest: str = "") -> Response:
    """End an upload, perhaps with its last piece; a wrong digest ends it without a result."""
    wanted = _digest(digest)
    container = await run_in_threadpool(_own_upload, hub, who, name, number)
    if _length(request) or request.headers.get("transfer-encoding"):
        await _append(request, hub, number, container, _offset(request))
    else:
        uploads.path_of(hub, number).touch(mode=0o600)
    await run_in_threadpool(_finish, hub, number, container, wanted)
    return _made(name, digest)


@router.delete("/v2/{name:path}/blobs/uploads/{number}")
def cancel_upload(name: str, number: str, hub: TheHub, who: Who) -> Response:
    """Give an upload up."""
    _own_upload(hub, who, name, number)
    uploads.forget(hub, number)
    return Response(None, 204)


# --- blobs -----------------------------------------------------------------------------------------------------------


def _readable(session: Session, container: Container, sha256: str) -> Image | None:
    """Check that a blob may be read through a container; returns the image that it is, if it is one."""
    image = session.scalar(
        sa.select(Image)
        .where(Image.container_id == container.id, Image.blob == sha256)
        .order_by(Image.hidden, Image.id.desc())
        .limit(1)
    )
    linked = session.get(BlobLink, (container.id, sha256)) is not None and session.get(Blob, sha256) is not None
    if image is None and not linked:
        raise NotFound("no-such-blob", f"sha256:{sha256}: there is no such file here")
    return image


@router.head("/v2/{name:path}/blobs/{digest}")
@router.get("/v2/{name:path}/blobs/{digest}")
def get_blob(name: str, digest: str, request: Request, hub: TheHub, who: Who) -> Response:
    """Send a blob; parts with `Range`."""
    sha256 = _digest(digest)
    headers = {**VERSION, "Docker-Content-Digest": digest}
    with hub.read() as session:
        container = _pulled(request, session, who, name)
        if sha256 == CONFIG_DIGEST:  # the configuration of every image; not worth a file
            headers["Content-Length"] = str(len(CONFIG))
            body = b"" if request.method == "HEAD" else CONFIG
            return Response(body, media_type="application/octet-stream", headers=headers)
        image = _readable(session, container, sha256)
    answer = send_blob(request, hub, sha256, headers=headers, redirect=307)
    if image is not None:
        count_pull(request, hub, who, image, answer)
    return answer


@router.delete("/v2/{name:path}/blobs/{digest}")
def delete_blob(name: str, digest: str, request: Request, hub: TheHub, who: Who) -> Response:
    """Take a blob out of a container, unless an image or a manifest there needs it."""
    sha256 = _digest(digest)
    with hub.write() as session:
        container = _pulled(request, session, who, name)
        need_change(session, who, container.collection, "push")
        image = _readable(session, container, sha256)
        refs = session.scalars(sa.select(Manifest.references).where(Manifest.container_id == container.id))
        if image is not None or any(digest in one for one in refs):
            raise Conflict("blob-in-use", f"{digest}: an image here is made of it", hint="delete its manifest")
        session.execute(sa.delete(BlobLink).where(BlobLink.container_id == container.id, BlobLink.sha256 == sha256))
    return Response(None, 202)
