# SPDX-License-Identifier: Apache-2.0
"""Agents that start from an image elsewhere: each with a small image in its format, on loopback or in a file."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import io
import json
import os
import socketserver
import tarfile
import threading

import pytest

from registries import FakeRegistry, digest
from traces import leftovers

pytestmark = pytest.mark.rootless

USERS = ["as_subuid_user", "as_plain_user"]
POST = '%post\n  echo "owner $(stat -c %u:%g:%a /etc/secret) greets $GREETING"\n'
EXPECTED = "owner 77:88:640 greets hello"


@pytest.fixture(scope="module")
def layer(tiny) -> bytes:
    """A whole small system as one layer, with a file that is not root's."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:

        def plain(info: tarfile.TarInfo) -> tarfile.TarInfo:
            info.uid = info.gid = 0
            info.uname = info.gname = ""
            return info

        for path in sorted(tiny.iterdir()):
            tar.add(path, path.name, filter=plain)
        info = tarfile.TarInfo("etc/secret")
        info.uid, info.gid, info.mode, info.size = 77, 88, 0o640, 1
        tar.addfile(info, io.BytesIO(b"x"))
    return out.getvalue()


CONFIG = {"architecture": "amd64", "os": "linux", "config": {"Env": ["GREETING=hello", "PATH=/usr/bin:/bin"]}}


def docker_save(layer: bytes, name: str) -> bytes:
    """Return what `docker save` writes."""
    config = json.dumps({**CONFIG, "rootfs": {"type": "layers", "diff_ids": [digest(layer)]}}).encode()
    listing = [{"Config": "config.json", "RepoTags": [name], "Layers": ["a/layer.tar"]}]
    return tar([("config.json", config), ("a/layer.tar", layer), ("manifest.json", json.dumps(listing).encode())])


