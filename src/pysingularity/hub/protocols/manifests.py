# SPDX-License-Identifier: Apache-2.0
"""OCI manifests: reading what a client pushed, and keeping it. Without HTTP; that is `oci`."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from pysingularity.hub.accounts.audit import record
from pysingularity.hub.accounts.rights import Principal
from pysingularity.hub.builds.publish import CONFIG_DIGEST, LAYER_TYPE, MANIFEST_TYPE
from pysingularity.hub.catalog import check_tag, set_tag
from pysingularity.hub.context import Hub
from pysingularity.hub.errors import Invalid, NotFound
from pysingularity.hub.models import BlobLink, Container, Image, Manifest, Tag, now
from pysingularity.hub.protocols.shelves import facts_of, publish

INDEX_TYPE = "application/vnd.oci.image.index.v1+json"
TYPES = (
    MANIFEST_TYPE,
    INDEX_TYPE,
    "application/vnd.docker.distribution.manifest.v2+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)
#: As early clients misspelt it.
LAYER_TYPES = (LAYER_TYPE, "appliciation/vnd.sylabs.sif.layer.tar")
LONGEST = 4 << 20


@dataclass(frozen=True)
class Parsed:
    """What a manifest says.

    Arguments:
        blobs, manifests: digests `sha256:…` that it is made of.
        sif: SHA-256 of the SIF file, when it is an image of ours.
    """

    media_type: str
    blobs: list[str] = field(default_factory=list)
    manifests: list[str] = field(default_factory=list)
    sif: str = ""
    subject: str = ""
    artifact_type: str = ""
    annotations: dict[str, str] = field(default_factory=dict)


def parse_manifest(content: bytes, kind: str) -> Parsed:
    """Read a manifest or an index.

    Arguments:
        kind: media type of the request; the manifest's own one must agree when it has one.

    Raises:
        Invalid: it is none, or of a kind that the registry does not keep.
    """
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        raise _wrong("is no JSON")
    if not isinstance(value, dict) or value.get("schemaVersion") != 2:
        raise _wrong("is no object of schemaVersion 2")
    media_type = value.get("mediaType") or kind or MANIFEST_TYPE
    if media_type not in TYPES or (kind and kind != media_type):
        raise _wrong(f"has the media type {str(media_type)[:100]!r} and came as {kind[:100]!r}")
    annotations = value.get("annotations") or {}
    if not isinstance(annotations, dict) or not all(isinstance(one, str) for one in annotations.values()):
        raise _wrong("has annotations that are no texts")
    subject = _reference(value["subject"])[0] if value.get("subject") else ""
    artifact = value.get("artifactType") or ""
    if "manifests" in value:
        manifests = [_reference(one)[0] for one in _items(value, "manifests")]
        return Parsed(media_type, [], manifests, "", subject, str(artifact), annotations)
    config, config_type = _reference(value.get("config"))
    layers = [_reference(one) for one in _items(value, "layers")]
    sif = ""
    if len(layers) == 1 and layers[0][1] in LAYER_TYPES:
        sif = layers[0][0].removeprefix("sha256:")
    # Layers with addresses of their own are by definition kept elsewhere.
    own = [one[0] for one, raw in zip(layers, value["layers"], strict=True) if not raw.get("urls")]
    return Parsed(media_type, [config, *own], [], sif, subject, str(artifact or config_type), annotations)


def _wrong(what: str) -> Invalid:
    return Invalid("wrong-manifest", f"the manifest {what}")


def _items(value: dict[str, Any], key: str) -> list[Any]:
    items = value.get(key)
    if not isinstance(items, list) or len(items) > 1000:
        raise _wrong(f"has no list of {key}")
    return items


def _reference(value: Any) -> tuple[str, str]:
    """Return (digest, media type) of a descriptor."""
    if not isinstance(value, dict):
        raise _wrong("has a descriptor that is no object")
    digest, kind = value.get("digest"), value.get("mediaType")
    if not isinstance(digest, str) or not isinstance(kind, str) or not isinstance(value.get("size"), int):
        raise _wrong("has a descriptor without digest, mediaType or size")
    algorithm, _, text = digest.partition(":")
    if algorithm != "sha256" or len(text) != 64 or text.strip("0123456789abcdef"):
        raise _wrong(f"names {digest[:80]!r}, which is no sha256 digest")
    return digest, kind


def find_manifest(session: Session, container: Container, reference: str) -> Manifest:
    """Return the manifest that a tag or digest names; of several architectures, the one that was tagged last.

    Raises:
        NotFound: there is none.
    """
    query = sa.select(Manifest).where(Manifest.container_id == container.id)
    if ":" in reference:
        found = session.scalar(query.where(Manifest.digest == reference))
    else:
        found = session.scalar(
            query.join(Tag, sa.and_(Tag.container_id == Manifest.container_id, Tag.manifest == Manifest.digest))
            .where(Tag.name == reference)
            .order_by(Tag.changed_at.desc())
            .limit(1)
        )
    if found is None:
        raise NotFound("no-such-manifest", f"{reference[:100]}: there is no such manifest")
    return found


def put_manifest(hub: Hub, who: Principal, container_id: int, reference: str, content: bytes, kind: str) -> Manifest:
    """Keep a manifest under its digest, and under a tag when the reference is one.

    Raises:
        Invalid: wrong in itself, another digest than the reference's, or of files that are not here.
        NotBelieved: its SIF is no image.
    """
    parsed = parse_manifest(content, kind)
    digest = "sha256:" + hashlib.sha256(content).hexdigest()
    tag = "" if ":" in reference else check_tag(reference)
    if not tag and reference != digest:
        raise Invalid("wrong-digest", f"the manifest is {digest}, not {reference[:80]}")
    with hub.read() as session:
        _need_parts(session, container_id, parsed)
    facts = facts_of(hub, parsed.sif) if parsed.sif else None
    with hub.write() as session:
        container = session.get_one(Container, container_id)
        _need_parts(session, container_id, parsed)
        image = publish(session, container, facts, tags=[], by=who.name) if facts is not None else None
        row = session.scalar(
            sa.select(Manifest).where(Manifest.container_id == container_id, Manifest.digest == digest)
        )
        if row is None:
            row = Manifest(
                container_id=container_id,
                digest=digest,
                media_type=parsed.media_type,
                artifact_type=parsed.artifact_type,
                subject=parsed.subject,
                annotations=parsed.annotations,
                content=content,
                image_id=image.id if image is not None else None,
                references=[*parsed.blobs, *parsed.manifests],
            )
            session.add(row)
            session.flush()
        if tag:
            _tag(session, container, tag, image, digest)
        container.collection.changed_at = now()
        record(session, who, "manifest.push", f"{container.collection.full_name}:{tag or digest}")
        return row


def _need_parts(session: Session, container_id: int, parsed: Parsed) -> None:
    """Refuse a manifest whose parts are not in the container."""
    for digest in parsed.blobs:
        sha256 = digest.removeprefix("sha256:")
        if sha256 == CONFIG_DIGEST or session.get(BlobLink, (container_id, sha256)) is not None:
            continue
        known = sa.select(Image.id).where(Image.container_id == container_id, Image.blob == sha256).limit(1)
        if session.scalar(known) is None:
            raise Invalid("missing-blob", f"{digest}: has not been uploaded here")
    for digest in parsed.manifests:
        query = sa.select(Manifest.id).where(Manifest.container_id == container_id, Manifest.digest == digest)
        if session.scalar(query) is None:
            raise Invalid("missing-blob", f"{digest}: this manifest has not been uploaded here")


def _tag(session: Session, container: Container, tag: str, image: Image | None, digest: str) -> None:
    """Let a tag name a manifest; an image of ours takes the place of something else of this name, and the reverse."""
    others = sa.select(Tag).where(Tag.container_id == container.id, Tag.name == tag)
    if image is not None:
        for row in session.scalars(others.where(Tag.image_id.is_(None))):
            session.delete(row)
        session.flush()
        set_tag(session, image, tag, manifest=digest)
        image.tag = image.tag or tag
        return
    for row in session.scalars(others.where(Tag.arch != "")):
        session.delete(row)
    session.flush()
    plain = session.scalar(others) or Tag(container_id=container.id, name=tag, arch="")
    session.add(plain)
    plain.image_id, plain.manifest, plain.changed_at = None, digest, now()
