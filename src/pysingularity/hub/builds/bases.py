# SPDX-License-Identifier: Apache-2.0
"""Images that recipes begin with: what they are now, and builds for those that have moved.

Recipes choose the registry that is asked, so the question runs in a sandbox with the builds' own way out.
"""

from __future__ import annotations

import json
import secrets
from typing import Any

import sqlalchemy as sa

from pysingularity import messages
from pysingularity.hub.builds.log import LogWriter
from pysingularity.hub.builds.planning import Plan, add_build
from pysingularity.hub.context import Hub
from pysingularity.hub.engines.base import sandboxed
from pysingularity.hub.engines.job import SCRATCH, Job, Stopped
from pysingularity.hub.engines.sweep import sweep
from pysingularity.hub.models import Branch, Collection, Recipe, now
from pysingularity.hub.sources.discovery import Found

#: Triggers that ask for the check.
TRIGGERS = ("base", "schedule")
#: Seconds for an answer of a registry.
PATIENCE = 60


def present_digest(hub: Hub, reference: str) -> str:
    """Return what a reference means at its registry now; "" when that cannot be had."""
    folder = hub.settings.folder("work") / f"base-{secrets.token_hex(8)}"
    try:
        for name in ("source", *(f"scratch/{one}" for one in (".", *SCRATCH))):
            (folder / name).mkdir(mode=0o755, parents=True, exist_ok=True)
        spec: dict[str, Any] = sandboxed(hub.settings, PATIENCE)
        (folder / "job.json").write_text(json.dumps(spec))
        with LogWriter(folder / "log", limit=1 << 20) as log:
            job = Job(folder, spec, log)
            try:
                if job.ask([reference]):
                    messages.warning(f"{reference}: {job.failure.get('message') or 'cannot be asked for'}")
                    return ""
            except Stopped as stop:
                messages.warning(f"{reference}: {stop.args[2]}")
                return ""
    finally:
        sweep(folder)
    for base in job.bases:
        for kind, value in base["digest"].items():
            return f"{kind}:{value}"
    return ""


def check_bases(hub: Hub) -> list[int]:
    """Look at the bases of all collections that ask for it and are due; returns the numbers of new builds."""
    with hub.read() as session:
        due = [
            collection.id
            for collection in session.scalars(
                sa.select(Collection).where(
                    Collection.building,
                    Collection.git_url != "",
                    sa.or_(
                        Collection.bases_at.is_(None),
                        Collection.bases_at + hub.settings.sources.base_hours * 3600 < now(),
                        # Recipes that came since have no digest to compare with yet.
                        sa.exists().where(
                            Recipe.collection_id == Collection.id,
                            Recipe.base.like("%://%"),
                            Recipe.base_digest == "",
                            Collection.bases_at < Collection.changed_at,
                            Collection.bases_at + 60 < now(),
                        ),
                    ),
                )
            )
            if set(TRIGGERS) & set(collection.triggers)
        ]
    builds: list[int] = []
    for number in due:
        builds += _check(hub, number)
    return builds


def _check(hub: Hub, collection_id: int) -> list[int]:
    with hub.read() as session:
        rows = session.scalars(
            sa.select(Recipe).where(
                Recipe.collection_id == collection_id,
                Recipe.shadowed.is_(False),
                Recipe.problem == "",
                Recipe.base.like("%://%"),
            )
        ).all()
    known: dict[str, str] = {}
    for base in dict.fromkeys(row.base for row in rows):
        known[base] = present_digest(hub, base)
    plan = Plan()
    with hub.write() as session:
        collection = session.get(Collection, collection_id)
        if collection is None:
            return []
        collection.bases_at = now()
        for seen in rows:
            row = session.get(Recipe, seen.id)
            digest = known[seen.base]
            if row is None or not digest or digest == row.base_digest:
                continue
            moved, row.base_digest = bool(row.base_digest), digest
            if not moved:
                continue
            head = session.scalar(
                sa.select(Branch.head).where(Branch.collection_id == collection_id, Branch.name == row.branch)
            )
            found = Found(row.path, row.tag, "", row.commit, row.changed_at, row.copies, row.base)
            build = add_build(
                hub, session, collection, found, branch=row.branch, commit=head or row.commit, trigger="base",
                by=f"{row.base} is now {digest[:19]}", plan=plan, repeat=True,
            )  # fmt: skip
            if build is not None:
                plan.builds.append(build.id)
    return plan.builds
