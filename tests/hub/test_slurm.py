# SPDX-License-Identifier: Apache-2.0
"""Builds on a cluster: a real Slurm of one node, a hub that runs as an ordinary user, a stand-in builder."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from users import User

from .conftest import make_data, started
from .slurm import Cluster
from .world import RECIPE, Repository, Server, wait_for

pytestmark = [pytest.mark.slurm, pytest.mark.root]
SLOW = RECIPE.replace("echo hello from post", "for i in $(seq 60); do echo line $i; sleep 0.2; done")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A running Slurm."""
    if os.geteuid() != 0:
        pytest.skip("a Slurm of the tests' own needs root")
    for name in ("munged", "slurmctld", "slurmd", "sbatch"):
        if shutil.which(name, path="/usr/sbin:/sbin:/usr/bin") is None:
            pytest.skip(f"needs Debian's Slurm ({name}): apt install slurmctld slurmd slurm-client munge")
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/var/tmp"))
    cluster = Cluster(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def scratch() -> str:
    """Folder on the nodes; tests that want one overrule it."""
    return ""


@pytest.fixture
def server(cluster: Cluster, as_subuid_user: User, scratch: str) -> Iterator[Server]:
    """A hub of an ordinary user that builds on the cluster."""
    cluster.ready()
    settings = f"""
[builds.slurm]
partition = "other"
account = "lab"
constraint = "fast"
cpus = 1
poll = 0.5
scratch = "{scratch}"
"""
    builds = 'engine = "slurm"\nworkers = 2\nmemory_limit = 536870912\ntime_limit = 600\nattempts = 3'
    data = make_data(as_subuid_user.tmp, builds, settings)
    for path in [data, *data.rglob("*")]:
        as_subuid_user.own(path)
    server = started(data, None)
    server.stop()
    for path in data.rglob("*"):
        as_subuid_user.own(path)
    server.user = as_subuid_user
    server.environ = {"SLURM_CONF": str(cluster.configuration)}
    server.start()
    yield server
    server.stop()


@pytest.fixture
def repository(as_subuid_user: User) -> Repository:
    """A repository that the hub's account can read."""
    return Repository(as_subuid_user.tmp / "repository", as_subuid_user)


def in_state(server: Server, number: int, *states: str, seconds: float = 60.0) -> dict:
    def look() -> dict | None:
        build = server.get(f"/api/v1/builds/{number}").json
        assert build["state"] in states or build["finished_at"] is None, (build, server.log(number))
        return build if build["state"] in states else None

    try:
        return wait_for(look, seconds, f"build {number} to be {states}")
    except AssertionError as error:
        raise AssertionError(server.get(f"/api/v1/builds/{number}").json, server.log(number)) from error


def test_build_runs_as_a_job_with_what_the_settings_ask_for(cluster: Cluster, server: Server, repository: Repository):
    repository.commit({"Singularity": RECIPE.replace("echo hello", "sleep 2; echo hello")})
    build = server.connect(repository)
    build = in_state(server, build["id"], "building")
    job = cluster.call("scontrol", "show", "job", build["job"])
    for expected in ("Partition=other", "Account=lab", "Features=fast", "TimeLimit=00:15:00", "Requeue=0"):
        assert expected in job
    assert "MinMemoryNode=512M" in job
    assert f"UserId={server.user.name}({server.user.uid})" in job
    build = server.ended(build["id"])
    log = server.log(build["id"])
    assert build["state"] == "done", log
    assert (build["engine"], build["node"]) == ("slurm", os.uname().nodename)
    assert f"Job {build['job']} on" in log
    assert "hello from post" in log
    assert server.get("/api/v1/images/lab/tools").json["images"][0]["labels"] == {"KIND": "test"}


@pytest.mark.long
def test_log_is_followed_while_the_job_runs(cluster: Cluster, server: Server, repository: Repository):
    repository.commit({"Singularity": SLOW})
    build = server.connect(repository)
    in_state(server, build["id"], "building")
    wait_for(lambda: "line 3\n" in server.log(build["id"]), what="a line of the running job")
    assert "line 60\n" not in server.log(build["id"])
    assert server.post(f"/api/v1/builds/{build['id']}/cancel").status == 202


def test_cancel_takes_the_job_away(cluster: Cluster, server: Server, repository: Repository):
    repository.commit({"Singularity": SLOW})
    build = in_state(server, server.connect(repository)["id"], "building")
    server.post(f"/api/v1/builds/{build['id']}/cancel")
    assert server.ended(build["id"])["state"] == "cancelled"
    wait_for(lambda: f"{build['job']} " not in cluster.call("squeue", "--noheader", "--format=%i "))


def test_waiting_job_says_why_and_is_cancelled_without_ever_running(
    cluster: Cluster, server: Server, repository: Repository
):
    cluster.call("scontrol", "update", f"nodename={cluster.host}", "state=drain", "reason=test")
    try:
        repository.commit({"Singularity": RECIPE})
        build = server.connect(repository)
        found = wait_for(
            lambda: (one := server.get(f"/api/v1/builds/{build['id']}").json)["reason"] and one, what="a reason"
        )
        assert found["state"] == "cloning"
        assert "waits in Slurm" in found["reason"]
        server.post(f"/api/v1/builds/{build['id']}/cancel")
        assert server.ended(build["id"])["state"] == "cancelled"
        assert "hello" not in server.log(build["id"])
    finally:
        cluster.call("scontrol", "update", f"nodename={cluster.host}", "state=resume")


@pytest.mark.parametrize("how", ["stopped", "killed"])
def test_job_goes_on_without_its_hub_and_its_result_is_taken(
    cluster: Cluster, server: Server, repository: Repository, how: str
):
    repository.commit({"Singularity": RECIPE.replace("echo hello", "sleep 3; echo hello")})
    build = in_state(server, server.connect(repository)["id"], "building")
    server.stop() if how == "stopped" else server.kill()
    wait_for(lambda: f"{build['job']} " not in cluster.call("squeue", "--noheader", "--format=%i "), what="its end")
    server.start()
    ended = server.ended(build["id"])
    assert ended["state"] == "done", server.log(build["id"])
    assert ended["job"] == build["job"]
    assert server.log(build["id"]).count("hello from post") == 1


@pytest.mark.long
def test_build_of_a_lost_node_is_built_again(cluster: Cluster, server: Server, repository: Repository):
    repository.commit({"Singularity": SLOW.replace("seq 60", "seq 20")})
    build = in_state(server, server.connect(repository)["id"], "building")
    cluster.end("slurmd", kill=True)
    # The node is gone with everything on it, also what keeps the job there.
    for pid in processes_of(f"[{build['job']}.batch]") + processes_of(str(server.data / "work" / str(build["id"]))):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    cluster.call("scontrol", "update", f"nodename={cluster.host}", "state=down", "reason=gone")
    wait_for(lambda: server.get(f"/api/v1/builds/{build['id']}").json["job"] != build["job"], 40, "a second job")
    cluster.start_node()
    ended = server.ended(build["id"], 60)
    log = server.log(build["id"])
    assert ended["state"] == "done", log
    assert ended["attempt"] == 2
    assert "Slurm says: NODE_FAIL" in log
    assert "line 20\n" in log


def processes_of(mark: str) -> list[int]:
    found = subprocess.run(["pgrep", "--full", "--", mark.replace("[", r"\[")], capture_output=True, text=True)
    return [int(pid) for pid in found.stdout.split() if int(pid) != os.getpid()]


@pytest.mark.long
def test_controller_that_is_away_loses_no_build(cluster: Cluster, server: Server, repository: Repository):
    repository.commit({"Singularity": RECIPE.replace("echo hello", "sleep 4; echo hello")})
    build = in_state(server, server.connect(repository)["id"], "building")
    cluster.end("slurmctld", kill=True)
    try:
        ended = server.ended(build["id"], 60)
    finally:
        cluster.daemon("slurmctld", "-D", "-f", str(cluster.configuration))
        cluster.ready()
    assert ended["state"] == "done", server.log(build["id"])
    assert ended["attempt"] == 1


@pytest.mark.long
def test_job_that_somebody_else_ended_is_submitted_again(cluster: Cluster, server: Server, repository: Repository):
    repository.commit({"Singularity": RECIPE.replace("echo hello", "sleep 3; echo hello")})
    build = in_state(server, server.connect(repository)["id"], "building")
    cluster.call("scancel", build["job"])
    ended = server.ended(build["id"], 60)
    assert ended["state"] == "done", server.log(build["id"])
    assert ended["attempt"] == 2


class TestScratch:
    """Builds on the node's own disk."""

    @pytest.fixture
    def scratch(self) -> Iterator[str]:
        folder = tempfile.mkdtemp(prefix="node-", dir="/var/tmp")
        os.chmod(folder, 0o1777)
        yield folder
        shutil.rmtree(folder)

    def test_builds_work_there_and_leave_nothing(
        self, cluster: Cluster, server: Server, repository: Repository, scratch: str
    ):
        home = Path(scratch) / f"hub-{server.user.uid}"
        left = home / "7-dead"
        left.mkdir(parents=True)
        (home / "7-dead.lock").touch()
        for path in (home, left, home / "7-dead.lock"):
            server.user.own(path)
        repository.commit(
            {"Singularity": RECIPE.replace("echo hello", "echo x > /scratch/tmp/here; sleep 2; echo hello")}
        )
        build = in_state(server, server.connect(repository)["id"], "building")
        wait_for(lambda: list(home.glob("*/tmp/here")), what="the build's file on the node")
        assert not left.exists()
        ended = server.ended(build["id"])
        assert ended["state"] == "done", server.log(build["id"])
        assert list(home.iterdir()) == []


@pytest.mark.long
def test_refusal_of_the_cluster_is_the_builds_reason(cluster: Cluster, server: Server, repository: Repository):
    settings = server.data / "hub.toml"
    server.stop()
    settings.write_text(settings.read_text().replace('constraint = "fast"', 'constraint = "nowhere"'))
    server.start()
    repository.commit({"Singularity": RECIPE})
    ended = server.ended(server.connect(repository)["id"])
    assert ended["state"] == "failed"
    assert "feature" in ended["reason"].lower()
