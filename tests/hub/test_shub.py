# SPDX-License-Identifier: Apache-2.0
"""shub:// and plain downloads, with our client, the reference client and bare requests."""

from __future__ import annotations

import hashlib
import os
import socket
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pysingularity.hub.accounts.tokens import add_share
from pysingularity.hub.catalog import find_collection
from pysingularity.hub.context import Hub
from pysingularity.hub.models import Blob, Image
from pysingularity.hub.protocols.sending import WrongRange, parse_range
from pysingularity.hub.settings import load_settings

from .shelf import SINGULARITY, make_sif, put_image, run
from .world import Server

COMMIT = "89abcdef0123456789abcdef0123456789abcdef"
MISSING = "0" * 40


@pytest.fixture
def server(clean: tuple[Server, Hub]) -> Server:
    return clean[0]


@pytest.fixture
def hub(clean: tuple[Server, Hub]) -> Hub:
    return clean[1]


def answer_of(server: Server, target: str) -> dict:
    answer = server.get(f"/api/container/{target}", token="")
    assert answer.status == 200, answer.text
    return answer.json


def raw(server: Server, text: str) -> bytes:
    with socket.create_connection(("127.0.0.1", server.port), 10) as connection:
        connection.sendall(text.encode())
        data = b""
        while part := connection.recv(1 << 16):
            data += part
        return data


def test_answer_has_what_every_generation_of_clients_reads(server: Server, hub: Hub, tmp_path: Path):
    image = put_image(hub, make_sif(tmp_path / "a.sif"), "lab/tools", tags=["latest"], commit=COMMIT, branch="main")
    value = answer_of(server, "lab/tools:latest")
    assert value["name"] == "lab/tools"
    assert (value["tag"], value["branch"], value["commit"]) == ("latest", "main", COMMIT)
    assert value["version"] == hashlib.md5((tmp_path / "a.sif").read_bytes()).hexdigest()
    assert value["size_mb"] > 0
    assert value["image"].startswith(f"{server.url}/")
    assert value["image"].rpartition("/")[2] == f"{value['version']}.simg"
    for target in (
        "lab/tools", "Lab/Tools", "lab/tools/", f"lab/tools@{COMMIT}", f"lab/tools:latest@{value['version']}"
    ):  # fmt: skip
        assert answer_of(server, target)["id"] == image.id, target
    prefixed = server.get("/any/prefix/api/container/lab/tools:latest", token="")
    assert prefixed.json["id"] == image.id


@pytest.mark.parametrize(
    "target", ["lab/tools:other", f"lab/tools@{MISSING}", "lab/none", "none/tools", "lab", "a/b/c"]
)
def test_what_is_not_there_is_404(server: Server, hub: Hub, tmp_path: Path, target: str):
    put_image(hub, make_sif(tmp_path / "a.sif"), "lab/tools", tags=["latest"])
    answer = server.get(f"/api/container/{target}", token="")
    assert answer.status == 404
    assert answer.json["error"]["message"]


def test_two_images_of_one_commit_have_different_commits(server: Server, hub: Hub, tmp_path: Path):
    put_image(hub, make_sif(tmp_path / "a.sif", "one"), "lab/tools", tags=["latest"], commit=COMMIT)
    put_image(hub, make_sif(tmp_path / "b.sif", "two"), "lab/tools", tags=["gpu"], commit=COMMIT)
    put_image(hub, make_sif(tmp_path / "c.sif", "fork"), "ann/tools", tags=["latest"], commit=COMMIT)
    names = ("lab/tools:latest", "lab/tools:gpu", "ann/tools")
    assert len({answer_of(server, target)["commit"] for target in names}) == 3
    found = answer_of(server, f"lab/tools:gpu@{COMMIT}")
    assert found["version"] == hashlib.md5((tmp_path / "b.sif").read_bytes()).hexdigest()
    assert answer_of(server, f"lab/tools@{found['commit']}")["id"] == found["id"]


