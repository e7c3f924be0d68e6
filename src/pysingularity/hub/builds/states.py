# SPDX-License-Identifier: Apache-2.0
"""The states of a build and the only ways from one to another.

Every change of state is one conditional UPDATE that names the state and the worker it believes in, so that a worker
that lost its lease, or a cancel button pressed at the last moment, can never contradict each other.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from pysingularity.hub.models import Build, now

QUEUED = "queued"
#: A worker holds a lease on the build.
ACTIVE = ("claimed", "cloning", "building", "testing", "uploading")
#: Nothing will happen any more.
FINAL = ("done", "failed", "cancelled", "timed_out", "superseded", "skipped")
ALL = (QUEUED, *ACTIVE, *FINAL)

#: From each state, the states that may follow. Every active state may also go back to `queued` (a lost worker).
NEXT: dict[str, tuple[str, ...]] = {
    "queued": ("claimed", "cancelled", "superseded", "failed"),
    "claimed": ("cloning", "failed", "cancelled", "timed_out", "skipped", "queued"),
    "cloning": ("building", "done", "failed", "cancelled", "timed_out", "skipped", "queued"),
    "building": ("testing", "uploading", "failed", "cancelled", "timed_out", "skipped", "queued"),
    "testing": ("uploading", "failed", "cancelled", "timed_out", "queued"),
    "uploading": ("done", "failed", "cancelled", "timed_out", "queued"),
    **dict.fromkeys(FINAL, ()),
}


class LostLease(Exception):
    """The build is no longer this worker's: its lease ran out, or somebody else changed the state."""


def move(session: Session, build_id: int, to: str, *, worker: str, **fields: Any) -> None:
    """Change the state of a build that a worker holds.

    Arguments:
        fields: other columns that change with it.

    Raises:
        LostLease: the worker does not hold it any more, or its state does not lead there.
    """
    allowed = [state for state in ACTIVE if to in NEXT[state]]
    if to in FINAL:
        fields |= {"finished_at": now(), "leased_until": None}
    changed = session.execute(
        sa.update(Build)
        .where(Build.id == build_id, Build.worker == worker, Build.state.in_(allowed))
        .values(state=to, **fields)
        .execution_options(synchronize_session=False)
    )
    if not changed.rowcount:  # type: ignore[attr-defined]
        raise LostLease(f"build {build_id} is not {worker}'s to make {to}")


def beat(session: Session, build_id: int, *, worker: str, lease: float) -> bool:
    """Renew a lease and return whether somebody wants the build cancelled.

    Raises:
        LostLease: it is not this worker's any more.
    """
    row = session.execute(
        sa.update(Build)
        .where(Build.id == build_id, Build.worker == worker, Build.state.in_(ACTIVE))
        .values(leased_until=now() + lease)
        .returning(Build.cancel)
        .execution_options(synchronize_session=False)
    ).first()
    if row is None:
        raise LostLease(f"build {build_id} is not {worker}'s any more")
    return bool(row[0])
