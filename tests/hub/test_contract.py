# SPDX-License-Identifier: Apache-2.0
"""The contract that other people's programs rely on, line by line: commands, fields, states, errors, addresses."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import urllib.parse
import urllib.request
from pathlib import Path

import pytest

from pysingularity.hub.api.reference import manual
from pysingularity.hub.app import describe
from pysingularity.hub.builds.states import ALL
from pysingularity.hub.context import Hub

from .shelf import make_sif, put_image
from .test_pages import put_build
from .world import COMMAND, RECIPE, Repository, Server, wait_for

STATES = "queued claimed cloning building testing uploading done failed cancelled timed_out superseded skipped".split()


@pytest.fixture
def server(clean: tuple[Server, Hub]) -> Server:
    return clean[0]


@pytest.fixture
def hub(clean: tuple[Server, Hub]) -> Hub:
    return clean[1]


@pytest.fixture
def repository(server: Server, tmp_path: Path) -> Repository:
    """A repository in the folder from which the running hub may clone."""
    return Repository(server.data.parent / f"repository-{tmp_path.name}")


def raw(server: Server, text: str) -> tuple[int, dict[str, str], bytes]:
    """Send bytes as they are and return (status, headers, body)."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(text.replace("\n", "\r\n").encode())
        data = b""
        while piece := connection.recv(1 << 16):
            data += piece
    head, _, body = data.partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
    return int(lines[0].split()[1]), headers, body


# --- commands --------------------------------------------------------------------------------------------------------


def test_commands_print_what_scripts_read(data: Path):
    repository = Repository(data.parent / "repository")
    server = Server(data)
    user = json.loads(
        server.command("user", "add", "Lab", "--admin", "--password-stdin", "--json", text="long enough\n")
    )
    assert (user["name"], user["admin"]) == ("lab", True)
    token = server.command("token", "create", "--user", "lab", "--scope", "read,push", "--expires", "30")
    assert re.fullmatch(r"\S{200,4096}\n", token)  # the token alone
    as_json = json.loads(server.command("token", "create", "--user", "lab", "--json"))
    assert as_json["scopes"] == ["read"]
    made = json.loads(
        server.command(
            "collection", "add", "lab/tools", "--git", f"file://{repository.path}", "--branch", "main", "--private"
        )
    )
    assert made["webhook_secret"]
    assert re.fullmatch(r"http://127\.0\.0\.1:8080/api/v1/hooks/\S+", made["webhook_url"])
    assert (made["private"], made["branches"], made["name"]) == (True, ["main"], "lab/tools")
    for words in (
        ("init",),
        ("user", "list"),
        ("token", "list"),
        ("collection", "list"),
        ("collection", "show", "lab/tools"),
        ("gc",),
        ("scrub",),
        ("settings",),
        ("token", "revoke", "1"),
        ("user", "block", "lab"),
        ("collection", "remove", "lab/tools"),
    ):
        json.loads(server.command(*words, "--json"))


