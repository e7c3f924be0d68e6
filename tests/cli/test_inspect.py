# SPDX-License-Identifier: Apache-2.0
"""`singularity inspect` prints what Apptainer's prints, of every kind of image."""

from __future__ import annotations

import json
import subprocess

import pytest

from pysingularity.cli.main import main
from pysingularity.errors import SingularityError
from pysingularity.image import metadata, scif
from pysingularity.image.convert import to_file
from pysingularity.image.entries import Entry, put_into_folder

FLAGS = [
    *([], ["-l"], ["-d"], ["-r"], ["-s"], ["-t"], ["-e"], ["-H"], ["--list-apps"], ["--all"], ["-j"], ["-r", "-d"]),
    *(["-j", "-r"], ["-j", "-e", "-l"], ["--list-apps", "-j"], ["-r", "--app", "foo"], ["-l", "--app", "foo"]),
    *(["-e", "--app", "foo"], ["-j", "-r", "--app", "foo"], ["-H", "-d", "-r", "-s", "-t", "-e", "-l", "--list-apps"]),
]


@pytest.fixture
def box(tmp_path):
    root = tmp_path / "box"
    root.mkdir()
    put_into_folder(
        str(root),
        [
            *metadata.base_entries(),
            Entry.file(metadata.LABELS, metadata.labels_file({"B": "2 <&> é", "A": "1"})),
            Entry.file(metadata.HELP, "help me\n\n"),
            Entry.file(metadata.RUNSCRIPT, '#!/bin/sh\n\necho "run"\n', 0o755),
            Entry.file(metadata.STARTSCRIPT, "#!/bin/sh\nsleep 1\n", 0o755),
            Entry.file(metadata.TEST, "#!/bin/sh\ntrue\n", 0o755),
            Entry.file(metadata.DEFINITION, "bootstrap: scratch\n%post\n  true\n"),
            Entry.file(metadata.DOCKER_ENVIRONMENT, "export X=1\n", 0o755),
            *scif.entries("foo", run="echo foo", help="foo!", environment="export F=1", labels={"L": "x"}),
        ],
    )
    return root


@pytest.fixture(params=["sandbox", "sif", "squashfs"])
def image(request, box, tmp_path):
    if request.param == "sandbox":
        return box
    path = tmp_path / f"image.{request.param}"
    to_file(str(box), str(path), bare=request.param == "squashfs")
    return path


def inspect(capfd, *words) -> str:
    assert main(["inspect", *map(str, words)]) == 0
    return capfd.readouterr().out


def test_a_damaged_image_is_named(box, tmp_path, capfd):
    path = tmp_path / "image.simg"
    to_file(str(box), str(path), bare=True)
    with open(path, "r+b") as file:
        file.seek(12)  # the block size
        file.write(bytes(4))
    assert main(["inspect", str(path)]) == 255
    assert f"FATAL:   {path}: damaged squashfs image" in capfd.readouterr().err


def test_labels_are_the_default(image, capfd):
    assert inspect(capfd, image) == "A: 1\nB: 2 <&> é\n"


def test_parts_are_shown(image, capfd):
    assert inspect(capfd, "-r", image) == '#!/bin/sh\n\necho "run"\n'
    assert inspect(capfd, "-H", image) == "help me\n"
    assert inspect(capfd, "-d", image) == "bootstrap: scratch\n%post\n  true\n"
    assert inspect(capfd, "--list-apps", image) == "foo\n"
    assert inspect(capfd, "-r", "--app", "foo", image) == "#!/bin/sh\n\necho foo\n"
    assert inspect(capfd, "-s", "-t", image) == "#!/bin/sh\nsleep 1\n#!/bin/sh\ntrue\n"
    assert "=== /.singularity.d/env/10-docker2singularity.sh ===\nexport X=1\n\n" in inspect(capfd, "-e", image)


def test_json_has_the_usual_shape(image, capfd):
    assert json.loads(inspect(capfd, "-j", image)) == {
        "data": {"attributes": {"labels": {"A": "1", "B": "2 <&> é"}}},
        "type": "container",
    }
    everything = json.loads(inspect(capfd, "--all", image))["data"]["attributes"]
    assert set(everything) == {*metadata.ATTRIBUTES}


def test_unknown_app_is_an_error_that_lists_the_apps(image, capfd):
    with pytest.raises(SingularityError, match="no app bar") as caught:
        from pysingularity.cli.inspect import OPTIONS, run
        from pysingularity.cli.scan import scan

        run(scan(["--app", "bar", str(image)], OPTIONS, {}), {})
    assert "foo" in caught.value.hint


def test_bytes_that_are_no_utf8_come_out_unchanged(box, capfdbinary):
    put_into_folder(str(box), [Entry.file(metadata.HELP, b"caf\xe9\n")])
    assert main(["inspect", "-H", str(box)]) == 0
    assert capfdbinary.readouterr().out == b"caf\xe9\n"
    assert main(["inspect", "-H", "-j", str(box)]) == 0
    json.loads(capfdbinary.readouterr().out)


def test_missing_image_is_one_line(tmp_path, capfd):
    assert main(["inspect", str(tmp_path / "nosuch.sif")]) == 255
    assert capfd.readouterr().err.count("\n") == 1


@pytest.mark.peer
def test_output_equals_apptainers(box, tmp_path, apptainer, capfd):
    path = tmp_path / "a.sif"
    to_file(str(box), str(path))
    for flags in FLAGS:
        theirs: subprocess.CompletedProcess = apptainer("inspect", *flags, path)
        assert theirs.returncode == 0, theirs.stderr
        ours, expected = inspect(capfd, *flags, path), theirs.stdout
        if expected.startswith("{"):  # Go writes < as \\u003c; the same JSON
            ours, expected = json.loads(ours), json.loads(expected)
        assert ours == expected, flags


@pytest.mark.peer
def test_output_for_a_sandbox_equals_apptainers(box, apptainer, capfd):
    theirs = json.loads(apptainer("inspect", "--all", box).stdout)
    assert json.loads(inspect(capfd, "--all", box)) == theirs
