# SPDX-License-Identifier: Apache-2.0
"""From a reference to a file: failing registries, redirects, resumed downloads, other schemes, the cache in between."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from pysingularity.cache import Cache
from pysingularity.errors import ImageError, RegistryError, SingularityError
from pysingularity.image.open import open_image
from pysingularity.reference import parse_reference
from pysingularity.registry.fetch import fetch_for_run, obtain
from pysingularity.squashfs.reader import SquashfsImage
from registries import FakeRegistry, digest, gz, quiet, tar_of

BIG = os.urandom(3_000_000)


def content(path: str, name: str) -> bytes:
    with open_image(path) as image:
        squashfs = SquashfsImage(image.fd, image.offset, image.size)
        inode = squashfs.lookup(name.encode())
        assert inode is not None, name
        return squashfs.read(inode)


def bytes_of(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def pull(reference: str, settings):
    return obtain(parse_reference(reference), settings, quiet)


def test_image_is_fetched_once_and_found_afterwards(fake, settings):
    reference = fake.add(
        [gz(("a", b"1"), ("b", b"2")), gz(("a", b"new"))], config={"config": {"Env": ["X=a b"], "Cmd": ["ls"]}}
    )
    first = pull(reference, settings())
    assert (content(first.path, "a"), content(first.path, "b")) == (b"new", b"2")
    assert b"X" in content(first.path, "/.singularity.d/env/10-docker2singularity.sh")
    count = len(fake.log)
    second = pull(reference, settings())
    assert second.cached and second.path == first.path and second.digests["image"] == first.digests["image"]
    assert [entry[0] for entry in fake.log[count:]] == ["HEAD"]
    pull(reference, settings(pull="missing"))
    pull(reference, settings(offline=True))
    assert len(fake.log) == count + 1
    assert os.stat(first.path).st_mode & 0o777 == 0o555
    assert "sha256:" + hashlib.sha256(bytes_of(first.path)).hexdigest() == first.digests["image"]


def test_same_digest_gives_same_bytes_whatever_the_threads_and_the_day(fake, settings, environ, tmp_path):
    reference = fake.add([gz(*((f"f{number}", os.urandom(50_000)) for number in range(30)))])
    digests = set()
    for number, threads in enumerate((1, 2, 8)):
        environ["SINGULARITY_CACHEDIR"] = str(tmp_path / f"c{number}")
        digests.add(pull(reference, settings(threads=str(threads))).digests["image"])
    assert len(digests) == 1


def test_offline_says_so_when_nothing_is_known(fake, settings):
    with pytest.raises(RegistryError, match="not in the cache"):
        pull(fake.add([]), settings(offline=True))
    assert fake.log == []


def test_cut_download_is_continued_by_range(fake, settings, quick):
    layer = gz(("big", BIG))
    reference = fake.add([layer])
    cuts = []

    def spoil(handler):
        if "/blobs/" in handler.path and digest(layer) in handler.path and len(cuts) < 3:
            start = int(handler.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
            cuts.append(start)
            handler.send_response(206 if start else 200)
            handler.send_header("Content-Length", str(len(layer) - start))
            handler.end_headers()
            handler.wfile.write(layer[start : start + 700_000])
            handler.wfile.flush()
            handler.connection.shutdown(socket.SHUT_RDWR)
            handler.close_connection = True
            return True
        return False

    fake.spoil = spoil
    assert content(pull(reference, settings()).path, "big") == BIG
    assert cuts[0] == 0 and cuts == sorted(cuts) and cuts[1] > 0


@pytest.fixture
def parts(monkeypatch):
    """Blobs of more than 1 MiB come in parts of 256 KiB."""
    monkeypatch.setattr("pysingularity.registry.blobs.IN_PARTS", 1 << 20)
    monkeypatch.setattr("pysingularity.registry.blobs.PART", 1 << 18)


def asked_for(fake, layer):
    return [headers.get("Range", "") for _, path, headers in fake.log if digest(layer) in path]


@pytest.mark.usefixtures("parts")
def test_large_blob_comes_in_parts_over_several_connections(fake, settings):
    layer = gz(("big", BIG))
    reference = fake.add([layer])
    now, most, lock = [0], [0], threading.Lock()

    def slow(handler):
        if digest(layer) in handler.path:
            with lock:
                now[0] += 1
                most[0] = max(most[0], now[0])
            time.sleep(0.05)
            with lock:
                now[0] -= 1
        return False

    fake.spoil = slow
    assert content(pull(reference, settings()).path, "big") == BIG
    ranges = asked_for(fake, layer)
    assert len(ranges) == -(-len(layer) // (1 << 18)) and len(set(ranges)) == len(ranges)
    assert 1 < most[0] <= 4


@pytest.mark.usefixtures("parts")
def test_registry_without_ranges_is_asked_for_one_part_only(fake, settings):
    layer = gz(("big", BIG))
    reference = fake.add([layer])
    fake.ranges = False
    assert content(pull(reference, settings()).path, "big") == BIG
    assert asked_for(fake, layer) == ["bytes=0-262143", ""]


@pytest.mark.usefixtures("parts", "quick")
def test_part_that_fails_is_fetched_again_and_what_came_before_stays(fake, settings, environ):
    layer = gz(("big", BIG))
    reference = fake.add([layer])
    partial = Cache.open(environ).path("partial", digest(layer))
    with open(partial, "wb") as file:
        file.write(layer[:300_000])
    failed = []

    def spoil(handler):
        if digest(layer) in handler.path and "bytes=1348576-" in handler.headers.get("Range", "") and not failed:
            failed.append(handler.headers["Range"])
            handler.answer(206, b"short", Content_Range=f"bytes 1348576-1348580/{len(layer)}")
            return True
        return False

    fake.spoil = spoil
    assert content(pull(reference, settings()).path, "big") == BIG
    ranges = asked_for(fake, layer)
    assert failed and ranges[0].startswith("bytes=300000-") and ranges[-1] == "bytes=1348576-"


def test_partial_blob_of_a_killed_process_is_resumed(fake, settings, environ):
    layer = gz(("big", BIG))
    reference = fake.add([layer])
    cache = Cache.open(environ)
    with open(cache.path("partial", digest(layer)), "wb") as file:
        file.write(layer[:1_000_000])
    assert content(pull(reference, settings()).path, "big") == BIG
    ranges = [headers.get("Range") for _, path, headers in fake.log if digest(layer) in path]
    assert ranges == ["bytes=1000000-"]


def test_wrong_partial_blob_is_thrown_away_and_the_next_try_works(fake, settings, environ, quick):
    layer = gz(("big", BIG))
    reference = fake.add([layer])
    partial = Cache.open(environ).path("partial", digest(layer))
    with open(partial, "wb") as file:
        file.write(b"x" * 1_000_000)
    with pytest.raises(SingularityError):
        pull(reference, settings())
    assert not os.path.exists(partial)
    assert content(pull(reference, settings()).path, "big") == BIG


@pytest.mark.parametrize("status", [429, 500, 502, 503])
def test_passing_faults_are_waited_for(fake, settings, quick, status):
    reference = fake.add([gz(("a", b"1"))])
    left = [2]

    def spoil(handler):
        if left[0]:
            left[0] -= 1
            handler.answer(status, b"", Retry_After="7")
            return True
        return False

    fake.spoil = spoil
    pull(reference, settings())
    assert quick[:2] == [7.0, 7.0]


def test_wrong_content_and_wrong_size_leave_nothing_behind(fake, settings, environ, quick):
    layer = gz(("a", b"1"))
    reference = fake.add([layer])
    for wrong, word in (
        (layer[:-1] + b"?", "digest|damaged"),
        (layer + b"more", "more than"),
        (layer[:-9], "instead of the"),
    ):
        fake.blobs[digest(layer)] = wrong
        with pytest.raises(SingularityError, match=word):
            pull(reference, settings())
        cache = Cache.open(environ)
        assert list(cache.entries(("image",))) == []
        assert cache.blob(digest(layer)) is None
    fake.blobs[digest(layer)] = layer
    assert content(pull(reference, settings()).path, "a") == b"1"


def test_manifest_that_is_not_what_its_digest_says(fake, settings):
    fake.add([gz(("a", b"1"))])
    data, media = fake.manifests["1"]
    fake.manifests[digest(data)] = (data + b" ", media)
    with pytest.raises(RegistryError, match="not what"):
        pull(f"docker://{fake.host}/a/b@{digest(data)}", settings())


@pytest.mark.parametrize(
    ("manifest", "word"),
    [
        (b"no json", "no JSON"),
        (b"[]", "no JSON object"),
        ({"schemaVersion": 1, "fsLayers": []}, "schema 1"),
        ({"schemaVersion": 2}, "neither"),
        ({"layers": [{"digest": "sha256:1", "size": 1}]}, "damaged descriptor"),
        ({"layers": [{"digest": "sha256:" + "0" * 64, "size": -1}]}, "damaged descriptor"),
        ({"layers": [], "config": {}}, "damaged descriptor"),
        ({"manifests": []}, "no image for"),
        ({"manifests": [{"platform": {"os": "linux", "architecture": "s390x"}, "digest": "d", "size": 1}]}, "s390x"),
    ],
)
def test_manifest_of_nonsense_is_one_clear_error(fake, settings, manifest, word):
    with pytest.raises(ImageError) as caught:
        pull(fake.put("1", manifest), settings())
    assert word in str(caught.value)


@pytest.mark.parametrize("layer", [b"what is this", b"BZh91AY&SYx", gzip.compress(b"no tar" * 200, mtime=0)])
def test_layer_of_nonsense_is_one_clear_error(fake, settings, layer):
    with pytest.raises(ImageError):
        pull(fake.add([layer]), settings())


def test_index_gives_the_asked_platform_and_passes_attestations_over(fake, settings):
    entries = []
    for arch, variant in (("unknown", ""), ("amd64", ""), ("arm64", "v8")):
        fake.add([gz(("arch", arch.encode()))], tag=arch, config={"architecture": arch})
        data, _ = fake.manifests[arch]
        platform = {"os": "unknown" if arch == "unknown" else "linux", "architecture": arch, "variant": variant}
        entries.append({"digest": digest(data), "size": len(data), "platform": platform})
    reference = fake.put("multi", {"schemaVersion": 2, "manifests": entries})
    assert content(pull(reference, settings(arch="amd64")).path, "arch") == b"amd64"
    found = pull(reference, settings(arch="arm64"))
    assert content(found.path, "arch") == b"arm64"
    with open_image(found.path) as image:
        assert image.arch == "arm64"


def test_redirect_to_another_host_gets_no_credentials(fake, settings):
    other, inner = FakeRegistry(), FakeRegistry(password="secret")
    try:
        reference = inner.add([gz(("a", b"1"))])

        def spoil(handler):
            if "/blobs/" in handler.path and handler.headers.get("Authorization"):
                handler.answer(307, b"", Location=f"http://{other.host}{handler.path}")
                return True
            return False

        other.blobs, inner.spoil = inner.blobs, spoil
        pull(reference, settings(docker_username="me", docker_password="secret"))
        assert other.log and all("Authorization" not in headers for _, _, headers in other.log)
    finally:
        other.close()
        inner.close()


@pytest.mark.parametrize("token", [False, True])
def test_login_by_basic_and_bearer(settings, token):
    registry = FakeRegistry(password="secret", token=token)
    try:
        reference = registry.add([gz(("a", b"1"))])
        with pytest.raises(RegistryError):
            pull(reference, settings())
        with pytest.raises(RegistryError):
            pull(reference, settings(docker_username="me", docker_password="wrong"))
        assert content(pull(reference, settings(docker_username="me", docker_password="secret")).path, "a") == b"1"
    finally:
        registry.close()


def test_nothing_is_kept_without_cache_and_cache_that_cannot_be_written_is_said(
    fake, settings, environ, capfd, tmp_path
):
    reference = fake.add([gz(("a", b"1"))])
    found = pull(reference, settings(disable_cache=True))
    assert found.temporary and content(found.path, "a") == b"1"
    assert not os.path.exists(environ["SINGULARITY_CACHEDIR"])
    (tmp_path / "file").write_text("")
    environ["SINGULARITY_CACHEDIR"] = str(tmp_path / "file")
    assert pull(reference, settings()).temporary
    assert "Cache disabled" in capfd.readouterr().err


def test_damaged_cached_image_is_made_anew(fake, settings):
    reference = fake.add([gz(("a", b"1"))])
    path = pull(reference, settings()).path
    os.chmod(path, 0o755)
    os.truncate(path, 5000)
    found = pull(reference, settings(pull="missing"))
    assert not found.cached and content(found.path, "a") == b"1"
    os.chmod(path, 0o755)
    with open(path, "r+b") as file:  # same length, other bytes
        file.seek(-100, 2)
        file.write(b"spoilt")
    assert not pull(reference, settings(pull="missing")).cached


def test_layouts_and_archives_give_what_the_registry_gives(tmp_path, settings, tool):
    tar = tar_of([("a", b"1"), ("d", None), ("d/x", b"2")])
    config = json.dumps({"architecture": "amd64", "rootfs": {"diff_ids": [digest(tar)]}, "config": {}}).encode()
    manifest = [{"Config": "c.json", "RepoTags": ["lab/x:1"], "Layers": ["l/layer.tar"]}]
    archive = tar_of([("manifest.json", json.dumps(manifest).encode()), ("c.json", config), ("l/layer.tar", tar)])
    (tmp_path / "x.tar").write_bytes(archive)
    (tmp_path / "x.tar.gz").write_bytes(gzip.compress(archive))
    for name in ("x.tar", "x.tar.gz"):
        for tail in ("", ":lab/x:1", ":@0"):
            assert content(pull(f"docker-archive:{tmp_path}/{name}{tail}", settings()).path, "d/x") == b"2"
    with pytest.raises(SingularityError, match="not in the archive"):
        pull(f"docker-archive:{tmp_path}/x.tar:other:1", settings())
    skopeo = tool("skopeo")
    for target in ("oci:lay:tag", "oci-archive:lay.tar:tag"):
        subprocess.run(
            [skopeo, "copy", "-q", "--insecure-policy", "docker-archive:x.tar", target],
            cwd=tmp_path,
            check=True,
            capture_output=True,
        )
        kind, _, rest = target.partition(":")
        for tail in ("", ":tag"):
            assert content(pull(f"{kind}:{tmp_path}/{rest.partition(':')[0]}{tail}", settings()).path, "a") == b"1"
    spoilt = bytearray(archive)
    at = archive.index(tar) + 512
    spoilt[at : at + 1] = b"9"
    (tmp_path / "bad.tar").write_bytes(bytes(spoilt))
    with pytest.raises(RegistryError, match="not what its digest says"):
        pull(f"docker-archive:{tmp_path}/bad.tar", settings())


def web(fake, answers):
    """Let the fake server answer plain paths: path -> (status, data, headers)."""

    def spoil(handler):
        found = answers.get(handler.path) or answers.get(handler.path.partition("?")[0])
        if found is None:
            return False
        handler.answer(found[0], found[1], **(found[2] if len(found) > 2 else {}))
        return True

    fake.spoil = spoil


SIF = b"#!/usr/bin/env run-singularity\n\0SIF_MAGIC\0" + os.urandom(4000)


def test_shub_pulls_by_two_requests_and_checks_the_md5(fake, settings):
    md5 = hashlib.md5(SIF).hexdigest()
    value = {"image": f"http://{fake.host}/img/x.sif", "name": "u/r", "tag": "v1", "version": md5, "commit": "a" * 40}
    answers = {"/api/container/u/r:v1": (200, json.dumps(value).encode()), "/img/x.sif": (200, SIF)}
    web(fake, answers)
    found = pull(f"shub://{fake.host}/u/r:v1", settings())
    assert bytes_of(found.path) == SIF
    value["version"] = "0" * 32
    answers["/api/container/u/r:v1"] = (200, json.dumps(value).encode())
    with pytest.raises(RegistryError, match="MD5"):
        pull(f"shub://{fake.host}/u/r:v1", settings())
    for body, word in ((b"7", "instead of an image"), (b'{"image": null}', "no image"), (b"x", "no JSON")):
        answers["/api/container/u/r:v1"] = (200, body)
        with pytest.raises(RegistryError, match=word):
            pull(f"shub://{fake.host}/u/r:v1", settings())


def test_two_images_of_one_commit_are_two_images(fake, settings):
    for name, data in (("a", SIF), ("b", SIF + b"2")):
        value = {
            "image": f"http://{fake.host}/{name}",
            "version": hashlib.md5(data).hexdigest(),
            "commit": "c" * 40,
            "tag": name,
        }
        web(fake, {f"/api/container/u/r:{name}": (200, json.dumps(value).encode()), f"/{name}": (200, data)})
        assert bytes_of(pull(f"shub://{fake.host}/u/r:{name}", settings()).path) == data


def test_library_pull_checks_the_hash(fake, settings):
    name = "/v1/images/e/c/i:t"
    value = {
        "data": {"id": "1", "hash": "sha256." + hashlib.sha256(SIF).hexdigest(), "size": len(SIF), "uploaded": True}
    }
    web(fake, {name: (200, json.dumps(value).encode()), "/v1/imagefile/e/c/i:t": (200, SIF)})
    assert bytes_of(pull(f"library://{fake.host}/e/c/i:t", settings()).path) == SIF
    value["data"]["hash"] = "sha256." + "0" * 64
    web(fake, {name: (200, json.dumps(value).encode()), "/v1/imagefile/e/c/i:t": (200, SIF)})
    with pytest.raises(RegistryError, match="SHA-256"):
        pull(f"library://{fake.host}/e/c/i:t", settings())
    with pytest.raises(RegistryError, match="not in"):
        pull(f"library://{fake.host}/e/c/nosuch", settings())
    with pytest.raises(RegistryError, match="names no library"):
        pull("library://e/c/i:t", settings())


def test_sif_of_a_registry_is_continued_checked_and_told_from_an_image(fake, settings, environ):
    media = "application/vnd.sylabs.sif.layer.v1.sif"
    fake.add([SIF], change=lambda manifest: manifest["layers"][0].update(mediaType=media))
    partial = Cache.open(environ).path("partial", "file-" + digest(SIF).replace(":", "-"))
    with open(partial, "wb") as file:
        file.write(SIF[:1000])
    reference = f"oras://{fake.host}/a/b:1"
    assert bytes_of(pull(reference, settings()).path) == SIF
    ranges = [headers.get("Range") for _, path, headers in fake.log if digest(SIF) in path]
    assert ranges == ["bytes=1000-"] and not os.path.exists(partial)
    count = len(fake.log)
    assert pull(reference, settings(pull="missing")).cached and len(fake.log) == count
    with open(partial, "wb") as file:
        file.write(b"x" * 1000)
    os.unlink(pull(reference, settings(pull="missing")).path)
    with pytest.raises(RegistryError, match="SHA-256"):
        pull(reference, settings())
    assert not os.path.exists(partial)
    assert bytes_of(pull(reference, settings()).path) == SIF
    fake.add([gz(("a", b"1"))], tag="2")
    with pytest.raises(RegistryError, match="no SIF file"):
        pull(f"oras://{fake.host}/a/b:2", settings())


def test_plain_file_is_fetched_again_only_when_it_changed(fake, settings):
    web(fake, {"/x.sif": (200, SIF, {"ETag": '"1"'})})
    first = pull(f"http://{fake.host}/x.sif", settings())
    assert pull(f"http://{fake.host}/x.sif", settings()).path == first.path
    web(fake, {"/x.sif": (200, SIF + b"2", {"ETag": '"2"'})})
    assert pull(f"http://{fake.host}/x.sif", settings()).path != first.path


def test_unreachable_registry_is_one_line_with_the_host(settings, quick):
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{one.getsockname()[1]}"
        with pytest.raises(RegistryError) as caught:
            pull(f"docker://{host}/a/b", settings())
    assert host in caught.value.message and "refused" in caught.value.message


def test_way_of_a_known_image_loads_nothing_heavy(fake, settings, environ):
    reference = fake.add([gz(("a", b"1"))])
    path = pull(reference, settings()).path
    environ["SINGULARITY_NOHTTPS"] = "1"

    class Options:
        pass

    assert fetch_for_run(reference, Options(), environ) == path
    code = (
        "import sys; from pysingularity.registry.fetch import fetch_for_run\n"
        f"print(fetch_for_run({reference!r}, object(), {environ!r}))\n"
        "heavy = ('json', 'urllib3', 'hashlib', 're', 'typing', 'socket', 'ssl')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    source = os.path.dirname(os.path.dirname(sys.modules["pysingularity"].__file__))
    command = [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, {source!r}); {code}"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert lines == [path, "[]"]


def test_layers_of_a_known_base_are_copied_and_the_bytes_are_those_of_a_fresh_pull(fake, settings, environ, tmp_path):
    base = gz(("d", None), ("d/big", BIG), ("d/copy", BIG), *((f"d/{n}", os.urandom(3000)) for n in range(90)))
    other = gz(*((f"o/{n}", os.urandom(5000)) for n in range(90)), ("gone", b"1"))
    first = fake.add([base, other], tag="first")
    second = fake.add([base, other, gz(("new", b"2"), ("o/new", b"3"))], tag="second")
    third = fake.add([base, other, gz((".wh.gone", b""), ("d/0", b"replaced"))], tag="third")
    said = []
    for reference in (first, second, third, second):
        obtain(
            parse_reference(reference), settings(), lambda text, done=0, total=0: said.append(text) if not total else 0
        )
    assert [text for text in said if "copied" in text] == ["2 of 3 layers were copied from other images"]
    kept = [pull(reference, settings()).digests["image"] for reference in (first, second, third)]
    for number, reference in enumerate((third, second, first)):
        environ["SINGULARITY_CACHEDIR"] = str(tmp_path / f"fresh{number}")
        found = pull(reference, settings())
        assert found.digests["image"] == kept[2 - number]
    assert content(found.path, "d/copy") == BIG
    environ["SINGULARITY_CACHEDIR"] = str(tmp_path / "cachedir")
    fourth = fake.add([base, other, gz((".wh.gone", b""), ("d/0", b"again"))], tag="fourth")
    count = len(fake.log)
    found = pull(fourth, settings())
    assert (content(found.path, "d/0"), content(found.path, "d/big")) == (b"again", BIG)
    assert not [path for _, path, _ in fake.log[count:] if digest(base) in path or digest(other) in path]
