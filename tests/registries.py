# SPDX-License-Identifier: Apache-2.0
"""A registry in memory that fails on purpose, and small layers and images to put into registries."""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import json
import socket
import tarfile
import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def tar_of(entries, *, form=tarfile.PAX_FORMAT) -> bytes:
    """Return a tar of (name, content or TarInfo changes): bytes make a file, None a folder, dict sets attributes."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        for name, what in entries:
            info = tarfile.TarInfo(name)
            info.mtime = 1_600_000_000
            data = b""
            if what is None:
                info.type, info.mode = tarfile.DIRTYPE, 0o755
            elif isinstance(what, bytes):
                data = what
            else:
                data = what.pop("data", b"")
                for key, value in what.items():
                    setattr(info, key, value)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


class FakeRegistry:
    """A registry in memory whose answers can be spoiled: `spoil(handler) -> True` when it has answered itself."""

    def __init__(self, *, password: str = "", token: bool = False) -> None:
        self.blobs: dict[str, bytes] = {}
        self.manifests: dict[str, tuple[bytes, str]] = {}
        self.log: list[tuple[str, str, dict[str, str]]] = []
        self.spoil, self.ranges = None, True
        self.password, self.token = password, token
        registry = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *words):
                pass

            def answer(self, status, data=b"", **headers):
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                for name, value in headers.items():
                    self.send_header(name.replace("_", "-"), value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data)

            def do_GET(self):
                registry.log.append((self.command, self.path, dict(self.headers)))
                if registry.spoil is not None and registry.spoil(self):
                    return
                if not registry.lets_in(self):
                    return
                kind, _, name = self.path.rpartition("/")
                if kind.endswith("/manifests") and name in registry.manifests:
                    data, media = registry.manifests[name]
                    self.answer(200, data, Content_Type=media, Docker_Content_Digest=digest(data))
                elif kind.endswith("/blobs") and name in registry.blobs:
                    data = registry.blobs[name]
                    wanted = self.headers.get("Range", "")
                    if wanted and registry.ranges:
                        start, _, last = wanted.removeprefix("bytes=").partition("-")
                        at, end = int(start), int(last) + 1 if last else len(data)
                        self.answer(206, data[at:end], Content_Range=f"bytes {at}-{end - 1}/{len(data)}")
                    else:
                        self.answer(200, data)
                else:
                    self.answer(404, b'{"errors":[{"code":"MANIFEST_UNKNOWN","message":"no such thing"}]}')

            do_HEAD = do_GET

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request, client_address):
                pass  # cut connections are the point

        self.server = Server(("127.0.0.1", 0), Handler)
        self.host = f"127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02})
        self.thread.start()

    def lets_in(self, handler) -> bool:
        if not self.password:
            return True
        given = handler.headers.get("Authorization", "")
        basic = "Basic " + base64.b64encode(f"me:{self.password}".encode()).decode()
        if self.token:
            if handler.path.startswith("/token"):
                fine = given == basic
                handler.answer(200 if fine else 401, json.dumps({"token": "t0ken"}).encode() if fine else b"")
                return False
            if given == "Bearer t0ken":
                return True
            challenge = f'Bearer realm="http://{self.host}/token",service="reg",scope="repository:a/b:pull"'
        else:
            if given == basic:
                return True
            challenge = 'Basic realm="reg"'
        handler.answer(401, b"", WWW_Authenticate=challenge)
        return False

    def add(self, layers, *, tag="1", config=None, change=None) -> str:
        """Add an image of compressed layers and return its reference."""
        config = {
            "architecture": "amd64",
            "os": "linux",
            "created": "2020-09-13T12:26:40Z",
            "config": {},
            **(config or {}),
        }
        data = json.dumps(config).encode()
        self.blobs[digest(data)] = data
        entries = []
        for layer in layers:
            self.blobs[digest(layer)] = layer
            entries.append(
                {
                    "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip",
                    "digest": digest(layer),
                    "size": len(layer),
                }
            )
        manifest = {
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": {"mediaType": "x", "digest": digest(data), "size": len(data)},
            "layers": entries,
        }
        if change is not None:
            change(manifest)
        return self.put(tag, manifest)

    def put(self, tag, manifest) -> str:
        data = manifest if isinstance(manifest, bytes) else json.dumps(manifest).encode()
        media = "application/vnd.oci.image.manifest.v1+json"
        self.manifests[tag] = self.manifests[digest(data)] = (data, media)
        return f"docker://{self.host}/a/b:{tag}"

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


def quiet(text: str = "", done: int = 0, total: int = 0) -> None:
    """Progress that nobody looks at."""


def gz(*entries) -> bytes:
    return gzip.compress(tar_of(entries), mtime=0)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def send(host: str, layers: list[bytes], *, tag: str = "1", name: str = "a/b", architecture: str = "amd64", **config):
    """Send an image to a plain registry with nothing but urllib; return the manifest's digest."""

    def call(method, url, data=None, **headers):
        request = urllib.request.Request(url, data=data, method=method, headers=headers)
        return urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request)

    def blob(data):
        with call("POST", f"http://{host}/v2/{name}/blobs/uploads/", b"") as answer:
            place = answer.headers["Location"]
        mark = f"{'&' if '?' in place else '?'}digest={digest(data)}"
        call("PUT", place + mark, data, **{"Content-Type": "application/octet-stream"}).close()
        return {"digest": digest(data), "size": len(data), "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip"}

    document = {"architecture": architecture, "os": "linux", "created": "2020-09-13T12:26:40Z", "config": config}
    document["rootfs"] = {"type": "layers", "diff_ids": [digest(layer) for layer in layers]}
    entry = blob(json.dumps(document).encode())
    entry["mediaType"] = "application/vnd.oci.image.config.v1+json"
    media = "application/vnd.oci.image.manifest.v1+json"
    manifest = {"schemaVersion": 2, "mediaType": media, "config": entry, "layers": [blob(layer) for layer in layers]}
    data = json.dumps(manifest).encode()
    call("PUT", f"http://{host}/v2/{name}/manifests/{tag}", data, **{"Content-Type": media}).close()
    return digest(data), len(data)