def tar(members: list[tuple[str, bytes]]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def layout(layer: bytes) -> list[tuple[str, bytes]]:
    """Return the files of an OCI layout."""
    packed = gzip.compress(layer, 1, mtime=0)
    config = json.dumps({**CONFIG, "rootfs": {"type": "layers", "diff_ids": [digest(layer)]}}).encode()
    kind = "application/vnd.oci.image"
    manifest = json.dumps(
        {
            "schemaVersion": 2,
            "mediaType": f"{kind}.manifest.v1+json",
            "config": {"mediaType": f"{kind}.config.v1+json", "digest": digest(config), "size": len(config)},
            "layers": [{"mediaType": f"{kind}.layer.v1.tar+gzip", "digest": digest(packed), "size": len(packed)}],
        }
    ).encode()
    entry = {"mediaType": f"{kind}.manifest.v1+json", "digest": digest(manifest), "size": len(manifest)}
    entry["annotations"] = {"org.opencontainers.image.ref.name": "v1"}
    index = json.dumps({"schemaVersion": 2, "manifests": [entry]}).encode()
    blobs = [(f"blobs/sha256/{hashlib.sha256(data).hexdigest()}", data) for data in (packed, config, manifest)]
    return [("oci-layout", b'{"imageLayoutVersion":"1.0.0"}'), ("index.json", index), *blobs]


@pytest.fixture
def fake():
    """A registry on loopback."""
    registry = FakeRegistry()
    yield registry
    registry.close()


def build(user, header: str, post: str = POST, **options):
    user.write("x.def", f"{header}\n{post}")
    environ = {"SINGULARITY_TMPDIR": str(user.tmp), **options.pop("env", {})}
    done = user(["singularity", "build", "--force", "--no-https", "x.sif", "x.def"], env=environ, **options)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert leftovers(user) == []
    return said


@pytest.mark.parametrize("kind", USERS)
@pytest.mark.parametrize("keywords", ["From: {host}/a/b:1", "Registry: {host}\nNamespace: a\nFrom: b:1"])
def test_docker(request, fake, layer, kind, keywords):
    user = request.getfixturevalue(kind)
    fake.add([gzip.compress(layer, 1)], config=CONFIG)
    assert EXPECTED in build(user, "Bootstrap: docker\n" + keywords.format(host=fake.host))


@pytest.mark.parametrize("kind", USERS)
def test_docker_archive(request, layer, kind):
    user = request.getfixturevalue(kind)
    user.write("saved.tar", docker_save(layer, "toy:1"))
    assert EXPECTED in build(user, "Bootstrap: docker-archive\nFrom: saved.tar")


def test_docker_daemon(as_user, layer):
    """What Docker's programming interface answers on its socket."""
    data = docker_save(layer, "toy:1")
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            told = json.dumps({"Id": digest(data)}).encode()  # what `docker inspect` shows of an image
            answer = data if self.path.endswith("/get") else told
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def address_string(self) -> str:
            return "unix"

        def log_message(self, *_: object) -> None:
            pass

    path = as_user.tmp / "docker.sock"
    with socketserver.UnixStreamServer(str(path), Handler) as server:
        path.chmod(0o666)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            said = build(as_user, "Bootstrap: docker-daemon\nFrom: toy:1", env={"DOCKER_HOST": f"unix://{path}"})
        finally:
            server.shutdown()
            thread.join()
    assert EXPECTED in said
    assert any(path.endswith("/images/toy:1/get") for path in asked)


@pytest.mark.parametrize("kind", USERS)
@pytest.mark.parametrize("agent", ["oci", "oci-archive"])
@pytest.mark.parametrize("tag", ["", ":v1"])
def test_oci(request, layer, kind, agent, tag):
    user = request.getfixturevalue(kind)
    files = layout(layer)
    if agent == "oci":
        for name, data in files:
            user.write(f"image/{name}", data)
    else:
        user.write("image", tar(files))
    assert EXPECTED in build(user, f"Bootstrap: {agent}\nFrom: image{tag}")


@pytest.fixture
def sif(as_user, base) -> bytes:
    """A SIF file."""
    as_user(["singularity", "build", "base.sif", base], check=True)
    return (as_user.tmp / "base.sif").read_bytes()


GREET = "%post\n  ls -d /opt/..\n  echo from the image\n"


def test_library_shub_and_oras(as_user, fake, sif):
    checksum = hashlib.sha256(sif).hexdigest()
    value = {"data": {"id": "1", "hash": f"sha256.{checksum}", "size": len(sif), "uploaded": True}}
    md5 = hashlib.md5(sif).hexdigest()
    hub = {"image": f"http://{fake.host}/x.sif", "name": "u/r", "tag": "v1", "version": md5, "commit": "a" * 40}
    answers = {
        "/v1/images/e/c/i:t": json.dumps(value).encode(),
        "/v1/imagefile/e/c/i:t": sif,
        "/api/container/u/r:v1": json.dumps(hub).encode(),
        "/x.sif": sif,
    }

    def spoil(handler) -> bool:
        found = answers.get(handler.path.partition("?")[0])
        if found is not None:
            handler.answer(200, found)
        return found is not None

    fake.spoil = spoil
    assert "from the image" in build(as_user, f"Bootstrap: library\nFrom: {fake.host}/e/c/i:t", GREET)
    header = f"Bootstrap: library\nLibrary: http://{fake.host}\nFrom: e/c/i:t"
    assert "from the image" in build(as_user, header, GREET)
    assert "from the image" in build(as_user, f"Bootstrap: shub\nFrom: {fake.host}/u/r:v1", GREET)
    config = b"{}"
    fake.blobs[digest(config)], fake.blobs[digest(sif)] = config, sif
    entry = {"mediaType": "application/vnd.sylabs.sif.layer.v1.sif", "digest": digest(sif), "size": len(sif)}
    fake.put(
        "1",
        {
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": {"mediaType": "application/vnd.sylabs.sif.config.v1+json", "digest": digest(config), "size": 2},
            "layers": [entry],
        },
    )
    assert "from the image" in build(as_user, f"Bootstrap: oras\nFrom: {fake.host}/a/b:1", GREET)


@pytest.mark.parametrize("kind", USERS)
@pytest.mark.parametrize("form", ["sif", "sandbox", "squashfs"])
def test_localimage(request, layer, tool, kind, form):
    """Owners pass from an image of any kind to the next, also those that are only recorded."""
    user = request.getfixturevalue(kind)
    user.write("saved.tar", docker_save(layer, "toy:1"))
    user.write("first.def", "Bootstrap: docker-archive\nFrom: saved.tar\n%post\n  chown 5:6 /opt\n")
    words = ["--sandbox"] if form == "sandbox" else []
    user(["singularity", "build", *words, "first", "first.def"], check=True)
    if form == "squashfs":
        user(["sh", "-c", "singularity sif dump 4 first > bare || singularity sif dump 3 first > bare"], check=True)
        assert (user.tmp / "bare").read_bytes()[:4] == b"hsqs"
        os.rename(user.tmp / "bare", user.tmp / "first")
    post = f"{POST}  stat -c 'opt %u:%g' /opt\n"
    said = build(user, "Bootstrap: localimage\nFrom: first", post)
    assert EXPECTED in said and "opt 5:6" in said
    if form == "sandbox":
        user(["singularity", "rm", "first"], check=True)


@pytest.mark.parametrize("agent", ["docker", "library", "shub", "oras", "oci", "docker-archive", "localimage"])
def test_what_is_not_there_is_told_with_its_name(as_user, fake, agent):
    fake.spoil = None
    name = f"{fake.host}/no/such:1" if agent in ("docker", "library", "shub", "oras") else "nosuch"
    as_user.write("x.def", f"Bootstrap: {agent}\nFrom: {name}\n{POST}")
    done = as_user(["singularity", "build", "--no-https", "x.sif", "x.def"])
    assert done.returncode == 255
    assert "such" in done.stderr and "Traceback" not in done.stderr
