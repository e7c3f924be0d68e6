# SPDX-License-Identifier: Apache-2.0
"""The tables: what the hub remembers. Rules about them live with their subjects (`catalog`, `builds`, `accounts`).

Times are seconds since 1970 in UTC (floats), so that both databases compare them alike; sizes are bytes. Names that
people choose are stored as written and compared in lower case where two spellings must not be two things.
"""

from __future__ import annotations

import time
from typing import Any, ClassVar

import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

#: Names for constraints, so that migrations can speak of them on both databases.
NAMING = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s",
    "pk": "pk_%(table_name)s",
}


def now() -> float:
    """Return the present time as it is stored."""
    return time.time()


class Base(DeclarativeBase):
    """All tables."""

    metadata = sa.MetaData(naming_convention=NAMING)
    type_annotation_map: ClassVar[dict[Any, Any]] = {
        dict[str, Any]: sa.JSON,
        list[Any]: sa.JSON,
        int: sa.BigInteger().with_variant(sa.Integer(), "sqlite"),
        str: sa.Text,
    }


def _parent(column: str, on_delete: str = "CASCADE", **options: Any) -> Any:
    return mapped_column(sa.ForeignKey(column, ondelete=on_delete), **options)


# --- people ----------------------------------------------------------------------------------------------------------


class User(Base):
    """A person or a robot."""

    __tablename__ = "users"
    id: Mapped[int] = mapped_column(primary_key=True)
    #: As in `shub://NAME/…`: letters, digits and hyphens.
    name: Mapped[str] = mapped_column(unique=True)
    display_name: Mapped[str] = mapped_column(default="")
    email: Mapped[str] = mapped_column(default="")
    #: "person" or "robot"; a robot has no password and belongs to somebody.
    kind: Mapped[str] = mapped_column(default="person")
    owner_id: Mapped[int | None] = _parent("users.id")
    password: Mapped[str | None]
    admin: Mapped[bool] = mapped_column(default=False)
    active: Mapped[bool] = mapped_column(default=True)
    quota: Mapped[int | None]
    created_at: Mapped[float] = mapped_column(default=now)
    seen_at: Mapped[float | None]


class Identity(Base):
    """A way of a user to sign in through somebody else (`github`, an OpenID provider)."""

    __tablename__ = "identities"
    __table_args__ = (sa.UniqueConstraint("provider", "subject"),)
    id: Mapped[int] = mapped_column(primary_key=True)
    user_id: Mapped[int] = _parent("users.id", index=True)
    provider: Mapped[str]
    subject: Mapped[str]
    created_at: Mapped[float] = mapped_column(default=now)


class Group(Base):
    """People who own collections together. Shares its names with users."""

    __tablename__ = "groups"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    description: Mapped[str] = mapped_column(default="")
    quota: Mapped[int | None]
    created_at: Mapped[float] = mapped_column(default=now)


class Membership(Base):
    """Who is in a group: `member` (reads and builds), `maintainer` (changes collections), `owner` (changes members)."""

    __tablename__ = "memberships"
    group_id: Mapped[int] = _parent("groups.id", primary_key=True)
    user_id: Mapped[int] = _parent("users.id", primary_key=True, index=True)
    role: Mapped[str] = mapped_column(default="member")


class Token(Base):
    """A secret for programs. Only its SHA-256 is stored."""

    __tablename__ = "tokens"
    id: Mapped[int] = mapped_column(primary_key=True)
    user_id: Mapped[int] = _parent("users.id", index=True)
    digest: Mapped[str] = mapped_column(unique=True)
    name: Mapped[str] = mapped_column(default="")
    #: Some of read, push, build, admin; separated by blanks.
    scopes: Mapped[str] = mapped_column(default="read")
    collection_id: Mapped[int | None] = _parent("collections.id")
    created_at: Mapped[float] = mapped_column(default=now)
    expires_at: Mapped[float | None]
    used_at: Mapped[float | None]
    revoked_at: Mapped[float | None]


class SignIn(Base):
    """A browser that is signed in. Only the SHA-256 of its cookie is stored."""

    __tablename__ = "sign_ins"
    digest: Mapped[str] = mapped_column(primary_key=True)
    user_id: Mapped[int] = _parent("users.id", index=True)
    csrf: Mapped[str]
    agent: Mapped[str] = mapped_column(default="")
    address: Mapped[str] = mapped_column(default="")
    created_at: Mapped[float] = mapped_column(default=now)
    expires_at: Mapped[float]


