# SPDX-License-Identifier: Apache-2.0
"""From a verified file to an image that everybody can pull: rows, tags and the OCI manifest, in one transaction.

The manifest is the one that `oras://` clients make for a SIF, so that every door shows the same image by the same
digest.
"""

from __future__ import annotations

import hashlib
import json
import time

import sqlalchemy as sa
from sqlalchemy.orm import Session

from pysingularity.hub.builds.accept import Facts
from pysingularity.hub.catalog import container_of, set_tag, unique_key
from pysingularity.hub.models import Blob, BlobLink, Collection, Container, Image, Manifest, now

CONFIG_TYPE = "application/vnd.sylabs.sif.config.v1+json"
LAYER_TYPE = "application/vnd.sylabs.sif.layer.v1.sif"
MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
CONFIG = b"{}"
CONFIG_DIGEST = hashlib.sha256(CONFIG).hexdigest()


def know_blob(session: Session, sha256: str, md5: str, size: int) -> None:
    """Note that the storage has a blob."""
    if session.get(Blob, sha256) is None:
        session.add(Blob(sha256=sha256, md5=md5, size=size))
        session.flush()


def link_blob(session: Session, container: Container, sha256: str) -> None:
    """Let a blob be read through a container."""
    if session.get(BlobLink, (container.id, sha256)) is None:
        session.add(BlobLink(container_id=container.id, sha256=sha256))
        session.flush()


def add_image(
    session: Session,
    collection: Collection,
    facts: Facts,
    *,
    container: str = "",
    tags: list[str],
    by: str,
    commit: str = "",
    branch: str = "",
    recipe: str = "",
    hidden: bool = False,
    input_digest: str = "",
    seconds: float = 0.0,
    image: Image | None = None,
) -> Image:
    """Add an image whose blob is stored, or complete one that was announced; tags name it from now on.

    Arguments:
        image: the row that a library client made before it uploaded.
    """
    box = container_of(session, collection, container, make=True)
    digests = facts.digests
    know_blob(session, digests.sha256, digests.md5, digests.size)
    if image is None:
        image = Image(container_id=box.id)
        session.add(image)
    image.blob = image.sha256 = digests.sha256
    image.version, image.size = digests.md5, digests.size
    image.arch = facts.arch
    image.tag = tags[0] if tags else ""
    image.branch, image.commit, image.recipe = branch, commit, recipe
    image.key = unique_key(session, box, commit, digests.md5)
    image.definition, image.labels, image.details = facts.definition, facts.labels, facts.details
    image.signed, image.encrypted, image.hidden = facts.signed, facts.encrypted, hidden
    image.input_digest, image.build_seconds, image.created_by = input_digest, seconds, by
    session.flush()
    digest = add_manifest(session, image, collection)
    for tag in tags if not hidden else []:
        set_tag(session, image, tag, manifest=digest)
    collection.changed_at = now()
    session.flush()
    return image


def add_manifest(session: Session, image: Image, collection: Collection) -> str:
    """Make the OCI manifest of an image and return its digest."""
    layer = {
        "mediaType": LAYER_TYPE,
        "size": image.size,
        "digest": f"sha256:{image.sha256}",
        "annotations": {"org.opencontainers.image.title": f"{collection.name}_{image.tag or 'latest'}.sif"},
    }
    value = {
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "config": {"mediaType": CONFIG_TYPE, "size": len(CONFIG), "digest": f"sha256:{CONFIG_DIGEST}"},
        "layers": [layer],
        "annotations": {
            "org.opencontainers.image.created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(image.created_at)),
            **({"org.opencontainers.image.revision": image.commit} if image.commit else {}),
        },
    }
    content = json.dumps(value, separators=(",", ":")).encode()
    digest = "sha256:" + hashlib.sha256(content).hexdigest()
    known = session.scalar(
        sa.select(Manifest).where(Manifest.container_id == image.container_id, Manifest.digest == digest)
    )
    if known is None:
        session.add(
            Manifest(
                container_id=image.container_id,
                digest=digest,
                media_type=MANIFEST_TYPE,
                content=content,
                image_id=image.id,
                annotations=value["annotations"],
                references=[f"sha256:{image.sha256}"],
            )
        )
        session.flush()
    return digest
