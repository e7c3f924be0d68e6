# SPDX-License-Identifier: Apache-2.0
"""A push becomes an image: the whole line with real git, real processes, a stand-in builder."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import signal
import subprocess
import time
import urllib.request

from .world import RECIPE, Repository, Server, wait_for


def push(server: Server, collection: dict, repository: Repository, before: str, after: str, **headers: str):
    body = json.dumps({"ref": "refs/heads/main", "before": before, "after": after, "repository": {"id": 7}}).encode()
    proof = "sha256=" + hmac.new(collection["webhook_secret"].encode(), body, hashlib.sha256).hexdigest()
    path = collection["webhook_url"].partition(str(server.port))[2]
    sent = {"X-GitHub-Event": "push", "X-Hub-Signature-256": proof, "Content-Type": "application/json", **headers}
    return server.post(path, body, headers=sent, token="")


def test_push_becomes_an_image(server: Server, repository: Repository):
    first = repository.commit({"Singularity": RECIPE})
    made = server.post("/api/v1/collections", {"name": "lab/tools", "git_url": f"file://{repository.path}"})
    assert made.status == 201, made.text
    collection = made.json
    builds = wait_for(lambda: server.get("/api/v1/builds?collection=lab/tools").json["builds"], what="a build")
    build = server.ended(builds[0]["id"])
    log = server.get(f"/api/v1/builds/{build['id']}/log").text
    assert build["state"] == "done", log
    assert (build["recipe"], build["tag"], build["commit"], build["branch"]) == ("Singularity", "latest", first, "main")
    assert "hello from post" in log

    second = repository.commit({"envs/Singularity.gpu": RECIPE.replace("hello", "gpu")})
    started = time.monotonic()
    answer = push(server, collection, repository, first, second)
    assert answer.status == 202
    assert time.monotonic() - started < 2
    found = wait_for(
        lambda: [one for one in server.get("/api/v1/builds?collection=lab/tools").json["builds"] if one["tag"] == "gpu"]
    )
    assert server.get(f"/api/v1/builds/{found[0]['id']}/log").text.startswith("Build")
    assert time.monotonic() - started < 2
    gpu = server.ended(found[0]["id"])
    assert gpu["state"] == "done"

    image = server.get("/api/v1/images/lab/tools:gpu").json
    assert image["labels"]["KIND"] == "test"
    assert image["commit"] == second
    assert image["provenance"]["subject"][0]["digest"]["sha256"] == image["sha256"]
    assert len(server.get("/api/v1/images/lab/tools").json["images"]) == 2


def events_of(server: Server, build: int, headers: dict[str, str]) -> list[tuple[str, int, str]]:
    text = server.get(f"/api/v1/builds/{build}/log/stream", headers=headers).text
    found = []
    for block in text.split("\n\n"):
        fields = [line.partition(": ")[::2] for line in block.splitlines() if not line.startswith(("retry", ":"))]
        if fields:
            data = "\n".join(value for name, value in fields if name == "data")
            found.append((dict(fields).get("event", "message"), int(dict(fields)["id"]), data))
    return found


def test_stream_continues_at_any_offset_and_ends_with_the_state(server: Server, repository: Repository):
    repository.commit(
        {"Singularity": RECIPE.replace("echo hello", "for i in 1 2 3; do echo $i; sleep 0.3; done; echo ")}
    )
    server.post("/api/v1/collections", {"name": "lab/tools", "git_url": f"file://{repository.path}"})
    builds = wait_for(lambda: server.get("/api/v1/builds?collection=lab/tools").json["builds"])
    events = events_of(server, builds[0]["id"], {})
    log = server.get(f"/api/v1/builds/{builds[0]['id']}/log").text
    assert events[-1][0] == "state"
    assert events[-1][2] == "done"
    assert "\n".join(data for kind, _, data in events if kind == "message") + "\n" == log
    middle = next(number for kind, number, _ in events if kind == "message")
    again = events_of(server, builds[0]["id"], {"Last-Event-ID": str(middle)})
    assert "\n".join(data for kind, _, data in again if kind == "message") + "\n" == log[middle:]


def test_log_of_a_running_build_is_whole_at_every_moment_and_in_parts(server: Server, repository: Repository):
    repository.commit(
        {"Singularity": RECIPE.replace("echo hello", "for i in $(seq 3000); do echo line $i; done; sleep 1; echo")}
    )
    build = server.connect(repository)
    before = b""
    while server.get(f"/api/v1/builds/{build['id']}").json["finished_at"] is None:
        answer = server.get(f"/api/v1/builds/{build['id']}/log")
        assert len(answer.body) == int(answer.headers["Content-Length"])
        assert answer.body.startswith(before)
        before = answer.body
    whole = server.get(f"/api/v1/builds/{build['id']}/log").body
    part = server.get(f"/api/v1/builds/{build['id']}/log", headers={"Range": "bytes=100-199"})
    assert (part.status, part.body) == (206, whole[100:200])
    assert part.headers["Content-Range"] == f"bytes 100-199/{len(whole)}"
    end = server.get(f"/api/v1/builds/{build['id']}/log", headers={"Range": f"bytes={len(whole)}-"})
    assert (end.status, end.headers["Content-Range"]) == (416, f"bytes */{len(whole)}")
    again = server.post(f"/api/v1/builds/{build['id']}/retry").json
    assert server.log(again["id"]).startswith(f"Build {again['id']} of lab/tools:latest")


def test_reader_who_comes_back_again_and_again_misses_nothing(server: Server, repository: Repository):
    repository.commit(
        {"Singularity": RECIPE.replace("echo hello", "for i in $(seq 200); do echo line $i; sleep 0.02; done; echo")}
    )
    build = server.connect(repository)
    got, last = "", 0
    for _ in range(200):
        kind, last, data = one_event(server, build["id"], last)
        if kind == "message":
            got += data + "\n"
        if kind == "state" and data == "done":
            break
    assert got == server.log(build["id"])


def one_event(server: Server, build: int, offset: int) -> tuple[str, int, str]:
    """Return the first event behind an offset that is worth something, and go away in the middle of the stream."""
    request = urllib.request.Request(
        f"{server.url}/api/v1/builds/{build}/log/stream",
        headers={"Authorization": f"Bearer {server.token}", "Last-Event-ID": str(offset)},
    )
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30) as answer:
        fields: list[tuple[str, str]] = []
        for raw in answer:
            line = raw.decode().rstrip("\n")
            if line:
                fields.append(line.partition(": ")[::2])
                continue
            names = dict(fields)
            data = "\n".join(value for name, value in fields if name == "data")
            fields = []
            if "id" in names and (names.get("event") != "state" or data == "done"):
                return names.get("event", "message"), int(names["id"]), data
    return "end", offset, ""


def test_limits_of_a_collection_hold_for_its_builds(server: Server, repository: Repository):
    repository.commit({"Singularity": RECIPE.replace("echo hello", "sleep 60; echo")})
    server.post("/api/v1/collections", {"name": "lab/tools"})
    wrong = server.request("PATCH", "/api/v1/collections/lab/tools", {"limits": {"disk": 1}})
    assert wrong.status in (400, 422)
    value = {"limits": {"seconds": 2}, "git_url": f"file://{repository.path}"}
    assert server.request("PATCH", "/api/v1/collections/lab/tools", value).json["limits"] == {"seconds": 2}
    server.post("/api/v1/collections/lab/tools/resync")
    build = server.ended(wait_for(lambda: server.builds(), what="a build")[0]["id"])
    assert (build["state"], build["error_id"]) == ("timed_out", "time-limit")


def test_cancel_ends_a_running_build(server: Server, repository: Repository):
    repository.commit({"Singularity": RECIPE.replace("echo hello", "sleep 60; echo")})
    server.post("/api/v1/collections", {"name": "lab/tools", "git_url": f"file://{repository.path}"})
    builds = wait_for(lambda: server.get("/api/v1/builds?collection=lab/tools&state=building").json["builds"])
    assert server.post(f"/api/v1/builds/{builds[0]['id']}/cancel").status == 202
    assert server.ended(builds[0]["id"])["state"] == "cancelled"


def test_build_of_a_killed_hub_is_built_by_the_next(server: Server, repository: Repository):
    repository.commit({"Singularity": RECIPE.replace("echo hello", "sleep 2; echo")})
    server.post("/api/v1/collections", {"name": "lab/tools", "git_url": f"file://{repository.path}"})
    builds = wait_for(lambda: server.get("/api/v1/builds?collection=lab/tools&state=building").json["builds"])
    family = subprocess.run(["pgrep", "-P", str(server.process.pid)], capture_output=True, text=True).stdout.split()
    for pid in family:  # the robot must not get the chance to hand its build back
        os.kill(int(pid), signal.SIGKILL)
    server.stop(signal.SIGKILL)
    server.start()
    build = server.ended(builds[0]["id"])
    assert build["state"] == "done", build["reason"]
    assert build["attempt"] == 2


def test_build_of_a_stopped_hub_is_built_by_the_next(server: Server, repository: Repository):
    repository.commit({"Singularity": RECIPE.replace("echo hello", "sleep 2; echo")})
    server.post("/api/v1/collections", {"name": "lab/tools", "git_url": f"file://{repository.path}"})
    builds = wait_for(lambda: server.get("/api/v1/builds?collection=lab/tools&state=building").json["builds"])
    server.stop()
    server.start()
    build = server.ended(builds[0]["id"])
    assert build["state"] == "done", build["reason"]
    assert build["attempt"] == 1


def test_recipes_see_nothing_of_the_hub(server: Server, repository: Repository):
    script = f"ls {server.data} && exit 1; ls -A /root | grep . && exit 1; env | grep -i token && exit 1\n"
    script += "    cat /proc/*/environ | tr '\\0' '\\n' | grep SINGULARITY_HUB && exit 1\n"
    script += f"    python3 -c 'import socket; socket.create_connection((\"127.0.0.1\", {server.port}), 3)' && exit 1\n"
    script += f"    http_proxy= curl -sf -x $https_proxy http://127.0.0.1:{server.port}/healthz && exit 1\n"
    script += "    curl -sf http://169.254.169.254/latest/ && exit 1\n"
    script += "    touch /source/x && exit 1\n    id -u\n    echo inside"
    repository.commit({"Singularity": RECIPE.replace("echo hello from post", script)})
    server.post("/api/v1/collections", {"name": "lab/tools", "git_url": f"file://{repository.path}"})
    builds = wait_for(lambda: server.get("/api/v1/builds?collection=lab/tools").json["builds"])
    build = server.ended(builds[0]["id"])
    log = server.get(f"/api/v1/builds/{build['id']}/log").text
    assert build["state"] == "done", log
    assert "may not be reached from builds" in log