class Audit(Base):
    """Who changed what, for the administrator."""

    __tablename__ = "audit"
    id: Mapped[int] = mapped_column(primary_key=True)
    at: Mapped[float] = mapped_column(default=now, index=True)
    actor: Mapped[str]
    action: Mapped[str]
    target: Mapped[str] = mapped_column(default="")
    details: Mapped[dict[str, Any]] = mapped_column(default=dict)
    address: Mapped[str] = mapped_column(default="")


# --- collections -----------------------------------------------------------------------------------------------------


class Collection(Base):
    """One git repository of recipes, or a place to push images to: `OWNER/NAME`."""

    __tablename__ = "collections"
    __table_args__ = (sa.UniqueConstraint("owner", "name"),)
    id: Mapped[int] = mapped_column(primary_key=True)
    #: Both parts in lower case for comparison; `title` keeps how they were written.
    owner: Mapped[str]
    name: Mapped[str]
    title: Mapped[str]
    user_id: Mapped[int | None] = _parent("users.id", "SET NULL", index=True)
    group_id: Mapped[int | None] = _parent("groups.id", "SET NULL", index=True)
    description: Mapped[str] = mapped_column(default="")
    topics: Mapped[list[Any]] = mapped_column(default=list)
    private: Mapped[bool] = mapped_column(default=False)
    building: Mapped[bool] = mapped_column(default=True)

    git_url: Mapped[str] = mapped_column(default="")
    #: The address that an administrator wrote himself, "" when somebody else did: the settings do not bind it.
    approved_url: Mapped[str] = mapped_column(default="")
    #: Names and patterns (`release/*`) of the branches that build; empty means the repository's own default branch.
    branches: Mapped[list[Any]] = mapped_column(default=list)
    default_branch: Mapped[str] = mapped_column(default="")
    #: Some of push, tag, deployment, base (the scheduled look at base images); manual always works.
    triggers: Mapped[list[Any]] = mapped_column(default=lambda: ["push"])
    #: Seconds between two looks at the repository; 0 waits for webhooks.
    poll: Mapped[float] = mapped_column(default=0.0)
    polled_at: Mapped[float | None]
    #: When the base images of its recipes were last looked at.
    bases_at: Mapped[float | None]
    #: The repository's own number at its forge, which survives renames.
    forge: Mapped[str] = mapped_column(default="")
    forge_id: Mapped[str] = mapped_column(default="")
    hook: Mapped[str] = mapped_column(unique=True)
    #: Needed as it is to check signatures, so it cannot be hashed.
    hook_secret: Mapped[str]
    #: Token of the forge, for reporting commit states.
    status_token: Mapped[str] = mapped_column(default="")
    status_api: Mapped[str] = mapped_column(default="")

    quota: Mapped[int | None]
    #: Overrules the hub's [keep] settings: {"last": 5, "pulled_days": 90}.
    keep: Mapped[dict[str, Any]] = mapped_column(default=dict)
    #: Overrules the hub's [builds] limits, as far as the administrator allows.
    limits: Mapped[dict[str, Any]] = mapped_column(default=dict)
    pulls: Mapped[int] = mapped_column(default=0)
    stars: Mapped[int] = mapped_column(default=0)
    created_at: Mapped[float] = mapped_column(default=now)
    changed_at: Mapped[float] = mapped_column(default=now, index=True)

    @property
    def full_name(self) -> str:
        """`owner/name` in lower case, as addresses have it."""
        return f"{self.owner}/{self.name}"


class Rename(Base):
    """An earlier name of a collection that still leads to it."""

    __tablename__ = "renames"
    __table_args__ = (sa.UniqueConstraint("owner", "name"),)
    id: Mapped[int] = mapped_column(primary_key=True)
    owner: Mapped[str]
    name: Mapped[str]
    collection_id: Mapped[int] = _parent("collections.id", index=True)


class Star(Base):
    """A user likes a collection."""

    __tablename__ = "stars"
    user_id: Mapped[int] = _parent("users.id", primary_key=True)
    collection_id: Mapped[int] = _parent("collections.id", primary_key=True, index=True)


class ShareLink(Base):
    """A short secret that lets clients without accounts pull from a private collection (`shub://hub/t/SECRET/u/r`)."""

    __tablename__ = "share_links"
    id: Mapped[int] = mapped_column(primary_key=True)
    collection_id: Mapped[int] = _parent("collections.id", index=True)
    digest: Mapped[str] = mapped_column(unique=True)
    name: Mapped[str] = mapped_column(default="")
    created_by: Mapped[str] = mapped_column(default="")
    created_at: Mapped[float] = mapped_column(default=now)
    expires_at: Mapped[float | None]


