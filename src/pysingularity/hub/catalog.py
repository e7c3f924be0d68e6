# SPDX-License-Identifier: Apache-2.0
"""Collections, containers, tags and images: naming, finding, replacing, freezing.

The old hub's rules: a new image of a tag takes the tag over; a frozen image is never removed nor changed, a new one
stands beside it and is told apart by commit and version. A digest in a reference may be the version (MD5), the commit
(SHA-1), the image's key, or the SHA-256.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.orm import Session

from pysingularity.hub.accounts.people import find_group, find_user, role_in
from pysingularity.hub.accounts.rights import Principal, need_user, visible
from pysingularity.hub.errors import Conflict, Forbidden, Invalid, NotFound
from pysingularity.hub.models import Collection, Container, Group, Image, Rename, Tag, User, now

#: Second part of a shub name, and tags.
PART = re.compile(r"[-_.a-zA-Z0-9]{1,64}\Z")
CONTAINER = re.compile(r"[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*)*\Z")
LATEST = "latest"


@dataclass(frozen=True)
class Name:
    """A collection's name, and perhaps a tag and a digest."""

    owner: str
    name: str
    tag: str = ""
    digest: str = ""


def parse_name(text: str) -> tuple[str, str]:
    """Return (owner, name) of `OWNER/NAME` as written.

    Raises:
        Invalid: clients could not write it in a reference.
    """
    owner, slash, name = text.strip().partition("/")
    dots = (".", "..")
    if not slash or not PART.match(name) or not PART.match(owner) or name in dots or owner in dots:
        raise Invalid("wrong-name", f"{text[:200]!r}: a collection is named OWNER/NAME, of letters, digits and -_.")
    return owner, name


def parse_target(text: str) -> Name:
    """Return what `OWNER/NAME[:TAG][@DIGEST]` names."""
    rest, _, digest = text.partition("@")
    rest, _, tag = rest.partition(":")
    owner, name = parse_name(rest)
    if tag:
        check_tag(tag)
    return Name(owner.lower(), name.lower(), tag, digest)


def check_tag(tag: str) -> str:
    """Return a tag, after checking that every client can write it."""
    if not PART.match(tag) or tag[0] in ".-":
        raise Invalid("wrong-tag", f"{tag[:80]!r}: a tag has 1 to 64 letters, digits and -_., and no dot in front")
    return tag


def add_collection(
    session: Session,
    who: Principal,
    title: str,
    *,
    git_url: str = "",
    branches: list[str] | None = None,
    private: bool = False,
    description: str = "",
    most: int = 0,
) -> Collection:
    """Make a collection below the person's own name or a group's.

    Arguments:
        most: how many collections a user may own; 0 is without limit.

    Raises:
        Conflict: the name is taken.
        Forbidden: the first part is somebody else's name.
        NotFound: the first part is nobody's name.
    """
    user = need_user(who, "admin")
    if who.collection_id is not None:
        raise Forbidden("missing-scope", "this token is for one collection only")
    owner, name = parse_name(title)
    user_id, group_id = _owner(session, user, owner.lower(), admin=who.admin)
    if most and user_id is not None and not who.admin:
        count = session.scalar(sa.select(sa.func.count()).where(Collection.user_id == user_id)) or 0
        if count >= most:
            raise Forbidden("too-many-collections", f"{owner}: no more than {most} collections per user")
    if find_collection(session, owner, name) is not None:
        raise Conflict("name-taken", f"{title}: there is a collection of this name")
    collection = Collection(
        owner=owner.lower(),
        name=name.lower(),
        title=f"{owner}/{name}",
        user_id=user_id,
        group_id=group_id,
        git_url=git_url,
        approved_url=git_url if who.admin else "",
        branches=list(branches or []),
        private=private,
        description=description,
        hook=secrets.token_urlsafe(18),
        hook_secret=secrets.token_urlsafe(32),
    )
    session.add(collection)
    session.flush()
    return collection


def _owner(session: Session, user: User, owner: str, *, admin: bool) -> tuple[int | None, int | None]:
    if owner == user.name:
        return user.id, None
    group = session.scalar(sa.select(Group).where(Group.name == owner))
    if group is not None:
        if admin or role_in(session, group.id, user.id) in ("owner", "maintainer"):
            return None, group.id
        raise Forbidden("not-yours", f"{owner}: only maintainers of the group add collections to it")
    if admin:
        return find_user(session, owner).id, None
    if session.scalar(sa.select(User.id).where(User.name == owner)):
        raise Forbidden("not-yours", f"{owner}: this name belongs to somebody else")
    raise NotFound("no-such-user", f"{owner}: there is no such user or group")


