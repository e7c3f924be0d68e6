# SPDX-License-Identifier: Apache-2.0
"""The queue is the table of builds: putting in, claiming, giving back, cancelling, superseding.

Fairness: a build gets its turn when it is queued. Each owner's builds take turns one after the other, beginning at the
turn that is being served now, so that somebody with a hundred builds waits behind somebody with one. A claim is one
statement that walks along an index in the order of priority, turn and number, passing by collections that are busy.
"""

from __future__ import annotations

import functools

import sqlalchemy as sa
from sqlalchemy.orm import Session

from pysingularity.hub.builds.states import ACTIVE, FINAL, QUEUED
from pysingularity.hub.errors import Conflict, NotFound
from pysingularity.hub.models import Build, Collection, now

#: Key of PostgreSQL's lock around claims.
_CLAIMS = 0x68_75_62_01


def enqueue(session: Session, build: Build, owner: str) -> Build:
    """Add a build and give it its turn."""
    build.queue_owner = owner
    serving = session.scalar(
        sa.select(sa.func.min(Build.turn)).where(Build.state == QUEUED, Build.priority == build.priority)
    )
    mine = session.scalar(
        sa.select(sa.func.max(Build.turn)).where(Build.queue_owner == owner, Build.state.in_((QUEUED, *ACTIVE)))
    )
    build.turn = max(serving or 0.0, (mine or 0.0) + 1.0)
    build.state = QUEUED
    session.add(build)
    session.flush()
    return build


def claim(session: Session, *, worker: str, lease: float, active_per_collection: int = 1) -> int | None:
    """Take the next build for a worker and return its number; None when there is nothing to do."""
    if session.get_bind().dialect.name == "postgresql":
        # Two claims at the same moment would both find a collection free; SQLite has one writer anyway.
        session.execute(sa.select(sa.func.pg_advisory_xact_lock(_CLAIMS)))
    moment = now()
    values = {"who": worker, "moment": moment, "until": moment + lease, "most": active_per_collection}
    number: int | None = session.scalar(_claiming(active_per_collection == 1), values)
    return number


@functools.cache
def _claiming(single: bool) -> sa.Executable:
    """Return the statement of a claim; putting it together takes ten times longer than running it."""
    table = Build.metadata.tables[Build.__tablename__]
    other, inner = table.alias(), table.alias()
    same = other.c.collection_id == inner.c.collection_id, other.c.state.in_(ACTIVE)
    if single:
        free: sa.ColumnElement[bool] = ~sa.exists().where(*same)
    else:
        free = sa.select(sa.func.count()).select_from(other).where(*same).scalar_subquery() < sa.bindparam("most")
    candidate = (
        sa.select(inner.c.id)
        .where(inner.c.state == QUEUED, free)
        .order_by(inner.c.priority.desc(), inner.c.turn, inner.c.id)
        .limit(1)
        .with_for_update(skip_locked=True, of=inner)
        .scalar_subquery()
    )
    return (
        sa.update(table)
        .where(table.c.id == candidate, table.c.state == QUEUED)
        .values(
            state="claimed",
            worker=sa.bindparam("who"),
            claimed_at=sa.bindparam("moment"),
            leased_until=sa.bindparam("until"),
            attempt=table.c.attempt + 1,
        )
        .returning(table.c.id)
    )


def give_back(session: Session, *, attempts: int) -> tuple[list[int], list[int]]:
    """Return builds of dead workers to the queue, or fail those that killed too many; (returned, failed) numbers.

    Builds that a scheduler runs (`job` is set) keep their job: the next worker finds it again.
    """
    late = sa.and_(Build.state.in_(ACTIVE), Build.leased_until < now())
    done = {"synchronize_session": False}
    cancelled = session.scalars(
        sa.update(Build)
        .where(late, Build.cancel)
        .values(state="cancelled", finished_at=now(), leased_until=None, reason="cancelled")
        .returning(Build.id)
        .execution_options(**done)
    ).all()
    failed = session.scalars(
        sa.update(Build)
        .where(late, Build.attempt >= attempts)
        .values(
            state="failed",
            finished_at=now(),
            leased_until=None,
            error_id="worker-lost",
            reason=f"the worker was lost {attempts} times",
        )
        .returning(Build.id)
        .execution_options(**done)
    ).all()
    returned = session.scalars(
        sa.update(Build)
        .where(late)
        .values(state=QUEUED, worker="", leased_until=None, reason="the worker was lost; waiting for another one")
        .returning(Build.id)
        .execution_options(**done)
    ).all()
    return list(returned), [*cancelled, *failed]


def hand_back(session: Session, build_id: int, *, worker: str) -> None:
    """Return a build to the queue because its worker ends in good order; that is no failed attempt."""
    session.execute(
        sa.update(Build)
        .where(Build.id == build_id, Build.worker == worker, Build.state.in_(ACTIVE))
        .values(state=QUEUED, worker="", leased_until=None, attempt=Build.attempt - 1)
        .execution_options(synchronize_session=False)
    )


def cancel(session: Session, build_id: int, *, by: str) -> str:
    """Cancel a build: at once when it waits, else its worker is asked. Returns the state it is in now.

    Raises:
        NotFound: there is no such build.
        Conflict: it has ended.
    """
    waiting = session.execute(
        sa.update(Build)
        .where(Build.id == build_id, Build.state == QUEUED)
        .values(state="cancelled", finished_at=now(), reason=f"cancelled by {by}", cancel=True)
        .execution_options(synchronize_session=False)
    )
    if waiting.rowcount:  # type: ignore[attr-defined]
        return "cancelled"
    asked = session.execute(
        sa.update(Build)
        .where(Build.id == build_id, Build.state.in_(ACTIVE))
        .values(cancel=True, reason=f"cancelled by {by}")
        .execution_options(synchronize_session=False)
    )
    state = session.scalar(sa.select(Build.state).where(Build.id == build_id))
    if state is None:
        raise NotFound("no-such-build", f"build {build_id}: there is no such build")
    if not asked.rowcount:  # type: ignore[attr-defined]
        raise Conflict("build-ended", f"build {build_id} has ended ({state})")
    return state


def supersede(session: Session, collection: Collection, *, tag: str, branch: str, arch: str, by: Build) -> list[int]:
    """End waiting builds of the same tag and branch in favour of a newer one; returns their numbers."""
    return list(
        session.scalars(
            sa.update(Build)
            .where(
                Build.collection_id == collection.id,
                Build.state == QUEUED,
                Build.tag == tag,
                Build.branch == branch,
                Build.arch == arch,
                Build.publish == by.publish,
                Build.id < by.id,
                Build.trigger != "manual",
            )
            .values(state="superseded", finished_at=now(), reason=f"build {by.id} is newer")
            .returning(Build.id)
            .execution_options(synchronize_session=False)
        )
    )


def retry(session: Session, build: Build, *, by: str) -> Build:
    """Queue a new build of the same commit and recipe.

    Raises:
        Conflict: the build has not ended.
    """
    if build.state not in FINAL:
        raise Conflict("build-running", f"build {build.id} has not ended ({build.state})")
    again = Build(
        collection_id=build.collection_id,
        trigger="retry",
        requested_by=by,
        branch=build.branch,
        commit=build.commit,
        recipe=build.recipe,
        tag=build.tag,
        arch=build.arch,
        publish=build.publish,
        retry_of=build.id,
        priority=build.priority,
    )
    return enqueue(session, again, build.queue_owner)
