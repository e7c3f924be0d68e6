# SPDX-License-Identifier: Apache-2.0
"""Health and figures, for machines that watch the hub."""

from __future__ import annotations

import os
from typing import Any

import sqlalchemy as sa
from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse

from pysingularity.hub.builds.states import ACTIVE, ALL
from pysingularity.hub.context import Hub
from pysingularity.hub.doors import TheHub
from pysingularity.hub.models import Blob, Build, Collection, Image, User, now
from pysingularity.hub.settings import ROBOTS
from pysingularity.version import __version__

router = APIRouter(tags=["service"])
#: Seconds without a sign of the robots after which something is wrong; they give one every few seconds.
QUIET = 120.0


@router.get("/healthz", responses={503: {"description": "It cannot; the fields say what is ill."}})
def health(hub: TheHub) -> Response:
    """Say whether the hub can do its work: database, data folder, robots."""
    checks: dict[str, Any] = {}
    try:
        with hub.read() as session:
            session.execute(sa.select(1))
            late = session.scalar(
                sa.select(sa.func.count()).where(Build.state.in_(ACTIVE), Build.leased_until < now() - 120)
            )
        checks["database"] = "ok"
        checks["robots"] = f"{late} builds without a worker" if late else _robots(hub)
    except sa.exc.SQLAlchemyError as error:
        checks["database"] = type(error).__name__
    checks["data"] = "ok" if os.access(hub.settings.data, os.W_OK) else "not writable"
    good = all(value == "ok" for value in checks.values())
    return JSONResponse({"status": "ok" if good else "ill", "version": __version__, **checks}, 200 if good else 503)


def _robots(hub: Hub) -> str:
    """Say whether the robots have been at work lately; a hub that has just begun may not have any yet."""
    try:
        quiet = now() - (hub.settings.data / ROBOTS).stat().st_mtime
    except FileNotFoundError:
        return "ok"
    return "ok" if quiet < QUIET else f"not heard of for {quiet:.0f} s"


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
def metrics(hub: TheHub) -> Response:
    """Return figures in Prometheus' text format."""
    with hub.read() as session:
        rows = session.execute(sa.select(Build.state, sa.func.count()).group_by(Build.state))
        states = {state: count for state, count in rows}  # noqa: C416 - rows are no pairs for type checkers
        counts = {
            "users": session.scalar(sa.select(sa.func.count()).select_from(User)),
            "collections": session.scalar(sa.select(sa.func.count()).select_from(Collection)),
            "images": session.scalar(sa.select(sa.func.count()).select_from(Image)),
            # Rows of images are wide; the sums of collections are the same figure for a hundredth of the reading.
            "pulls_total": session.scalar(sa.select(sa.func.coalesce(sa.func.sum(Collection.pulls), 0))),
            "blobs": session.scalar(sa.select(sa.func.count()).select_from(Blob)),
            "blob_bytes": session.scalar(sa.select(sa.func.coalesce(sa.func.sum(Blob.size), 0))),
            "blobs_damaged": session.scalar(sa.select(sa.func.count()).select_from(Blob).where(Blob.damaged != "")),
        }
        oldest = session.scalar(sa.select(sa.func.min(Build.created_at)).where(Build.state == "queued"))
    disk = os.statvfs(hub.settings.data)
    lines = ["# HELP hub_builds Builds by state.", "# TYPE hub_builds gauge"]
    lines += [f'hub_builds{{state="{state}"}} {states.get(state, 0)}' for state in ALL]
    for name, value in counts.items():
        kind = "counter" if name.endswith("_total") else "gauge"
        lines += [f"# TYPE hub_{name} {kind}", f"hub_{name} {value or 0}"]
    lines += [
        "# TYPE hub_queue_oldest_seconds gauge",
        f"hub_queue_oldest_seconds {max(0.0, now() - oldest) if oldest else 0.0:.3f}",
    ]
    lines += ["# TYPE hub_disk_free_bytes gauge", f"hub_disk_free_bytes {disk.f_bavail * disk.f_frsize}"]
    return Response("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4; charset=utf-8")
