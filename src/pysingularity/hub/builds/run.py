# SPDX-License-Identifier: Apache-2.0
"""One worker's turn: a claimed build from the clone to the published image, or to the sentence that says why not.

Everything slow happens between transactions, under a lease that is renewed meanwhile; every change of state is refused
when the lease was lost, so a build ends once. What the worker leaves on the disk when it is killed is swept away by the
next attempt.
"""

from __future__ import annotations

import fnmatch
import json
import os
import posixpath
import threading
import time
from pathlib import Path
from typing import Any

from sqlalchemy.orm import Session

from pysingularity.errors import SingularityError
from pysingularity.hub.builds.accept import Facts, NotBelieved, examine, take_copy
from pysingularity.hub.builds.log import LogWriter, log_path
from pysingularity.hub.builds.planning import mirror_of
from pysingularity.hub.builds.provenance import embed, statement
from pysingularity.hub.builds.publish import add_image
from pysingularity.hub.builds.reuse import earlier_image, input_digest
from pysingularity.hub.builds.states import QUEUED, LostLease, beat, move
from pysingularity.hub.context import Hub
from pysingularity.hub.engines.base import Engine, secrets_of, specification
from pysingularity.hub.engines.sweep import sweep
from pysingularity.hub.errors import HubError
from pysingularity.hub.models import Build, Image
from pysingularity.hub.sources.git import public_text
from pysingularity.hub.storage.base import Digests
from pysingularity.hub.storage.quota import need_room
from pysingularity.recipe.parser import parse
from pysingularity.recipe.sections import file_pairs

#: Seconds between two looks at a running job.
POLL = 0.2
#: Seconds that a cancelled job has to end itself.
PATIENCE = 15.0


class Failed(Exception):
    """The build ends here: (state, error id, sentence)."""


class Stopping(Exception):
    """The robot is told to end; the build goes back to the queue."""


class Again(Exception):
    """The machine failed, not the build: (error id, sentence). It goes back to the queue, a few times."""


