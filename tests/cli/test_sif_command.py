# SPDX-License-Identifier: Apache-2.0
"""`singularity sif` prints what Apptainer's prints and changes files as it does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pysingularity.cli.main import main
from pysingularity.cli.sif_text import size_text

PARTITION = ["--datatype", "4", "--parttype", "2", "--partfs", "1", "--partarch", "2"]
ENTITY = "433FE984155206BD962725E20E8713472A879943"
KINDS = [
    ["--datatype", "1", "--groupid", "1"],
    ["--datatype", "2", "--filename", "variables"],
    ["--datatype", "3", "--groupid", "2", "--link", "1"],
    PARTITION,
    ["--datatype", "4", "--parttype", "4", "--partfs", "2", "--partarch", "12"],
    *(["--datatype", "5", "--signhash", str(number), "--signentity", ENTITY] for number in range(1, 6)),
    ["--datatype", "6"],
    ["--datatype", "7", "--alignment", "512"],
    ["--datatype", "8"],
    ["--datatype", "9", "--sbomformat", "spdx-json"],
    ["--datatype", "10"],
    ["--datatype", "11"],
]


@pytest.fixture
def payload(tmp_path):
    path = tmp_path / "object"
    path.write_bytes(b"hello")
    return str(path)


@pytest.fixture
def full(tmp_path, payload):
    path = str(tmp_path / "a.sif")
    assert main(["sif", "new", path]) == 0
    for flags in KINDS:
        assert main(["sif", "add", *flags, path, payload]) == 0
    return path


def test_objects_are_listed_and_dumped(full, capfd):
    assert main(["sif", "list", full]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[3] == "1    |1       |NONE    |32176-32181               |Def.FILE"
    assert lines[6] == "4    |NONE    |NONE    |32768-32773               |FS (Squashfs/*System/amd64)"
    assert main(["sif", "dump", "4", full]) == 0
    assert capfd.readouterr().out == "hello"


def test_json_says_the_same(full, capfd):
    assert main(["sif", "list", "--json", full]) == 0
    objects = json.loads(capfd.readouterr().out)["objects"]
    assert len(objects) == len(KINDS)
    assert objects[3]["primary"] is True
    assert main(["sif", "info", "-j", "4", full]) == 0
    assert json.loads(capfd.readouterr().out) == objects[3]
    assert main(["sif", "header", "-j", full]) == 0
    assert json.loads(capfd.readouterr().out)["architecture"] == "amd64"


def test_objects_are_deleted_and_partitions_chosen(full, capfd):
    assert main(["sif", "del", "1", full]) == 0
    assert main(["sif", "setprim", "5", full]) == 1  # an overlay
    assert "not a system partition" in capfd.readouterr().err
    assert main(["sif", "info", "1", full]) == 1
    assert "no object with id 1" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("words", "say"),
    [
        (["list", "/nosuch.sif"], "no such file"),
        (["list", "/etc/passwd"], "not a SIF file"),
        (["info", "x", "FILE"], "is no id"),
        (["add", "FILE", "/etc/hostname"], "--datatype is needed"),
        (["add", "--datatype", "99", "FILE", "/etc/hostname"], "no number from 1 to 11"),
        (["add", "--datatype", "4", "FILE", "/etc/hostname"], "--partarch is needed"),
        (["add", "--datatype", "5", "--signhash", "1", "--signentity", "xyz", "FILE", "/etc/hostname"], "hexadecimal"),
        (["add", "--datatype", "1", "FILE", "/nosuch"], "no such file"),
        (["add", *PARTITION, "FILE", "/etc/hostname"], "primary partition"),
        (["new", "FILE"], "exists already"),
        (["new", "/nosuch/a.sif"], "the folder"),
    ],
)
def test_mistakes_end_with_status_one_and_one_clear_line(full, capfd, words, say):
    assert main(["sif", *(full if word == "FILE" else word for word in words)]) == 1
    assert say in capfd.readouterr().err


def test_object_from_standard_input(full, capfd, monkeypatch):
    import io
    import sys

    class Input:
        buffer = io.BytesIO(b"piped")

    monkeypatch.setattr(sys, "stdin", Input)
    assert main(["sif", "add", "--datatype", "7", full, "-"]) == 0
    assert main(["sif", "dump", str(len(KINDS) + 1), full]) == 0
    assert capfd.readouterr().out == "piped"


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1535, "1 KiB"),
        (1536, "2 KiB"),
        ((1 << 20) - 1, "1024 KiB"),
        (1 << 20, "1 MiB"),
        (10443816, "10 MiB"),
        (3 << 50, "3 PiB"),
        (1 << 60, "1 EiB"),
    ],
)
def test_sizes_are_rounded_as_apptainer_does(size, text):
    assert size_text(size) == text


@pytest.mark.peer
def test_output_equals_apptainers(full, tmp_path, payload, apptainer, capfd):
    for words in (["list"], ["header"], *(["info", str(number)] for number in range(1, len(KINDS) + 1))):
        theirs = apptainer("sif", *words, full)
        assert theirs.returncode == 0, theirs.stderr
        assert main(["sif", *words, full]) == 0
        assert capfd.readouterr().out == theirs.stdout, words


@pytest.mark.peer
def test_files_made_step_by_step_equal_apptainers(full, tmp_path, payload, apptainer):
    theirs = tmp_path / "theirs.sif"
    assert apptainer("sif", "new", theirs).returncode == 0
    for flags in KINDS:
        assert apptainer("sif", "add", *flags, theirs, payload).returncode == 0
    assert apptainer("sif", "del", "2", theirs).returncode == 0
    assert main(["sif", "del", "2", full]) == 0
    ours, reference = bytearray(Path(full).read_bytes()), bytearray(theirs.read_bytes())
    for data in (ours, reference):
        data[48:80] = bytes(32)  # identity and times
        for slot in range(48):
            at = 4096 + 585 * slot
            data[at + 41 : at + 57] = bytes(16)
    different = [at for at, pair in enumerate(zip(ours, reference, strict=True)) if pair[0] != pair[1]]
    assert different == []
