# SPDX-License-Identifier: Apache-2.0
"""Bad images and bad days: one clear line, status 255, nothing half-written, and the next try works.

Every case goes the whole way of a person: `singularity pull` of a registry on loopback, a look at what lies around
afterwards, then the same command against the mended registry.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import os
import re
import resource
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import pytest

from registries import digest, gz

SINGULARITY = str(Path(sys.executable).parent / "singularity")
LINK, HARD = {"type": tarfile.SYMTYPE}, {"type": tarfile.LNKTYPE}
GOOD = gz(("etc", None), ("etc/passwd", b"root"), ("data", os.urandom(300_000)))


@pytest.fixture
def pull(environ, tmp_path):
    """Return pull(reference, code) → lines of standard error; nothing is left but the asked-for file."""
    (tmp_path / "out").mkdir()
    environ["SINGULARITY_NOHTTPS"] = "1"

    cache = tmp_path / "cachedir/cache"

    def kept():
        return {kind: sorted(os.listdir(cache / kind)) for kind in ("image", "layer") if (cache / kind).exists()}

    def run(reference, code=255, **options):
        if (tmp_path / "out/x.sif").exists():
            (tmp_path / "out/x.sif").unlink()
        before = kept() or {"image": [], "layer": []}
        result = subprocess.run(
            [SINGULARITY, "-q", "pull", "x.sif", reference],
            env=environ,
            cwd=tmp_path / "out",
            capture_output=True,
            text=True,
            timeout=120,
            **options,
        )
        assert result.returncode == code, result.stderr
        lines = result.stderr.splitlines()
        if code:
            assert len(lines) in (1, 2) and lines[0].startswith("FATAL:"), lines
            assert len(lines) == 1 or lines[1].startswith("    hint: "), lines
            assert os.listdir(tmp_path / "out") == []
            assert kept() == before
        else:
            assert os.listdir(tmp_path / "out") == ["x.sif"]
        assert os.listdir(tmp_path / "tmp") == []
        return lines

    return run


HOSTILE = {
    "name that climbs out": ([("../../etc/cron.d/x", b"")], "climbs out"),
    "hard link to the outside": ([("x", {**HARD, "linkname": "../../../etc/shadow"})], "climbs out"),
    "hard link to a file of the host": ([("x", {**HARD, "linkname": "/etc/shadow"})], "nothing in the image"),
    "hard link through a link to the outside": (
        [("up", {**LINK, "linkname": "../../../.."}), ("x", {**HARD, "linkname": "up/etc/hostname"})],
        "nothing in the image",
    ),
    "links in a circle": (
        [("a", {**LINK, "linkname": "b"}), ("b", {**LINK, "linkname": "a"}), ("a/x", b"")],
        "too many symbolic links",
    ),
    "name longer than any": ([("n" * 300, b"")], "name of 300 bytes"),
    "whiteout of nothing": ([("etc/.wh.", b"")], "whiteout of nothing"),
    "link in place of the root": ([(".", {**LINK, "linkname": "/"})], "no folder"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_layer_is_refused(fake, pull, case):
    entries, word = HOSTILE[case]
    lines = pull(
        fake.add([GOOD, gz(*((name, dict(what) if isinstance(what, dict) else what) for name, what in entries))])
    )
    assert word in lines[0]
    pull(fake.add([GOOD]), code=0)


def test_links_that_lead_out_stay_inside(fake, pull, environ, tmp_path):
    """Absolute and climbing symbolic links are legal; what is written through them stays in the image."""
    (tmp_path / "victim").mkdir()
    outside = str(tmp_path / "victim")
    layers = [
        gz(("abs", {**LINK, "linkname": outside}), ("up", {**LINK, "linkname": "../" * 20 + outside[1:]})),
        gz(("abs/x", b"1"), ("up/y", b"2"), ("/abs/./z", b"3")),
    ]
    pull(fake.add(layers), code=0)
    assert os.listdir(tmp_path / "victim") == []
    result = subprocess.run(
        [SINGULARITY, "-q", "convert", "--to", "sandbox", "out/x.sif", "box"], cwd=tmp_path, env=environ, check=True
    )
    assert result.returncode == 0
    assert sorted(os.listdir(str(tmp_path / "box") + outside)) == ["x", "y", "z"]
    assert os.listdir(tmp_path / "victim") == []


def test_bomb_is_given_up_before_it_hurts(fake, pull, environ):
    """A header of 2 GiB, thousands of entries: bounded work; a file of zeros is no bomb."""
    environ["SINGULARITY_MAX_ENTRIES"] = "5000"
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.XHDTYPE, 1 << 31
    packed = gzip.compress(header.tobuf(tarfile.GNU_FORMAT) + bytes(8 << 20), 9)
    assert "2147483648" in pull(fake.add([packed]))[0]
    many = gz(*((f"f{number}", b"") for number in range(6000)))
    assert "more than 5000 entries" in pull(fake.add([many]))[0]
    holes = tarfile.TarInfo("holes")
    holes.size = 60 << 20
    layer = gzip.compress(holes.tobuf(tarfile.GNU_FORMAT) + bytes((60 << 20) + 1024), 1)
    pull(fake.add([layer]), code=0, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30)))


@pytest.mark.long
def test_millions_of_tiny_entries_end_with_a_line_and_not_with_the_memory(fake, pull, environ, tmp_path):
    info = tarfile.TarInfo("d/0000000")
    out = io.BytesIO()
    with gzip.GzipFile(fileobj=out, mode="wb", compresslevel=1, mtime=0) as file:
        for number in range(2_000_000):
            info.name = f"d/{number:07}"
            file.write(info.tobuf(tarfile.USTAR_FORMAT))
        file.write(bytes(1024))
    reference = fake.add([out.getvalue()])
    environ["SINGULARITY_MAX_ENTRIES"] = "1500000"
    limit = lambda: resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))  # noqa: E731
    assert "more than 1500000 entries" in pull(reference, preexec_fn=limit)[0]


def damaged(fake, change):
    """Return a reference whose manifest was changed by `change(manifest)`."""
    return fake.add([GOOD], change=change)


def wrong_digest(manifest):
    manifest["layers"][0]["digest"] = "sha256:" + "0" * 64


MANIFESTS = {
    "size too small": (lambda m: m["layers"][0].update(size=len(GOOD) - 5), "more than the"),
    "size too large": (lambda m: m["layers"][0].update(size=len(GOOD) + 5), "instead of the"),
    "digest of something else": (wrong_digest, "not found"),
    "digest of no kind": (lambda m: m["layers"][0].update(digest="md5:0"), "damaged descriptor"),
    "size that is no number": (lambda m: m["layers"][0].update(size="7"), "damaged descriptor"),
    "no layers": (lambda m: m.pop("layers"), "neither layers nor platforms"),
    "config that is missing": (lambda m: m.pop("config"), "damaged descriptor"),
    "config of the wrong size": (lambda m: m["config"].update(size=3), "instead of 3|larger|more than"),
    "foreign layer that nobody keeps": (
        lambda m: m["layers"][0].update(
            digest="sha256:" + "1" * 64,
            mediaType="application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
            urls=["ftp://example.invalid/layer"],
        ),
        "not found",
    ),
    "absurdly many layers": (lambda m: m.update(layers=m["layers"] * 5000), "too many"),
}


@pytest.mark.parametrize("case", MANIFESTS)
def test_manifest_that_lies_is_refused(fake, pull, case):
    change, word = MANIFESTS[case]
    lines = pull(damaged(fake, change))
    assert re.search(word, lines[0]), lines
    pull(fake.add([GOOD]), code=0)


def test_media_types_do_not_matter_but_content_does(fake, pull):
    def types(manifest):
        manifest["mediaType"] = "text/plain"
        manifest["layers"][0]["mediaType"] = "application/vnd.oci.image.layer.v1.tar+zstd"  # it is gzip

    pull(fake.add([GOOD], change=types), code=0)
    tar = gzip.decompress(GOOD)
    pull(fake.add([tar, bz2.compress(tar)], tag="2"), code=0)
    lines = pull(fake.add([b"\x04\x22\x4d\x18" + os.urandom(2000)], tag="3"))  # lz4, which nobody uses for layers
    assert "layer 1 of 1" in lines[0]
    lines = pull(fake.add([gzip.compress(tar)[:-2000]], tag="4"))
    assert "ends early" in lines[0]
    spoilt = bytearray(GOOD)
    spoilt[len(GOOD) // 2] ^= 1
    assert "damaged" in pull(fake.add([bytes(spoilt)], tag="5"))[0]


def test_registry_that_dies_in_the_middle_is_gone_on_with(fake, pull, environ, tmp_path):
    """The server vanishes after a part of the layer; a new one at the same address is asked for the rest only."""
    layer = gz(("big", os.urandom(2_000_000)))
    reference = fake.add([layer])

    def half(handler):
        if digest(layer) in handler.path:
            if handler.headers.get("Range"):
                handler.answer(500, Retry_After="0")
                return True
            handler.send_response(200)
            handler.send_header("Content-Length", str(len(layer)))
            handler.end_headers()
            handler.wfile.write(layer[:1_300_000])
            handler.close_connection = True
            return True
        return False

    fake.spoil = half
    assert "500" in pull(reference)[0]
    fake.spoil = None
    count = len(fake.log)
    pull(reference, code=0)
    ranges = [headers.get("Range") for _, path, headers in fake.log[count:] if digest(layer) in path]
    assert len(ranges) == 1 and int(ranges[0].removeprefix("bytes=").rstrip("-")) > 1_000_000


def test_server_that_sends_slow_bytes_is_waited_for(fake, pull):
    layer = gz(("big", os.urandom(50_000)))

    def slow(handler):
        if digest(layer) not in handler.path:
            return False
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(layer)))
        handler.end_headers()
        for at in range(0, len(layer), 5000):
            handler.wfile.write(layer[at : at + 5000])
            handler.wfile.flush()
            time.sleep(0.05)
        return True

    fake.spoil = slow
    pull(fake.add([layer]), code=0)


def test_cleaning_leaves_what_another_process_is_fetching(fake, environ, tmp_path):
    layer = gz(("big", os.urandom(2_000_000)))
    reference = fake.add([layer])
    environ["SINGULARITY_NOHTTPS"] = "1"
    half, go_on = threading.Event(), threading.Event()

    def gate(handler):
        if digest(layer) not in handler.path:
            return False
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(layer)))
        handler.end_headers()
        handler.wfile.write(layer[:1_500_000])
        handler.wfile.flush()
        half.set()
        go_on.wait(30)
        handler.wfile.write(layer[1_500_000:])
        return True

    fake.spoil = gate
    process = subprocess.Popen([SINGULARITY, "-q", "pull", "x.sif", reference], env=environ, cwd=tmp_path)
    assert half.wait(30)
    partial = tmp_path / "cachedir/cache/partial" / digest(layer).replace(":", "-")
    while not partial.exists() or partial.stat().st_size < 1_000_000:
        time.sleep(0.02)
    made = [*(tmp_path / "cachedir/cache/image").glob("*.new")]
    subprocess.run([SINGULARITY, "-q", "cache", "clean", "--force"], env=environ, check=True)
    assert partial.exists() and [*(tmp_path / "cachedir/cache/image").glob("*.new")] == made
    go_on.set()
    assert process.wait(30) == 0
    assert (tmp_path / "x.sif").stat().st_size > 2_000_000


def test_image_that_is_cleaned_away_before_it_is_handed_out_is_made_again(fake, environ, tmp_path, monkeypatch):
    from pysingularity.cli import main, pull
    from pysingularity.registry import fetch

    reference = fake.add([GOOD])
    for name, value in {**environ, "SINGULARITY_NOHTTPS": "1"}.items():
        monkeypatch.setenv(name, value)
    left = [2]
    true_obtain = fetch.obtain

    def obtain(*words):
        found = true_obtain(*words)
        if left[0]:
            left[0] -= 1
            os.unlink(found.path)
        return found

    monkeypatch.setattr(fetch, "obtain", obtain)
    monkeypatch.chdir(tmp_path)
    assert pull and main.main(["-q", "pull", "x.sif", reference]) == 0
    assert left == [0] and (tmp_path / "x.sif").stat().st_size > 300_000


def test_plain_file_that_nothing_dates_is_not_kept(fake, environ, tmp_path):
    sif = b"#!/usr/bin/env run-singularity\n\0SIF_MAGIC\0" + os.urandom(9_000_000)

    def serve(handler):
        if handler.command == "HEAD":
            handler.answer(405)
            return True
        handler.send_response(200)
        handler.send_header("Connection", "close")
        handler.end_headers()
        for at in range(0, len(sif), 3_000_000):
            handler.wfile.write(sif[at : at + 3_000_000])
            time.sleep(0.2)  # more than the pause between two lines
        handler.close_connection = True
        return True

    fake.spoil = serve
    words = [SINGULARITY, "pull", f"http://{fake.host}/x.sif"]
    result = subprocess.run(words, env=environ, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert (tmp_path / "x.sif").read_bytes() == sif
    assert result.stderr.count("x.sif: ") in (1, 2)  # 4 and 8 MiB, not a line a piece
    listed = subprocess.run([SINGULARITY, "cache", "list", "--json"], env=environ, capture_output=True, check=True)
    assert [entry["type"] for entry in json.loads(listed.stdout)["entries"]] == []