class Run:
    """One attempt at one build.

    Arguments:
        worker: the name under which the build is claimed.
        ended: set when the robot has to end.
    """

    def __init__(self, hub: Hub, engine: Engine, build_id: int, worker: str, ended: threading.Event) -> None:
        self.hub, self.engine, self.id, self.worker, self.ended = hub, engine, build_id, worker, ended
        self.folder = hub.settings.folder("work") / str(build_id)
        self.lease = hub.settings.builds.lease
        self.beaten = 0.0
        self.cancel = False
        self.secrets: list[str] = []
        self.job = ""
        #: Digest of what the build begins with, "" while nobody has looked.
        self.inputs = ""
        #: The working folder is ours.
        self.mine = True

    # --- the row ---

    def load(self) -> Build:
        """Return the build as it is now."""
        with self.hub.read() as session:
            return session.get_one(Build, self.id)

    def move(self, to: str, **fields: Any) -> None:
        """Change the state."""
        with self.hub.write() as session:
            move(session, self.id, to, worker=self.worker, **fields)

    def note(self, **fields: Any) -> None:
        """Change columns, without a change of state."""
        import sqlalchemy as sa

        with self.hub.write() as session:
            session.execute(
                sa.update(Build)
                .where(Build.id == self.id, Build.worker == self.worker)
                .values(**fields)
                .execution_options(synchronize_session=False)
            )

    def beat(self, *, force: bool = False) -> None:
        """Renew the lease when a third of it is over, and notice a wish to cancel."""
        if force or time.monotonic() - self.beaten > min(self.lease / 3, 2.0):
            with self.hub.write() as session:
                self.cancel = beat(session, self.id, worker=self.worker, lease=self.lease)
            self.beaten = time.monotonic()

    def log(self) -> LogWriter:
        """Open the log."""
        path = log_path(self.hub.settings.folder("logs"), self.id)
        return LogWriter(path, limit=self.hub.settings.builds.log_limit, secrets=self.secrets)

    # --- the work ---

    def run(self) -> None:
        """Do all of it; the end is written into the row.

        Raises:
            LostLease: the build is somebody else's now.
            Stopping: the robot ends.
        """
        build = self.load()
        self.secrets = secrets_of(build.collection)
        try:
            try:
                if build.job and self.engine.survives and read_json(self.folder / "job.json") is not None:
                    result: dict[str, Any] | None = self._again(build)
                else:
                    result = self._fresh(build)
                if result is not None:
                    self._store(self.load(), result)
            except Again as reason:
                self._once_more(*reason.args)
            except Failed as end:
                self._end(*end.args)
            except NotBelieved as error:
                self._end("failed", error.id, f"the result was refused: {error.message}")
            except HubError as error:
                self._end("failed", error.id, error.message)
            except SingularityError as error:
                self._end("failed", error.id, str(error).replace("\n", " "))
            except OSError as error:
                self._end("failed", "hub-error", f"the hub's machine: {error.strerror or error}")
        except LostLease:
            # The folder is somebody else's by now; only what we started ourselves is ours to end.
            self.mine = False
            if self.job and not self.engine.survives:
                self.engine.kill(self.job)
            raise
        finally:
            if self.mine:
                self._clean()

    def _end(self, state: str, error_id: str, reason: str) -> None:
        with self.log() as log:
            log.line(f"Build {state.replace('_', ' ')}: {reason}")
            size = log.size
        self.move(state, error_id=error_id, reason=reason[:2000], log_size=size)

    def _once_more(self, error_id: str, reason: str) -> None:
        """Return the build to the queue, unless it has had its attempts."""
        build = self.load()
        if build.attempt >= self.hub.settings.builds.attempts:
            self._end("failed", error_id, f"{reason}; this was attempt {build.attempt}")
            return
        with self.log() as log:
            log.line(f"{reason}; the build is tried again")
        self._clean()
        self.mine = False  # the next worker may begin at once
        with self.hub.write() as session:
            move(session, self.id, QUEUED, worker=self.worker, job="", leased_until=None, reason=reason[:2000])

    def _fresh(self, build: Build) -> dict[str, Any] | None:
        """Clone, and start the job; None when an earlier image is the result."""
        if build.job and self.engine.survives:
            self.engine.kill(build.job)
        self.move("cloning", engine=self.engine.name, job="")
        self.beat(force=True)
        with self.log() as log:
            again = f", attempt {build.attempt}" if build.attempt > 1 else ""
            log.step("Cloning")
            log.line(f"Worker {self.worker}{again}")
            sweep(self.folder)
            self.folder.mkdir(mode=0o700, parents=True)
            mirror = mirror_of(self.hub, build.collection)
            if not mirror.has(build.commit):
                log.line(f"Fetching {public_text(build.collection.git_url)}")
                mirror.fetch()
            if not mirror.has(build.commit):
                raise Failed("failed", "no-such-commit", f"the repository no longer has the commit {build.commit}")
            mirror.checkout(build.commit, self.folder / "source")
            entry = mirror.entries(build.commit, f":(literal){build.recipe}")
            if len(entry) != 1 or entry[0].mode not in ("100644", "100755"):
                raise Failed("failed", "no-such-recipe", f"{build.recipe} is no plain file of the commit")
            text = mirror.blob(entry[0].sha, self.hub.settings.sources.recipe_limit)
            log.line(f"{build.recipe} of commit {build.commit}")
            entries = mirror.entries(build.commit)
            links = second_choice([entry.path for entry in entries], build.recipe, text)
            self.inputs = input_digest(self.hub, build, text, entries)
            self.beat(force=True)
            known = earlier_image(self.hub, build, self.inputs, text)
            if known is not None:
                log.line(f"Nothing has changed since image {known.id} ({known.version}): it is taken again")
                self._give_again(known, log)
                return None
        scratch = self.folder / "scratch"
        for name in (".", "home", "tmp", "cache", "out"):
            (scratch / name).mkdir(mode=0o755, parents=True, exist_ok=True)
        spec = specification(self.hub, build, self.folder, links=links)
        if spec["sandbox"] == "none":
            _plain_links(self.folder / "source", links)
        self.beat(force=True)
        if self.engine.survives:
            with self.log() as log:
                log.line(f"Submitting the build to {self.engine.name}")
        self.job = self.engine.start(self.folder, spec)
        self.note(job=self.job, input_digest=self.inputs)
        return self._follow(self.job, str(spec["token"]))

    def _again(self, build: Build) -> dict[str, Any]:
        """Find a job again that a scheduler went on running while no worker looked."""
        self.move("cloning")
        self.job, self.inputs = build.job, build.input_digest
        with self.log() as log:
            log.line(f"Worker {self.worker} follows job {build.job}")
        spec = read_json(self.folder / "job.json") or {}
        return self._follow(build.job, str(spec.get("token")))

    def _result(self, token: str) -> dict[str, Any] | None:
        """Return what the job left; a result of an attempt that was given up is none."""
        result = read_json(self.folder / "result.json")
        return result if result is not None and result.get("token") == token else None

    def _follow(self, job: str, token: str) -> dict[str, Any]:
        """Wait for a job, telling its state and renewing the lease."""
        state, steps, waits = "cloning", -1, ""
        asked, ended = 0.0, 0.0
        while (result := self._result(token)) is None:
            if self.ended.is_set():
                raise Stopping
            if self.engine.running(job):
                ended = 0.0
            elif not ended:
                ended = time.monotonic()
            elif time.monotonic() - ended > self.engine.settle:  # the result may have been written a moment ago
                if self.cancel:
                    raise Failed("cancelled", "cancelled", "cancelled")
                verdict = self.engine.verdict(job)
                reason = verdict[2] + self._last_words()
                raise Again(verdict[1], reason) if verdict[0] == QUEUED else Failed(*verdict[:2], reason)
            status = read_json(self.folder / "status.json") or {}
            if state == "cloning" and status:
                state = "building"
                self.move(state, reason="")
            if isinstance(status.get("steps"), list) and len(status["steps"]) != steps:
                steps = len(status["steps"])
                self.note(steps=status["steps"])
            if state == "building" and status.get("state") == "testing":
                state = "testing"
                self.move("testing")
            if state == "cloning" and not self.cancel and (now := self.engine.waits(job)) != waits:
                waits = now
                self.note(reason=waits)
            self.beat()
            if self.cancel:
                if not asked:
                    asked = time.monotonic()
                    self.engine.cancel(job)
                elif time.monotonic() - asked > PATIENCE:
                    self.engine.kill(job)
                    raise Failed("cancelled", "cancelled", "cancelled")
            time.sleep(POLL)
        while self.engine.running(job) and not self.engine.survives:
            time.sleep(0.02)  # the job takes its sandbox down
        if state == "cloning":
            state = "building"
            self.move(state, reason="")
        self.note(steps=result.get("steps") or [], node=str(result.get("node", ""))[:200])
        if result.get("state") == "cancelled":
            self.beat(force=True)
            if not self.cancel:
                raise Again("job-killed", f"the job {job} was ended from outside")
        if result.get("state") != "built":
            known = result.get("state") in ("failed", "cancelled", "timed_out", "skipped")
            raise Failed(
                str(result["state"]) if known else "failed",
                str(result.get("error_id") or "")[:100],
                str(result.get("reason") or "")[:2000],
            )
        if state == "building":
            self.move("testing")
        return result

    def _last_words(self) -> str:
        """Return the last line that the job's process wrote, if there is one."""
        try:
            text = (self.folder / "job.err").read_bytes()[-2000:].decode("utf-8", "replace").strip()
        except OSError:
            return ""
        return f": {text.splitlines()[-1]}" if text else ""

    def _store(self, build: Build, result: dict[str, Any]) -> None:
        """Look at the image, store it, and publish it."""
        settings = self.hub.settings
        self.move("uploading")
        with self.log() as log:
            log.step("Storing")
            path = take_copy(
                self.folder / "scratch" / "out" / "image.sif",
                self.hub.storage,
                limit=settings.builds.image_limit,
                beat=self.beat,
            )
            try:
                examine_first(path)
                embed(path, build, url=settings.url, result=result)
                facts = examine(path, self.beat)
                with self.hub.read() as session:
                    need_room(self.hub, session, build.collection, facts.digests.size)
                self.beat(force=True)
                if self.cancel:
                    raise Failed("cancelled", "cancelled", "cancelled")
                self.hub.storage.take(path, facts.digests.sha256)
            finally:
                path.unlink(missing_ok=True)
            log.line(f"{facts.digests.size} bytes, sha256 {facts.digests.sha256}")
            log.line("Done")
            size = log.size
        with self.hub.write() as session:
            row = session.get_one(Build, self.id)
            image = self._add(session, row, facts, float(result.get("seconds") or 0.0))
            image.provenance = statement(
                row, subject={"sha256": image.sha256}, name=f"{row.collection.name}_{row.tag}.sif", url=settings.url,
                result=result,
            )  # fmt: skip
            session.flush()
            move(session, self.id, "done", worker=self.worker, image_id=image.id, reason="", error_id="", log_size=size)

    def _give_again(self, known: Image, log: LogWriter) -> None:
        """Publish an earlier image under this build's commit and tag."""
        facts = Facts(
            Digests(known.size, known.sha256, known.version),
            known.arch,
            known.signed,
            known.encrypted,
            known.definition,
            known.labels,
            known.details,
        )
        log.line("Done")
        size = log.size
        before = (known.provenance or {}).get("predicate", {})
        with self.hub.write() as session:
            row = session.get_one(Build, self.id)
            if session.get(Image, known.id) is None:
                raise Again("image-gone", f"image {known.id} was removed at this moment")
            image = self._add(session, row, facts, known.build_seconds)
            image.provenance = {
                **(known.provenance or {}),
                "predicate": {**before, "reusedBy": f"build {self.id} of {row.commit}"},
            }
            move(
                session, self.id, "done", worker=self.worker, image_id=image.id, reason=f"the same as image {known.id}",
                error_id="", log_size=size,
            )  # fmt: skip

    def _add(self, session: Session, row: Build, facts: Facts, seconds: float) -> Image:
        return add_image(
            session,
            row.collection,
            facts,
            tags=[row.tag],
            by=row.requested_by or row.trigger,
            commit=row.commit,
            branch=row.branch,
            recipe=row.recipe,
            hidden=not row.publish,
            input_digest=self.inputs,
            seconds=seconds,
        )

    def _clean(self) -> None:
        if self.ended.is_set() and self.engine.survives:
            return  # its job goes on and will be found again
        if not self.hub.settings.builds.keep_work:
            sweep(self.folder)