def test_serve_says_where_it_listens(data: Path):
    words = [*COMMAND, "serve", "--data", str(data), "--port", "0", "--host", "127.0.0.1", "--json"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        said = json.loads(process.stdout.readline())
        assert said["name"] == "Test Hub"
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(said["url"] + "/healthz", timeout=60) as answer:
            assert json.load(answer)["status"] == "ok"
    finally:
        process.terminate()
        assert process.wait(60) == 0
        process.stdout.close()


# --- collections -----------------------------------------------------------------------------------------------------


def test_collections_are_made_listed_and_shown(server: Server):
    new = {"name": "lab/Tools", "git_url": "https://git.example.org/x.git", "branches": ["main", "v*"], "private": True}
    answer = server.post("/api/v1/collections", new)
    assert answer.status == 201
    made = answer.json
    assert isinstance(made["id"], int)
    assert made["webhook_url"].startswith(f"{server.url}/api/v1/hooks/")
    assert len(made["webhook_secret"]) >= 32
    listed = server.get("/api/v1/collections").json["collections"]
    assert [one["name"] for one in listed] == ["lab/tools"]
    assert "webhook_secret" not in listed[0]
    assert server.get("/api/v1/collections/lab/tools").json["id"] == made["id"]
    assert server.get("/api/v1/collections", token="").status == 200
    assert server.get("/api/v1/collections", token="").json["collections"] == []
    assert server.get("/api/v1/collections/lab/tools", token="").status == 404
    assert server.post("/api/v1/collections", new).status == 409
    assert server.post("/api/v1/collections", {**new, "name": "lab/x"}, token="").status == 401
    # the least that is asked for
    assert server.post("/api/v1/collections", {"name": "lab/least"}).status == 201


# --- builds ----------------------------------------------------------------------------------------------------------


def test_builds_have_the_fields_and_states_of_the_contract(server: Server, hub: Hub, tmp_path: Path):
    assert list(ALL) == STATES
    put_image(hub, make_sif(tmp_path / "a.sif"), "lab/tools", tags=["latest"])
    for state in STATES:
        put_build(hub, state=state, tag=f"of-{state}", branch="main", finished_at=None, worker="x", leased_until=1e12)
    rows = server.get("/api/v1/builds?collection=lab/tools").json["builds"]
    assert {row["state"] for row in rows} == set(STATES)
    for row in rows:
        assert {"id", "state", "recipe", "tag", "commit", "branch", "reason", "collection"} <= row.keys()
        assert server.get(f"/api/v1/builds/{row['id']}").json == row
    assert [row["tag"] for row in server.get("/api/v1/builds?state=failed,done").json["builds"]] == [
        "of-failed",
        "of-done",
    ]
    assert server.get("/api/v1/builds?state=nonsense").status == 400


def test_builds_are_started_cancelled_and_repeated(server: Server, repository: Repository):
    commit = repository.commit({"Singularity": RECIPE, "sub/Singularity.two": RECIPE})
    # building is off, so that only what is asked for happens
    server.post(
        "/api/v1/collections", {"name": "lab/tools", "branches": ["none"], "git_url": f"file://{repository.path}"}
    )
    answer = server.post("/api/v1/builds", {"collection": "lab/tools", "recipe": "sub/Singularity.two", "ref": "main"})
    assert answer.status == 201, answer.text
    build = answer.json
    assert (build["recipe"], build["tag"], build["commit"]) == ("sub/Singularity.two", "two", commit)
    assert server.ended(build["id"])["state"] == "done"
    again = server.post(f"/api/v1/builds/{build['id']}/retry")
    assert again.status == 201
    assert again.json["id"] != build["id"]
    assert server.ended(again.json["id"])["state"] == "done"
    assert server.post(f"/api/v1/builds/{build['id']}/cancel").status == 409
    assert server.post("/api/v1/builds/999999/cancel").status == 404
    assert server.post("/api/v1/builds", {"collection": "lab/tools", "ref": "main"}, token="").status == 401
    # text with ranges
    path = f"/api/v1/builds/{build['id']}/log"
    whole = server.get(path)
    assert whole.headers["Content-Type"].startswith("text/plain")
    part = server.get(path, headers={"Range": "bytes=6-15"})
    assert (part.status, part.body) == (206, whole.body[6:16])
    # the stream: ids are offsets, the last event is the state
    stream = server.get(path + "/stream")
    assert stream.headers["Content-Type"].startswith("text/event-stream")
    ids = [int(line[4:]) for line in stream.text.splitlines() if line.startswith("id: ")]
    assert ids == sorted(ids)
    assert ids[-1] == len(whole.body)
    last = stream.text.strip().split("\n\n")[-1].splitlines()
    assert last == ["event: state", f"id: {len(whole.body)}", "data: done"]


def test_a_stream_ends_soon_after_the_build_is_cancelled(server: Server, repository: Repository):
    repository.commit({"Singularity": RECIPE.replace("echo hello", "sleep 60; echo")})
    server.post("/api/v1/collections", {"name": "lab/tools", "git_url": f"file://{repository.path}"})
    found = wait_for(lambda: server.get("/api/v1/builds?collection=lab/tools&state=building").json["builds"])
    path = f"/api/v1/builds/{found[0]['id']}"
    assert server.post(path + "/cancel").status == 202
    assert server.get(path + "/log/stream").text.strip().endswith("data: cancelled")


# --- images ----------------------------------------------------------------------------------------------------------


def test_images_are_shown_frozen_compared_and_deleted(server: Server, hub: Hub, tmp_path: Path):
    one = put_image(hub, make_sif(tmp_path / "a.sif", "one"), "lab/tools", tags=["1"])
    two = put_image(hub, make_sif(tmp_path / "b.sif", "two"), "lab/tools", tags=["2", "latest"])
    listed = server.get("/api/v1/images/lab/tools").json["images"]
    assert [row["id"] for row in listed] == [two.id, one.id]
    assert server.get("/api/v1/images/lab/tools:1").json["id"] == one.id
    assert server.get("/api/v1/images/lab/tools:3").status == 404
    assert server.get(f"/api/v1/images/{one.id}").json["sha256"] == one.sha256
    frozen = server.post(f"/api/v1/images/{one.id}/freeze")
    assert (frozen.status, frozen.json["frozen"]) == (200, True)
    refused = server.request("DELETE", f"/api/v1/images/{one.id}")
    assert (refused.status, refused.json["error"]["id"]) == (409, "frozen")
    compared = server.get(f"/api/v1/images/{one.id}/compare/{two.id}").json
    assert compared["labels"]["changed"] == {"TEXT": {"before": "one", "after": "two"}}
    assert server.request("DELETE", f"/api/v1/images/{two.id}", token="").status == 401
    assert server.request("DELETE", f"/api/v1/images/{two.id}").status == 200
    assert server.get(f"/api/v1/images/{two.id}").status == 404
    assert server.get("/api/v1/images/lab/tools:2").status == 404


# --- errors, description, addresses ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "/api/v1/builds/0", None, 404),
        ("GET", "/api/v1/builds/word", None, 422),
        ("GET", "/api/v1/builds/99999999999999999999999", None, 422),
        ("GET", "/api/v1/collections/x", None, 404),
        ("GET", "/api/v1/nothing", None, 404),
        ("GET", "/api/v1/collections/lab/%00", None, 404),
        ("PUT", "/api/v1/collections", {}, 405),
        ("POST", "/api/v1/collections", {"name": "no-slash"}, 400),
        ("POST", "/api/v1/collections", {"name": "lab/x", "surprise": 1}, 422),
        ("POST", "/api/v1/collections", b"{", 422),
        ("POST", "/api/v1/collections", b"\xff\xfe", 422),
        ("POST", "/api/v1/hooks/unknown", {}, 404),
        ("GET", "/api/v1/collections?limit=0", None, 422),
    ],
)
def test_refusals_all_look_alike(server: Server, method: str, path: str, body: object, status: int):
    answer = server.request(method, path, body, headers={"Content-Type": "application/json"})
    assert answer.status == status, answer.text
    error = answer.json["error"]
    assert answer.json.keys() == {"error"}
    assert error["code"] == status
    assert re.fullmatch(r"[a-z][-a-z0-9]+", error["id"])
    assert error["message"]


