# SPDX-License-Identifier: Apache-2.0
"""The process that works while nobody asks: webhooks' consequences, builds, polling, reports, housekeeping.

One per hub, a child of `serve`. Threads: one per build worker, and one for each of the other things. When it is killed,
its jobs die with it (or go on, when a scheduler has them), leases run out, and the next robot goes on.
"""

from __future__ import annotations

import os
import platform
import secrets
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress

import sqlalchemy as sa

from pysingularity import messages
from pysingularity.hub.builds.bases import check_bases
from pysingularity.hub.builds.planning import moved
from pysingularity.hub.builds.queue import claim, give_back, hand_back
from pysingularity.hub.builds.reports import Reporter
from pysingularity.hub.builds.run import Run, Stopping
from pysingularity.hub.builds.states import ACTIVE, FINAL, LostLease
from pysingularity.hub.context import Hub
from pysingularity.hub.engines.base import Engine
from pysingularity.hub.engines.local import LocalEngine
from pysingularity.hub.engines.slurm import SlurmEngine
from pysingularity.hub.engines.sweep import sweep
from pysingularity.hub.errors import HubError
from pysingularity.hub.keeping.garbage import collect
from pysingularity.hub.keeping.scrub import scrub
from pysingularity.hub.models import Build, Collection, now
from pysingularity.hub.settings import ROBOTS
from pysingularity.hub.sources.intake import resync, work_off

#: Seconds between two looks for work; a webhook on this process's own hub wakes it at once.
POLL = 0.2
#: Seconds that threads have to end.
FAREWELL = 8.0
#: Seconds that the working folder of an ended build is left to the worker that ended it.
LINGER = 10.0


def make_engine(hub: Hub) -> Engine:
    """Return the engine that the settings name."""
    if hub.settings.builds.engine == "slurm":
        return SlurmEngine(hub.settings)
    return LocalEngine()


