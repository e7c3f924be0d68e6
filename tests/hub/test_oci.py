# SPDX-License-Identifier: Apache-2.0
"""OCI distribution: our client, the reference client and skopeo; and uploads that go wrong."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
import socket
from pathlib import Path

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pysingularity.hub.context import Hub
from pysingularity.hub.errors import Invalid
from pysingularity.hub.models import Collection, Image
from pysingularity.hub.protocols.manifests import parse_manifest

from .shelf import SINGULARITY, make_sif, put_image, run
from .world import Server

SIF = "application/vnd.sylabs.sif.layer.v1.sif"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
CONFIG = "sha256:" + hashlib.sha256(b"{}").hexdigest()


@pytest.fixture
def server(clean: tuple[Server, Hub]) -> Server:
    return clean[0]


@pytest.fixture
def hub(clean: tuple[Server, Hub]) -> Hub:
    return clean[1]


def digest_of(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def begin(server: Server, name: str = "lab/tools") -> str:
    answer = server.post(f"/v2/{name}/blobs/uploads/", b"")
    assert answer.status == 202, answer.text
    return answer.headers["location"]


def put_blob(server: Server, data: bytes, name: str = "lab/tools") -> str:
    answer = server.request("PUT", f"{begin(server, name)}?digest={digest_of(data)}", data)
    assert answer.status == 201, answer.text
    return digest_of(data)


def manifest_of(data: bytes, kind: str = SIF, **more: object) -> bytes:
    layer = {"mediaType": kind, "size": len(data), "digest": digest_of(data)}
    config = {"mediaType": "application/vnd.sylabs.sif.config.v1+json", "size": 2, "digest": CONFIG}
    value = {"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": [layer], **more}
    return json.dumps(value).encode()


def put_manifest(server: Server, content: bytes, tag: str, name: str = "lab/tools"):
    return server.request("PUT", f"/v2/{name}/manifests/{tag}", content, headers={"Content-Type": MANIFEST})


def test_strangers_are_asked_to_log_in_and_get_a_pass(server: Server, hub: Hub, tmp_path: Path):
    put_image(hub, make_sif(tmp_path / "a.sif"), "lab/tools", tags=["v1"])
    put_image(hub, make_sif(tmp_path / "b.sif"), "lab/secret", tags=["v1"], private=True)
    answer = server.get("/v2/", token="")
    assert answer.status == 401
    assert answer.headers["www-authenticate"] == f'Bearer realm="{server.url}/token",service="hub"'
    assert answer.json["errors"][0]["code"] == "UNAUTHORIZED"
    stranger = server.get("/token?service=hub", token="").json["token"]
    assert server.get("/v2/", token=stranger).status == 200
    assert server.get("/v2/lab/tools/manifests/v1", token=stranger).status == 200
    assert server.get("/v2/lab/secret/manifests/v1", token=stranger).status == 404
    assert server.get("/v2/lab/secret/manifests/v1", token="").status == 401
    assert server.get("/v2/lab/none/manifests/v1", token="").status == 401
    assert server.get("/v2/lab/secret/manifests/v1").status == 200
    changed = stranger.replace(".", "1.", 1)
    assert server.get("/v2/", token=changed).status == 401
    assert server.post("/v2/lab/tools/blobs/uploads/", b"", token=stranger).status == 401
    assert server.get("/v2/_catalog", token=stranger).json == {"repositories": ["lab/tools"]}


def test_pushed_image_is_an_image_at_every_door(server: Server, tmp_path: Path):
    data = make_sif(tmp_path / "a.sif", "pushed").read_bytes()
    put_blob(server, data)
    content = manifest_of(data)
    answer = put_manifest(server, content, "v1")
    assert answer.status == 201, answer.text
    assert answer.headers["docker-content-digest"] == digest_of(content)
    found = server.get("/v2/lab/tools/manifests/v1", token="")
    assert found.body == content
    image = server.get("/api/v1/images/lab/tools:v1").json
    assert (image["sha256"], image["labels"]) == (digest_of(data)[7:], {"TEXT": "pushed"})
    shub = server.get("/api/container/lab/tools:v1", token="").json
    assert server.get(shub["image"].removeprefix(server.url), token="").body == data
    part = server.get(f"/v2/lab/tools/blobs/{digest_of(data)}", headers={"Range": "bytes=10-19"})
    assert part.body == data[10:20]
    assert put_manifest(server, content, "v2").status == 201
    assert len(server.get("/api/v1/images/lab/tools").json["images"]) == 1


def test_built_image_is_pulled_as_it_was_published(server: Server, hub: Hub, tmp_path: Path):
    path = make_sif(tmp_path / "a.sif")
    put_image(hub, path, "lab/tools", tags=["latest"])
    answer = server.get("/v2/lab/tools/manifests/latest", token="")
    value = answer.json
    assert answer.headers["docker-content-digest"] == digest_of(answer.body)
    assert server.get(f"/v2/lab/tools/blobs/{value['layers'][0]['digest']}", token="").body == path.read_bytes()
    assert server.get(f"/v2/lab/tools/blobs/{value['config']['digest']}", token="").body == b"{}"
    head = server.request("HEAD", f"/v2/lab/tools/blobs/{value['layers'][0]['digest']}", token="")
    assert (head.status, int(head.headers["content-length"])) == (200, path.stat().st_size)


def test_pieces_are_put_together_and_gaps_refused(server: Server):
    data = bytes(range(256)) * 40
    place = begin(server)
    first = server.request("PATCH", place, data[:4000], headers={"Content-Range": "0-3999"})
    assert (first.status, first.headers["range"]) == (202, "0-3999")
    gap = server.request("PATCH", place, data[5000:], headers={"Content-Range": f"5000-{len(data) - 1}"})
    assert (gap.status, gap.headers["range"]) == (416, "0-3999")
    state = server.get(place)
    assert (state.status, state.headers["range"]) == (204, "0-3999")
    assert server.request("PATCH", place, data[4000:9000], headers={"Content-Range": "4000-8999"}).status == 202
    assert server.request("PUT", f"{place}?digest={digest_of(data)}", data[9000:]).status == 201
    assert server.get(f"/v2/lab/tools/blobs/{digest_of(data)}").body == data
    assert server.get(place).status == 404


def test_upload_goes_on_after_a_broken_connection(server: Server):
    data = b"x" * (3 << 20) + b"end"
    place = begin(server)
    head = f"PATCH {place} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {server.token}\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(head.encode() + f"Content-Length: {len(data)}\r\n\r\n".encode() + data[: 2 << 20])
    for _ in range(100):
        at = int(server.get(place).headers["range"].partition("-")[2]) + 1
        answer = server.request("PATCH", place, data[at:], headers={"Content-Range": f"{at}-{len(data) - 1}"})
        if answer.status == 202:
            break
    assert answer.status == 202, answer.text
    assert server.request("PUT", f"{place}?digest={digest_of(data)}", b"").status == 201


def test_wrong_digest_leaves_nothing(server: Server, hub: Hub):
    place = begin(server)
    answer = server.request("PUT", f"{place}?digest={digest_of(b'other')}", b"something")
    assert (answer.status, answer.json["errors"][0]["code"]) == (400, "DIGEST_INVALID")
    assert server.get(place).status == 404
    assert not hub.storage.has(digest_of(b"something")[7:])
    assert not list(hub.settings.folder("uploads").iterdir())
    assert server.get(f"/v2/lab/tools/blobs/{digest_of(b'other')}").status == 404
    for digest in ("sha256:short", "md5:0", "sha512:" + "0" * 128, ""):
        assert server.request("PUT", f"{begin(server)}?digest={digest}", b"x").status == 400


def test_manifest_of_missing_or_odd_files_is_refused(server: Server):
    put_blob(server, b"no image at all")
    assert put_manifest(server, manifest_of(b"missing"), "v1").json["errors"][0]["code"] == "MANIFEST_BLOB_UNKNOWN"
    assert put_manifest(server, manifest_of(b"no image at all"), "v1").status == 422
    other = manifest_of(b"no image at all", "application/octet-stream")
    assert put_manifest(server, other, digest_of(b"another")).json["errors"][0]["code"] == "DIGEST_INVALID"
    assert put_manifest(server, other, ".hidden").status == 400
    assert put_manifest(server, b"{}", "v1").json["errors"][0]["code"] == "MANIFEST_INVALID"
    assert server.get("/v2/lab/tools/manifests/v1").status == 404
    assert put_manifest(server, other, "v1").status == 201
    assert server.get("/api/container/lab/tools:v1").status == 404  # kept for OCI clients, but no image


def test_blobs_of_others_are_neither_seen_nor_mounted(server: Server, hub: Hub, tmp_path: Path):
    path = make_sif(tmp_path / "a.sif")
    put_image(hub, path, "lab/secret", tags=["v1"], private=True)
    secret = server.command("token", "create", "--user", _user(server, "ann"), "--scope", "read,push").strip()
    digest = digest_of(path.read_bytes())
    assert server.get(f"/v2/ann/own/blobs/{digest}", token=secret).status == 404
    mount = server.post(f"/v2/ann/own/blobs/uploads/?mount={digest}&from=lab/secret", b"", token=secret)
    assert mount.status == 202
    assert server.request("HEAD", f"/v2/ann/own/blobs/{digest}", token=secret).status == 404
    assert server.post("/v2/lab/tools/blobs/uploads/", b"", token=secret).status == 403
    assert server.post(f"/v2/lab/copy/blobs/uploads/?mount={digest}&from=lab/secret", b"").status == 201
    assert server.request("HEAD", f"/v2/lab/copy/blobs/{digest}").status == 200
    taken = server.request("PATCH", begin(server), b"x", token=secret)
    assert taken.status in (403, 404)


def _user(server: Server, name: str) -> str:
    if name not in server.command("user", "list"):
        server.command("user", "add", name)
    return name


def test_tags_are_listed_in_pages_and_deleted(server: Server):
    put_blob(server, b"thing")
    content = manifest_of(b"thing", "application/octet-stream")
    for tag in ("a", "b", "c"):
        assert put_manifest(server, content, tag).status == 201
    page = server.get("/v2/lab/tools/tags/list?n=2")
    assert page.json == {"name": "lab/tools", "tags": ["a", "b"]}
    rest = page.headers["link"].partition(">")[0].strip("<")
    assert server.get(rest).json["tags"] == ["c"]
    assert server.request("DELETE", f"/v2/lab/tools/blobs/{digest_of(b'thing')}").status == 409
    assert server.request("DELETE", "/v2/lab/tools/manifests/b").status == 202
    assert server.get("/v2/lab/tools/tags/list").json["tags"] == ["a", "c"]
    assert server.request("DELETE", f"/v2/lab/tools/manifests/{digest_of(content)}").status == 202
    assert server.get("/v2/lab/tools/tags/list").json["tags"] == []
    assert server.request("DELETE", f"/v2/lab/tools/blobs/{digest_of(b'thing')}").status == 202


def test_frozen_and_others_images_are_not_deleted(server: Server, hub: Hub, tmp_path: Path):
    image = put_image(hub, make_sif(tmp_path / "a.sif"), "lab/tools", tags=["v1"])
    digest = server.get("/v2/lab/tools/manifests/v1").headers["docker-content-digest"]
    pusher = server.command("token", "create", "--user", "lab", "--scope", "read,push").strip()
    with hub.write() as session:
        session.get_one(Image, image.id).created_by = "robot"
    address = f"/v2/lab/tools/manifests/{digest}"
    assert server.request("DELETE", address, token=pusher).status == 403
    assert server.post(f"/api/v1/images/{image.id}/freeze").status == 200
    assert server.request("DELETE", address).status == 409
    assert server.request("DELETE", "/v1/images/lab/tools/tools:v1").status == 409
    assert server.get("/v2/lab/tools/manifests/v1").status == 200
    assert server.post(f"/api/v1/images/{image.id}/unfreeze").status == 200
    assert server.request("DELETE", address).status == 202
    assert server.get("/api/container/lab/tools:v1").status == 404


def test_uploads_beyond_the_quota_are_refused(server: Server, hub: Hub):
    put_blob(server, b"x" * 600)
    with hub.write() as session:
        session.scalars(sa.select(Collection)).one().quota = 1000
    data = b"y" * 600
    place = begin(server)
    assert server.request("PATCH", place, data).status == 413
    piece = f"PATCH {place} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {server.token}\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as connection:  # without saying how much will come
        connection.sendall(piece.encode() + b"Transfer-Encoding: chunked\r\n\r\n258\r\n" + data + b"\r\n0\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 202")
    assert server.request("PUT", f"{place}?digest={digest_of(data)}", b"").status == 413
    assert server.request("HEAD", f"/v2/lab/tools/blobs/{digest_of(data)}").status == 404


def test_referrers_name_what_speaks_of_an_image(server: Server):
    put_blob(server, b"thing")
    content = manifest_of(b"thing", "application/octet-stream")
    put_manifest(server, content, "v1")
    subject = {"mediaType": MANIFEST, "digest": digest_of(content), "size": len(content)}
    signature = manifest_of(b"thing", "text/plain", subject=subject, artifactType="application/x.signature")
    answer = put_manifest(server, signature, digest_of(signature))
    assert (answer.status, answer.headers["oci-subject"]) == (201, digest_of(content))
    found = server.get(f"/v2/lab/tools/referrers/{digest_of(content)}").json["manifests"]
    assert [(one["digest"], one["artifactType"]) for one in found] == [
        (digest_of(signature), "application/x.signature")
    ]
    other = server.get(f"/v2/lab/tools/referrers/{digest_of(content)}?artifactType=other")
    assert (other.json["manifests"], other.headers["oci-filters-applied"]) == ([], "artifactType")


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(min_size=1, max_size=3000), cuts=st.lists(st.integers(0, 3000), max_size=4), wrong=st.booleans())
def test_any_way_of_cutting_gives_the_file_or_an_error(server: Server, data: bytes, cuts: list[int], wrong: bool):
    place = begin(server)
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    for start, end in itertools.pairwise(edges):
        if end > start:
            piece = {"Content-Range": f"{start}-{end - 1}"}
            assert server.request("PATCH", place, data[start:end], headers=piece).status == 202
    digest = digest_of(data + b"?") if wrong else digest_of(data)
    assert server.request("PUT", f"{place}?digest={digest}", b"").status == (400 if wrong else 201)
    assert server.get(f"/v2/lab/tools/blobs/{digest}").status == (404 if wrong else 200)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=12,
)
keys = ("mediaType", "config", "layers", "manifests", "subject", "annotations", "artifactType", "urls")


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(keys), json_values, max_size=6), st.binary(max_size=50))
def test_any_manifest_is_read_or_refused(value: dict, noise: bytes):
    for content in (json.dumps({"schemaVersion": 2, **value}).encode(), noise):
        try:
            parse_manifest(content, "")
        except Invalid:
            continue


def test_our_client_pushes_and_pulls(server: Server, tmp_path: Path):
    path = make_sif(tmp_path / "a.sif", pad=1 << 20)
    reference = f"oras://127.0.0.1:{server.port}/lab/tools:v1"
    env = {
        "SINGULARITY_CACHEDIR": str(tmp_path / "cache"),
        "SINGULARITY_DOCKER_USERNAME": "lab",
        "SINGULARITY_DOCKER_PASSWORD": server.token,
    }
    result = run(*SINGULARITY, "push", "--no-https", path, reference, env=env)
    assert result.returncode == 0, result.stderr
    target = tmp_path / "pulled.sif"
    env = {"SINGULARITY_CACHEDIR": str(tmp_path / "cache2")}
    result = run(*SINGULARITY, "pull", "--no-https", target, reference, env=env)
    assert result.returncode == 0, result.stderr
    assert target.read_bytes() == path.read_bytes()


@pytest.mark.peer
def test_reference_client_pushes_and_pulls(server: Server, tmp_path: Path, reference):
    path = make_sif(tmp_path / "a.sif", pad=1 << 20)
    name = f"oras://127.0.0.1:{server.port}/lab/tools:v1"
    env = {
        "APPTAINER_CACHEDIR": str(tmp_path / "cache"),
        "APPTAINER_DOCKER_USERNAME": "lab",
        "APPTAINER_DOCKER_PASSWORD": server.token,
    }
    result = reference("push", "--no-https", path, name, env=env)
    assert result.returncode == 0, result.stderr
    target = tmp_path / "pulled.sif"
    result = reference("pull", "--no-https", target, name, env={"APPTAINER_CACHEDIR": str(tmp_path / "cache2")})
    assert result.returncode == 0, result.stderr
    assert target.read_bytes() == path.read_bytes()
    assert server.get("/api/v1/images/lab/tools:v1").json["labels"] == {"TEXT": "hello"}


@pytest.mark.peer
def test_skopeo_pushes_and_pulls_a_container_image(server: Server, tmp_path: Path):
    if shutil.which("skopeo") is None:
        pytest.skip("needs skopeo")
    layout = tmp_path / "layout"
    (layout / "blobs" / "sha256").mkdir(parents=True)

    def put(data: bytes, kind: str) -> dict:
        digest = digest_of(data)
        (layout / "blobs" / "sha256" / digest[7:]).write_bytes(data)
        return {"mediaType": kind, "digest": digest, "size": len(data)}

    config = put(
        json.dumps({"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": []}}).encode(),
        "application/vnd.oci.image.config.v1+json",
    )
    manifest = {"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": []}
    top = {**put(json.dumps(manifest).encode(), MANIFEST), "annotations": {"org.opencontainers.image.ref.name": "x"}}
    (layout / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [top]}))
    (layout / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    name = f"docker://127.0.0.1:{server.port}/lab/docker:v1"
    base = ("skopeo", "--insecure-policy", "copy", "--src-tls-verify=false", "--dest-tls-verify=false")
    push = run(*base, "--dest-creds", f"lab:{server.token}", f"oci:{layout}:x", name)
    assert push.returncode == 0, push.stderr
    pull = run(*base, name, f"oci:{tmp_path / 'back'}:x")
    assert pull.returncode == 0, pull.stderr
    assert (tmp_path / "back" / "blobs" / "sha256" / top["digest"][7:]).exists()
    by_password = run(
        "skopeo", "list-tags", "--tls-verify=false", "--creds", "lab:correct horse", name.rpartition(":")[0]
    )
    assert json.loads(by_password.stdout)["Tags"] == ["v1"], by_password.stderr
