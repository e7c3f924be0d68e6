# SPDX-License-Identifier: Apache-2.0
"""The person behind a token, his tokens and robots, groups."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from fastapi import APIRouter, Depends
from pydantic import BaseModel, Field

from pysingularity.hub.accounts import people, tokens
from pysingularity.hub.accounts.audit import record
from pysingularity.hub.accounts.passwords import hash_password, verify_password
from pysingularity.hub.accounts.rights import Principal, need_admin, need_user
from pysingularity.hub.accounts.signin import sign_out_everywhere
from pysingularity.hub.api.views import when
from pysingularity.hub.doors import Number, TheHub, Who, limited
from pysingularity.hub.errors import Conflict, Forbidden, NotFound, Unauthenticated
from pysingularity.hub.models import Collection, Group, Identity, Membership, Token, User, now

router = APIRouter(prefix="/api/v1", tags=["people"], dependencies=[Depends(limited)])


class NewToken(BaseModel):
    """What makes a token."""

    model_config = {"extra": "forbid"}
    name: str = Field("", max_length=100)
    scopes: str = Field("read", max_length=100)
    days: float | None = Field(None, gt=0, le=36500)
    robot: str = Field("", max_length=40, description="for a robot of yours")


class NewName(BaseModel):
    """What makes a robot or a group."""

    model_config = {"extra": "forbid"}
    name: str = Field(max_length=40)
    description: str = Field("", max_length=500)


class NewGroup(NewName):
    """What makes a group."""


class GroupChanges(BaseModel):
    """What can be changed of a group; what is left out stays."""

    model_config = {"extra": "forbid"}
    description: str | None = Field(None, max_length=500)
    quota: int | None = Field(None, ge=-1, le=1 << 62, description="bytes; -1 takes it away; administrators only")


class Person(BaseModel):
    """What somebody changes about himself; what is left out stays."""

    model_config = {"extra": "forbid"}
    display_name: str | None = Field(None, max_length=200)
    email: str | None = Field(None, max_length=200)
    password: str | None = Field(None, max_length=1024, description="a new one")
    old_password: str = Field("", max_length=1024, description="the present one, when there is one")


class Role(BaseModel):
    """Somebody's place in a group."""

    model_config = {"extra": "forbid"}
    role: str = Field(max_length=20)


@router.get("/user")
def me(hub: TheHub, who: Who) -> dict[str, Any]:
    """Show on whose behalf the request is made."""
    user = need_user(who)
    with hub.read() as session:
        groups = session.execute(
            sa.select(Group.name, Membership.role)
            .join(Membership, Membership.group_id == Group.id)
            .where(Membership.user_id == user.id)
        ).all()
        identities = session.scalars(sa.select(Identity.provider).where(Identity.user_id == user.id)).all()
    return {
        "name": user.name,
        "display_name": user.display_name,
        "email": user.email,
        "password": user.password is not None,
        "identities": sorted(set(identities)),
        "admin": user.admin,
        "kind": user.kind,
        "scopes": sorted(who.scopes),
        "groups": {name: role for name, role in groups},  # noqa: C416
    }


@router.patch("/user")
def change_me(new: Person, hub: TheHub, who: Who) -> dict[str, Any]:
    """Change one's own account; a new password signs all browsers out."""
    user = need_user(who, "admin")
    if who.collection_id is not None:
        raise Forbidden("missing-scope", "this token is for one collection only")
    if new.password is not None:
        if user.kind != "person":
            raise Forbidden("no-passwords", "robots have no password")
        if user.password is not None and not verify_password(new.old_password, user.password):
            raise Unauthenticated("wrong-password", "the present password is wrong")
        stored = hash_password(new.password)
    with hub.write() as session:
        row = session.get_one(User, user.id)
        if new.display_name is not None:
            row.display_name = new.display_name
        if new.email is not None:
            row.email = new.email
        if new.password is not None:
            row.password = stored
            sign_out_everywhere(session, row)
        record(
            session,
            who,
            "user.change",
            row.name,
            fields=sorted(new.model_dump(exclude_none=True, exclude={"old_password"})),
        )
    return me(hub, Principal(row, who.scopes, who.collection_id, who.share, who.via, who.csrf, who.address))


