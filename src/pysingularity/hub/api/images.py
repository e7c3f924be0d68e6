# SPDX-License-Identifier: Apache-2.0
"""Images over JSON: show, list, freeze, delete, compare."""

from __future__ import annotations

from typing import Annotated, Any

import sqlalchemy as sa
from fastapi import APIRouter, Depends, Query, Request
from sqlalchemy.orm import defer

from pysingularity.hub.accounts.audit import record
from pysingularity.hub.accounts.rights import Principal, need_change, need_see
from pysingularity.hub.api.views import image_view
from pysingularity.hub.catalog import (
    delete_image,
    find_image,
    freeze,
    get_collection,
    get_image,
    parse_target,
    tags_by_image,
)
from pysingularity.hub.doors import Number, TheHub, Who, base_url, limited
from pysingularity.hub.errors import NotFound
from pysingularity.hub.models import Container, Image

router = APIRouter(prefix="/api/v1", tags=["images"], dependencies=[Depends(limited)])


def seen_image(session: Any, who: Principal, number: int) -> Image:
    """Return an image that somebody may see."""
    image = get_image(session, number if number < 1 << 62 else 0)
    try:
        need_see(session, who, image.container.collection)
    except NotFound:
        raise NotFound("no-such-image", f"image {number}: there is no such image")
    return image


@router.get("/images/{owner}/{target}")
def by_name(
    owner: str,
    target: str,
    request: Request,
    hub: TheHub,
    who: Who,
    arch: Annotated[str, Query(max_length=30)] = "",
    limit: Annotated[int, Query(ge=1, le=500)] = 100,
) -> dict[str, Any]:
    """Show the image of OWNER/NAME:TAG[@DIGEST]; without a tag, the images of the collection, the newest first."""
    name = parse_target(f"{owner}/{target}")
    with hub.read() as session:
        collection = get_collection(session, name.owner, name.name)
        need_see(session, who, collection)
        base = base_url(request)
        if name.tag or name.digest:
            image = find_image(session, collection, tag=name.tag, digest=name.digest, arch=arch)
            return image_view(session, image, base, full=True)
        rows = session.scalars(
            sa.select(Image)
            .options(defer(Image.definition), defer(Image.details), defer(Image.provenance))
            .join(Container, Container.id == Image.container_id)
            .where(Container.collection_id == collection.id, Image.blob.is_not(None))
            .order_by(Image.id.desc())
            .limit(limit)
        ).all()
        tags = tags_by_image(session, rows)
        images = [image_view(session, one, base, tags=tags.get(one.id, [])) for one in rows]
        return {"collection": collection.full_name, "images": images}


@router.get("/images/{number}")
def by_number(number: Number, request: Request, hub: TheHub, who: Who) -> dict[str, Any]:
    """Show an image."""
    with hub.read() as session:
        return image_view(session, seen_image(session, who, number), base_url(request), full=True)


@router.post("/images/{number}/freeze")
def put_padlock(number: Number, request: Request, hub: TheHub, who: Who) -> dict[str, Any]:
    """Freeze an image: it stays as it is, for a paper."""
    return _freeze(number, request, hub, who, True)


@router.post("/images/{number}/unfreeze")
def take_padlock(number: Number, request: Request, hub: TheHub, who: Who) -> dict[str, Any]:
    """Take the padlock off again."""
    return _freeze(number, request, hub, who, False)


def _freeze(number: int, request: Request, hub: TheHub, who: Principal, frozen: bool) -> dict[str, Any]:
    with hub.write() as session:
        image = seen_image(session, who, number)
        need_change(session, who, image.container.collection, "admin")
        freeze(image, frozen=frozen)
        record(session, who, "image.freeze" if frozen else "image.unfreeze", str(number))
        session.flush()
        return image_view(session, image, base_url(request))


@router.delete("/images/{number}")
def delete(number: Number, hub: TheHub, who: Who) -> dict[str, Any]:
    """Delete an image that is not frozen."""
    with hub.write() as session:
        image = seen_image(session, who, number)
        need_change(session, who, image.container.collection, "admin")
        name = image.container.collection.full_name
        delete_image(session, image)
        record(session, who, "image.delete", name, image=number, sha256=image.sha256)
    return {"deleted": number, "collection": name}
