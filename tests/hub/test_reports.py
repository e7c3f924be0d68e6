# SPDX-License-Identifier: Apache-2.0
"""What forges are told of builds: the right words to the right address, with the token to nobody else."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from pysingularity.hub.builds.queue import enqueue
from pysingularity.hub.builds.reports import GIVEN_UP, TRIES, Reporter
from pysingularity.hub.builds.states import ALL
from pysingularity.hub.context import Hub
from pysingularity.hub.models import Build, Collection
from pysingularity.hub.sources.statuses import Forge, forge_of, request_of, word_of

from .world import RECIPE, Repository, Server, made_collection, wait_for

COMMIT = "c" * 40


class FakeForge(ThreadingHTTPServer):
    """A forge that writes down what it is told."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.told: list[tuple[str, dict[str, str], dict[str, str]]] = []
        self.answer = 201
        self.elsewhere = ""
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: FakeForge

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.told.append((self.path, dict(self.headers), json.loads(body)))
        self.send_response(self.server.answer)
        if self.server.elsewhere:
            self.send_header("Location", self.server.elsewhere)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    do_GET = do_POST

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def forge() -> Iterator[FakeForge]:
    forge = FakeForge()
    yield forge
    forge.shutdown()
    forge.server_close()


def at(hub: Hub, forge: FakeForge, kind: str = "github", **fields: object) -> Build:
    hub.settings.sources.forges = [{"prefix": "https://git.example.org/", "kind": kind, "api": f"{forge.url}/api"}]
    collection = made_collection(hub, None, git_url="https://git.example.org/lab/tools.git", status_token="hush-token")
    with hub.write() as session:
        build = Build(collection_id=collection.id, commit=COMMIT, recipe="Singularity.gpu", tag="gpu")
        enqueue(session, build, "lab")
        for name, value in fields.items():
            setattr(build, name, value)
        return build


@pytest.mark.parametrize(
    ("url", "known", "expected"),
    [
        ("https://github.com/lab/tools.git", "", Forge("github", "https://api.github.com", "lab/tools")),
        ("git@github.com:lab/tools.git", "", Forge("github", "https://api.github.com", "lab/tools")),
        ("https://gitlab.com/a/b/c", "", Forge("gitlab", "https://gitlab.com/api/v4", "a/b/c")),
        ("https://u:p@code.lab:8443/a/b", "gitlab", Forge("gitlab", "https://code.lab:8443/api/v4", "a/b")),
        ("https://codeberg.org/a/b.git", "", Forge("gitea", "https://codeberg.org/api/v1", "a/b")),
        ("ssh://git@code.lab:2222/a/b.git", "gitea", Forge("gitea", "https://code.lab/api/v1", "a/b")),
        ("https://ghe.lab/a/b", "github", Forge("github", "https://ghe.lab/api/v3", "a/b")),
        ("https://unknown.lab/a/b", "", None),
        ("file:///srv/git/a.git", "", None),
    ],
)
def test_address_of_a_repository_tells_its_forge(hub: Hub, url: str, known: str, expected: Forge | None):
    assert forge_of(Collection(git_url=url, forge=known), hub.settings.sources) == expected


@pytest.mark.parametrize("state", ALL)
@pytest.mark.parametrize("kind", ["github", "gitlab", "gitea"])
def test_every_state_has_a_word_that_the_forge_knows(state: str, kind: str):
    build = Build(state=state, commit=COMMIT, tag="gpu", reason="x" * 500)
    request = request_of(Forge(kind, "https://f.example.org/api", "a/b"), build, token="t", url="https://hub/x")
    value = json.loads(request.data or b"")
    known = {
        "github": ("pending", "success", "failure", "error"),
        "gitea": ("pending", "success", "failure", "error"),
        "gitlab": ("pending", "running", "success", "failed", "canceled"),
    }
    assert value["state"] in known[kind]
    assert len(value["description"]) <= 140
    expected = f"/api/projects/a%2Fb/statuses/{COMMIT}" if kind == "gitlab" else f"/api/repos/a/b/statuses/{COMMIT}"
    assert request.selector == expected


def test_build_is_told_when_it_begins_and_when_it_ends(hub: Hub, forge: FakeForge):
    hub.settings.url = "https://hub.example.org"
    build = at(hub, forge)
    reporter = Reporter(hub)
    assert reporter.work()
    assert not reporter.work()
    with hub.write() as session:
        session.get_one(Build, build.id).state = "failed"
        session.get_one(Build, build.id).reason = "no space"
    Reporter(hub).work()  # also another robot, after the first was killed
    assert not reporter.work()
    assert [value["state"] for _, _, value in forge.told] == ["pending", "failure"]
    path, headers, value = forge.told[1]
    assert path == f"/api/repos/lab/tools/statuses/{COMMIT}"
    assert headers["Authorization"] == "Bearer hush-token"
    assert value["context"] == "singularity-hub/gpu"
    assert value["target_url"] == f"https://hub.example.org/lab/tools/builds/{build.id}"
    assert value["description"] == "no space"


def test_token_never_follows_a_redirect(hub: Hub, forge: FakeForge):
    other = FakeForge()
    try:
        forge.answer, forge.elsewhere = 302, f"{other.url}/steal"
        at(hub, forge, "gitlab")
        Reporter(hub).work()
        assert len(forge.told) == 1
        assert other.told == []
    finally:
        other.shutdown()
        other.server_close()


def test_forge_that_refuses_is_asked_a_few_times_with_pauses(
    hub: Hub, forge: FakeForge, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    forge.answer = 403
    build = at(hub, forge)
    reporter = Reporter(hub)
    clock = [0.0]
    monkeypatch.setattr("pysingularity.hub.builds.reports.time.monotonic", lambda: clock[0])
    for _ in range(400):
        clock[0] += 1.0
        reporter.work()
    assert len(forge.told) == TRIES
    with hub.read() as session:
        assert session.get_one(Build, build.id).reported == GIVEN_UP
    assert "hush-token" not in capsys.readouterr().err


def test_collections_without_a_token_tell_nobody(hub: Hub, forge: FakeForge):
    build = at(hub, forge)
    with hub.write() as session:
        session.get_one(Collection, build.collection_id).status_token = ""
    assert not Reporter(hub).work()
    assert forge.told == []


def test_running_hub_reports_a_real_build(data, forge: FakeForge, repository: Repository):
    from .conftest import started

    settings = data / "hub.toml"
    entry = f'[[sources.forges]]\nprefix = "file://{repository.path.parent}/"\nkind = "gitea"\napi = "{forge.url}"\n'
    settings.write_text(settings.read_text() + entry)
    server: Server = started(data)
    try:
        server.post("/api/v1/collections", {"name": "lab/tools"})
        server.request(
            "PATCH", "/api/v1/collections/lab/tools", {"status_token": "hush", "git_url": f"file://{repository.path}"}
        )
        repository.commit({"Singularity": RECIPE})
        server.post("/api/v1/collections/lab/tools/resync")
        wait_for(lambda: [value for _, _, value in forge.told if value["state"] == "success"], 60, "a report")
        assert forge.told[0][0].startswith("/repos/repository/statuses/")
        assert forge.told[0][1]["Authorization"] == "token hush"
    finally:
        server.stop()


def test_words_cover_all_states():
    assert {word_of(state) for state in ALL} == {"pending", "success", "failure", "error"}
