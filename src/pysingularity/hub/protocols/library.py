# SPDX-License-Identifier: Apache-2.0
"""library://: the Library API as clients of Singularity 3 and later speak it; pull, search, delete, and containers.

Answers are `{"data": ...}`, errors `{"error": {"code", "message"}}`, hashes `sha256.HEX`. ENTITY/COLLECTION/CONTAINER
is OWNER/NAME and a container in it; what the hub built is in the container named like the collection. Pushing is in
`library_push`.
"""

from __future__ import annotations

import re
from typing import Annotated, Any

import sqlalchemy as sa
from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from sqlalchemy.orm import Session, defer

from pysingularity.hub.accounts.audit import record
from pysingularity.hub.accounts.rights import Principal, may_change, need_change, need_see, need_user, visible
from pysingularity.hub.api.views import when
from pysingularity.hub.catalog import LATEST, container_of, delete_image, find_image, set_tag, tags_by_image, tags_of
from pysingularity.hub.doors import TheHub, Who, base_url, limited
from pysingularity.hub.errors import Forbidden, Invalid, NotFound
from pysingularity.hub.models import Collection, Container, Group, Image, Manifest, Tag, User
from pysingularity.hub.protocols.https import image_file
from pysingularity.hub.protocols.shelves import need_delete, pushed_collection, seen_collection
from pysingularity.version import __version__

#: From this on clients push in parts and tag by architecture.
API_VERSION = "2.0.0-alpha.2"
# Clients send JSON without saying so.
router = APIRouter(include_in_schema=False, strict_content_type=False, dependencies=[Depends(limited)])
_HASH = re.compile(r"sha256\.([0-9a-f]{64})\Z")


def data(value: Any, **more: Any) -> JSONResponse:
    """Return an answer as the protocol wraps it."""
    return JSONResponse({"data": value}, **more)


class NewEntity(BaseModel):
    """What makes an entity."""

    name: str = Field(max_length=100)


class NewCollection(BaseModel):
    """What makes a collection."""

    name: str = Field(max_length=100)
    entity: str = Field(max_length=100)
    description: str = Field("", max_length=5000)
    private: bool = False


class NewContainer(BaseModel):
    """What makes a container."""

    name: str = Field(max_length=200)
    collection: str = Field(max_length=30)
    description: str = Field("", max_length=5000)


class NewTag(BaseModel):
    """A tag and the image that it names."""

    Tag: str = Field(max_length=100)
    ImageID: str = Field(max_length=30)
    Arch: str = Field("", max_length=30)


# --- discovery -------------------------------------------------------------------------------------------------------


@router.get("/assets/config/config.prod.json")
def services(request: Request) -> Response:
    """Say where the services of this remote are: all of them here."""
    base = base_url(request)
    names = ("libraryAPI", "keystoreAPI", "tokenAPI", "builderAPI", "consentAPI")
    return JSONResponse({name: {"uri": base} for name in names})


@router.get("/version")
def version() -> Response:
    """Say which version of the protocol this is."""
    return data({"version": f"v{__version__}", "apiVersion": API_VERSION})


@router.get("/v1/token-status")
def token_status(who: Who) -> Response:
    """Say that a token is good; a bad one did not come so far."""
    user = need_user(who)
    return data({"status": "OK", "username": user.name})


@router.get("/v1/rbac/users/current")
def current_user(who: Who) -> Response:
    """Show who somebody is."""
    user = need_user(who)
    return data({"id": str(user.id), "username": user.name, "realname": user.display_name, "email": user.email})


@router.get("/v1/oci-redirect")
def oci_redirect() -> Response:
    """Decline: images come and go through this protocol itself."""
    raise NotFound("no-oci-redirect", "this library does not send clients elsewhere")


# --- names -----------------------------------------------------------------------------------------------------------