class Branch(Base):
    """How far a branch of a collection's repository was looked at."""

    __tablename__ = "branches"
    __table_args__ = (sa.UniqueConstraint("collection_id", "name"),)
    id: Mapped[int] = mapped_column(primary_key=True)
    collection_id: Mapped[int] = _parent("collections.id")
    name: Mapped[str]
    head: Mapped[str]
    seen_at: Mapped[float] = mapped_column(default=now)


class Recipe(Base):
    """A recipe as it stands at the head of a branch."""

    __tablename__ = "recipes"
    __table_args__ = (sa.UniqueConstraint("collection_id", "branch", "path"),)
    id: Mapped[int] = mapped_column(primary_key=True)
    collection_id: Mapped[int] = _parent("collections.id")
    branch: Mapped[str]
    path: Mapped[str]
    tag: Mapped[str]
    #: The commit that last changed it, and when that was.
    commit: Mapped[str]
    changed_at: Mapped[float]
    #: Another recipe of the same tag is newer; this one is not built.
    shadowed: Mapped[bool] = mapped_column(default=False)
    #: Patterns of repository files that the recipe copies in.
    copies: Mapped[list[Any]] = mapped_column(default=list)
    base: Mapped[str] = mapped_column(default="")
    base_digest: Mapped[str] = mapped_column(default="")
    #: Why it cannot be built; "" when it can.
    problem: Mapped[str] = mapped_column(default="")


class Delivery(Base):
    """One exchange with a forge: what it sent, what we answered, what came of it."""

    __tablename__ = "deliveries"
    __table_args__ = (
        sa.UniqueConstraint("collection_id", "delivery"),
        sa.Index("ix_deliveries_state", "state", "id"),
    )
    id: Mapped[int] = mapped_column(primary_key=True)
    collection_id: Mapped[int] = _parent("collections.id")
    #: The sender's own id of the exchange, or the body's digest.
    delivery: Mapped[str]
    forge: Mapped[str]
    event: Mapped[str]
    received_at: Mapped[float] = mapped_column(default=now)
    headers: Mapped[dict[str, Any]] = mapped_column(default=dict)
    body: Mapped[str] = mapped_column(default="")
    status: Mapped[int]
    answer: Mapped[str] = mapped_column(default="")
    #: "waiting" until a robot has looked at the repository, then "done" or "failed"; "refused" and "ignored" at once.
    state: Mapped[str]
    #: What the robot has to do: {"kind": "push", "ref": …, "before": …, "after": …}.
    work: Mapped[dict[str, Any]] = mapped_column(default=dict)
    result: Mapped[str] = mapped_column(default="")
    finished_at: Mapped[float | None]


# --- images ----------------------------------------------------------------------------------------------------------


class Blob(Base):
    """A stored file, named by its content."""

    __tablename__ = "blobs"
    sha256: Mapped[str] = mapped_column(primary_key=True)
    md5: Mapped[str]
    size: Mapped[int]
    created_at: Mapped[float] = mapped_column(default=now)
    #: When scrubbing last found it whole, and what it found when it was not.
    checked_at: Mapped[float | None]
    damaged: Mapped[str] = mapped_column(default="")


class Container(Base):
    """A name for images inside a collection. Built images live in the one named like the collection."""

    __tablename__ = "containers"
    __table_args__ = (sa.UniqueConstraint("collection_id", "name"),)
    id: Mapped[int] = mapped_column(primary_key=True)
    collection_id: Mapped[int] = _parent("collections.id")
    name: Mapped[str]
    description: Mapped[str] = mapped_column(default="")
    created_at: Mapped[float] = mapped_column(default=now)
    collection: Mapped[Collection] = relationship(lazy="joined", innerjoin=True)


