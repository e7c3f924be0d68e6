# SPDX-License-Identifier: Apache-2.0
"""One command, one tree of processes: it starts from nothing, replaces its dead, and ends with all of them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from .conftest import make_data, started
from .world import COMMAND, RECIPE, Repository, Server, wait_for


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_serve_starts_from_nothing_and_says_what_is_next(tmp_path: Path):
    server = Server(tmp_path / "new" / "hub")
    with (tmp_path / "errors").open("wb") as errors:
        server.process = subprocess.Popen(
            [*COMMAND, "serve", "--data", str(server.data), "--port", str(server.port)],
            stdout=subprocess.PIPE, stderr=errors, text=True,
        )  # fmt: skip
    try:
        assert server.process.stdout is not None
        assert f"http://127.0.0.1:{server.port}" in server.process.stdout.readline()
        wait_for(lambda: server._up(), what="an answer")
        assert "user add" in (tmp_path / "errors").read_text()
        assert server.data.stat().st_mode & 0o077 == 0
    finally:
        server.stop()


def test_serve_fills_no_folder_of_somebody_else(tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("x")
    result = subprocess.run([*COMMAND, "serve", "--data", str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert result.returncode != 0
    assert "init" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_port_that_is_taken_is_said_at_once(data: Path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        words = [*COMMAND, "serve", "--data", str(data), "--port", str(other.getsockname()[1])]
        result = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert result.returncode != 0
    assert "--port" in result.stderr


@pytest.fixture
def wide(tmp_path: Path):
    """A hub with three web processes."""
    data = make_data(tmp_path)
    settings = data / "hub.toml"
    settings.write_text("processes = 3\n" + settings.read_text())
    server = started(data)
    yield server
    server.stop()


def test_dead_processes_are_replaced_and_builds_go_on(wide: Server, tmp_path: Path):
    family = wide.family()
    assert len(family) == 5  # the parent, three that answer, one that builds
    repository = Repository(tmp_path / "repository")
    repository.commit({"Singularity": RECIPE.replace("echo hello", "sleep 3; echo hello")})
    build = wide.connect(repository)
    wait_for(lambda: wide.get(f"/api/v1/builds/{build['id']}").json["state"] == "building", what="building")
    for pid in family[1:]:
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: len(set(wide.family()) - set(family)) == 4, 30, "four new processes")
    wait_for(lambda: wide._up(), what="an answer")
    ended = wide.ended(build["id"], 60)
    assert ended["state"] == "done", wide.log(build["id"])


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.long), signal.SIGKILL]
)
def test_all_of_it_ends_with_its_parent(wide: Server, tmp_path: Path, number: signal.Signals):
    repository = Repository(tmp_path / "repository")
    repository.commit({"Singularity": RECIPE.replace("echo hello", "sleep 3000.66; echo hello")})
    build = wide.connect(repository)
    wait_for(lambda: "sleep" in wide.log(build["id"]) or wide.builds(query="&state=building"), what="building")
    family = wide.family()
    wide.stop(number)
    wait_for(lambda: not any(alive(pid) for pid in family), 20, "the end of all processes")
    found = ["pgrep", "--full", "sleep 3000.66"]
    wait_for(lambda: subprocess.run(found, capture_output=True).returncode == 1, 20, "the end of the build")
    wide.start()
    state = wide.get(f"/api/v1/builds/{build['id']}").json["state"]
    assert state in ("queued", "claimed", "cloning", "building")
