# SPDX-License-Identifier: Apache-2.0
"""Users, robots, groups: making them, finding them, changing who belongs where.

Users and groups share one list of names, since both stand in front of the slash of a collection's name.
"""

from __future__ import annotations

import re

import sqlalchemy as sa
from sqlalchemy.orm import Session

from pysingularity.hub.accounts.passwords import hash_password
from pysingularity.hub.errors import Conflict, Invalid, NotFound
from pysingularity.hub.models import Collection, Group, Membership, User

#: The strictest of the clients' grammars for the first part of a name (shub).
NAME = re.compile(r"[a-z0-9](?:[-a-z0-9]{0,37}[a-z0-9])?\Z")
#: Names that are the first part of our own addresses.
RESERVED = frozenset(
    "about account admin api assets auth badge builds collections docs export favicon groups healthz help home hooks "
    "images join keys labels library login logout metrics new openapi pks robots search settings shub sign-in sign-out "
    "static t topics token user users v1 v2 version".split()
)
ROLES = ("member", "maintainer", "owner")


def check_name(name: str) -> str:
    """Return a name of a user or group in lower case.

    Raises:
        Invalid: clients could not write it in a reference, or it is one of our own addresses.
    """
    lower = name.lower()
    if not NAME.match(lower):
        raise Invalid("wrong-name", f"{name!r}: a name has 1 to 39 letters, digits and hyphens between them")
    if lower in RESERVED:
        raise Invalid("reserved-name", f"{name}: this name is part of the hub's own addresses")
    return lower


def _free(session: Session, name: str) -> None:
    taken = session.scalar(sa.select(User.id).where(User.name == name)) or session.scalar(
        sa.select(Group.id).where(Group.name == name)
    )
    if taken:
        raise Conflict("name-taken", f"{name}: there is a user or group of this name")
    owned = session.scalar(
        sa.select(Collection.id).where(
            Collection.owner == name, Collection.user_id.is_(None), Collection.group_id.is_(None)
        )
    )
    if owned:  # else a stranger could take over what a deleted account left behind
        raise Conflict("name-taken", f"{name}: collections of a former user carry this name")


def add_user(
    session: Session,
    name: str,
    *,
    password: str | None = None,
    admin: bool = False,
    email: str = "",
    display_name: str = "",
) -> User:
    """Make a user; without a password the account can only be used by tokens or another way to sign in."""
    lower = check_name(name)
    _free(session, lower)
    user = User(
        name=lower,
        display_name=display_name or name,
        email=email,
        admin=admin,
        password=hash_password(password) if password is not None else None,
    )
    session.add(user)
    session.flush()
    return user


def add_robot(session: Session, name: str, owner: User) -> User:
    """Make a robot account that belongs to a user and may do what its tokens say."""
    robot = add_user(session, name)
    robot.kind, robot.owner_id = "robot", owner.id
    return robot


def find_user(session: Session, name: str) -> User:
    """Return a user by name.

    Raises:
        NotFound: there is none.
    """
    user = session.scalar(sa.select(User).where(User.name == name.lower()))
    if user is None:
        raise NotFound("no-such-user", f"{name}: there is no such user")
    return user


def add_group(session: Session, name: str, owner: User, description: str = "") -> Group:
    """Make a group with its first owner."""
    lower = check_name(name)
    _free(session, lower)
    group = Group(name=lower, description=description)
    session.add(group)
    session.flush()
    session.add(Membership(group_id=group.id, user_id=owner.id, role="owner"))
    return group


def find_group(session: Session, name: str) -> Group:
    """Return a group by name.

    Raises:
        NotFound: there is none.
    """
    group = session.scalar(sa.select(Group).where(Group.name == name.lower()))
    if group is None:
        raise NotFound("no-such-group", f"{name}: there is no such group")
    return group


def set_member(session: Session, group: Group, user: User, role: str | None) -> None:
    """Give a user a role in a group, or take it away (`None`).

    Raises:
        Invalid: unknown role.
        Conflict: the group would be left without an owner.
    """
    if role is not None and role not in ROLES:
        raise Invalid("wrong-role", f"{role}: roles are {', '.join(ROLES)}")
    member = session.get(Membership, (group.id, user.id))
    if member is not None and member.role == "owner" and role != "owner":
        others = session.scalar(
            sa.select(sa.func.count())
            .select_from(Membership)
            .where(Membership.group_id == group.id, Membership.role == "owner", Membership.user_id != user.id)
        )
        if not others:
            raise Conflict("last-owner", f"{group.name}: a group keeps at least one owner")
    if role is None:
        if member is not None:
            session.delete(member)
    elif member is None:
        session.add(Membership(group_id=group.id, user_id=user.id, role=role))
    else:
        member.role = role


def role_in(session: Session, group_id: int, user_id: int) -> str | None:
    """Return the role of a user in a group."""
    member = session.get(Membership, (group_id, user_id))
    return member.role if member else None
