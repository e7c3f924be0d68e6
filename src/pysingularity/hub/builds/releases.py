# SPDX-License-Identifier: Apache-2.0
"""Git tags as releases: every recipe of the tagged commit is built once more under the tag's name.

`Singularity` of the git tag `v1.0` becomes the image tag `v1.0`, `Singularity.gpu` becomes `v1.0-gpu`.
"""

from __future__ import annotations

from dataclasses import replace

from pysingularity.hub.builds.planning import Plan, add_build, mirror_of
from pysingularity.hub.catalog import LATEST, PART
from pysingularity.hub.context import Hub
from pysingularity.hub.models import Collection
from pysingularity.hub.sources.discovery import recipes_of


def look_at_tag(hub: Hub, collection_id: int, name: str, *, delivery_id: int | None = None) -> Plan:
    """Fetch the repository and queue builds of a git tag's recipes, when the collection asks for that."""
    plan = Plan()
    with hub.read() as session:
        collection = session.get_one(Collection, collection_id)
    if "tag" not in collection.triggers:
        plan.remarks.append("tags do not build in this collection")
        return plan
    mirror = mirror_of(hub, collection)
    mirror.fetch()
    commit = mirror.tags().get(name)
    if commit is None:
        plan.remarks.append(f"the repository has no tag {name}")
        return plan
    recipes = [one for one in recipes_of(mirror, commit, limit=hub.settings.sources.recipe_limit) if not one.shadowed]
    with hub.write() as session:
        collection = session.get_one(Collection, collection_id)
        for one in recipes[: hub.settings.builds.recipes_per_push]:
            tag = (name if one.tag == LATEST else f"{name}-{one.tag}").replace("/", "-").replace("+", "_")
            if not PART.match(tag) or tag[0] in ".-":
                plan.remarks.append(f"{tag[:80]!r} cannot be the tag of an image")
                continue
            build = add_build(
                hub, session, collection, replace(one, tag=tag), branch=name, commit=commit, trigger="tag", by="",
                delivery_id=delivery_id, plan=plan,
            )  # fmt: skip
            if build is not None:
                plan.builds.append(build.id)
    return plan