def test_images_of_pull_requests_are_not_answered(server: Server, hub: Hub, tmp_path: Path):
    put_image(hub, make_sif(tmp_path / "a.sif"), "lab/tools", tags=["x"], commit=COMMIT, hidden=True)
    assert server.get(f"/api/container/lab/tools@{COMMIT}", token="").status == 404


def test_request_line_of_a_proxy_and_host_asked_for(server: Server, hub: Hub, tmp_path: Path):
    put_image(hub, make_sif(tmp_path / "a.sif"), "lab/tools", tags=["v1"])
    text = raw(
        server, "GET http://hub.lab/api/container/lab/tools:v1 HTTP/1.1\r\nHost: hub.lab\r\nConnection: close\r\n\r\n"
    )
    assert b"200 OK" in text
    assert b'"image":"http://hub.lab/api/v1/images/' in text


def test_private_collection_opens_by_the_secret_in_the_path_only(server: Server, hub: Hub, tmp_path: Path):
    put_image(hub, make_sif(tmp_path / "a.sif"), "lab/secret", tags=["latest"], private=True)
    put_image(hub, make_sif(tmp_path / "b.sif"), "lab/other", tags=["latest"], private=True)
    with hub.write() as session:
        collection = find_collection(session, "lab", "secret")
        assert collection is not None
        share = add_share(session, collection, by="lab")
    assert len(f"hub.lab/t/{share}") <= 64
    assert server.get("/api/container/lab/secret", token="").status == 404
    assert server.get(f"/t/{'0' * 22}/api/container/lab/secret", token="").status == 404
    assert server.get(f"/t/{share}/api/container/lab/other", token="").status == 404
    answer = server.get(f"/t/{share}/api/container/lab/secret", token="")
    path = answer.json["image"].removeprefix(server.url)
    assert path.startswith(f"/t/{share}/")
    assert server.get(path, token="").body == (tmp_path / "a.sif").read_bytes()
    assert server.get(path.removeprefix(f"/t/{share}"), token="").status == 404


def test_downloads_resume_and_parts_fit_together(server: Server, hub: Hub, tmp_path: Path):
    path = make_sif(tmp_path / "a.sif", pad=5 << 20)
    whole = path.read_bytes()
    image = put_image(hub, path, "lab/tools", tags=["latest"])
    address = f"/api/v1/images/{image.id}/download"
    answer = server.get(address, token="")
    assert answer.body == whole
    assert int(answer.headers["content-length"]) == len(whole)
    assert answer.headers["content-disposition"] == 'attachment; filename="tools_latest.sif"'
    tag = answer.headers["etag"]
    part = server.get(address, token="", headers={"Range": "bytes=1000-", "If-Range": tag})
    assert (part.status, part.body) == (206, whole[1000:])
    assert part.headers["content-range"] == f"bytes 1000-{len(whole) - 1}/{len(whole)}"
    assert server.get(address, token="", headers={"Range": "bytes=-7"}).body == whole[-7:]
    assert server.get(address, token="", headers={"Range": "bytes=5-9", "If-Range": '"other"'}).status == 200
    assert server.get(address, token="", headers={"Range": f"bytes={len(whole)}-"}).status == 416
    assert server.get(address, token="", headers={"If-None-Match": tag}).status == 304
    head = server.request("HEAD", address, token="")
    assert (head.status, head.body, int(head.headers["content-length"])) == (200, b"", len(whole))
    with hub.read() as session:
        assert session.get_one(Image, image.id).pulls == 2  # the whole, and the whole after a change of the file