def find_collection(session: Session, owner: str, name: str) -> Collection | None:
    """Return a collection by its name or an earlier name; None when there is none."""
    key = (owner.lower(), name.lower())
    if not PART.match(owner) or not PART.match(name):
        return None
    found = session.scalar(sa.select(Collection).where(Collection.owner == key[0], Collection.name == key[1]))
    if found is None:
        found = session.scalar(
            sa.select(Collection)
            .join(Rename, Rename.collection_id == Collection.id)
            .where(Rename.owner == key[0], Rename.name == key[1])
        )
    return found


def get_collection(session: Session, owner: str, name: str) -> Collection:
    """Return a collection by its name.

    Raises:
        NotFound: there is none. (The caller asks `rights` whether the person may see it.)
    """
    found = find_collection(session, owner, name)
    if found is None:
        raise NotFound("no-such-collection", f"{owner.lower()}/{name.lower()}: there is no such collection")
    return found


def rename_collection(session: Session, collection: Collection, title: str) -> None:
    """Give a collection another name below the same owner; the earlier one goes on leading to it."""
    owner, name = parse_name(title)
    if owner.lower() != collection.owner:
        raise Invalid("wrong-name", f"{title}: the owner is changed by a transfer, not by a new name")
    other = find_collection(session, owner, name)
    if other is not None and other.id != collection.id:
        raise Conflict("name-taken", f"{title}: there is a collection of this name")
    session.execute(sa.delete(Rename).where(Rename.owner == owner.lower(), Rename.name == name.lower()))
    if name.lower() != collection.name:
        session.add(Rename(owner=collection.owner, name=collection.name, collection_id=collection.id))
        main = session.scalar(
            sa.select(Container).where(Container.collection_id == collection.id, Container.name == collection.name)
        )
        if main is not None:
            main.name = name.lower()
    collection.name, collection.title = name.lower(), f"{owner}/{name}"


def transfer_collection(session: Session, collection: Collection, owner: str) -> None:
    """Give a collection to another user or group; the earlier name goes on leading to it."""
    lower = owner.lower()
    user = session.scalar(sa.select(User).where(User.name == lower))
    group = None if user is not None else find_group(session, lower)
    other = find_collection(session, lower, collection.name)
    if other is not None and other.id != collection.id:
        raise Conflict("name-taken", f"{lower}/{collection.name}: there is a collection of this name")
    if lower != collection.owner:
        session.execute(sa.delete(Rename).where(Rename.owner == lower, Rename.name == collection.name))
        session.add(Rename(owner=collection.owner, name=collection.name, collection_id=collection.id))
    collection.owner, collection.title = lower, f"{owner}/{collection.title.partition('/')[2]}"
    collection.user_id = user.id if user is not None else None
    collection.group_id = group.id if group is not None else None


def container_of(session: Session, collection: Collection, name: str = "", *, make: bool = False) -> Container:
    """Return a container of a collection, by default the one named like it; `make` makes it when it is missing.

    Raises:
        NotFound: there is none and `make` is not set.
        Invalid: a name that no client could write.
    """
    wanted = name.lower() or collection.name
    found = session.scalar(
        sa.select(Container).where(Container.collection_id == collection.id, Container.name == wanted)
    )
    if found is None:
        if not make:
            raise NotFound("no-such-container", f"{collection.full_name}: there is no container {wanted}")
        if wanted != collection.name and not CONTAINER.match(wanted):
            raise Invalid("wrong-name", f"{wanted[:200]!r}: a container is named in lower-case letters and digits")
        found = Container(collection_id=collection.id, name=wanted)
        session.add(found)
        session.flush()
    return found


def find_image(
    session: Session, collection: Collection, *, container: str = "", tag: str = "", digest: str = "", arch: str = ""
) -> Image:
    """Return the image that a reference means.

    A digest is looked for as version, commit, key and SHA-256, among the images made for the tag first. Without a
    digest the tag (default `latest`) says it; a collection that never had a `latest` gives its newest image.

    Raises:
        NotFound: there is none.
    """
    box = container_of(session, collection, container)
    name = f"{collection.full_name}{':' + tag if tag else ''}{'@' + digest if digest else ''}"
    known = sa.select(Image).where(Image.container_id == box.id, Image.blob.is_not(None))
    if arch:
        known = known.where(sa.or_(Image.arch == arch, Image.arch == ""))
    if digest:
        value = digest.lower().removeprefix("sha256:").removeprefix("sha256.")
        matches = sa.or_(Image.version == value, Image.commit == value, Image.key == value, Image.sha256 == value)
        # what was built for a pull request comes last: it must not stand before what was published
        query = known.where(matches).order_by(Image.hidden, Image.id.desc())
        found = session.scalar(query.where(Image.tag == tag).limit(1)) if tag else None
        found = found or session.scalar(query.limit(1))
    else:
        query = (
            sa.select(Image)
            .join(Tag, Tag.image_id == Image.id)
            .where(Tag.container_id == box.id, Tag.name == (tag or LATEST), Image.blob.is_not(None))
            .order_by(Tag.changed_at.desc())
        )
        found = session.scalar((query.where(Tag.arch.in_([arch, ""])) if arch else query).limit(1))
        if found is None and not tag:
            found = session.scalar(known.where(Image.hidden.is_(False)).order_by(Image.id.desc()).limit(1))
    if found is None:
        raise NotFound("no-such-image", f"{name}: there is no such image")
    return found


