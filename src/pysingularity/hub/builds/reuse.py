# SPDX-License-Identifier: Apache-2.0
"""Equal inputs give the image again that they gave before: reverts, merged branches and tags of commits just built.

The inputs of a build are the recipe, every file of the repository that it may copy, the architecture, the builder and
its environment; a base image counts by the digest that it has now. Whoever asks for a build by hand gets one.
"""

from __future__ import annotations

import hashlib
import json
import platform

import sqlalchemy as sa

from pysingularity.hub.builds.bases import present_digest
from pysingularity.hub.context import Hub
from pysingularity.hub.engines.base import builder_program, environment
from pysingularity.hub.models import Blob, Build, Container, Image, now
from pysingularity.hub.sources.discovery import inputs, touches
from pysingularity.hub.sources.git import Entry
from pysingularity.version import FULL

#: Triggers that mean "again, whatever you know".
ALWAYS = ("manual", "retry", "base")
DAY = 86400.0


def input_digest(hub: Hub, build: Build, recipe: bytes, entries: list[Entry]) -> str:
    """Return one digest of all that a build begins with and that is known beforehand."""
    patterns, _ = inputs(recipe, build.recipe)
    files = [(one.path, one.mode, one.sha) for one in entries if touches(patterns, one.path)]
    value = {
        "recipe": [build.recipe, hashlib.sha256(recipe).hexdigest()],
        "files": sorted(files),
        "arch": build.arch or platform.machine(),
        "builder": [FULL, *builder_program(hub.settings)],
        "environment": environment(hub.settings),
    }
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode("utf-8", "surrogateescape")).hexdigest()


def earlier_image(hub: Hub, build: Build, digest: str, recipe: bytes) -> Image | None:
    """Return an image of the collection that was made of the same inputs and may be given again."""
    days = hub.settings.builds.reuse_days
    if not days or build.trigger in ALWAYS:
        return None
    with hub.read() as session:
        image = session.scalar(
            sa.select(Image)
            .join(Container, Container.id == Image.container_id)
            .join(Blob, Blob.sha256 == Image.blob)
            .where(
                Container.collection_id == build.collection_id,
                Container.name == build.collection.name,
                Image.input_digest == digest,
                Image.hidden.is_(not build.publish),
                Image.created_at > now() - days * DAY,
                Blob.damaged == "",
            )
            .order_by(Image.id.desc())
            .limit(1)
        )
    if image is None or not _same_base(hub, image, inputs(recipe, build.recipe)[1]):
        return None
    return image


def _same_base(hub: Hub, image: Image, base: str) -> bool:
    if "://" not in base:
        return True
    known = (image.provenance or {}).get("predicate", {}).get("buildDefinition", {}).get("resolvedDependencies", [])[1:]
    if not known:
        return False
    for one in known:
        digests = [f"{kind}:{value}" for kind, value in one["digest"].items()]
        if present_digest(hub, one["uri"]) not in digests:
            return False
    return True
