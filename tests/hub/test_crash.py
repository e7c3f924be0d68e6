# SPDX-License-Identifier: Apache-2.0
"""kill -9 in every state: each build ends in a true state, once, and nothing is served that was not verified."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import sqlalchemy as sa

from pysingularity.hub.builds.log import log_path
from pysingularity.hub.builds.planning import look
from pysingularity.hub.builds.queue import cancel
from pysingularity.hub.builds.run import Run
from pysingularity.hub.builds.states import ACTIVE, FINAL, LostLease, move
from pysingularity.hub.context import Hub
from pysingularity.hub.engines.local import LocalEngine
from pysingularity.hub.keeping.scrub import scrub
from pysingularity.hub.models import Blob, Build, Collection, Image
from pysingularity.hub.robots import Robots, reclaim

from .world import RECIPE, Repository, made_collection, wait_for

#: A robot that is killed as soon as a build is in a state, by nobody but itself: no handler, no clean-up.
VICTIM = """
import os, signal, sys, threading
from pysingularity.hub import robots
from pysingularity.hub.builds import run
from pysingularity.hub.context import Hub
from pysingularity.hub.settings import load_settings

data, fatal = sys.argv[1:]

def move(session, build_id, to, **fields):
    real(session, build_id, to, **fields)
    if to == fatal:
        if fatal != "done":
            session.commit()
        os.kill(os.getpid(), signal.SIGKILL)

real, run.move = run.move, move
if fatal == "claimed":
    run.Run.run = lambda self: os.kill(os.getpid(), signal.SIGKILL)
