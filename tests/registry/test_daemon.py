# SPDX-License-Identifier: Apache-2.0
"""docker-daemon: images, from a small server that speaks the Docker Engine's protocol over a socket."""

from __future__ import annotations

import json
import os
import socketserver
import threading
from http.server import BaseHTTPRequestHandler
from urllib.parse import unquote

import pytest

from pysingularity.errors import RegistryError, UserError
from pysingularity.image.open import open_image
from pysingularity.reference import parse_reference
from pysingularity.registry.fetch import fetch_for_run, obtain
from pysingularity.squashfs.reader import SquashfsImage
from registries import digest, quiet, tar_of


def saved(name: str, data: bytes) -> bytes:
    """Return what `docker save` gives since version 25: an OCI layout that has a manifest.json as well."""
    layer = tar_of([("a", data)])
    config = json.dumps({"architecture": "amd64", "rootfs": {"diff_ids": [digest(layer)]}, "config": {}}).encode()
    place = {mark: "blobs/" + digest(what).replace(":", "/") for mark, what in (("c", config), ("l", layer))}
    manifest = [{"Config": place["c"], "RepoTags": [name], "Layers": [place["l"]]}]
    return tar_of([(place["c"], config), (place["l"], layer), ("manifest.json", json.dumps(manifest).encode())])


class Daemon:
    """Answers GET /images/NAME/json and /get as the Engine does, chunked; `cut` ends it in the middle."""

    def __init__(self, path: str, images: dict[str, bytes]) -> None:
        self.asked: list[str] = []
        self.cut, self.images = False, images
        daemon = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *words):
                pass

            def address_string(self):
                return "socket"

            def do_GET(self):
                daemon.asked.append(self.path)
                path, _, what = unquote(self.path).rpartition("/")
                name = path.removeprefix("/images/")
                if name in images and what == "json":
                    data = json.dumps({"Id": digest(images[name]), "RepoTags": [name]}).encode()
                    self.send_response(200)
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)
                    return
                if name not in images:
                    data = b'{"message":"No such image: %s"}' % name.encode()
                    self.send_response(404)
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)
                    return
                self.send_response(200)
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                data = images[name]
                for at in range(0, len(data), 1000):
                    piece = data[at : at + 1000]
                    self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
                    if daemon.cut:
                        self.close_connection = True
                        return
                self.wfile.write(b"0\r\n\r\n")

        class Server(socketserver.ThreadingUnixStreamServer):
            daemon_threads = True

        self.server = Server(path, Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02})
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def daemon(tmp_path, environ):
    images = {"lab/tools:1": saved("lab/tools:1", b"first"), "tools:latest": saved("tools:latest", b"latest")}
    found = Daemon(str(tmp_path / "docker.sock"), images)
    environ["DOCKER_HOST"] = f"unix://{tmp_path}/docker.sock"
    yield found
    found.close()


def content(path: str) -> bytes:
    with open_image(path) as image:
        squashfs = SquashfsImage(image.fd, image.offset, image.size)
        inode = squashfs.lookup(b"a")
        assert inode is not None
        return squashfs.read(inode)


def pull(reference: str, settings) -> str:
    return obtain(parse_reference(reference), settings, quiet).path


def test_image_of_a_daemon_becomes_a_file_under_every_spelling(daemon, settings, environ):
    assert content(pull("docker-daemon:lab/tools:1", settings())) == b"first"
    assert content(pull("docker-daemon://tools", settings())) == b"latest"
    assert [path for path in daemon.asked if path.endswith("/get")] == [
        "/images/lab/tools:1/get",
        "/images/tools:latest/get",
    ]
    assert os.listdir(environ["SINGULARITY_TMPDIR"]) == []


def test_image_is_packed_once_and_a_new_one_of_the_name_is_noticed(daemon, settings):
    first = pull("docker-daemon:tools:latest", settings(pull="missing"))
    assert pull("docker-daemon:tools:latest", settings(pull="missing")) == first
    assert sum(path.endswith("/get") for path in daemon.asked) == 1
    daemon.images["tools:latest"] = saved("tools:latest", b"newer")
    assert content(pull("docker-daemon:tools:latest", settings(pull="missing"))) == b"newer"


def test_archive_that_changes_and_one_of_that_name_elsewhere_are_noticed(tmp_path, environ, monkeypatch):
    class Options:
        pass

    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.tar").write_bytes(saved("x:1", folder.encode()))
    for folder in ("one", "two", "one"):
        monkeypatch.chdir(tmp_path / folder)
        assert content(fetch_for_run("docker-archive:x.tar", Options(), environ)) == folder.encode()
    (tmp_path / "one/x.tar").write_bytes(saved("x:1", b"changed"))
    assert content(fetch_for_run("docker-archive:x.tar", Options(), environ)) == b"changed"


def test_missing_image_and_cut_answer_leave_nothing(daemon, settings, environ):
    with pytest.raises(RegistryError, match="No such image: lab/nosuch:1"):
        pull("docker-daemon:lab/nosuch:1", settings())
    daemon.cut = True
    with pytest.raises(RegistryError, match=r"docker\.sock"):
        pull("docker-daemon:lab/tools:1", settings())
    assert os.listdir(environ["SINGULARITY_TMPDIR"]) == []


def test_daemon_that_is_not_there_is_one_line_with_its_address(settings, tmp_path):
    with pytest.raises(RegistryError, match="no such file"):
        pull("docker-daemon:x:1", settings(docker_host=f"unix://{tmp_path}/none.sock"))
    with pytest.raises(UserError, match="only unix:// and tcp://"):
        pull("docker-daemon:x:1", settings(docker_host="ssh://me@there"))