def number(text: str) -> int:
    """Return the number of a row; 0, which no row has, for anything else."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 18 else 0


def split_reference(path: str) -> tuple[str, str, str, str]:
    """Return (owner, collection, container, tag or hash) of `E/C/I[:WORD]`.

    Raises:
        NotFound: not three parts.
    """
    name, _, word = path.partition(":")
    parts = name.strip("/").split("/")
    if len(parts) == 2:  # what is short for the collection's own container
        parts.append(parts[1])
    if len(parts) != 3 or not all(parts):
        raise NotFound("no-such-image", f"{path[:200]}: images are named ENTITY/COLLECTION/CONTAINER")
    return parts[0], parts[1], parts[2], word


def collection_view(one: Collection) -> dict[str, Any]:
    """Return a collection."""
    return {
        "id": str(one.id),
        "name": one.name,
        "description": one.description,
        "entity": one.owner,
        "entityName": one.owner,
        "owner": one.owner,
        "private": one.private,
        "createdAt": when(one.created_at),
        "updatedAt": when(one.changed_at),
    }


def container_view(session: Session, one: Container) -> dict[str, Any]:
    """Return a container."""
    collection = one.collection
    rows = session.execute(sa.select(Tag.name, Tag.image_id).where(Tag.container_id == one.id))
    return {
        "id": str(one.id),
        "name": one.name,
        "description": one.description,
        "collection": str(collection.id),
        "collectionName": collection.name,
        "entity": collection.owner,
        "entityName": collection.owner,
        "private": collection.private,
        "imageTags": {name: str(image) for name, image in rows if image is not None},
        "createdAt": when(one.created_at),
    }


def image_view(session: Session, one: Image, tags: list[str] | None = None) -> dict[str, Any]:
    """Return an image; `tags` when they are known already."""
    collection = one.container.collection
    return {
        "id": str(one.id),
        "hash": f"sha256.{one.sha256}",
        "description": one.description,
        "container": str(one.container_id),
        "containerName": one.container.name,
        "collection": str(collection.id),
        "collectionName": collection.name,
        "entity": collection.owner,
        "entityName": collection.owner,
        "size": one.size,
        "uploaded": one.blob is not None,
        "signed": one.signed,
        "encrypted": one.encrypted,
        "arch": one.arch,
        "tags": tags_of(session, one) if tags is None else tags,
        "downloadCount": one.pulls,
        "createdBy": one.created_by,
        "createdAt": when(one.created_at),
    }


def seen(session: Session, who: Principal, row_id: str) -> Container:
    """Return a container by its number.

    Raises:
        NotFound: none, or none for this person.
    """
    container = session.get(Container, number(row_id))
    if container is None:
        raise NotFound("no-such-container", f"{row_id[:30]}: there is no such container")
    need_see(session, who, container.collection)
    return container


@router.get("/v1/entities/{name}")
def entity(name: str, hub: TheHub) -> Response:
    """Show a user or group."""
    lower = name.lower()
    with hub.read() as session:
        user = session.scalar(sa.select(User).where(User.name == lower))
        group = session.scalar(sa.select(Group).where(Group.name == lower))
    if user is None and group is None:
        raise NotFound("no-such-entity", f"{name[:100]}: there is no such user or group")
    description = group.description if group is not None else user.display_name if user is not None else ""
    return data({"id": lower, "name": lower, "description": description, "defaultPrivate": False})


@router.post("/v1/entities")
def add_entity(new: NewEntity, who: Who) -> Response:
    """Refuse: entities are accounts."""
    user = need_user(who, "push")
    raise Forbidden("not-yours", f"{new.name}: push below your own name, library://{user.name}/..., or your group's")


@router.get("/v1/collections/{owner}/{name}")
def collection(owner: str, name: str, hub: TheHub, who: Who) -> Response:
    """Show a collection."""
    with hub.read() as session:
        return data(collection_view(seen_collection(session, who, owner, name)))


@router.post("/v1/collections")
def add_collection(new: NewCollection, hub: TheHub, who: Who) -> Response:
    """Make a collection."""
    with hub.write() as session:
        one = pushed_collection(hub, session, who, new.entity, new.name, private=new.private)
        one.description = one.description or new.description
        session.flush()
        return data(collection_view(one))


@router.get("/v1/containers/{owner}/{name}/{box}")
def container(owner: str, name: str, box: str, hub: TheHub, who: Who) -> Response:
    """Show a container."""
    with hub.read() as session:
        return data(container_view(session, container_of(session, seen_collection(session, who, owner, name), box)))


@router.post("/v1/containers")
def add_container(new: NewContainer, hub: TheHub, who: Who) -> Response:
    """Make a container."""
    with hub.write() as session:
        shelf = session.get(Collection, number(new.collection))
        if shelf is None:
            raise NotFound("no-such-collection", f"{new.collection}: there is no such collection")
        need_change(session, who, shelf, "push")
        box = container_of(session, shelf, new.name, make=True)
        box.description = box.description or new.description
        session.refresh(box)
        return data(container_view(session, box))


# --- images ----------------------------------------------------------------------------------------------------------


def lookup(session: Session, who: Principal, path: str, arch: str) -> Image:
    """Return the image of a reference; one that is announced and not yet uploaded, for those who may push it.

    Raises:
        NotFound: none, or none for this person.
    """
    owner, name, box, word = split_reference(path)
    shelf = seen_collection(session, who, owner, name)
    match = _HASH.match(word)
    if match is None:
        return find_image(session, shelf, container=box, tag=word or LATEST, arch=arch)
    # What a file is made for stands in the file; a hash needs no second opinion.
    query = (
        sa.select(Image)
        .where(Image.container_id == container_of(session, shelf, box).id, Image.sha256 == match[1])
        .order_by(Image.blob.is_(None), Image.hidden, Image.id.desc())
        .limit(1)
    )
    found = session.scalar(query)
    if found is None or (found.blob is None and not may_change(session, who, shelf, "push")):
        raise NotFound("no-such-image", f"{path[:300]}: there is no such image")
    return found


Arch = Annotated[str, Query(max_length=30)]


@router.get("/v1/images/{path:path}")
def image(path: str, hub: TheHub, who: Who, arch: Arch = "") -> Response:
    """Show an image."""
    with hub.read() as session:
        return data(image_view(session, lookup(session, who, path, arch)))


@router.delete("/v1/images/{path:path}")
def remove_image(path: str, hub: TheHub, who: Who, arch: Arch = "") -> Response:
    """Delete an image."""
    with hub.write() as session:
        one = lookup(session, who, path, arch)
        need_delete(session, who, one)
        value = image_view(session, one)
        delete_image(session, one)
        record(session, who, "image.delete", one.container.collection.full_name, image=one.id, sha256=one.sha256)
    return data(value)


@router.head("/v1/imagefile/{path:path}")
@router.get("/v1/imagefile/{path:path}")
def image_bytes(path: str, request: Request, hub: TheHub, who: Who, arch: Arch = "") -> Response:
    """Send an image's file; a client that is sent on to a store fetches it there in parts."""
    with hub.read() as session:
        one = lookup(session, who, path, arch)
    return image_file(request, hub, who, one, redirect=303)


