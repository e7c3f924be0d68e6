# SPDX-License-Identifier: Apache-2.0
"""What administrators see and do over JSON: accounts, the audit log, and how the hub is doing."""

from __future__ import annotations

import os
from typing import Annotated, Any

import sqlalchemy as sa
from fastapi import APIRouter, Depends, Query
from pydantic import BaseModel, Field

from pysingularity.hub.accounts import people
from pysingularity.hub.accounts.audit import record
from pysingularity.hub.accounts.passwords import hash_password
from pysingularity.hub.accounts.rights import need_admin
from pysingularity.hub.accounts.signin import sign_out_everywhere
from pysingularity.hub.api.views import when
from pysingularity.hub.builds.states import ALL
from pysingularity.hub.doors import TheHub, Who, limited
from pysingularity.hub.errors import Conflict
from pysingularity.hub.models import Audit, Blob, Build, Collection, Group, Image, User
from pysingularity.version import __version__

router = APIRouter(prefix="/api/v1", tags=["administration"], dependencies=[Depends(limited)])


class NewUser(BaseModel):
    """What makes an account."""

    model_config = {"extra": "forbid"}
    name: str = Field(max_length=40)
    display_name: str = Field("", max_length=200)
    email: str = Field("", max_length=200)
    password: str | None = Field(None, max_length=1024)
    admin: bool = False


class UserChanges(BaseModel):
    """What an administrator changes of an account; what is left out stays."""

    model_config = {"extra": "forbid"}
    active: bool | None = None
    admin: bool | None = None
    password: str | None = Field(None, max_length=1024)
    quota: int | None = Field(None, ge=-1, le=1 << 62, description="bytes; -1 takes it away")


def user_view(row: User) -> dict[str, Any]:
    """Return an account as administrators see it."""
    return {
        "name": row.name,
        "display_name": row.display_name,
        "email": row.email,
        "kind": row.kind,
        "admin": row.admin,
        "active": row.active,
        "quota": row.quota,
        "created_at": when(row.created_at),
        "seen_at": when(row.seen_at),
    }


@router.get("/users")
def list_users(
    hub: TheHub,
    who: Who,
    query: Annotated[str, Query(alias="q", max_length=100)] = "",
    limit: Annotated[int, Query(ge=1, le=500)] = 100,
    offset: Annotated[int, Query(ge=0, le=1 << 31)] = 0,
) -> dict[str, Any]:
    """List accounts by name."""
    need_admin(who)
    rows = sa.select(User).order_by(User.name).limit(limit).offset(offset)
    if query:
        rows = rows.where(User.name.startswith(query.lower(), autoescape=True))
    with hub.read() as session:
        return {"users": [user_view(row) for row in session.scalars(rows)], "limit": limit, "offset": offset}


@router.post("/users", status_code=201)
def add_user(new: NewUser, hub: TheHub, who: Who) -> dict[str, Any]:
    """Make an account."""
    need_admin(who)
    with hub.write() as session:
        user = people.add_user(
            session,
            new.name,
            password=new.password,
            admin=new.admin,
            email=new.email,
            display_name=new.display_name,
        )
        record(session, who, "user.add", user.name, admin=user.admin)
        return user_view(user)


@router.patch("/users/{name}")
def change_user(name: str, new: UserChanges, hub: TheHub, who: Who) -> dict[str, Any]:
    """Block or let in, make or unmake an administrator, set a password or a quota.

    Nobody takes his own power away: another administrator does, or the command on the hub's machine.
    """
    me = need_admin(who)
    stored = hash_password(new.password) if new.password is not None else None
    with hub.write() as session:
        user = people.find_user(session, name)
        if user.id == me.id and (new.active is False or new.admin is False):
            raise Conflict("yourself", "you cannot take your own account's power away")
        if stored is not None and user.kind != "person":
            raise Conflict("no-passwords", f"{user.name}: robots have no password")
        if new.admin is not None:
            user.admin = new.admin
        if new.quota is not None:
            user.quota = new.quota if new.quota >= 0 else None
        if new.active is not None:
            user.active = new.active
        if stored is not None:
            user.password = stored
        if stored is not None or new.active is False:
            sign_out_everywhere(session, user)
        record(session, who, "user.change", user.name, fields=sorted(new.model_dump(exclude_none=True)))
        return user_view(user)


@router.get("/audit")
def audit(
    hub: TheHub,
    who: Who,
    actor: Annotated[str, Query(max_length=100)] = "",
    action: Annotated[str, Query(max_length=100)] = "",
    limit: Annotated[int, Query(ge=1, le=500)] = 100,
    before: Annotated[int, Query(ge=0, le=1 << 62)] = 0,
) -> dict[str, Any]:
    """List who changed what, the newest first."""
    need_admin(who)
    query = sa.select(Audit).order_by(Audit.id.desc()).limit(limit)
    if actor:
        query = query.where(Audit.actor == actor.lower())
    if action:
        query = query.where(Audit.action.startswith(action, autoescape=True))
    if before:
        query = query.where(Audit.id < before)
    with hub.read() as session:
        return {
            "audit": [
                {
                    "id": row.id,
                    "at": when(row.at),
                    "actor": row.actor,
                    "action": row.action,
                    "target": row.target,
                    "details": row.details,
                    "address": row.address,
                }
                for row in session.scalars(query)
            ]
        }


@router.get("/status")
def status(hub: TheHub, who: Who) -> dict[str, Any]:
    """Show how the hub is doing: builds by state, what is stored, room on the disk."""
    need_admin(who)
    with hub.read() as session:
        states = dict(session.execute(sa.select(Build.state, sa.func.count()).group_by(Build.state)).tuples().all())
        tables = {"users": User, "groups": Group, "collections": Collection, "images": Image}
        counts = {
            name: session.scalar(sa.select(sa.func.count()).select_from(table)) or 0 for name, table in tables.items()
        }
        blobs, stored = session.execute(
            sa.select(sa.func.count(), sa.func.coalesce(sa.func.sum(Blob.size), 0)).select_from(Blob)
        ).one()
        damaged = session.scalar(sa.select(sa.func.count()).where(Blob.damaged != "")) or 0
    disk = os.statvfs(hub.settings.data)
    return {
        "version": __version__,
        "database": "SQLite" if hub.database.sqlite else "PostgreSQL",
        "storage": hub.settings.storage.url.partition("://")[0] or "files",
        "engine": hub.settings.builds.engine,
        "workers": hub.settings.builds.workers,
        "builds": {state: states.get(state, 0) for state in ALL},
        **counts,
        "blobs": blobs,
        "blob_bytes": int(stored),
        "damaged": damaged,
        "disk_free_bytes": disk.f_bavail * disk.f_frsize,
        "disk_bytes": disk.f_blocks * disk.f_frsize,
    }
