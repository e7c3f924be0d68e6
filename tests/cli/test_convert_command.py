# SPDX-License-Identifier: Apache-2.0
"""`singularity convert` as people use it."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from pysingularity.cli.main import main
from pysingularity.image import metadata
from pysingularity.image.entries import Entry, put_into_folder
from pysingularity.image.open import open_image


@pytest.fixture
def box(tmp_path):
    root = tmp_path / "box"
    root.mkdir()
    put_into_folder(str(root), [*metadata.base_entries(), Entry.file("data", b"x" * 200_000)])
    return str(root)


def test_every_kind_is_made(box, tmp_path, capfd):
    sif = str(tmp_path / "a.sif")
    assert main(["convert", box, sif]) == 0
    for kind, found in (("sandbox", "sandbox"), ("squashfs", "squashfs"), ("sif", "sif")):
        assert main(["convert", "--to", kind, sif, str(tmp_path / kind)]) == 0
        with open_image(str(tmp_path / kind)) as image:
            assert image.kind == found
    for kind in ("docker-archive", "oci", "oci-archive"):
        assert main(["convert", "--to", kind, sif, str(tmp_path / kind)]) == 0
    assert (tmp_path / "oci/index.json").exists()
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


@pytest.mark.parametrize("kind", ["docker-archive", "oci", "oci-archive"])
def test_archives_and_layouts_become_images_again(box, tmp_path, capfd, monkeypatch, kind):
    monkeypatch.setenv("SINGULARITY_CACHEDIR", str(tmp_path / "c"))
    monkeypatch.setenv("SINGULARITY_TMPDIR", str(tmp_path))
    there = tmp_path / "there"
    assert main(["convert", "--to", kind, box, str(there)]) == 0
    assert main(["convert", f"{kind}:{there}", str(tmp_path / "back.sif")]) == 0
    assert main(["convert", "--to", "sandbox", f"{kind}:{there}", str(tmp_path / "box2")]) == 0
    assert (tmp_path / "box2/data").read_bytes() == b"x" * 200_000
    assert main(["convert", f"{kind}:{there}", str(tmp_path / "back.sif")]) == 255
    assert main(["convert", f"{kind}:{tmp_path}/none", str(tmp_path / "none.sif")]) == 255
    said = capfd.readouterr().err
    assert "to replace it" in said and "none" in said.splitlines()[-1]


def test_json_tells_the_digests(box, tmp_path, capfd):
    path = tmp_path / "a.sif"
    assert main(["convert", "--json", "--compress", "zstd", "--level", "3", box, str(path)]) == 0
    found = json.loads(capfd.readouterr().out)
    data = path.read_bytes()
    assert found["digest"] == f"sha256:{hashlib.sha256(data).hexdigest()}"
    with open_image(str(path)) as image:
        partition = data[image.offset : image.offset + image.size]
        assert found["partitionDigest"] == f"sha256:{hashlib.sha256(partition).hexdigest()}"
        assert found["id"] == image.sif.header.uuid


@pytest.mark.parametrize(
    ("words", "status", "say"),
    [
        (["--to", "floppy", "IN", "OUT"], 1, "not one of"),
        (["IN"], 1, "too few"),
        (["--level", "3", "IN", "OUT"], 1, "--compress"),
        (["--to", "oci", "--compress", "zstd", "IN", "OUT"], 1, "not for oci"),
        (["--threads", "0", "IN", "OUT"], 1, "no number"),
        (["/nosuch", "OUT"], 255, "no such image"),
        (["/etc/passwd", "OUT"], 255, "not recognized"),
        (["IN", "/nosuch/out.sif"], 255, "the folder /nosuch"),
        (["IN", "IN"], 255, "the image itself"),
        (["IN", "EXISTING"], 255, "exists already"),
        (["--to", "sandbox", "IN", "OUT"], 255, "sandbox already"),
    ],
)
def test_mistakes_are_one_clear_line(box, tmp_path, capfd, words, status, say):
    (tmp_path / "existing").write_text("precious")
    names = {"IN": box, "OUT": str(tmp_path / "out"), "EXISTING": str(tmp_path / "existing")}
    before = sorted(os.listdir(tmp_path))
    assert main(["convert", *(names.get(word, word) for word in words)]) == status
    error = capfd.readouterr().err
    assert say in error
    assert "Traceback" not in error
    assert sorted(os.listdir(tmp_path)) == before
    assert (tmp_path / "existing").read_text() == "precious"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("kind", ["sif", "docker-archive"])
def test_interrupted_conversion_leaves_nothing(box, tmp_path, number, kind):
    with open(os.path.join(box, "big"), "wb") as file:
        file.writelines(os.urandom(1 << 20) for _ in range(100))
    out = tmp_path / "out"
    out.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "pysingularity", "convert", "--to", kind, "--threads", "1", box, out / "a"],
        stderr=subprocess.PIPE,
    )
    # As soon as it reads the big file it has the output open.
    deadline = time.monotonic() + 60
    while not any(name.endswith("/big") for name in opened(process.pid)):
        if process.poll() is not None or time.monotonic() > deadline:
            pytest.fail("the conversion could not be caught while it read the file")
        time.sleep(0.002)
    process.send_signal(number)
    _, error = process.communicate(timeout=30)
    assert process.returncode == (255 if number == signal.SIGINT else -number)
    assert b"Traceback" not in error
    assert os.listdir(out) == []


def opened(pid: int) -> list[str]:
    """Return the files that a process has open just now."""
    found = []
    try:
        found.extend(os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd"))
    except OSError:  # closed in between; the next look will tell
        pass
    return found


@pytest.mark.rootless
def test_ordinary_user_converts(as_user):
    script = "mkdir b; echo hi > b/f; singularity convert b a.sif; singularity convert --to squashfs a.sif a.simg; "
    script += "singularity convert --to sandbox a.simg c; cat c/f"
    result = as_user(["sh", "-ec", script])
    assert result.stdout == "hi\n", result.stderr