@router.get("/v1/search")
def search(
    hub: TheHub,
    who: Who,
    value: Annotated[str, Query(max_length=100)] = "",
    arch: Arch = "",
    signed: bool = False,
) -> Response:
    """Find entities, collections, containers and images by a piece of their names or descriptions."""
    if len(value) < 3:
        raise Invalid("short-search", "search for three letters or more")
    escaped = value.lower().replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")

    def like(*columns: Any) -> sa.ColumnElement[bool]:
        return sa.or_(*(sa.func.lower(column).like(f"%{escaped}%", escape="\\") for column in columns))

    with hub.read() as session:
        names = [
            *session.scalars(sa.select(User.name).where(like(User.name)).limit(50)),
            *session.scalars(sa.select(Group.name).where(like(Group.name)).limit(50)),
        ]
        shelves = session.scalars(
            sa.select(Collection).where(visible(who), like(Collection.name, Collection.description)).limit(50)
        ).all()
        boxes = (
            sa.select(Container)
            .join(Collection, Collection.id == Container.collection_id)
            .where(visible(who), like(Container.name, Container.description, Collection.name))
        )
        images = (
            sa.select(Image)
            .join(Container, Container.id == Image.container_id)
            .join(Collection, Collection.id == Container.collection_id)
            .where(visible(who), Image.blob.is_not(None), Image.hidden.is_(False))
            .where(like(Container.name, Container.description, Collection.name))
        )
        if arch:
            images = images.where(Image.arch.in_([arch, ""]))
        if signed:
            images = images.where(Image.signed)
        images = images.options(defer(Image.definition), defer(Image.details), defer(Image.provenance))
        found = session.scalars(images.order_by(Image.id.desc()).limit(200)).all()
        tags = tags_by_image(session, found)
        return data(
            {
                "entity": [{"id": name, "name": name} for name in names],
                "collection": [collection_view(one) for one in shelves],
                "container": [container_view(session, one) for one in session.scalars(boxes.limit(50))],
                "image": [image_view(session, one, tags.get(one.id, [])) for one in found],
            }
        )


# --- tags ------------------------------------------------------------------------------------------------------------


@router.get("/v1/tags/{box}")
def tags(box: str, hub: TheHub, who: Who) -> Response:
    """Return tag → image, without architectures."""
    with hub.read() as session:
        return data(container_view(session, seen(session, who, box))["imageTags"])


@router.get("/v2/tags/{box}")
def arch_tags(box: str, hub: TheHub, who: Who) -> Response:
    """Return architecture → tag → image."""
    with hub.read() as session:
        container = seen(session, who, box)
        found: dict[str, dict[str, str]] = {}
        for row in session.scalars(sa.select(Tag).where(Tag.container_id == container.id, Tag.image_id.is_not(None))):
            found.setdefault(row.arch, {})[row.name] = str(row.image_id)
        return data(found)


@router.post("/v1/tags/{box}")
@router.post("/v2/tags/{box}")
def put_tag(box: str, new: NewTag, hub: TheHub, who: Who) -> Response:
    """Let a tag name an image; its architecture is what its file says."""
    with hub.write() as session:
        container = seen(session, who, box)
        need_change(session, who, container.collection, "push")
        one = session.get(Image, number(new.ImageID))
        if one is None or one.container_id != container.id or one.blob is None:
            raise NotFound("no-such-image", f"image {new.ImageID}: not in this container, or not uploaded")
        digest = session.scalar(
            sa.select(Manifest.digest).where(Manifest.image_id == one.id).order_by(Manifest.id).limit(1)
        )
        set_tag(session, one, new.Tag, manifest=digest or "")
        one.tag = one.tag or new.Tag
        record(session, who, "tag.set", f"{container.collection.full_name}:{new.Tag}", image=one.id)
    return data(None)