class Image(Base):
    """One image: a verified SIF file and what is known about it."""

    __tablename__ = "images"
    __table_args__ = (
        sa.Index("ix_images_container_id_tag", "container_id", "tag", "id"),
        sa.Index("ix_images_commit", "commit"),
        sa.Index("ix_images_version", "version"),
        sa.Index("ix_images_key", "key"),
    )
    id: Mapped[int] = mapped_column(primary_key=True)
    container_id: Mapped[int] = _parent("containers.id")
    blob: Mapped[str | None] = mapped_column(sa.ForeignKey("blobs.sha256", ondelete="RESTRICT"), index=True)
    #: What a library client announces before it uploads; equal to `blob` afterwards.
    sha256: Mapped[str] = mapped_column(index=True)
    #: MD5 of the file: the old hub's `version`.
    version: Mapped[str] = mapped_column(default="")
    size: Mapped[int] = mapped_column(default=0)
    arch: Mapped[str] = mapped_column(default="")
    #: The tag it was made for; which tags name it now is the table of tags.
    tag: Mapped[str] = mapped_column(default="")
    branch: Mapped[str] = mapped_column(default="")
    commit: Mapped[str] = mapped_column(default="")
    #: What shub clients get as `commit`: their cache knows images by nothing else, so no two images share one.
    key: Mapped[str] = mapped_column(default="")
    recipe: Mapped[str] = mapped_column(default="")
    definition: Mapped[str] = mapped_column(default="")
    labels: Mapped[dict[str, Any]] = mapped_column(default=dict)
    #: environment, runscript, test, help, startscript, apps, oci: what `inspect` shows.
    details: Mapped[dict[str, Any]] = mapped_column(default=dict)
    provenance: Mapped[dict[str, Any]] = mapped_column(default=dict)
    input_digest: Mapped[str] = mapped_column(default="", index=True)
    signed: Mapped[bool] = mapped_column(default=False)
    encrypted: Mapped[bool] = mapped_column(default=False)
    frozen: Mapped[bool] = mapped_column(default=False)
    #: Not pulled by name, not listed for strangers: built for a pull request or not yet uploaded.
    hidden: Mapped[bool] = mapped_column(default=False)
    description: Mapped[str] = mapped_column(default="")
    build_seconds: Mapped[float] = mapped_column(default=0.0)
    pulls: Mapped[int] = mapped_column(default=0)
    pulled_at: Mapped[float | None]
    created_by: Mapped[str] = mapped_column(default="")
    created_at: Mapped[float] = mapped_column(default=now, index=True)
    container: Mapped[Container] = relationship(lazy="joined", innerjoin=True)


class Tag(Base):
    """A name inside a container, for one architecture (`""` for what is no image of ours)."""

    __tablename__ = "tags"
    __table_args__ = (sa.UniqueConstraint("container_id", "name", "arch"),)
    id: Mapped[int] = mapped_column(primary_key=True)
    container_id: Mapped[int] = _parent("containers.id")
    name: Mapped[str]
    arch: Mapped[str] = mapped_column(default="")
    image_id: Mapped[int | None] = _parent("images.id", index=True)
    #: `sha256:…` of the OCI manifest that the tag names.
    manifest: Mapped[str] = mapped_column(default="")
    changed_at: Mapped[float] = mapped_column(default=now)


class Manifest(Base):
    """An OCI manifest or index, exactly as pushed or as made for one of our images."""

    __tablename__ = "manifests"
    __table_args__ = (
        sa.UniqueConstraint("container_id", "digest"),
        sa.Index("ix_manifests_container_id_subject", "container_id", "subject"),
    )
    id: Mapped[int] = mapped_column(primary_key=True)
    container_id: Mapped[int] = _parent("containers.id")
    digest: Mapped[str]
    media_type: Mapped[str]
    artifact_type: Mapped[str] = mapped_column(default="")
    subject: Mapped[str] = mapped_column(default="")
    annotations: Mapped[dict[str, Any]] = mapped_column(default=dict)
    content: Mapped[bytes]
    image_id: Mapped[int | None] = _parent("images.id", index=True)
    #: Digests of the blobs and manifests it names: garbage collection starts here.
    references: Mapped[list[Any]] = mapped_column("refs", default=list)
    created_at: Mapped[float] = mapped_column(default=now)


class BlobLink(Base):
    """A blob may be read through a container: a client pushed it there, or an image there is made of it."""

    __tablename__ = "blob_links"
    container_id: Mapped[int] = _parent("containers.id", primary_key=True)
    sha256: Mapped[str] = mapped_column(sa.ForeignKey("blobs.sha256", ondelete="CASCADE"), primary_key=True, index=True)
    created_at: Mapped[float] = mapped_column(default=now)


