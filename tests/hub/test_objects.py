# SPDX-License-Identifier: Apache-2.0
"""Images in an object store: pushed, pulled through signed links, looked into, and collected; against an S3 server."""

from __future__ import annotations

import hashlib
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from pysingularity.hub.context import Hub
from pysingularity.hub.keeping.backup import back_up, restore
from pysingularity.hub.keeping.garbage import collect
from pysingularity.hub.keeping.scrub import scrub
from pysingularity.hub.settings import load_settings

from .conftest import make_data, started
from .shelf import SINGULARITY, make_sif, put_image, run
from .test_library import test_every_way_of_uploading_gives_the_image  # noqa: F401
from .test_oci import test_pushed_image_is_an_image_at_every_door  # noqa: F401
from .world import Server


@pytest.fixture(scope="module")
def bucket() -> Iterator[tuple[str, str]]:
    """A bucket in an S3 server on loopback: (address of the server, name)."""
    pytest.importorskip("obstore", reason="needs the objects extra: pip install '.[objects]'")
    moto = pytest.importorskip("moto.server", reason="needs moto's S3 server: pip install 'moto[s3]' flask flask-cors")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    opener.open(urllib.request.Request(f"{url}/images", method="PUT")).close()
    yield url, "images"
    server.stop()


@pytest.fixture(scope="module")
def stand(tmp_path_factory: pytest.TempPathFactory, bucket: tuple[str, str]) -> Iterator[tuple[Server, Hub]]:
    """A running hub whose images are in the bucket."""
    url, name = bucket
    data = make_data(
        tmp_path_factory.mktemp("objects"),
        more=f'url = "s3://{name}/hub"\n[storage.options]\nendpoint = "{url}"\nregion = "us-east-1"\n'
        'access_key_id = "a"\nsecret_access_key = "b"\nallow_http = "true"\nvirtual_hosted_style_request = "false"\n',
    )
    one = started(data)
    opened = Hub(load_settings(data))
    yield one, opened
    opened.close()
    one.stop()


@pytest.fixture
def server(clean: tuple[Server, Hub]) -> Server:
    return clean[0]


@pytest.fixture
def hub(clean: tuple[Server, Hub]) -> Hub:
    return clean[1]


def test_downloads_are_sent_to_signed_links_that_end(server: Server, hub: Hub, bucket: tuple[str, str], tmp_path: Path):
    file = make_sif(tmp_path / "a.sif", "signed", pad=3 << 20)
    image = put_image(hub, file, "lab/tools", tags=["latest"])
    answer = server.get("/api/container/lab/tools").json
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect())
    with pytest.raises(urllib.error.HTTPError) as caught:
        opener.open(answer["image"])
    link = caught.value.headers["Location"]
    caught.value.close()
    assert caught.value.code == 302
    assert link.startswith(f"{bucket[0]}/images/hub/{image.sha256[:2]}/{image.sha256}?")
    query = dict(urllib.parse.parse_qsl(urllib.parse.urlsplit(link).query))
    assert query["X-Amz-Expires"] == "3600"
    assert query["X-Amz-Signature"]
    with opener.open(link) as got:
        assert hashlib.sha256(got.read()).hexdigest() == image.sha256
    # no token of ours goes there, and pulls are counted
    assert server.get(f"/api/v1/images/{image.id}").json["pulls"] == 1


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: object) -> None:
        return None


def test_our_client_pulls_and_pushes_at_every_door(server: Server, hub: Hub, tmp_path: Path):
    file = make_sif(tmp_path / "a.sif", "every door", pad=2 << 20)
    put_image(hub, file, "lab/tools", tags=["v1"])
    host = f"127.0.0.1:{server.port}"
    env = {"SINGULARITY_CACHEDIR": str(tmp_path / "cache"), "HOME": str(tmp_path), "APPTAINER_CACHEDIR": ""}
    for number, words in enumerate(
        (
            ("--no-https", f"shub://{host}/lab/tools:v1"),
            ("--library", server.url, "library://lab/tools/tools:v1"),
            ("--no-https", f"oras://{host}/lab/tools:v1"),
        )
    ):
        target = tmp_path / f"{number}.sif"
        result = run(*SINGULARITY, "pull", "--disable-cache", *words[:-1], target, words[-1], env=env)
        assert result.returncode == 0, result.stderr
        assert target.read_bytes() == file.read_bytes()


def test_pages_look_into_stored_images_and_garbage_goes(server: Server, hub: Hub, tmp_path: Path):
    image = put_image(hub, make_sif(tmp_path / "a.sif", "inside"), "lab/tools", tags=["latest"])
    assert hub.storage.has(image.sha256)
    files = server.get(f"/api/v1/images/{image.id}/files/").json
    assert [row["name"] for row in files["entries"]] == ["text"]
    assert scrub(hub)["damaged"] == {}
    server.request("DELETE", f"/api/v1/images/{image.id}")
    collect(hub, grace=-1)
    assert not hub.storage.has(image.sha256)
    assert not list((hub.settings.data / "blobs" / "copies").glob(image.sha256))


def test_backup_of_a_bucket_becomes_a_hub_with_files(server: Server, hub: Hub, tmp_path: Path):
    image = put_image(hub, make_sif(tmp_path / "a.sif", "backup"), "lab/tools", tags=["latest"])
    back_up(hub, tmp_path / "backup")
    assert (tmp_path / "backup").is_dir()
    text = (hub.settings.data / "hub.toml").read_text()
    assert "s3://" in text
    restore(tmp_path / "backup", tmp_path / "again")
    again = Hub(load_settings(tmp_path / "again"))
    assert again.storage.has(image.sha256)
    again.close()
