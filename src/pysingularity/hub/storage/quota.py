# SPDX-License-Identifier: Apache-2.0
"""How many bytes people use, and refusing to take more than they may have.

A blob counts once for an owner, however many images and tags are made of it.
"""

from __future__ import annotations

import os

import sqlalchemy as sa
from sqlalchemy.orm import Session

from pysingularity.hub.context import Hub
from pysingularity.hub.errors import NoSpace, TooLarge
from pysingularity.hub.models import Blob, BlobLink, Collection, Container, Group, Image, User


def used(session: Session, *, collection: Collection | None = None, owner: Collection | None = None) -> int:
    """Return the bytes of a collection, or of everything of the owner of a collection."""
    if collection is not None:
        where: sa.ColumnElement[bool] = Collection.id == collection.id
    elif owner is not None and owner.group_id is not None:
        where = Collection.group_id == owner.group_id
    elif owner is not None and owner.user_id is not None:
        where = Collection.user_id == owner.user_id
    else:
        return 0
    return _bytes(session, where)


def _bytes(session: Session, where: sa.ColumnElement[bool]) -> int:
    images = (
        sa.select(Image.blob)
        .join(Container, Container.id == Image.container_id)
        .join(Collection, Collection.id == Container.collection_id)
        .where(where, Image.blob.is_not(None))
    )
    pushed = (
        sa.select(BlobLink.sha256)
        .join(Container, Container.id == BlobLink.container_id)
        .join(Collection, Collection.id == Container.collection_id)
        .where(where)
    )
    total = sa.select(sa.func.coalesce(sa.func.sum(Blob.size), 0)).where(Blob.sha256.in_(images.union(pushed)))
    return int(session.scalar(total) or 0)


def quota(hub: Hub, session: Session, collection: Collection) -> tuple[int, int]:
    """Return (allowed, used) bytes of the narrowest quota around a collection; allowed 0 means without limit."""
    limits = hub.settings.limits
    found: list[tuple[int, int]] = []
    own = collection.quota if collection.quota is not None else limits.collection_bytes
    if own:
        found.append((own, used(session, collection=collection)))
    theirs = 0
    if collection.group_id is not None:
        group = session.get(Group, collection.group_id)
        theirs = group.quota if group is not None and group.quota is not None else limits.group_bytes
    elif collection.user_id is not None:
        user = session.get(User, collection.user_id)
        theirs = user.quota if user is not None and user.quota is not None else limits.user_bytes
    if theirs:
        found.append((theirs, used(session, owner=collection)))
    if not found:
        return 0, used(session, collection=collection)
    return min(found, key=lambda pair: pair[0] - pair[1])


def room_of(hub: Hub, session: Session, user: User) -> tuple[int, int]:
    """Return (allowed, used) bytes of everything that a user owns; allowed 0 means without limit."""
    allowed = user.quota if user.quota is not None else hub.settings.limits.user_bytes
    return allowed, _bytes(session, Collection.user_id == user.id)


def need_room(hub: Hub, session: Session, collection: Collection, size: int) -> None:
    """Refuse bytes that the owner may not have, or that the disk has not.

    Raises:
        TooLarge: over a quota.
        NoSpace: less than the reserve would be left.
    """
    allowed, have = quota(hub, session, collection)
    if allowed and have + size > allowed:
        raise TooLarge(
            "over-quota",
            f"{collection.full_name}: {size} bytes more would be over the quota ({have} of {allowed} bytes are used)",
        )
    disk = os.statvfs(hub.settings.data)
    if disk.f_bavail * disk.f_frsize < size + hub.settings.storage.reserve:
        raise NoSpace("disk-full", f"the hub's disk has no room for {size} bytes more")
