# SPDX-License-Identifier: Apache-2.0
"""Collections over JSON: make, list, show, change, delete."""

from __future__ import annotations

from typing import Annotated, Any

import sqlalchemy as sa
from fastapi import APIRouter, Depends, Query, Request
from pydantic import BaseModel, Field

from pysingularity.hub.accounts.audit import record
from pysingularity.hub.accounts.rights import may_change, need_admin, need_change, need_see, need_user, visible
from pysingularity.hub.accounts.tokens import add_share
from pysingularity.hub.api.views import collection_view, when
from pysingularity.hub.catalog import add_collection, get_collection, rename_collection, search, transfer_collection
from pysingularity.hub.doors import Number, TheHub, Who, base_url, limited
from pysingularity.hub.errors import Conflict, Invalid, NotFound
from pysingularity.hub.models import Collection, Image, Recipe, ShareLink, Star
from pysingularity.hub.sources.git import check_branch, check_url
from pysingularity.hub.sources.intake import resync

router = APIRouter(prefix="/api/v1", tags=["collections"], dependencies=[Depends(limited)])
#: `manual` is always there; `schedule` is another word for `base`.
TRIGGERS = ("push", "tag", "deployment", "base", "schedule", "manual")


class NewCollection(BaseModel):
    """What makes a collection."""

    model_config = {"extra": "forbid"}
    name: str = Field(max_length=200, description="OWNER/NAME")
    git_url: str = Field("", max_length=2000)
    branches: list[str] = Field(default_factory=list, max_length=100)
    private: bool = False
    description: str = Field("", max_length=2000)


class Limits(BaseModel):
    """Limits of a collection's builds; the hub's own are the most that anybody gets."""

    model_config = {"extra": "forbid"}
    seconds: int | None = Field(None, ge=1, le=1 << 31)
    memory: int | None = Field(None, ge=1 << 20, le=1 << 50, description="bytes")


class Changes(BaseModel):
    """What can be changed of a collection; what is left out stays."""

    model_config = {"extra": "forbid"}
    name: str | None = Field(None, max_length=200)
    owner: str | None = Field(None, max_length=64)
    git_url: str | None = Field(None, max_length=2000)
    branches: list[str] | None = Field(None, max_length=100)
    triggers: list[str] | None = Field(None, max_length=10)
    topics: list[str] | None = Field(None, max_length=30)
    description: str | None = Field(None, max_length=2000)
    private: bool | None = None
    building: bool | None = None
    poll: float | None = Field(None, ge=0, le=30 * 86400)
    status_token: str | None = Field(None, max_length=4096)
    keep: dict[str, float] | None = None
    limits: Limits | None = Field(None, description="replaces the collection's earlier ones")
    quota: int | None = Field(None, ge=-1, le=1 << 62, description="bytes; -1 takes it away; administrators only")


class NewShare(BaseModel):
    """What makes a share link."""

    model_config = {"extra": "forbid"}
    name: str = Field("", max_length=100)
    days: float | None = Field(None, gt=0, le=3650)


def check_patterns(branches: list[str]) -> list[str]:
    """Return names and patterns of branches after checking them."""
    for pattern in branches:
        check_branch(pattern.replace("*", "x").replace("?", "x").replace("[", "x"))
    return branches


@router.post("/collections", status_code=201)
def create(new: NewCollection, request: Request, hub: TheHub, who: Who) -> dict[str, Any]:
    """Make a collection, and look at its repository at once."""
    if new.git_url:
        check_url(new.git_url, hub.settings.sources, approved=who.admin)
    check_patterns(new.branches)
    with hub.write() as session:
        collection = add_collection(
            session,
            who,
            new.name,
            git_url=new.git_url,
            branches=new.branches,
            private=new.private,
            description=new.description,
            most=hub.settings.limits.collections_per_user,
        )
        record(session, who, "collection.add", collection.full_name, git_url=new.git_url)
    if new.git_url:
        resync(hub, collection.id, by=who.name)
    return collection_view(collection, base_url(request), secrets=True)


