# SPDX-License-Identifier: Apache-2.0
"""Images interchange with Apptainer in both directions: one recipe, built by either, behaves the same in both."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest

from containers import own_tree

pytestmark = [pytest.mark.peer, pytest.mark.rootless, pytest.mark.fuse]

RECIPE = """\
Bootstrap: localimage
From: {box}

%files
    {box}/etc/passwd /opt/copied

%post
    echo made by $(id -u) > /opt/made
    chmod 4755 /opt/made

%environment
    export ANSWER=42

%runscript
    echo "answer $ANSWER to $*"

%labels
    Purpose interchange

%help
    Ask it.

%test
    grep -q made /opt/made
    echo tested
"""
#: Commands of a user, with what they print; both programs must say the same of both images.
COMMANDS = [
    (["exec", "IMAGE", "cat", "/opt/made"], "made by 0\n"),
    (["exec", "IMAGE", "stat", "-c", "%a %s", "/opt/made"], "4755 10\n"),
    (["exec", "IMAGE", "sh", "-c", "echo $ANSWER; exit 7"], "42\n"),
    (["run", "IMAGE", "a", "b c"], "answer 42 to a b c\n"),
    (["test", "IMAGE"], "tested\n"),
    (["run-help", "IMAGE"], "    Ask it.\n"),
]


@pytest.fixture
def shared(box):
    """A folder that both programs see, with a root file system and a recipe in it."""
    folder = Path(tempfile.mkdtemp(prefix="pysingularity-peer-", dir="/tmp"))
    folder.chmod(0o755)
    shutil.copytree(box, folder / "box", symlinks=True)
    (folder / "recipe.def").write_text(RECIPE.format(box=folder / "box"))
    # Apptainer's own user writes here as well, whatever its number; we read what it made.
    own_tree(folder, 1000, 1000)
    folder.chmod(0o777)
    yield folder
    shutil.rmtree(folder)


def check_both(path: Path, sing, apptainer) -> None:
    """Let both programs use an image as ordinary users."""
    for words, output in COMMANDS:
        argv = [str(path) if word == "IMAGE" else word for word in words]
        ours, theirs = sing(*argv), apptainer(*argv, user=True)
        status = 7 if "exit 7" in argv[-1] else 0
        assert (theirs.stdout, theirs.returncode) == (output, status), theirs.stderr
        assert (ours.stdout, ours.returncode) == (output, status), ours.stderr
    assert json.loads(sing("inspect", "--all", path).stdout) == json.loads(apptainer("inspect", "--all", path).stdout)
    assert sing("sif", "list", path).stdout == apptainer("sif", "list", path).stdout
    assert sing("sif", "header", path).stdout == apptainer("sif", "header", path).stdout


@pytest.mark.parametrize("compression", ["gzip", "zstd", "xz", "lz4"])
def test_what_apptainer_builds_runs_in_ours(compression, shared, sing, as_user, apptainer):
    theirs = shared / "theirs.sif"
    built = apptainer("build", "--mksquashfs-args", f"-comp {compression}", theirs, shared / "recipe.def", user=True)
    if built.returncode:
        pytest.skip(f"Apptainer cannot build here: {built.stderr.splitlines()[-1]}")
    theirs.chmod(0o755)
    check_both(theirs, sing, apptainer)
    sing("build", "--sandbox", "folder", theirs, check=True)
    sing("build", "again.sif", theirs, check=True)
    sing("build", "back.sif", "folder", check=True)
    for again in ("folder", "again.sif", "back.sif"):
        assert sing("run", again, "x").stdout == "answer 42 to x\n"
        assert sing("inspect", again).stdout == sing("inspect", theirs).stdout


@pytest.mark.parametrize("compression", ["gzip", "zstd"])
def test_what_we_build_runs_in_apptainer(compression, shared, sing, as_user, apptainer):
    sing("build", "--mksquashfs-args", f"-comp {compression}", "ours.sif", shared / "recipe.def", check=True)
    ours = shutil.copy(as_user.tmp / "ours.sif", shared)
    os.chmod(ours, 0o755)
    check_both(Path(ours), sing, apptainer)
    for words in (["--sandbox", shared / "folder"], [shared / "again.sif"]):
        built = apptainer("build", *words, ours, user=True)
        assert built.returncode == 0, built.stderr
    assert (shared / "folder/opt/made").read_text() == "made by 0\n"
    assert sing("run", shared / "again.sif", "x").stdout == "answer 42 to x\n"