@router.delete("/user/sign-ins")
def sign_out_all(hub: TheHub, who: Who) -> dict[str, Any]:
    """Sign all browsers of one's own out."""
    user = need_user(who, "admin")
    with hub.write() as session:
        sign_out_everywhere(session, user)
        record(session, who, "user.sign-out", user.name)
    return {"signed_out": user.name}


@router.get("/tokens")
def list_tokens(hub: TheHub, who: Who) -> dict[str, Any]:
    """List one's own tokens; their secrets are known to nobody."""
    user = need_user(who, "admin")
    with hub.read() as session:
        rows = session.execute(
            sa.select(Token, User.name)
            .join(User, User.id == Token.user_id)
            .where(sa.or_(User.id == user.id, User.owner_id == user.id), Token.revoked_at.is_(None))
            .order_by(Token.id)
        )
        return {
            "tokens": [
                {
                    "id": row.id,
                    "name": row.name,
                    "user": name,
                    "scopes": row.scopes.split(),
                    "created_at": when(row.created_at),
                    "expires_at": when(row.expires_at),
                    "used_at": when(row.used_at),
                }
                for row, name in rows
            ]
        }


@router.post("/tokens", status_code=201)
def add_token(new: NewToken, hub: TheHub, who: Who) -> dict[str, Any]:
    """Make a token for oneself or for a robot; a token cannot make one that may do more than itself."""
    user = need_user(who, "admin")
    wanted = tokens.check_scopes(new.scopes)
    if not set(wanted) <= who.scopes or who.collection_id is not None:
        raise Forbidden("missing-scope", "a token makes no token that may do more than itself")
    with hub.write() as session:
        owner = session.get_one(User, user.id)
        if new.robot:
            owner = people.find_user(session, new.robot)
            if owner.owner_id != user.id:
                raise NotFound("no-such-user", f"{new.robot}: you have no such robot")
        secret, row = tokens.add_token(session, owner, scopes=new.scopes, name=new.name, days=new.days)
        record(session, who, "token.add", owner.name, token=row.id, scopes=row.scopes)
        return {"id": row.id, "token": secret, "scopes": row.scopes.split(), "expires_at": when(row.expires_at)}


@router.delete("/tokens/{number}")
def revoke(number: Number, hub: TheHub, who: Who) -> dict[str, Any]:
    """Take a token back."""
    user = need_user(who, "admin")
    with hub.write() as session:
        row = session.get(Token, number) if number < 1 << 62 else None
        owner = session.get(User, row.user_id) if row is not None else None
        if row is None or owner is None or (user.id not in (owner.id, owner.owner_id) and not who.admin):
            raise NotFound("no-such-token", f"token {number}: there is no such token")
        row.revoked_at = now()
        record(session, who, "token.revoke", owner.name, token=number)
    return {"revoked": number}


@router.get("/robots")
def list_robots(hub: TheHub, who: Who) -> dict[str, Any]:
    """List one's own robots."""
    user = need_user(who, "admin")
    with hub.read() as session:
        rows = session.scalars(sa.select(User).where(User.owner_id == user.id).order_by(User.name))
        return {
            "robots": [{"name": row.name, "active": row.active, "created_at": when(row.created_at)} for row in rows]
        }


@router.post("/robots", status_code=201)
def add_robot(new: NewName, hub: TheHub, who: Who) -> dict[str, Any]:
    """Make a robot account: it may do what its owner may, as far as its tokens go."""
    user = need_user(who, "admin")
    with hub.write() as session:
        robot = people.add_robot(session, new.name, session.get_one(User, user.id))
        record(session, who, "robot.add", robot.name)
        return {"name": robot.name, "owner": user.name}


@router.delete("/robots/{name}")
def remove_robot(name: str, hub: TheHub, who: Who) -> dict[str, Any]:
    """Remove a robot of one's own, with its tokens."""
    user = need_user(who, "admin")
    with hub.write() as session:
        robot = session.scalar(sa.select(User).where(User.name == name.lower(), User.owner_id == user.id))
        if robot is None:
            raise NotFound("no-such-user", f"{name[:80]}: you have no such robot")
        record(session, who, "robot.remove", robot.name)
        session.delete(robot)
    return {"removed": name.lower()}


