# SPDX-License-Identifier: Apache-2.0
"""library://: our client and the reference client; and uploads in every way and wrong ones."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pysingularity.hub.context import Hub

from .shelf import SINGULARITY, make_sif, put_image, run
from .world import Server


@pytest.fixture
def server(clean: tuple[Server, Hub]) -> Server:
    return clean[0]


@pytest.fixture
def hub(clean: tuple[Server, Hub]) -> Hub:
    return clean[1]


def sha256_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def announce(server: Server, data: bytes, name: str = "tools") -> tuple[str, str]:
    """Return the numbers of a container and of an image that was announced in it."""
    shelf = server.post("/v1/collections", {"name": name, "entity": "lab"}).json["data"]["id"]
    box = server.post("/v1/containers", {"name": "deb", "collection": shelf}).json["data"]["id"]
    image = server.post("/v1/images", {"hash": f"sha256.{sha256_of(data)}", "container": box}).json["data"]
    assert image["uploaded"] is False
    return box, image["id"]


def send_parts(server: Server, image: str, data: bytes, order: list[int] | None = None):
    begun = server.post(f"/v2/imagefile/{image}/_multipart", {"filesize": len(data)}).json["data"]
    size, count = begun["partSize"], begun["totalParts"]
    for part in order or range(1, count + 1):
        piece = data[(part - 1) * size : part * size]
        value = {
            "uploadID": begun["uploadID"],
            "partNumber": part,
            "partSize": len(piece),
            "sha256sum": sha256_of(piece),
        }
        url = server.request("PUT", f"/v2/imagefile/{image}/_multipart", value).json["data"]["presignedURL"]
        answer = server.request("PUT", url.removeprefix(server.url), piece, token="")
        assert answer.status == 200, answer.text
    return server.request("PUT", f"/v2/imagefile/{image}/_multipart_complete", {"uploadID": begun["uploadID"]})


def tag(server: Server, box: str, image: str, name: str):
    return server.post(f"/v2/tags/{box}", {"Arch": "amd64", "Tag": name, "ImageID": image})


def test_discovery_names_the_host_that_was_asked_for(server: Server):
    value = server.get("/assets/config/config.prod.json", token="", headers={"Host": "hub.lab"}).json
    assert value["libraryAPI"] == {"uri": "http://hub.lab"}
    assert server.get("/version", token="").json["data"]["apiVersion"] == "2.0.0-alpha.2"
    assert server.get("/v1/token-status").status == 200
    assert server.get("/v1/token-status", token="wrong").status == 401
    assert server.get("/v1/oci-redirect?accessTypes=pull").status == 404
    assert len(server.token) >= 200


def test_image_is_shown_and_sent(server: Server, hub: Hub, tmp_path: Path):
    path = make_sif(tmp_path / "a.sif")
    put_image(hub, path, "lab/tools", tags=["v1"])
    value = server.get("/v1/images/lab/tools/tools:v1?arch=amd64", token="").json["data"]
    assert value["hash"] == f"sha256.{sha256_of(path.read_bytes())}"
    assert (value["size"], value["uploaded"], value["arch"]) == (path.stat().st_size, True, "amd64")
    assert server.get("/v1/images/lab/tools/tools:v1?arch=arm64", token="").status == 404
    assert server.get(f"/v1/images/lab/tools/tools:{value['hash']}?arch=arm64", token="").json["data"] == value
    assert server.get("/v1/imagefile/lab/tools/tools:v1?arch=amd64", token="").body == path.read_bytes()
    for missing in ("lab/tools/tools:v2", "lab/tools/none:v1", "a/b/c:d", "lab", "lab/tools/tools:sha256.0"):
        assert server.get(f"/v1/images/{missing}", token="").status == 404, missing


@pytest.mark.parametrize("way", ["whole", "oldest", "parts"])
def test_every_way_of_uploading_gives_the_image(server: Server, hub: Hub, tmp_path: Path, way: str):
    data = make_sif(tmp_path / "a.sif", "sent").read_bytes()
    box, image = announce(server, data)
    assert server.get(f"/v1/images/lab/tools/deb:sha256.{sha256_of(data)}").json["data"]["uploaded"] is False
    assert server.get(f"/v1/images/lab/tools/deb:sha256.{sha256_of(data)}", token="").status == 404
    assert tag(server, box, image, "12").status == 404
    if way == "oldest":
        answer = server.post(f"/v1/imagefile/{image}", data, headers={"Content-Type": "application/octet-stream"})
    elif way == "whole":
        sums = {"filesize": len(data), "sha256sum": sha256_of(data)}
        url = server.post(f"/v2/imagefile/{image}", sums).json["data"]["uploadURL"]
        assert server.request("PUT", url.removeprefix(server.url), data, token="").status == 200
        answer = server.request("PUT", f"/v2/imagefile/{image}/_complete", {})
    else:
        answer = send_parts(server, image, data)
    assert answer.status == 200, answer.text
    assert answer.json["data"]["quota"]["quotaUsage"] == len(data)
    for name in ("12", "latest"):
        assert tag(server, box, image, name).status == 200
    assert server.get(f"/v2/tags/{box}").json["data"] == {"amd64": {"12": image, "latest": image}}
    assert server.get("/v1/imagefile/lab/tools/deb:12?arch=amd64", token="").body == data
    assert server.get("/v2/lab/tools/deb/manifests/12").json["layers"][0]["digest"] == f"sha256:{sha256_of(data)}"
    again = server.post("/v1/images", {"hash": f"sha256.{sha256_of(data)}", "container": box}).json["data"]
    assert (again["id"], again["uploaded"]) == (image, True)
    assert not list(hub.settings.folder("uploads").iterdir())


def test_parts_arrive_in_any_order_and_again(clean, tmp_path: Path):
    server, hub = clean
    data = make_sif(tmp_path / "a.sif", pad=12 << 20).read_bytes()
    hub.settings.folder("uploads")
    _, image = announce(server, data)
    part = 5 << 20
    count = -(-len(data) // part)
    assert count == 3
    answer = send_parts(server, image, data, order=[3, 1, 2, 1])
    assert answer.status == 200, answer.text
    assert server.get(f"/v1/imagefile/lab/tools/deb:sha256.{sha256_of(data)}").body == data


def test_wrong_parts_are_refused(server: Server, hub: Hub, tmp_path: Path):
    data = make_sif(tmp_path / "a.sif", pad=6 << 20).read_bytes()
    _, image = announce(server, data)
    begun = server.post(f"/v2/imagefile/{image}/_multipart", {"filesize": len(data)}).json["data"]
    upload, size = begun["uploadID"], begun["partSize"]

    def place(number: int, piece: bytes, promised: str | None = None):
        value = {"uploadID": upload, "partNumber": number, "partSize": len(piece)}
        value["sha256sum"] = promised or sha256_of(piece)
        return server.request("PUT", f"/v2/imagefile/{image}/_multipart", value)

    assert place(9, b"x").status == 400
    assert place(1, data[:size] + b"x").status == 400
    url = place(1, data[:size], sha256_of(b"other")).json["data"]["presignedURL"].removeprefix(server.url)
    assert server.request("PUT", url, data[:size], token="").status == 400
    url = place(1, data[:size]).json["data"]["presignedURL"].removeprefix(server.url)
    assert server.request("PUT", url, data[: size - 1], token="").status == 400
    assert server.request("PUT", url, data[:size] + b"x", token="").status == 413
    assert server.request("PUT", url.rpartition("/")[0] + "/" + "0" * 16, data[:size], token="").status == 404
    end = server.request("PUT", f"/v2/imagefile/{image}/_multipart_complete", {"uploadID": upload})
    assert (end.status, end.json["error"]["id"]) == (400, "missing-parts")
    assert server.request("PUT", f"/v2/imagefile/{image}/_multipart_abort", {"uploadID": upload}).status == 200
    assert server.request("PUT", url, data[:size], token="").status == 404
    assert not list(hub.settings.folder("uploads").iterdir())


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(min_size=1, max_size=2000), way=st.sampled_from(["short", "long", "other", "no image"]))
def test_wrong_files_never_become_images(server: Server, hub: Hub, data: bytes, way: str):
    _, image = announce(server, data)
    sent = {"short": data[:-1], "long": data + b"x", "other": bytes(255 - one for one in data), "no image": data}[way]
    url = server.post(f"/v2/imagefile/{image}", {"filesize": len(data)}).json["data"]["uploadURL"]
    put = server.request("PUT", url.removeprefix(server.url), sent, token="")
    end = server.request("PUT", f"/v2/imagefile/{image}/_complete", {})
    assert put.status in (200, 400, 413)
    assert end.status in (400, 404, 422), end.text
    assert server.get(f"/v1/images/lab/tools/deb:sha256.{sha256_of(data)}").json["data"]["uploaded"] is False
    assert server.get(f"/v1/imagefile/lab/tools/deb:sha256.{sha256_of(data)}").status == 404
    assert not list(hub.settings.folder("uploads").iterdir())


def test_strangers_and_others_push_nothing(server: Server, hub: Hub, tmp_path: Path):
    data = make_sif(tmp_path / "a.sif").read_bytes()
    box, image = announce(server, data)
    if "ben" not in server.command("user", "list"):
        server.command("user", "add", "ben")
    other = server.command("token", "create", "--user", "ben", "--scope", "read,push").strip()
    reader = server.command("token", "create", "--user", "lab", "--scope", "read").strip()
    for token, status in (("", 401), (other, 403), (reader, 403)):
        assert server.post("/v1/collections", {"name": "new", "entity": "lab"}, token=token).status == status
        assert server.post(f"/v2/imagefile/{image}", {"filesize": 5}, token=token).status == status
        assert server.post(f"/v2/tags/{box}", {"Tag": "a", "ImageID": image}, token=token).status == status
        assert server.post(f"/v1/imagefile/{image}", data, token=token).status == status
    assert server.post("/v1/entities", {"name": "new"}).status == 403
    assert server.post("/v1/collections", {"name": "own", "entity": "ben"}, token=other).status == 200


def test_search_and_delete(server: Server, hub: Hub, tmp_path: Path):
    put_image(hub, make_sif(tmp_path / "a.sif"), "lab/debian", tags=["v1"])
    put_image(hub, make_sif(tmp_path / "b.sif"), "lab/debsecret", tags=["v1"], private=True)
    found = server.get("/v1/search?value=deb&arch=amd64", token="").json["data"]
    assert [one["collectionName"] for one in found["image"]] == ["debian"]
    assert found["image"][0]["tags"] == ["v1"]
    assert server.get("/v1/search?value=deb&signed=true", token="").json["data"]["image"] == []
    assert len(server.get("/v1/search?value=deb").json["data"]["image"]) == 2
    assert server.get("/v1/search?value=%25%25%25").json["data"]["image"] == []
    assert server.get("/v1/search?value=de").status == 400
    assert server.request("DELETE", "/v1/images/lab/debian/debian:v1?arch=amd64", token="").status == 401
    assert server.request("DELETE", "/v1/images/lab/debian/debian:v1?arch=amd64").status == 200
    assert server.get("/v1/images/lab/debian/debian:v1").status == 404


def test_our_client_pushes_and_pulls(server: Server, tmp_path: Path):
    path = make_sif(tmp_path / "a.sif", pad=1 << 20)
    name = f"library://127.0.0.1:{server.port}/lab/tools/deb:12"
    env = {"SINGULARITY_CACHEDIR": str(tmp_path / "cache"), "SINGULARITY_LIBRARY_TOKEN": server.token}
    result = run(*SINGULARITY, "push", "-U", "--no-https", path, name, env=env)
    assert result.returncode == 0, result.stderr
    target = tmp_path / "pulled.sif"
    env = {"SINGULARITY_CACHEDIR": str(tmp_path / "cache2")}
    result = run(*SINGULARITY, "pull", "--no-https", target, name, env=env)
    assert result.returncode == 0, result.stderr
    assert target.read_bytes() == path.read_bytes()


@pytest.mark.peer
@pytest.mark.parametrize("pad", [1, 70])
def test_reference_client_pushes_searches_pulls_and_deletes(server: Server, tmp_path: Path, reference, pad: int):
    path = make_sif(tmp_path / "a.sif", pad=pad << 20)
    secret = tmp_path / "token"
    secret.write_text(server.token)
    # A remote has no port; a proxy is told where an invented host is.
    env = {
        "http_proxy": server.url,
        "APPTAINER_CONFIGDIR": str(tmp_path / "config"),
        "APPTAINER_CACHEDIR": str(tmp_path / "cache"),
    }

    def call(*words: str | Path) -> str:
        result = reference(*words, env=env)
        assert result.returncode == 0, result.stderr
        return result.stdout

    call("remote", "add", "--no-login", "--insecure", "hub", "hub.lab")
    call("remote", "use", "hub")
    call("remote", "login", "--tokenfile", secret, "hub")
    call("push", "-U", path, "library://lab/tools/deb:12,latest")
    assert "lab/tools/deb" in call("search", "--arch", "amd64", "deb")
    target = tmp_path / "pulled.sif"
    call("pull", "--allow-unsigned", target, "library://lab/tools/deb:latest")
    assert target.read_bytes() == path.read_bytes()
    call("delete", "--force", "--arch", "amd64", "library://lab/tools/deb:12")
    assert server.get("/v1/images/lab/tools/deb:12").status == 404