def test_keep_alive_serves_a_second_request_after_a_file(server: Server, hub: Hub, tmp_path: Path):
    path = make_sif(tmp_path / "a.sif", pad=1 << 20)
    image = put_image(hub, path, "lab/tools", tags=["latest"])
    request = f"GET /api/v1/images/{image.id}/download HTTP/1.1\r\nHost: x\r\n\r\n"
    data = raw(server, request + "GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert data.count(path.read_bytes()) == 1
    assert data.count(b"HTTP/1.1 200 OK") == 2


def test_damaged_and_vanished_files_are_not_served(server: Server, hub: Hub, tmp_path: Path):
    image = put_image(hub, make_sif(tmp_path / "a.sif"), "lab/tools", tags=["latest"])
    assert image.blob is not None
    with hub.write() as session:
        session.get_one(Blob, image.blob).damaged = "other content"
    assert server.get(f"/api/v1/images/{image.id}/download").status == 404
    with hub.write() as session:
        session.get_one(Blob, image.blob).damaged = ""
    hub.storage.remove(image.blob)
    assert server.get(f"/api/v1/images/{image.id}/download").status == 404
    assert server.get("/api/v1/images/9999/download").status == 404


def test_client_that_goes_away_in_the_middle_harms_nobody(server: Server, hub: Hub, tmp_path: Path):
    path = make_sif(tmp_path / "a.sif", pad=8 << 20)
    image = put_image(hub, path, "lab/tools", tags=["latest"])
    for _ in range(5):
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(f"GET /api/v1/images/{image.id}/download HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            assert connection.recv(1000).startswith(b"HTTP/1.1 200")
    assert server.get(f"/api/v1/images/{image.id}/download").body == path.read_bytes()


def test_too_many_pulls_get_a_true_429(data: Path, tmp_path: Path):
    settings_file = data / "hub.toml"
    settings_file.write_text(settings_file.read_text() + "[limits]\npulls_per_hour = 2\n")
    own = Hub(load_settings(data))
    server = Server(data)
    server.start()
    try:
        image = put_image(own, make_sif(tmp_path / "a.sif"), "lab/tools", tags=["latest"])
        answers = [server.get(f"/api/v1/images/{image.id}/download") for _ in range(3)]
        assert [answer.status for answer in answers] == [200, 200, 429]
        assert int(answers[2].headers["retry-after"]) > 0
        assert server.get("/api/container/lab/tools").status == 200
    finally:
        server.stop()
        own.close()


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=30) | st.from_regex(r"bytes=\d{0,4}-\d{0,4}", fullmatch=True), st.integers(0, 2000))
def test_any_range_lies_within_the_file(text: str, size: int):
    try:
        found = parse_range(text, size)
    except WrongRange:
        return
    if found is not None:
        offset, count = found
        assert 0 <= offset < offset + count <= size


@settings(max_examples=60, deadline=None)
@given(name=st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), max_size=60))
def test_odd_names_are_refused_quietly(name: str):
    from urllib.parse import quote

    from pysingularity.hub.catalog import parse_target
    from pysingularity.hub.errors import Invalid

    assert quote(name) is not None
    try:
        found = parse_target(name)
    except Invalid:
        return
    assert "/" not in found.owner + found.name
    assert found.owner not in ("", ".", "..") or found.name


