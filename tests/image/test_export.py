# SPDX-License-Identifier: Apache-2.0
"""Archives and layouts for other engines, judged by skopeo, umoci and tar."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import subprocess
import tarfile

import pytest

from pysingularity.image.convert import assemble_sif
from pysingularity.image.export import export, reference_of

CONFIG = {
    "architecture": "arm64",
    "variant": "v8",
    "os": "linux",
    "config": {"Entrypoint": ["/bin/x"], "Labels": {"old": "1"}, "Env": ["A=1"]},
    "rootfs": {"type": "layers", "diff_ids": ["sha256:0"]},
}


@pytest.fixture(params=["sandbox", "sif"])
def image(request, box, tmp_path):
    if request.param == "sandbox":
        return box
    assemble_sif(str(box), str(tmp_path / "a.sif"))
    return tmp_path / "a.sif"


def names_of(box):
    return sorted(os.fsencode(path.relative_to(box)) for path in box.rglob("*"))


def test_docker_archive_holds_the_tree_and_its_own_digests(image, box, tmp_path):
    identity = export(str(image), str(tmp_path / "a.tar"), "docker-archive", name="Me/Box:v1")
    with tarfile.open(tmp_path / "a.tar") as archive:
        manifest = json.load(archive.extractfile("manifest.json"))
        assert manifest[0]["RepoTags"] == ["me/box:v1"]
        config = archive.extractfile(manifest[0]["Config"]).read()
        assert f"sha256:{hashlib.sha256(config).hexdigest()}" == identity
        layer = archive.extractfile("layer.tar")
        digest = hashlib.file_digest(layer, "sha256").hexdigest()
        assert json.loads(config)["rootfs"]["diff_ids"] == [f"sha256:{digest}"]
        assert json.loads(config)["config"]["Labels"]["A"] == "1"
        layer.seek(0)
        with tarfile.open(fileobj=layer, errors="surrogateescape") as tree:
            members = tree.getmembers()
            assert sorted(os.fsencode(one.name) for one in members) == names_of(box)
            links = [one.name for one in members if one.islnk()]
            assert len(links) == 1
            small = tree.extractfile("data/small").read()
            assert small == b"small"
            assert tree.getmember("data/odd").mode == 0o6711


def test_configuration_of_the_original_image_is_kept(box, tmp_path):
    assemble_sif(str(box), str(tmp_path / "a.sif"), oci_config=json.dumps(CONFIG).encode(), arch="arm64")
    export(str(tmp_path / "a.sif"), str(tmp_path / "oci"), "oci")
    index = json.loads((tmp_path / "oci/index.json").read_text())
    assert index["manifests"][0]["platform"]["architecture"] == "arm64"
    manifest = json.loads((tmp_path / "oci/blobs/sha256" / index["manifests"][0]["digest"][7:]).read_text())
    config = json.loads((tmp_path / "oci/blobs/sha256" / manifest["config"]["digest"][7:]).read_text())
    assert config["config"]["Entrypoint"] == ["/bin/x"]
    assert config["config"]["Labels"] == {"old": "1", "A": "1"}
    assert config["variant"] == "v8"
    layer = manifest["layers"][0]
    blob = (tmp_path / "oci/blobs/sha256" / layer["digest"][7:]).read_bytes()
    assert len(blob) == layer["size"]
    assert hashlib.sha256(blob).hexdigest() == layer["digest"][7:]
    assert config["rootfs"]["diff_ids"] == [f"sha256:{hashlib.sha256(gzip.decompress(blob)).hexdigest()}"]


def test_layout_is_the_same_whatever_the_number_of_threads(image, tmp_path):
    for threads in (1, 4):
        export(str(image), str(tmp_path / f"{threads}.tar"), "oci-archive", name="x", threads=threads)
    assert (tmp_path / "1.tar").read_bytes() == (tmp_path / "4.tar").read_bytes()


@pytest.mark.peer
def test_skopeo_reads_archives_and_layouts(image, tmp_path, tool):
    skopeo = tool("skopeo")
    for kind, tag in (("docker-archive", ""), ("oci", ":latest"), ("oci-archive", ":latest")):
        target = tmp_path / kind
        export(str(image), str(target), kind)
        shown = subprocess.run([skopeo, "inspect", f"{kind}:{target}{tag}"], capture_output=True, text=True)
        assert shown.returncode == 0, shown.stderr
        assert json.loads(shown.stdout)["Labels"]["A"] == "1"
        copied = subprocess.run(
            [skopeo, "copy", "--insecure-policy", f"{kind}:{target}{tag}", f"dir:{tmp_path / ('copy-' + kind)}"],
            capture_output=True,
            text=True,
        )
        assert copied.returncode == 0, copied.stderr


@pytest.mark.peer
def test_umoci_unpacks_the_same_tree(image, box, tmp_path, tool, snapshot, root_only):
    umoci = tool("umoci")
    export(str(image), str(tmp_path / "oci"), "oci")
    command = [umoci, "unpack", "--image", f"{tmp_path / 'oci'}:latest", tmp_path / "bundle"]
    subprocess.run(command, check=True, capture_output=True)
    assert snapshot(tmp_path / "bundle/rootfs") == snapshot(box)


def test_failed_export_leaves_nothing(box, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (box / "data/large").unlink()
    (box / "data/large").symlink_to("x")
    for kind in ("docker-archive", "oci", "oci-archive"):
        with pytest.raises(Exception, match="no such image"):
            export(str(box / "nosuch"), str(out / "a"), kind)
    assert os.listdir(out) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("image.sif", ("image", "latest")),
        ("My Image.tar.gz", ("my-image", "latest")),
        ("a/b:v2", ("a/b", "v2")),
        ("...", ("image", "latest")),
    ],
)
def test_names_are_made_fit_for_other_engines(text, expected):
    assert reference_of(text) == expected