class Upload(Base):
    """A file on its way in. Its bytes so far lie in the folder of uploads under its id."""

    __tablename__ = "uploads"
    id: Mapped[str] = mapped_column(primary_key=True)
    user_id: Mapped[int | None] = _parent("users.id")
    container_id: Mapped[int | None] = _parent("containers.id")
    image_id: Mapped[int | None] = _parent("images.id")
    #: Announced size and digest; 0 and "" when the client did not say.
    size: Mapped[int] = mapped_column(default=0)
    sha256: Mapped[str] = mapped_column(default="")
    part_size: Mapped[int] = mapped_column(default=0)
    #: Part number → {"size", "sha256"} of multipart uploads.
    parts: Mapped[dict[str, Any]] = mapped_column(default=dict)
    created_at: Mapped[float] = mapped_column(default=now)
    changed_at: Mapped[float] = mapped_column(default=now)


class Pull(Base):
    """How often an image was pulled on a day (days since 1970)."""

    __tablename__ = "pulls"
    image_id: Mapped[int] = _parent("images.id", primary_key=True)
    day: Mapped[int] = mapped_column(primary_key=True)
    count: Mapped[int] = mapped_column(default=0)


class FileTree(Base):
    """The listing of an image's files, compressed JSON, made once when somebody first looks."""

    __tablename__ = "file_trees"
    sha256: Mapped[str] = mapped_column(sa.ForeignKey("blobs.sha256", ondelete="CASCADE"), primary_key=True)
    content: Mapped[bytes]
    created_at: Mapped[float] = mapped_column(default=now)


# --- builds ----------------------------------------------------------------------------------------------------------


class Build(Base):
    """One attempt to make an image. The row is the queue, the page and the history."""

    __tablename__ = "builds"
    __table_args__ = (
        # What the claim walks along, and how it sees whether a collection is busy.
        sa.Index("ix_builds_queue", "state", sa.text("priority DESC"), "turn", "id"),
        sa.Index("ix_builds_collection_id_state", "collection_id", "state"),
        sa.Index("ix_builds_collection_id_id", "collection_id", "id"),
        sa.Index("ix_builds_collection_id_tag", "collection_id", "tag", "id"),
        sa.Index("ix_builds_queue_owner_state", "queue_owner", "state"),
    )
    id: Mapped[int] = mapped_column(primary_key=True)
    collection_id: Mapped[int] = _parent("collections.id")
    state: Mapped[str] = mapped_column(default="queued")
    #: One sentence for people, and the stable id of the case for programs; both "" while all is well.
    reason: Mapped[str] = mapped_column(default="")
    error_id: Mapped[str] = mapped_column(default="")

    trigger: Mapped[str] = mapped_column(default="push")
    requested_by: Mapped[str] = mapped_column(default="")
    branch: Mapped[str] = mapped_column(default="")
    commit: Mapped[str]
    recipe: Mapped[str]
    tag: Mapped[str]
    arch: Mapped[str] = mapped_column(default="")
    #: False for pull requests: the image is kept aside and no tag moves.
    publish: Mapped[bool] = mapped_column(default=True)
    delivery_id: Mapped[int | None] = _parent("deliveries.id", "SET NULL")
    retry_of: Mapped[int | None] = _parent("builds.id", "SET NULL")
    input_digest: Mapped[str] = mapped_column(default="")
    image_id: Mapped[int | None] = _parent("images.id", "SET NULL", index=True)

    #: Whose share of the workers it counts against, and its place in the round (see builds.queue).
    queue_owner: Mapped[str] = mapped_column(default="")
    priority: Mapped[int] = mapped_column(default=0)
    turn: Mapped[float] = mapped_column(default=0.0)
    attempt: Mapped[int] = mapped_column(default=0)
    worker: Mapped[str] = mapped_column(default="")
    leased_until: Mapped[float | None]
    cancel: Mapped[bool] = mapped_column(default=False)
    engine: Mapped[str] = mapped_column(default="")
    #: The scheduler's own number for it.
    job: Mapped[str] = mapped_column(default="")
    node: Mapped[str] = mapped_column(default="")

    #: [{"name", "offset", "seconds", "status"}]: where each step starts in the log.
    steps: Mapped[list[Any]] = mapped_column(default=list)
    log_size: Mapped[int] = mapped_column(default=0)
    builder: Mapped[str] = mapped_column(default="")
    #: What the forge was last told of it; "" for nothing yet.
    reported: Mapped[str] = mapped_column(default="")
    created_at: Mapped[float] = mapped_column(default=now)
    claimed_at: Mapped[float | None]
    finished_at: Mapped[float | None]
    collection: Mapped[Collection] = relationship(lazy="joined", innerjoin=True)