@router.get("/groups")
def list_groups(hub: TheHub, who: Who) -> dict[str, Any]:
    """List the groups that one belongs to; an administrator's list has all."""
    user = need_user(who)
    mine = sa.select(Membership.group_id).where(Membership.user_id == user.id)
    query = sa.select(Group).order_by(Group.name)
    with hub.read() as session:
        rows = session.scalars(query if who.admin else query.where(Group.id.in_(mine)))
        return {"groups": [{"name": row.name, "description": row.description} for row in rows]}


@router.post("/groups", status_code=201)
def add_group(new: NewGroup, hub: TheHub, who: Who) -> dict[str, Any]:
    """Make a group, owned by oneself."""
    user = need_user(who, "admin")
    with hub.write() as session:
        group = people.add_group(session, new.name, session.get_one(User, user.id), new.description)
        record(session, who, "group.add", group.name)
        return {"name": group.name, "members": {user.name: "owner"}}


@router.get("/groups/{name}")
def show_group(name: str, hub: TheHub, who: Who) -> dict[str, Any]:
    """Show a group one belongs to."""
    with hub.read() as session:
        group = _group(session, who, name, ("member", "maintainer", "owner"))
        rows = session.execute(
            sa.select(User.name, Membership.role)
            .join(Membership, Membership.user_id == User.id)
            .where(Membership.group_id == group.id)
            .order_by(User.name)
        )
        return {
            "name": group.name,
            "description": group.description,
            "quota": group.quota,
            "members": dict(rows.tuples().all()),
        }


@router.patch("/groups/{name}")
def change_group(name: str, new: GroupChanges, hub: TheHub, who: Who) -> dict[str, Any]:
    """Change what a group says about itself; its quota is the administrator's."""
    need_user(who, "admin")
    if new.quota is not None:
        need_admin(who)
    with hub.write() as session:
        group = _group(session, who, name, ("owner",))
        if new.description is not None:
            group.description = new.description
        if new.quota is not None:
            group.quota = new.quota if new.quota >= 0 else None
        record(session, who, "group.change", group.name, fields=sorted(new.model_dump(exclude_none=True)))
    return show_group(name, hub, who)


@router.delete("/groups/{name}")
def remove_group(name: str, hub: TheHub, who: Who) -> dict[str, Any]:
    """Remove a group that owns nothing."""
    need_user(who, "admin")
    with hub.write() as session:
        group = _group(session, who, name, ("owner",))
        owned = session.scalar(sa.select(sa.func.count()).where(Collection.group_id == group.id))
        if owned:
            raise Conflict("not-empty", f"{group.name}: the group still owns {owned} collections")
        record(session, who, "group.remove", group.name)
        session.delete(group)
    return {"removed": name.lower()}


@router.put("/groups/{name}/members/{member}")
def put_member(name: str, member: str, new: Role, hub: TheHub, who: Who) -> dict[str, Any]:
    """Give somebody a role in a group."""
    need_user(who, "admin")
    with hub.write() as session:
        group = _group(session, who, name, ("owner",))
        people.set_member(session, group, people.find_user(session, member), new.role)
        record(session, who, "group.member", group.name, member=member, role=new.role)
    return {"name": name, "member": member, "role": new.role}


@router.delete("/groups/{name}/members/{member}")
def remove_member(name: str, member: str, hub: TheHub, who: Who) -> dict[str, Any]:
    """Take somebody out of a group."""
    need_user(who, "admin")
    with hub.write() as session:
        group = _group(session, who, name, ("owner",))
        people.set_member(session, group, people.find_user(session, member), None)
        record(session, who, "group.member", group.name, member=member, role=None)
    return {"name": name, "removed": member}


def _group(session: Any, who: Principal, name: str, roles: tuple[str, ...]) -> Group:
    user = need_user(who)
    group = people.find_group(session, name)
    role = people.role_in(session, group.id, user.id)
    if who.admin or role in roles:
        return group
    if role is None:
        raise NotFound("no-such-group", f"{name}: there is no such group")
    raise Forbidden("not-yours", f"{name}: only its owners do this")
