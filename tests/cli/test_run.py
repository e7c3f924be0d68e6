# SPDX-License-Identifier: Apache-2.0
"""`singularity run`: runscripts good and bad, apps, and image files that are programs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

pytestmark = pytest.mark.rootless


def test_runscript_gets_the_arguments(sing, box):
    assert sing("run", box, "a b", "c").stdout == "run: a b c\n"


def test_runscript_of_an_old_image(sing, box):
    shutil.move(box / ".singularity.d/runscript", box / "singularity")
    shutil.rmtree(box / ".singularity.d")
    (box / "environment").write_text("export OLD=1\n")
    (box / "singularity").write_text('#!/bin/sh\necho "old $OLD: $*"\n')
    assert sing("run", box, "x").stdout == "old 1: x\n"


def test_runscript_without_permission_bits_still_runs(sing, box):
    (box / ".singularity.d/runscript").chmod(0o644)
    assert sing("run", box, "x").stdout == "run: x\n"


def test_runscript_without_its_interpreter_is_named(sing, box):
    (box / ".singularity.d/runscript").write_text("#!/no/such/shell\n")
    result = sing("run", box)
    assert result.returncode == 255
    assert "/.singularity.d/runscript" in result.stderr
    assert "Traceback" not in result.stderr


def test_image_without_runscript_runs_a_shell(sing, box):
    (box / ".singularity.d/runscript").unlink()
    assert sing("run", box, "-c", "echo shell").stdout == "shell\n"


def test_runscript_without_a_first_line_is_a_shell_script(sing, box):
    (box / ".singularity.d/runscript").write_text('echo "plain $1"\n')
    assert sing("run", box, "x").stdout == "plain x\n"


def test_app_has_its_own_runscript_and_variables(sing, box):
    meta = box / "scif/apps/foo/scif"
    meta.mkdir(parents=True)
    (meta / "runscript").write_text('#!/bin/sh\necho "foo: $SINGULARITY_APPNAME $*"\n')
    (meta / "runscript").chmod(0o755)
    assert sing("run", "--app", "foo", box, "x").stdout == "foo: foo x\n"
    result = sing("run", "--app", "bar", box)
    assert result.returncode == 1
    assert "Could not locate the container application: bar" in result.stderr


def test_image_file_is_a_program(as_user, image, box):
    """A SIF begins with a line that starts run-singularity; a squashfs of Singularity 2.x may too."""
    program = image.with_name("program")
    program.write_bytes(b"#!/usr/bin/env run-singularity\n" + image.read_bytes())
    program.chmod(0o755)
    assert as_user([program, "one", "two"]).stdout == "run: one two\n"


def test_run_singularity_stands_beside_singularity(as_user):
    path = as_user(["sh", "-c", "command -v run-singularity"]).stdout.strip()
    assert Path(path).name == "run-singularity"