def test_wrong_tokens_are_401_with_a_challenge(server: Server):
    for value in ("Bearer wrong", "Bearer ", "Basic !!!", "Basic " + "YTpi", "Digest x"):
        answer = server.get("/api/v1/user", headers={"Authorization": value}, token="")
        assert answer.status == 401, value
        assert answer.json["error"]["code"] == 401


def test_openapi_describes_every_route_and_how_they_refuse(server: Server):
    answer = server.get("/api/v1/openapi.json", token="")
    assert answer.status == 200
    paths = answer.json["paths"]
    for path, methods in {
        "/api/v1/collections": {"get", "post"},
        "/api/v1/collections/{owner}/{name}": {"get", "patch", "delete"},
        "/api/v1/builds": {"get", "post"},
        "/api/v1/builds/{number}": {"get"},
        "/api/v1/builds/{number}/cancel": {"post"},
        "/api/v1/builds/{number}/retry": {"post"},
        "/api/v1/builds/{number}/log": {"get"},
        "/api/v1/builds/{number}/log/stream": {"get"},
        "/api/v1/images/{owner}/{target}": {"get"},
        "/api/v1/images/{number}": {"get", "delete"},
        "/api/v1/images/{number}/freeze": {"post"},
        "/api/v1/images/{before}/compare/{after}": {"get"},
        "/healthz": {"get"},
        "/metrics": {"get"},
    }.items():
        assert paths[path].keys() == methods, path
    for methods in paths.values():
        for one in methods.values():
            assert one["description"]
            assert one["responses"]["404"]["content"]["application/json"]["schema"]["$ref"].endswith("/Refusal")


def test_reference_of_the_api_is_current():
    page = Path(__file__).parents[2] / "docs" / "reference" / "hub-api.md"
    assert page.read_text().splitlines() == manual(describe()), "run scripts/reference"