robots.run(Hub(load_settings(data)), threading.Event())
"""


@contextmanager
def robots(hub: Hub) -> Iterator[Robots]:
    """Robots in this process."""
    reclaim(hub)
    working = Robots(hub)
    working.start()
    try:
        yield working
    finally:
        working.stop()


def load(hub: Hub, number: int) -> Build:
    with hub.read() as session:
        return session.get_one(Build, number)


def ended(hub: Hub, number: int) -> Build:
    return wait_for(lambda: (build := load(hub, number)).state in FINAL and build, 60, "the end of the build")


def log(hub: Hub, number: int) -> str:
    return log_path(hub.settings.folder("logs"), number).read_text()


@pytest.fixture
def collection(hub: Hub, repository: Repository) -> Collection:
    return made_collection(hub, repository)


def queued(hub: Hub, collection: Collection, repository: Repository, recipe: str = RECIPE) -> int:
    repository.commit({"Singularity": recipe})
    return look(hub, collection.id).builds[-1]


@pytest.mark.parametrize("fatal", [*ACTIVE, "done"])
def test_build_of_a_killed_robot_is_done_once_by_the_next(
    hub: Hub, collection: Collection, repository: Repository, fatal: str
):
    number = queued(hub, collection, repository)
    victim = subprocess.run(
        [sys.executable, "-c", VICTIM, str(hub.settings.data), fatal], timeout=60, check=False, capture_output=True
    )
    assert victim.returncode == -signal.SIGKILL, victim.stderr.decode()
    # Killed in the transaction that publishes, nothing of it has happened.
    assert load(hub, number).state == (fatal if fatal != "done" else "uploading")
    with hub.read() as session:
        assert session.scalars(sa.select(Image.id)).all() == []
    with robots(hub):
        build = ended(hub, number)
        assert build.state == "done", log(hub, number)
        assert build.attempt == 2
        wait_for(lambda: not list(hub.settings.folder("work").iterdir()), what="an empty working folder")
    with hub.read() as session:
        images = session.scalars(sa.select(Image)).all()
        assert [image.id for image in images] == [build.image_id]
        assert session.get(Blob, images[0].blob) is not None
    assert scrub(hub)["damaged"] == {}
    assert log(hub, number).endswith("Done\n")


def test_job_that_is_killed_fails_its_build_and_says_so(hub: Hub, collection: Collection, repository: Repository):
    number = queued(hub, collection, repository, RECIPE.replace("echo hello", "sleep 30; echo"))
    with robots(hub):
        wait_for(lambda: load(hub, number).state == "building", what="building")
        os.kill(int(load(hub, number).job.partition("-")[0]), signal.SIGKILL)
        build = ended(hub, number)
    assert (build.state, build.error_id) == ("failed", "job-lost")
    assert "without a result" in log(hub, number)


def test_job_that_is_asked_to_end_by_somebody_else_is_tried_again(
    hub: Hub, collection: Collection, repository: Repository
):
    number = queued(hub, collection, repository, RECIPE.replace("echo hello", "sleep 3; echo"))
    with robots(hub):
        wait_for(lambda: load(hub, number).state == "building", what="building")
        os.kill(int(load(hub, number).job.partition("-")[0]), signal.SIGTERM)
        build = ended(hub, number)
    assert (build.state, build.attempt) == ("done", 2), log(hub, number)


def test_worker_without_its_lease_gives_way_and_spoils_nothing(
    hub: Hub, collection: Collection, repository: Repository
):
    number = queued(hub, collection, repository, RECIPE.replace("echo hello", "sleep 2; echo"))
    from pysingularity.hub.builds.queue import claim

    with hub.write() as session:
        assert claim(session, worker="first", lease=60) == number
    engine, problems = LocalEngine(), []

    def first() -> None:
        try:
            Run(hub, engine, number, "first", threading.Event()).run()
        except LostLease as error:
            problems.append(error)

    thread = threading.Thread(target=first)
    thread.start()
    wait_for(lambda: load(hub, number).state == "building", what="building")
    with hub.write() as session:
        session.execute(sa.update(Build).values(state="queued", worker=""))
    with robots(hub):
        build = ended(hub, number)
    thread.join(30)
    engine.close()
    assert len(problems) == 1
    assert build.state == "done", log(hub, number)
    assert build.worker != "first"


def test_collection_that_is_removed_takes_its_running_build_along(
    hub: Hub, collection: Collection, repository: Repository
):
    number = queued(hub, collection, repository, RECIPE.replace("echo hello", "sleep 3000.99; echo"))
    with robots(hub):
        wait_for(lambda: load(hub, number).state == "building", what="building")
        with hub.write() as session:
            session.execute(sa.delete(Collection))
        found = ["pgrep", "--full", "sleep 3000.99"]
        wait_for(lambda: subprocess.run(found, capture_output=True).returncode == 1, what="the end of its processes")
        wait_for(lambda: not list(hub.settings.folder("work").iterdir()), 30, what="an empty working folder")


def test_cancel_at_the_last_moment_publishes_nothing_or_all(
    hub: Hub, collection: Collection, repository: Repository, monkeypatch: pytest.MonkeyPatch
):
    from pysingularity.hub.builds import run

    number = queued(hub, collection, repository)

    def pressed(session: object, build_id: int, to: str, **fields: object) -> None:
        move(session, build_id, to, **fields)  # type: ignore[arg-type]
        if to == "uploading":
            cancel(session, build_id, by="me")  # type: ignore[arg-type]

    monkeypatch.setattr(run, "move", pressed)
    with robots(hub):
        build = ended(hub, number)
    assert build.state == "cancelled"
    with hub.read() as session:
        assert session.scalars(sa.select(Image.id)).all() == []


def test_secrets_of_a_collection_are_masked_in_its_logs(hub: Hub, collection: Collection, repository: Repository):
    script = f"echo secret is {collection.hook_secret} and https://me:word@host/"
    number = queued(hub, collection, repository, RECIPE.replace("echo hello from post", script))
    with robots(hub):
        assert ended(hub, number).state == "done"
    assert collection.hook_secret not in log(hub, number)
    assert "me:word" not in log(hub, number)
    assert "secret is [secret] and https://[secret]@host/" in log(hub, number)


# --- what the hub believes -------------------------------------------------------------------------------------------


def odd(folder: Path) -> dict[str, Path]:
    """Return things that are no image, by what they are."""
    (folder / "text").write_text("no image")
    (folder / "empty").touch()
    (folder / "whole").write_bytes(b"x" * 1000)
    (folder / "link").symlink_to("/etc/passwd")
    (folder / "hard").hardlink_to(folder / "whole")
    (folder / "folder").mkdir()
    os.mkfifo(folder / "fifo")
    return {path.name: path for path in folder.iterdir()} | {"missing": folder / "missing"}


def test_only_sound_files_of_their_own_are_taken(hub: Hub, tmp_path: Path):
    from pysingularity.hub.builds.accept import NotBelieved, examine, take_copy
    from pysingularity.hub.errors import TooLarge

    folder = tmp_path / "out"
    folder.mkdir()
    for name, path in odd(folder).items():
        try:
            copy = take_copy(path, hub.storage, limit=1 << 20)
        except NotBelieved:
            assert name in ("link", "hard", "whole", "folder", "fifo", "missing"), name
            continue
        with pytest.raises(NotBelieved):
            examine(copy)
        copy.unlink()
    with pytest.raises(TooLarge):
        take_copy(folder / "text", hub.storage, limit=3)
    assert list(hub.storage.staging().iterdir()) == []


@pytest.mark.parametrize("cut", [10, 128, 4096, 5000, -1, -4096])
def test_truncated_images_are_refused(tmp_path: Path, cut: int):
    from pysingularity.hub.builds.accept import NotBelieved, examine

    from .shelf import make_sif

    path = make_sif(tmp_path / "x.sif", pad=100_000)
    assert examine(path).arch == "amd64"
    data = path.read_bytes()
    path.write_bytes(data[:cut])
    with pytest.raises(NotBelieved):
        examine(path)


def test_builder_that_lies_about_its_image_is_not_believed(
    hub: Hub, collection: Collection, repository: Repository, tmp_path: Path
):
    """A builder that was taken over says "built" and leaves something else."""
    evil = tmp_path / "evil.py"
    evil.write_text(
        "import sys, os\n"
        "if 'build' in sys.argv:\n"
        "    image = [w for w in sys.argv if w.endswith('.sif')][0]\n"
        "    os.symlink('/proc/self/environ', image)\n"
    )
    hub.settings.builds.program = [sys.executable, "-I", str(evil)]
    hub.settings.builds.readable = [str(tmp_path / "evil.py")]
    number = queued(hub, collection, repository)
    with robots(hub):
        build = ended(hub, number)
    assert (build.state, build.error_id) == ("failed", "no-result"), log(hub, number)
    with hub.read() as session:
        assert session.scalars(sa.select(Image.id)).all() == []
