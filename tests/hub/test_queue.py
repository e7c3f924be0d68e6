# SPDX-License-Identifier: Apache-2.0
"""The queue: who is next, who is passed by, and that no two ever have the same build."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pysingularity.hub.builds.queue import cancel, claim, enqueue, give_back, hand_back, retry, supersede
from pysingularity.hub.builds.states import ACTIVE, ALL, FINAL, NEXT, QUEUED, LostLease, beat, move
from pysingularity.hub.context import Hub
from pysingularity.hub.errors import Conflict, NotFound
from pysingularity.hub.models import Build, Collection, now
from pysingularity.hub.settings import load_settings

from .world import made_collection

COMMIT = "c" * 40


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def hub(request: pytest.FixtureRequest, data: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """An opened hub on both databases."""
    if request.param == "postgres":
        monkeypatch.setenv("SINGULARITY_HUB_DATABASE", request.getfixturevalue("postgres"))
    hub = Hub(load_settings(data))
    hub.database.migrate()
    yield hub
    hub.close()


def put(hub: Hub, collection: Collection, tag: str = "latest", **fields: object) -> int:
    with hub.write() as session:
        build = Build(collection_id=collection.id, commit=COMMIT, recipe=f"Singularity.{tag}", tag=tag, **fields)
        return enqueue(session, build, collection.owner).id


def take(hub: Hub, worker: str = "w", lease: float = 60.0, active: int = 1) -> int | None:
    with hub.write() as session:
        return claim(session, worker=worker, lease=lease, active_per_collection=active)


def state(hub: Hub, number: int) -> str:
    with hub.read() as session:
        return session.get_one(Build, number).state


def end(hub: Hub, number: int, worker: str = "w") -> None:
    for to in ("cloning", "building", "testing", "uploading", "done"):
        with hub.write() as session:
            move(session, number, to, worker=worker)


def test_a_hundred_builds_wait_behind_one_of_somebody_else(hub: Hub):
    many = [made_collection(hub, None, f"busy/c{number}") for number in range(10)]
    numbers = [put(hub, collection, f"t{tag}") for collection in many for tag in range(5)]
    assert take(hub) == numbers[0]
    single = put(hub, made_collection(hub, None, "rare/one"))
    # One of the busy owner's may be before it, not fifty.
    assert single in (take(hub), take(hub))


def test_owners_take_turns(hub: Hub):
    first = [put(hub, made_collection(hub, None, f"a/c{number}")) for number in range(3)]
    second = [put(hub, made_collection(hub, None, f"b/c{number}")) for number in range(3)]
    order = [take(hub) for _ in range(6)]
    assert order == [one for pair in zip(first, second, strict=True) for one in pair]


def test_collection_has_one_build_at_a_time(hub: Hub):
    collection, other = made_collection(hub, None, "a/x"), made_collection(hub, None, "a/y")
    numbers = [put(hub, collection, "a"), put(hub, collection, "b")]
    beside = put(hub, other)
    assert [take(hub), take(hub), take(hub)] == [numbers[0], beside, None]
    end(hub, numbers[0])
    assert take(hub) == numbers[1]


def test_more_at_a_time_when_the_settings_say_so(hub: Hub):
    collection = made_collection(hub, None, "a/x")
    numbers = [put(hub, collection, tag) for tag in "abc"]
    assert [take(hub, active=2), take(hub, active=2), take(hub, active=2)] == [numbers[0], numbers[1], None]


def test_builds_asked_for_by_hand_come_first(hub: Hub):
    put(hub, made_collection(hub, None, "a/x"))
    asked = put(hub, made_collection(hub, None, "a/y"), trigger="manual", priority=10)
    assert take(hub) == asked


def test_newer_build_of_a_tag_supersedes_waiting_ones_only(hub: Hub):
    collection = made_collection(hub, None, "a/x")
    running = put(hub, collection)
    assert take(hub) == running
    waiting = put(hub, collection)
    by_hand = put(hub, collection, trigger="manual")
    other_branch = put(hub, collection, branch="dev")
    other_tag = put(hub, collection, "gpu")
    newest = put(hub, collection)
    with hub.write() as session:
        build = session.get_one(Build, newest)
        assert supersede(session, collection, tag="latest", branch="", arch="", by=build) == [waiting]
    assert state(hub, waiting) == "superseded"
    assert {state(hub, one) for one in (by_hand, other_branch, other_tag, newest)} == {QUEUED}
    assert state(hub, running) == "claimed"


def test_cancel_at_once_while_waiting_and_by_asking_afterwards(hub: Hub):
    collection = made_collection(hub, None, "a/x")
    waiting, running = put(hub, collection, "a"), put(hub, made_collection(hub, None, "a/y"))
    with hub.write() as session:
        assert cancel(session, waiting, by="me") == "cancelled"
    assert take(hub) == running
    with hub.write() as session:
        assert cancel(session, running, by="me") == "claimed"
    with hub.write() as session:
        assert beat(session, running, worker="w", lease=60)
    with hub.write() as session, pytest.raises(Conflict):
        cancel(session, waiting, by="me")
    with hub.write() as session, pytest.raises(NotFound):
        cancel(session, 10_000, by="me")


def test_retry_is_a_new_build_of_the_same(hub: Hub):
    collection = made_collection(hub, None, "a/x")
    number = put(hub, collection, "gpu", branch="main")
    with hub.write() as session, pytest.raises(Conflict):
        retry(session, session.get_one(Build, number), by="me")
    assert take(hub) == number
    end(hub, number)
    with hub.write() as session:
        again = retry(session, session.get_one(Build, number), by="me")
        assert (again.retry_of, again.commit, again.tag, again.state) == (number, COMMIT, "gpu", QUEUED)


def test_lost_workers_build_returns_and_after_some_attempts_fails(hub: Hub):
    number = put(hub, made_collection(hub, None, "a/x"))
    for attempt in (1, 2):
        assert take(hub, lease=-1) == number
        with hub.write() as session:
            returned, failed = give_back(session, attempts=2)
        assert (returned, failed) == (([number], []) if attempt == 1 else ([], [number]))
    assert state(hub, number) == "failed"
    with hub.read() as session:
        build = session.get_one(Build, number)
        assert build.error_id == "worker-lost"
        assert build.finished_at


def test_lost_build_that_was_to_be_cancelled_is_cancelled(hub: Hub):
    number = put(hub, made_collection(hub, None, "a/x"))
    take(hub, lease=-1)
    with hub.write() as session:
        cancel(session, number, by="me")
    with hub.write() as session:
        give_back(session, attempts=3)
    assert state(hub, number) == "cancelled"


def test_worker_that_lost_its_lease_can_change_nothing(hub: Hub):
    number = put(hub, made_collection(hub, None, "a/x"))
    take(hub, "first", lease=-1)
    with hub.write() as session:
        give_back(session, attempts=3)
    take(hub, "second")
    for call in (
        lambda session: move(session, number, "cloning", worker="first"),
        lambda session: move(session, number, "failed", worker="first"),
        lambda session: beat(session, number, worker="first", lease=60),
    ):
        with pytest.raises(LostLease), hub.write() as session:
            call(session)
    with hub.write() as session:
        hand_back(session, number, worker="first")
    assert state(hub, number) == "claimed"
    end(hub, number, "second")


def test_hundred_workers_never_share_a_build(hub: Hub):
    numbers = {put(hub, made_collection(hub, None, f"o{number % 7}/c{number}")) for number in range(60)}
    taken: list[int] = []
    lock = threading.Lock()

    def work(name: str) -> None:
        while (number := take(hub, name)) is not None:
            with lock:
                taken.append(number)

    threads = [threading.Thread(target=work, args=(f"w{number}",)) for number in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == sorted(numbers)


@given(steps=st.lists(st.tuples(st.sampled_from(ALL), st.booleans()), max_size=12))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_states_follow_only_the_ways_there_are(hub: Hub, steps: list[tuple[str, bool]]):
    collection = made_collection(hub, None, f"x/c{now():.6f}".replace(".", "-"))
    number = put(hub, collection)
    with hub.write() as session:
        session.execute(sa.update(Build).where(Build.id == number).values(state="claimed", worker="w"))
    at = "claimed"
    for to, own in steps:
        try:
            with hub.write() as session:
                move(session, number, to, worker="w" if own else "other")
        except LostLease:
            assert not own or at not in ACTIVE or to not in NEXT[at]
            continue
        assert own
        assert to in NEXT[at]
        at = to
        with hub.read() as session:
            build = session.get_one(Build, number)
            assert build.state == at
            assert (build.finished_at is not None) == (at in FINAL)
        if at == QUEUED:
            return
