# SPDX-License-Identifier: Apache-2.0
"""Where pushed images go: collections and containers by the names that clients use, made at the first push.

`OWNER/NAME` is the collection's own container, `OWNER/NAME/MORE` another one in it; the library writes the former as
`OWNER/NAME/NAME`. An image is believed (see `builds.accept`) before a row about it is written.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.orm import Session

from pysingularity.hub.accounts.audit import record
from pysingularity.hub.accounts.people import role_in
from pysingularity.hub.accounts.rights import Principal, may_change, need_change, need_see, need_user
from pysingularity.hub.builds.accept import Facts, examine
from pysingularity.hub.builds.publish import add_image, link_blob
from pysingularity.hub.catalog import add_collection, container_of, find_collection, get_collection
from pysingularity.hub.context import Hub
from pysingularity.hub.errors import Forbidden, NotFound
from pysingularity.hub.models import Blob, Collection, Container, Group, Image
from pysingularity.hub.storage.base import Digests


def split_name(name: str) -> tuple[str, str, str]:
    """Return (owner, collection, container or "") of a registry's name.

    Raises:
        NotFound: fewer than two parts.
    """
    parts = name.split("/")
    if len(parts) < 2 or not all(parts):
        raise NotFound("no-such-collection", f"{name[:200]}: images are named OWNER/NAME")
    return parts[0], parts[1], "/".join(parts[2:])


def seen_collection(session: Session, who: Principal, owner: str, name: str) -> Collection:
    """Return a collection that somebody may pull from.

    Raises:
        NotFound: none, or none for him.
    """
    collection = get_collection(session, owner, name)
    need_see(session, who, collection)
    return collection


def pushed_collection(
    hub: Hub, session: Session, who: Principal, owner: str, name: str, *, private: bool = False
) -> Collection:
    """Return a collection that somebody may push to; his own, or his group's, is made when it is missing.

    Raises:
        Unauthenticated, Forbidden, NotFound: he may not.
    """
    collection = find_collection(session, owner, name)
    if collection is not None:
        need_change(session, who, collection, "push")
        return collection
    user = need_user(who, "push")
    group = session.scalar(sa.select(Group).where(Group.name == owner.lower()))
    mine = owner.lower() == user.name or (
        group is not None and role_in(session, group.id, user.id) in ("owner", "maintainer")
    )
    if not mine and not who.admin:
        raise Forbidden("not-yours", f"{owner}/{name}: you push to collections below your own name or your group's")
    if who.collection_id is not None:
        raise Forbidden("missing-scope", "this token is for one collection only")
    maker = replace(who, scopes=who.scopes | {"admin"}) if mine else who
    most = hub.settings.limits.collections_per_user
    collection = add_collection(session, maker, f"{owner}/{name}", private=private, most=most)
    record(session, who, "collection.add", collection.full_name, by="push")
    return collection


def facts_of(hub: Hub, sha256: str) -> Facts:
    """Look into a stored blob.

    Raises:
        NotBelieved: it is no SIF that the hub would serve.
        NotFound: it is not stored.
    """
    with hub.read() as session:
        blob = session.get(Blob, sha256)
    if blob is None:
        raise NotFound("no-such-blob", f"sha256:{sha256}: has not been uploaded")
    handle = hub.storage.open(sha256)
    try:
        return examine(Path(f"/proc/self/fd/{handle}"), digests=Digests(blob.size, blob.sha256, blob.md5))
    finally:
        os.close(handle)


def publish(
    session: Session, container: Container, facts: Facts, *, tags: list[str], by: str, image: Image | None = None
) -> Image:
    """Return the image of a believed file in a container, which may have it already."""
    known = session.scalar(
        sa.select(Image)
        .where(Image.container_id == container.id, Image.blob == facts.digests.sha256, Image.hidden.is_(False))
        .order_by(Image.id.desc())
        .limit(1)
    )
    if image is None or image.blob is not None:
        image = known
    if image is None or image.blob is None:
        collection = session.get_one(Collection, container.collection_id)
        image = add_image(session, collection, facts, container=container.name, tags=tags, by=by, image=image)
    link_blob(session, container, facts.digests.sha256)
    return image


def need_delete(session: Session, who: Principal, image: Image) -> None:
    """Refuse who may not delete an image: those who may change the collection can, and others what they pushed.

    Raises:
        Unauthenticated, Forbidden, NotFound: as everywhere.
    """
    collection = image.container.collection
    if image.created_by == who.name and may_change(session, who, collection, "push"):
        return
    need_change(session, who, collection, "admin")


def main_container(session: Session, collection: Collection, name: str, *, make: bool) -> Container:
    """Return a container; "" is the collection's own."""
    return container_of(session, collection, name, make=make)
