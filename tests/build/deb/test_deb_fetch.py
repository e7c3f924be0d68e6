# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pysingularity.build.deb import fetch
from pysingularity.build.deb.fetch import Fetcher, Item, NotFound, address
from pysingularity.errors import HostError, UserError

FILES = {f"/pool/{name}": name.encode() * 10_000 for name in ("a", "b", "c~1+b", "d%3a1")}


class Server(ThreadingHTTPServer):
    """A mirror on loopback that misbehaves where it is told."""

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[str] = []
        self.trouble: dict[str, list[object]] = {}
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        from urllib.parse import unquote

        server = self.server
        server.asked.append(self.path)
        path = unquote(self.path.removeprefix(server.url))
        trouble = server.trouble.get(path, [])
        what = trouble.pop(0) if trouble else None
        data = FILES.get(path)
        if isinstance(what, int):
            self.send_response(what)
            if what == 302:
                self.send_header("Location", "/pool/a")
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif data is None:
            self.send_error(404)
        else:
            self.send_response(200)
            if what == "short":
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data[:100])
                self.close_connection = True
                return
            data = {"wrong": data.upper(), "long": data * 2}.get(what, data)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(fetch, "ATTEMPTS", 2)
    with Server() as made:
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield made
        made.shutdown()
        thread.join()


@pytest.fixture
def fetcher(tmp_path: Path) -> Iterator[Fetcher]:
    told: list[tuple] = []
    made = Fetcher(str(tmp_path / "cache"), {}, lambda *words: told.append(words))
    made.told = told
    yield made
    made.close()


def item(server: Server, name: str) -> Item:
    data = FILES[f"/pool/{name}"]
    return Item(address(server.url, f"pool/{name}"), len(data), hashlib.sha256(data).hexdigest(), name)


def leftovers(fetcher: Fetcher) -> list[str]:
    return [name for name in os.listdir(fetcher.cache) if "partial" in name]


def test_files_are_brought_once_and_kept_by_checksum(server: Server, fetcher: Fetcher) -> None:
    items = [item(server, name) for name in ("a", "b", "c~1+b", "d%3a1")]
    found = fetcher.bring(items, "fetching")
    assert {Path(path).read_bytes() for path in found.values()} == set(FILES.values())
    assert len(server.asked) == 4
    assert fetcher.told[-1] == ("fetching", sum(each.size for each in items), sum(each.size for each in items))
    fetcher.bring(items, "fetching")
    assert len(server.asked) == 4
    assert leftovers(fetcher) == []


def test_a_file_that_rotted_in_the_cache_is_fetched_again(server: Server, fetcher: Fetcher) -> None:
    (path,) = fetcher.bring([item(server, "a")], "x").values()
    Path(path).write_bytes(b"rotten")
    fetcher.bring([item(server, "a")], "x")
    assert Path(path).read_bytes() == FILES["/pool/a"]


@pytest.mark.parametrize(("trouble", "why"), [("wrong", "has the checksum"), ("long", "is larger than")])
def test_other_content_than_promised_is_refused(server: Server, fetcher: Fetcher, trouble: str, why: str) -> None:
    server.trouble["/pool/a"] = [trouble] * 3
    with pytest.raises(UserError, match=why) as caught:
        fetcher.bring([item(server, "b"), item(server, "a")], "x")
    assert "refused" in caught.value.message
    assert "/pool/a" in caught.value.message
    assert leftovers(fetcher) == []
    assert fetcher.cached(item(server, "a").sha256) is None


@pytest.mark.parametrize("trouble", ["short", 503, 429])
def test_passing_trouble_is_waited_out(server: Server, fetcher: Fetcher, trouble: object) -> None:
    server.trouble["/pool/a"] = [trouble]
    fetcher.bring([item(server, "a")], "x")
    assert len(server.asked) == 2


@pytest.mark.parametrize("trouble", ["short", 503])
def test_lasting_trouble_is_told(server: Server, fetcher: Fetcher, trouble: object) -> None:
    server.trouble["/pool/a"] = [trouble] * 9
    with pytest.raises(UserError) as caught:
        fetcher.bring([item(server, "a")], "x")
    assert caught.value.id == "mirror-unreachable"
    assert leftovers(fetcher) == []


def test_missing_and_forbidden_files_are_told_at_once(server: Server, fetcher: Fetcher) -> None:
    with pytest.raises(NotFound, match="no such file"):
        fetcher.get(f"{server.url}/none", 10)
    server.trouble["/pool/a"] = [403]
    with pytest.raises(UserError, match="status 403"):
        fetcher.get(f"{server.url}/pool/a", 10)
    assert len(server.asked) == 2


def test_small_files_have_a_limit(server: Server, fetcher: Fetcher) -> None:
    with pytest.raises(UserError, match="more than 10 bytes"):
        fetcher.get(f"{server.url}/pool/a", 10)
    server.trouble["/pool/b"] = [302]
    assert fetcher.get(f"{server.url}/pool/b", 1 << 20) == FILES["/pool/a"]


def test_nobody_listening_is_told(fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "ATTEMPTS", 1)
    with pytest.raises(UserError) as caught:
        fetcher.get("http://127.0.0.1:9/dists/x", 10)
    assert caught.value.id == "mirror-unreachable"
    assert "refused" in str(caught.value)


def test_files_of_this_machine(tmp_path: Path, fetcher: Fetcher) -> None:
    (tmp_path / "a b").write_bytes(b"x")
    assert fetcher.get(f"file://{tmp_path}/a%20b", 10) == b"x"
    assert fetcher.get(f"copy:{tmp_path}/a%20b", 10) == b"x"
    with pytest.raises(NotFound):
        fetcher.get(f"file://{tmp_path}/none", 10)


def test_the_proxy_is_asked(server: Server, tmp_path: Path) -> None:
    made = Fetcher(str(tmp_path / "cache"), {"http_proxy": server.url}, lambda *_: None)
    with pytest.raises(UserError):
        made.get("http://mirror.example/pool/a", 1 << 20)
    made.close()
    assert server.asked == ["http://mirror.example/pool/a"]


def test_a_cache_that_cannot_be_written_is_told(tmp_path: Path, server: Server) -> None:
    made = Fetcher(str(tmp_path / "cache"), {}, lambda *_: None)
    os.rmdir(tmp_path / "cache")
    with pytest.raises(HostError, match="cannot be written"):
        made.bring([item(server, "a")], "x")
    made.close()