def get_image(session: Session, number: int) -> Image:
    """Return an image by its number.

    Raises:
        NotFound: there is none.
    """
    image = session.get(Image, number)
    if image is None:
        raise NotFound("no-such-image", f"image {number}: there is no such image")
    return image


def set_tag(session: Session, image: Image, tag: str, *, manifest: str = "") -> None:
    """Let a tag name an image from now on.

    Raises:
        Invalid: a tag that clients could not write.
    """
    check_tag(tag)
    row = session.scalar(
        sa.select(Tag).where(Tag.container_id == image.container_id, Tag.name == tag, Tag.arch == image.arch)
    )
    if row is None:
        row = Tag(container_id=image.container_id, name=tag, arch=image.arch)
        session.add(row)
    row.image_id, row.manifest, row.changed_at = image.id, manifest or row.manifest, now()


def unique_key(session: Session, container: Container, commit: str, version: str) -> str:
    """Return the `commit` that shub clients are told for a new image: unique, since their cache knows nothing else.

    The plain commit while no other image of the whole hub has it, then commit and version, then those with a number;
    the same file in another collection may share it.
    """
    base = commit or version
    candidates = [base, f"{base}-{version}"] if commit else [base]
    number = 2
    while True:
        key = candidates.pop(0) if candidates else f"{base}-{version}-{number}"
        others = sa.or_(Image.version != version, Image.container_id == container.id)
        taken = session.scalar(sa.select(Image.id).where(Image.key == key, others).limit(1))
        if not taken:
            return key
        number += not candidates


def freeze(image: Image, *, frozen: bool = True) -> None:
    """Protect an image for good: it cannot be deleted, replaced or collected while it is frozen."""
    image.frozen = frozen


def delete_image(session: Session, image: Image) -> None:
    """Remove an image and the tags that name it; its blob goes with the next garbage collection.

    Raises:
        Conflict: it is frozen.
    """
    if image.frozen:
        raise Conflict("frozen", f"image {image.id} is frozen and stays", hint="take the padlock off first")
    session.delete(image)
    session.flush()


def tags_of(session: Session, image: Image) -> list[str]:
    """Return the tags that name an image now."""
    return list(session.scalars(sa.select(Tag.name).where(Tag.image_id == image.id).order_by(Tag.name)))


def tags_by_image(session: Session, images: Iterable[Image]) -> dict[int, list[str]]:
    """Return the tags that name each of many images now, by their numbers."""
    found: dict[int, list[str]] = {}
    numbers = [image.id for image in images]
    rows = session.execute(sa.select(Tag.image_id, Tag.name).where(Tag.image_id.in_(numbers)).order_by(Tag.name))
    for number, name in rows:
        found.setdefault(number or 0, []).append(name)
    return found


def search(session: Session, who: Principal, text: str, *, limit: int = 50, offset: int = 0) -> list[Collection]:
    """Return the collections that a person may see in which all words are found.

    Each of them in the name, the description or the topics, or in a label, an app or a tag of an image.
    """
    query = sa.select(Collection).where(visible(who))
    for word in text.lower().split()[:10]:
        like = f"%{word.replace(chr(92), chr(92) * 2).replace('%', chr(92) + '%').replace('_', chr(92) + '_')}%"
        columns = (
            Collection.owner + "/" + Collection.name,
            Collection.description,
            sa.cast(Collection.topics, sa.Text),
        )
        inside = (
            sa.select(Container.collection_id)
            .join(Image, Image.container_id == Container.id)
            .where(Image.hidden.is_(False), Image.blob.is_not(None))
            .where(
                sa.or_(
                    sa.func.lower(Image.tag).like(like, escape="\\"),
                    sa.func.lower(sa.cast(Image.labels, sa.Text)).like(like, escape="\\"),
                    sa.func.lower(sa.cast(Image.details["apps"], sa.Text)).like(like, escape="\\"),
                )
            )
        )
        query = query.where(
            sa.or_(*(sa.func.lower(column).like(like, escape="\\") for column in columns), Collection.id.in_(inside))
        )
    return list(session.scalars(query.order_by(Collection.changed_at.desc()).limit(limit).offset(offset)))