@router.get("/collections")
def index(
    request: Request,
    hub: TheHub,
    who: Who,
    query: Annotated[str, Query(alias="q", max_length=200)] = "",
    owner: Annotated[str, Query(max_length=64)] = "",
    limit: Annotated[int, Query(ge=1, le=500)] = 50,
    offset: Annotated[int, Query(ge=0, le=1 << 31)] = 0,
) -> dict[str, Any]:
    """List collections, the last changed first."""
    with hub.read() as session:
        if owner:
            found = list(
                session.scalars(
                    sa.select(Collection)
                    .where(visible(who), Collection.owner == owner.lower())
                    .order_by(Collection.name)
                    .limit(limit)
                    .offset(offset)
                )
            )
        else:
            found = search(session, who, query, limit=limit, offset=offset)
    base = base_url(request)
    return {"collections": [collection_view(one, base) for one in found], "limit": limit, "offset": offset}


@router.get("/collections/{owner}/{name}")
def show(owner: str, name: str, request: Request, hub: TheHub, who: Who) -> dict[str, Any]:
    """Show a collection with its recipes; with the webhook's secret for those who may change it."""
    with hub.read() as session:
        collection = get_collection(session, owner, name)
        need_see(session, who, collection)
        value = collection_view(collection, base_url(request), secrets=may_change(session, who, collection, "admin"))
        rows = session.scalars(
            sa.select(Recipe)
            .where(Recipe.collection_id == collection.id)
            .order_by(Recipe.branch, Recipe.path)
            .limit(1000)
        )
        value["recipes"] = [
            {
                "branch": row.branch,
                "path": row.path,
                "tag": row.tag,
                "commit": row.commit,
                "base": row.base,
                "problem": row.problem,
                "shadowed": row.shadowed,
            }
            for row in rows
        ]
    return value


@router.patch("/collections/{owner}/{name}")
def change(owner: str, name: str, changes: Changes, request: Request, hub: TheHub, who: Who) -> dict[str, Any]:
    """Change a collection's settings."""
    given = changes.model_dump(exclude_unset=True, exclude_none=True)
    if given.get("git_url"):
        check_url(given["git_url"], hub.settings.sources, approved=who.admin)
    check_patterns(given.get("branches", []))
    wrong = [one for one in given.get("triggers", []) if one not in TRIGGERS]
    if wrong:
        raise Invalid("wrong-trigger", f"{wrong[0][:80]}: triggers are {', '.join(TRIGGERS)}")
    if given.get("quota") is not None:
        need_admin(who)
        given["quota"] = given["quota"] if given["quota"] >= 0 else None
    with hub.write() as session:
        collection = get_collection(session, owner, name)
        need_change(session, who, collection, "admin")
        title, to = given.pop("name", None), given.pop("owner", None)
        if "git_url" in given and given["git_url"] != collection.git_url:
            collection.forge_id = ""
            collection.approved_url = given["git_url"] if who.admin else ""
        for key, value in given.items():
            setattr(collection, key, value)
        if title is not None:
            rename_collection(session, collection, title if "/" in title else f"{collection.owner}/{title}")
        if to is not None:
            transfer_collection(session, collection, to)
        record(session, who, "collection.change", collection.full_name, fields=sorted(changes.model_fields_set))
        session.flush()
        return collection_view(collection, base_url(request), secrets=True)