def examine_first(path: Path) -> None:
    """Refuse what is no SIF before anything is written into it; the digests are made afterwards."""
    examine(path, digests=Digests(0, "", ""))


def read_json(path: Path) -> dict[str, Any] | None:
    """Return a small JSON file; None while it is not there."""
    try:
        with path.open("rb") as file:
            value = json.loads(file.read(4 << 20))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def second_choice(paths: list[str], recipe: str, text: bytes) -> list[tuple[str, str]]:
    """Return the links that make `%files` find what stands at the repository's root instead of beside the recipe.

    Pairs of (path inside the clone, what the link says). Works on the names that git knows, never on the clone itself,
    whose symlinks might lead to the hub's own files.

    Arguments:
        paths: all files of the commit.
    """
    folder = posixpath.dirname(recipe)
    if not folder:
        return []
    known = set(paths)
    for path in paths:
        while path := posixpath.dirname(path):
            if path in known:
                break
            known.add(path)
    links: dict[str, str] = {}
    for stage in parse(text, recipe).stages:
        for app in ("", *stage.apps):
            for pair in file_pairs(stage, recipe, app):
                name = posixpath.normpath(pair.source)
                if pair.stage or name.startswith(("/", "..")) or name == ".":
                    continue
                if _matching(known, posixpath.join(folder, name)):
                    continue
                for inside in _matching(known, name):
                    place = posixpath.join(folder, inside)
                    links[place] = posixpath.relpath(inside, posixpath.dirname(place))
    return list(links.items())[:10_000]


def _matching(known: set[str], pattern: str) -> list[str]:
    if not any(letter in pattern for letter in "*?["):
        return [pattern] if pattern in known else []
    parts = pattern.split("/")
    return sorted(
        path
        for path in known
        if path.count("/") == len(parts) - 1 and all(map(fnmatch.fnmatchcase, path.split("/"), parts))
    )


def _plain_links(source: Path, links: list[tuple[str, str]]) -> None:
    for name, to in links:
        path = source / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not os.path.lexists(path):
            path.symlink_to(to)