def test_our_client_pulls(server: Server, hub: Hub, tmp_path: Path):
    path = make_sif(tmp_path / "a.sif", pad=1 << 20)
    put_image(hub, path, "lab/tools", tags=["v1"], commit=COMMIT)
    target = tmp_path / "pulled.sif"
    result = run(
        *SINGULARITY, "pull", "--no-https", target, f"shub://127.0.0.1:{server.port}/lab/tools:v1",
        env={"SINGULARITY_CACHEDIR": str(tmp_path / "cache")},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert target.read_bytes() == path.read_bytes()


@pytest.mark.peer
def test_reference_client_pulls_two_images_of_one_commit(server: Server, hub: Hub, tmp_path: Path, reference):
    first, second = make_sif(tmp_path / "a.sif", "one"), make_sif(tmp_path / "b.sif", "two")
    put_image(hub, first, "lab/tools", tags=["latest"], commit=COMMIT)
    put_image(hub, second, "lab/tools", tags=["gpu"], commit=COMMIT)
    env = {"http_proxy": server.url, "APPTAINER_CACHEDIR": str(tmp_path / "cache")}
    for tag, path in (("latest", first), ("gpu", second)):
        target = tmp_path / f"{tag}-pulled.sif"
        result = reference("pull", "--no-https", target, f"shub://hub.lab/lab/tools:{tag}", env=env)
        assert result.returncode == 0, result.stderr
        assert target.read_bytes() == path.read_bytes()
    result = reference("pull", "--no-https", tmp_path / "x.sif", "shub://hub.lab/lab/tools:none", env=env)
    assert "not found in singularity hub" in result.stderr
    assert os.listdir(tmp_path / "cache")


@pytest.mark.peer
def test_reference_client_pulls_from_a_private_collection(server: Server, hub: Hub, tmp_path: Path, reference):
    path = make_sif(tmp_path / "a.sif")
    put_image(hub, path, "lab/secret", tags=["latest"], private=True)
    with hub.write() as session:
        collection = find_collection(session, "lab", "secret")
        assert collection is not None
        share = add_share(session, collection, by="lab")
    env = {"http_proxy": server.url, "APPTAINER_CACHEDIR": str(tmp_path / "cache")}
    target = tmp_path / "pulled.sif"
    result = reference("pull", "--no-https", target, f"shub://hub.lab/t/{share}/lab/secret", env=env)
    assert result.returncode == 0, result.stderr
    assert target.read_bytes() == path.read_bytes()


RECIPE = "Bootstrap: shub\nFrom: {host}/lab/tools:v1\n\n%labels\n    NEW label\n"


def test_our_client_builds_from_an_image_here(server: Server, hub: Hub, tmp_path: Path):
    put_image(hub, make_sif(tmp_path / "a.sif", "base"), "lab/tools", tags=["v1"], commit=COMMIT)
    recipe = tmp_path / "new.def"
    recipe.write_text(RECIPE.format(host=f"127.0.0.1:{server.port}"))
    env = {"SINGULARITY_CACHEDIR": str(tmp_path / "cache"), "SINGULARITY_NOHTTPS": "1"}
    result = run(*SINGULARITY, "build", "--fakeroot", tmp_path / "new.sif", recipe, env=env, timeout=300)
    assert result.returncode == 0, result.stderr
    shown = run(*SINGULARITY, "inspect", "--labels", tmp_path / "new.sif")
    assert "NEW" in shown.stdout


@pytest.mark.peer
def test_reference_client_builds_from_an_image_here(server: Server, hub: Hub, tmp_path: Path, reference):
    path = make_sif(tmp_path / "a.sif", "base")
    put_image(hub, path, "lab/tools", tags=["v1"], commit=COMMIT)
    recipe = tmp_path / "new.def"
    recipe.write_text(RECIPE.format(host="hub.lab"))
    cache = tmp_path / "cache"
    env = {"http_proxy": server.url, "APPTAINER_CACHEDIR": str(cache), "APPTAINER_NOHTTPS": "1"}
    result = reference("build", "--no-https", tmp_path / "new.sif", recipe, env=env, timeout=300)
    # What it builds from is what we sent, known by our commit; unpacking needs more of root than many machines give.
    assert (cache / "cache" / "shub" / COMMIT).read_bytes() == path.read_bytes(), result.stderr
    if result.returncode and "capability set" in result.stderr:
        pytest.skip("needs a root with all capabilities, for the reference client's own unpacking")
    assert result.returncode == 0, result.stderr
    assert "NEW" in reference("inspect", "--labels", tmp_path / "new.sif").stdout


def test_spython_pulls(server: Server, hub: Hub, tmp_path: Path, monkeypatch):
    main = pytest.importorskip("spython.main", reason="needs spython: pip install spython")
    path = make_sif(tmp_path / "a.sif", "spython")
    put_image(hub, path, "lab/tools", tags=["v1"], commit=COMMIT)
    # It runs whatever `singularity` is on the path; here ours.
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "singularity").write_text(f'#!/bin/sh\nexec {" ".join(SINGULARITY)} "$@"\n')
    (programs / "singularity").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    monkeypatch.setenv("SINGULARITY_CACHEDIR", str(tmp_path / "cache"))
    monkeypatch.setenv("SINGULARITY_NOHTTPS", "1")
    pulled = main.Client.pull(
        f"shub://127.0.0.1:{server.port}/lab/tools:v1", name="x.sif", pull_folder=str(tmp_path), quiet=True
    )
    assert Path(pulled).read_bytes() == path.read_bytes()