@router.delete("/collections/{owner}/{name}")
def delete(owner: str, name: str, hub: TheHub, who: Who, force: bool = False) -> dict[str, Any]:
    """Delete a collection with everything in it; frozen images stop that unless `force` is set by an administrator."""
    with hub.write() as session:
        collection = get_collection(session, owner, name)
        need_change(session, who, collection, "admin")
        frozen = session.scalar(
            sa.select(sa.func.count())
            .select_from(Image)
            .where(Image.frozen, Image.container.has(collection_id=collection.id))
        )
        if frozen and not (force and who.admin):
            raise Conflict("frozen", f"{collection.full_name} has {frozen} frozen images")
        record(session, who, "collection.delete", collection.full_name)
        session.delete(collection)
    return {"deleted": f"{owner}/{name}".lower()}


@router.post("/collections/{owner}/{name}/resync", status_code=202)
def sync(owner: str, name: str, hub: TheHub, who: Who) -> dict[str, Any]:
    """Look at the repository now."""
    with hub.read() as session:
        collection = get_collection(session, owner, name)
        need_change(session, who, collection, "build")
    return {"delivery": resync(hub, collection.id, by=who.name)}


@router.post("/collections/{owner}/{name}/shares", status_code=201)
def share(owner: str, name: str, new: NewShare, request: Request, hub: TheHub, who: Who) -> dict[str, Any]:
    """Make a short secret with which clients without accounts pull from a private collection."""
    with hub.write() as session:
        collection = get_collection(session, owner, name)
        need_change(session, who, collection, "admin")
        secret = add_share(session, collection, by=who.name, name=new.name, days=new.days)
        record(session, who, "share.add", collection.full_name, name=new.name)
    host = base_url(request).partition("://")[2]
    return {"secret": secret, "uri": f"shub://{host}/t/{secret}/{collection.full_name}"}


@router.get("/collections/{owner}/{name}/shares")
def list_shares(owner: str, name: str, hub: TheHub, who: Who) -> dict[str, Any]:
    """List the share links of a collection; their secrets are known to nobody."""
    with hub.read() as session:
        collection = get_collection(session, owner, name)
        need_change(session, who, collection, "admin")
        rows = session.scalars(
            sa.select(ShareLink).where(ShareLink.collection_id == collection.id).order_by(ShareLink.id)
        )
        return {
            "shares": [
                {
                    "id": row.id,
                    "name": row.name,
                    "created_by": row.created_by,
                    "created_at": when(row.created_at),
                    "expires_at": when(row.expires_at),
                }
                for row in rows
            ]
        }


@router.delete("/collections/{owner}/{name}/shares/{number}")
def remove_share(owner: str, name: str, number: Number, hub: TheHub, who: Who) -> dict[str, Any]:
    """Take a share link back."""
    with hub.write() as session:
        collection = get_collection(session, owner, name)
        need_change(session, who, collection, "admin")
        row = session.get(ShareLink, number)
        if row is None or row.collection_id != collection.id:
            raise NotFound("no-such-share", f"share link {number}: there is none in this collection")
        record(session, who, "share.remove", collection.full_name, name=row.name)
        session.delete(row)
    return {"removed": number}


@router.put("/collections/{owner}/{name}/star")
def star(owner: str, name: str, hub: TheHub, who: Who) -> dict[str, Any]:
    """Like a collection."""
    return _star(owner, name, hub, who, True)


@router.delete("/collections/{owner}/{name}/star")
def unstar(owner: str, name: str, hub: TheHub, who: Who) -> dict[str, Any]:
    """Like it no longer."""
    return _star(owner, name, hub, who, False)


def _star(owner: str, name: str, hub: TheHub, who: Who, like: bool) -> dict[str, Any]:
    user = need_user(who)
    with hub.write() as session:
        collection = get_collection(session, owner, name)
        need_see(session, who, collection)
        row = session.get(Star, (user.id, collection.id))
        if like and row is None:
            session.add(Star(user_id=user.id, collection_id=collection.id))
        elif not like and row is not None:
            session.delete(row)
        session.flush()
        collection.stars = (
            session.scalar(sa.select(sa.func.count()).select_from(Star).where(Star.collection_id == collection.id)) or 0
        )
        return {"stars": collection.stars, "starred": like}