class Robots:
    """All of a hub's robots in one process.

    Arguments:
        hub: opened by the caller, closed by him after `stop`.
        engine: for tests; normally as the settings say.
    """

    def __init__(self, hub: Hub, engine: Engine | None = None) -> None:
        self.hub = hub
        self.engine = engine or make_engine(hub)
        self.name = f"{platform.node()}-{os.getpid()}-{secrets.token_hex(3)}"
        self.ended = threading.Event()
        self.threads: list[threading.Thread] = []

    def start(self) -> None:
        """Start all threads."""
        self._thread("intake", lambda: work_off(self.hub), POLL)
        self._thread("chores", self._chores, min(5.0, self.hub.settings.builds.lease / 3))
        self._thread("polling", self._poll_repositories, min(5.0, self.hub.settings.sources.poll))
        self._thread("reports", Reporter(self.hub).work, 1.0)
        self._thread("bases", lambda: check_bases(self.hub), 10.0)
        self._thread("housekeeping", self._keep_house, 60.0)
        for number in range(self.hub.settings.builds.workers):
            self._thread(f"worker-{number}", lambda name=f"{self.name}-{number}": self._build(name), POLL)  # type: ignore[misc]

    def _thread(self, name: str, work: Callable[[], object], pause: float) -> None:
        def loop() -> None:
            while not self.ended.is_set():
                try:
                    if work():
                        continue  # there was something to do; there may be more
                except Exception:
                    # A robot outlives every surprise: it is reported and tried again, not swallowed.
                    messages.error(f"robot {name}: {traceback.format_exc().rstrip()}")
                    self.ended.wait(2.0)
                self.ended.wait(pause)

        thread = threading.Thread(target=loop, name=name, daemon=True)
        thread.start()
        self.threads.append(thread)

    def stop(self) -> None:
        """End all threads; running builds go back to the queue, or are found again when their engine goes on."""
        self.ended.set()
        deadline = time.monotonic() + FAREWELL
        # Workers first: they hand their builds back. What the others are at (a fetch, a scrub) can be done again.
        for thread in sorted(self.threads, key=lambda one: not one.name.startswith("worker-")):
            thread.join(max(0.1, deadline - time.monotonic()))
        self.engine.close()

    def _build(self, worker: str) -> bool:
        builds = self.hub.settings.builds
        with self.hub.read() as session:
            if session.scalar(sa.select(Build.id).where(Build.state == "queued").limit(1)) is None:
                return False
        with self.hub.write() as session:
            number = claim(
                session, worker=worker, lease=builds.lease, active_per_collection=builds.active_per_collection
            )
        if number is None:
            return False
        try:
            Run(self.hub, self.engine, number, worker, self.ended).run()
        except Stopping:
            with self.hub.write() as session:
                hand_back(session, number, worker=worker)
        except LostLease as error:
            messages.warning(str(error))
        return True

    def _chores(self) -> bool:
        with self.hub.write() as session:
            returned, failed = give_back(session, attempts=self.hub.settings.builds.attempts)
        for number in (*returned, *failed):
            messages.warning(f"build {number}: its worker was lost")
        self._tidy()
        (self.hub.settings.data / ROBOTS).touch(mode=0o600)
        return False

    def _tidy(self) -> None:
        """End jobs that go on for builds that have ended without them, and remove what they left."""
        names = [path for path in self.hub.settings.folder("work").glob("*") if path.name.isdigit()]
        for folder in names if not self.hub.settings.builds.keep_work else ():
            with self.hub.read() as session:
                build = session.get(Build, int(folder.name))
            if build is not None and (build.state not in FINAL or (build.finished_at or 0) > now() - LINGER):
                continue
            if build is not None and build.job and self.engine.survives:
                self.engine.kill(build.job)
            sweep(folder)
        for folder in self.hub.settings.folder("work").glob("base-*"):
            with suppress(FileNotFoundError):
                if folder.stat().st_mtime < now() - 3600:  # whoever asked was killed
                    sweep(folder)

    def _poll_repositories(self) -> bool:
        """Ask repositories that cannot call us whether something moved; only then is there an exchange to work off."""
        with self.hub.write() as session:
            due = session.scalars(
                sa.select(Collection).where(
                    Collection.poll > 0,
                    Collection.git_url != "",
                    sa.or_(Collection.polled_at.is_(None), Collection.polled_at + Collection.poll < now()),
                )
            ).all()
            for collection in due:
                collection.polled_at = now()
        for collection in due:
            if "push" not in collection.triggers:
                continue
            try:
                news = moved(self.hub, collection.id)
            except HubError:
                news = True  # the exchange shows what is wrong with it
            if news:
                resync(self.hub, collection.id, by="polling")
        return False

    def _keep_house(self) -> bool:
        """Collect garbage and read stored files again, as often as the settings say."""
        keep = self.hub.settings.keep
        if keep.collect_hours and self._due("collected", keep.collect_hours * 3600):
            collect(self.hub)
        if keep.scrub_days and self._due("scrubbed", 3600.0):
            # Every hour those whose turn has come, so that a large store is read evenly.
            scrub(self.hub, older=keep.scrub_days * 86400, most=100)
        return False

    def _due(self, name: str, seconds: float) -> bool:
        """Say whether something is to be done again, and note that it is; a file's time outlives the process."""
        stamp = self.hub.settings.data / f".{name}"
        try:
            if stamp.stat().st_mtime > now() - seconds:
                return False
        except FileNotFoundError:
            pass
        stamp.touch(mode=0o600)
        return True


def reclaim(hub: Hub) -> list[int]:
    """Return builds to the queue whose workers were of an earlier robot on this machine: nobody works on them now.

    Called at the start of the only robot of a hub; with several, leases decide.
    """
    prefix = f"{platform.node()}-"
    with hub.write() as session:
        return list(
            session.scalars(
                sa.update(Build)
                .where(Build.state.in_(ACTIVE), Build.worker.startswith(prefix, autoescape=True))
                .values(leased_until=0.0)
                .returning(Build.id)
                .execution_options(synchronize_session=False)
            )
        )


def run(hub: Hub, ended: threading.Event) -> None:
    """Work until `ended` is set."""
    reclaim(hub)
    robots = Robots(hub)
    robots.start()
    ended.wait()
    robots.stop()