def test_absolute_request_lines_are_answered_for_the_host_asked_for(server: Server, hub: Hub, tmp_path: Path):
    put_image(hub, make_sif(tmp_path / "a.sif"), "lab/tools", tags=["v1"])
    for path, field in (
        ("/api/container/lab/tools:v1", "image"),
        ("/api/v1/images/lab/tools:v1", "download_url"),
        ("/api/v1/collections/lab/tools", "url"),
    ):
        line = f"GET http://hub.lab{path} HTTP/1.1\nHost: hub.lab\nAccept: application/json\nConnection: close\n\n"
        status, _, body = raw(server, line)
        assert status == 200
        assert json.loads(body)[field].startswith("http://hub.lab/")
        # and what was answered leads back here the same way
        target = json.loads(body)[field]
        line = f"GET {target} HTTP/1.1\nHost: hub.lab\nConnection: close\n\n"
        assert raw(server, line)[0] == 200
    get = "GET /api/container/lab/tools:v1 HTTP/1.1\nConnection: close\n"
    line = f"{get}Host: other.example:8443\nX-Forwarded-Proto: https\n\n"
    assert json.loads(raw(server, line)[2])["image"].startswith("https://other.example:8443/")
    line = f"{get}Host: x\nX-Forwarded-Host: public.example\n\n"
    assert json.loads(raw(server, line)[2])["image"].startswith("http://public.example/")
    # a host that is none is not repeated
    line = 'GET /api/container/lab/tools:v1 HTTP/1.1\nHost: a"><script>\nConnection: close\n\n'
    status, _, body = raw(server, line)
    assert status == 400 or b"script" not in body


def test_health_and_metrics_are_for_machines(server: Server, hub: Hub, tmp_path: Path):
    put_image(hub, make_sif(tmp_path / "a.sif"), "lab/tools", tags=["latest"])
    health = server.get("/healthz", token="")
    assert (health.status, health.json["status"]) == (200, "ok")
    metrics = server.get("/metrics", token="")
    assert metrics.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    values = {}
    for line in metrics.text.splitlines():
        assert re.fullmatch(r'# (HELP|TYPE) .+|[a-z_]+(\{[a-z]+="[^"]*"\})? -?[0-9.e+]+', line), line
        if not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            values[name] = float(value)
    assert values["hub_images"] == 1
    assert values['hub_builds{state="queued"}'] == 0


def test_head_says_what_get_would_send(server: Server, hub: Hub, tmp_path: Path):
    image = put_image(hub, make_sif(tmp_path / "a.sif"), "lab/tools", tags=["latest"])
    for path in ("/healthz", "/", "/lab/tools", f"/api/v1/images/{image.id}", f"/api/v1/images/{image.id}/download"):
        head, get = server.request("HEAD", path), server.get(path)
        assert (head.status, head.body) == (200, b""), path
        assert head.headers["Content-Length"] == get.headers["Content-Length"]


def test_pages_of_the_contract_are_there(server: Server, hub: Hub, tmp_path: Path):
    one = put_image(hub, make_sif(tmp_path / "a.sif", "one"), "lab/tools", tags=["v1"])
    two = put_image(hub, make_sif(tmp_path / "b.sif", "two"), "lab/tools", tags=["987654"])
    build = put_build(hub, log=b"==> A\nline\n")
    for path in (
        "/",
        "/search",
        "/search?q=tools",
        "/lab/tools",
        f"/lab/tools/builds/{build}",
        f"/lab/tools/images/{one.id}",
        f"/lab/tools/compare/{one.id}...{two.id}",
        "/lab/tools/compare/v1...987654",
        "/api",
        "/api/v1",
    ):
        answer = server.get(path, token="", headers={"Accept": "text/html"})
        assert answer.status == 200, path
        assert answer.headers["Content-Type"].startswith("text/html")
        twin = server.get(path, token="", headers={"Accept": "application/json"})
        assert isinstance(twin.json, dict), path
    for path in ("/badge/lab/tools.svg", "/badge/lab/tools:v1.svg", "/badge/lab/tools.svg?show=size"):
        answer = server.get(path, token="")
        assert answer.headers["Content-Type"] == "image/svg+xml"
        assert answer.text.startswith("<svg")


@pytest.mark.parametrize("name", ["lab/tools", "lab/tools:latest", "lab/tools@{version}", "lab/tools:latest@{sha256}"])
def test_names_of_images_are_understood_alike_at_every_door(server: Server, hub: Hub, tmp_path: Path, name: str):
    image = put_image(hub, make_sif(tmp_path / "a.sif"), "lab/tools", tags=["latest"])
    target = name.format(version=image.version, sha256=image.sha256)
    shub = server.get("/api/container/" + urllib.parse.quote(target, safe="/:@")).json
    assert shub["version"] == image.version
    shown = server.get("/api/v1/images/" + urllib.parse.quote(target, safe="/:@")).json
    assert image.sha256 in (shown.get("sha256"), shown.get("images", [{}])[0].get("sha256"))
