# SPDX-License-Identifier: Apache-2.0
"""Results appear whole or not at all, whatever ends the work."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from pysingularity.errors import HostError, UserError
from pysingularity.image import output
from pysingularity.image.output import OutputFile, OutputFolder, check_target, epoch


def test_file_appears_complete_and_executable(tmp_path):
    target = tmp_path / "a.sif"
    with OutputFile(str(target)) as file:
        os.write(file.fd, b"x")
        assert os.listdir(tmp_path) == [] or not target.exists()
        file.publish()
    assert target.read_bytes() == b"x"
    assert target.stat().st_mode & 0o777 == 0o755
    assert os.listdir(tmp_path) == ["a.sif"]


@pytest.fixture(params=[True, False], ids=["unnamed", "named"])
def unnamed(request, monkeypatch):
    """With and without a file system that knows files without names."""
    if not request.param:
        real = os.open

        def refuse(path, flags, *more, **options):
            if flags & os.O_TMPFILE == os.O_TMPFILE:
                raise OSError(95, "Operation not supported", path)
            return real(path, flags, *more, **options)

        monkeypatch.setattr(output.os, "open", refuse)


@pytest.mark.usefixtures("unnamed")
def test_failure_leaves_the_old_file_and_nothing_else(tmp_path):
    target = tmp_path / "a.sif"
    target.write_bytes(b"old")
    with pytest.raises(RuntimeError), OutputFile(str(target), force=True) as file:
        os.write(file.fd, b"new")
        raise RuntimeError
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.sif"]


@pytest.mark.usefixtures("unnamed")
def test_full_disk_is_one_clear_error(tmp_path):
    with pytest.raises(HostError, match="no space left") as caught, OutputFile(str(tmp_path / "a")):
        raise OSError(28, "No space left on device")
    assert str(tmp_path) in caught.value.message
    assert os.listdir(tmp_path) == []


@pytest.mark.usefixtures("unnamed")
def test_existing_file_is_replaced_only_with_force(tmp_path):
    target = tmp_path / "a.sif"
    target.write_bytes(b"old")
    with pytest.raises(UserError, match="exists already"):
        OutputFile(str(target))
    with OutputFile(str(target), force=True) as file:
        os.write(file.fd, b"new")
        file.publish()
    assert target.read_bytes() == b"new"


def test_targets_are_checked_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="mkdir -p"):
        try:
            check_target(str(tmp_path / "no/such/a.sif"))
        except UserError as error:
            assert error.id == "no-output-folder"
            raise UserError("x", error.hint)
    with pytest.raises(UserError, match="folder"):
        check_target(str(tmp_path / "file/a.sif"))
    with pytest.raises(UserError, match="is a folder"):
        check_target(str(tmp_path), force=True)
    with pytest.raises(UserError, match="is a file"):
        check_target(str(tmp_path / "file"), force=True, folder=True)


@pytest.mark.rootless
def test_folder_that_may_not_be_written_is_named(as_user):
    script = "from pysingularity.image.output import check_target\ncheck_target('/etc/a.sif')"
    result = as_user([sys.executable, "-c", script])
    assert "may not write into the folder /etc" in result.stderr


def test_folder_replaces_a_folder(tmp_path):
    target = tmp_path / "box"
    (target / "old").mkdir(parents=True)
    (target / "old").chmod(0o500)
    with OutputFolder(str(target) + "/", force=True) as folder:
        open(os.path.join(folder.partial, "new"), "w").close()
        folder.publish()
    assert os.listdir(target) == ["new"]
    assert os.listdir(tmp_path) == ["box"]


def test_failed_folder_is_removed_whatever_its_modes(tmp_path):
    with pytest.raises(RuntimeError), OutputFolder(str(tmp_path / "box")) as folder:
        os.makedirs(os.path.join(folder.partial, "a/b"))
        os.chmod(os.path.join(folder.partial, "a"), 0)
        os.symlink("/etc", os.path.join(folder.partial, "link"))
        raise RuntimeError
    assert os.listdir(tmp_path) == []
    assert os.path.isdir("/etc")


SLOW = """
import os, signal, sys, time
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whoever runs the tests may ignore it
from pysingularity.image.output import Orderly, OutputFile, OutputFolder
kind = OutputFolder if sys.argv[1] == "folder" else OutputFile
with Orderly(), kind(sys.argv[2], force=True) as out:
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL])
def test_signals_leave_nothing_behind(tmp_path, kind, number):
    target = tmp_path / "target"
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, kind, target], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    process.stdout.readline()
    process.send_signal(number)
    assert process.wait(20) == -number
    process.stdout.close()
    if kind == "folder" and number == signal.SIGKILL:
        assert len(os.listdir(tmp_path)) == 1
        with OutputFolder(str(target)):  # the next one who writes the same target clears up
            assert len(os.listdir(tmp_path)) == 1
    assert os.listdir(tmp_path) == []


def test_partials_of_running_processes_are_not_swept(tmp_path):
    target = str(tmp_path / "box")
    with OutputFolder(target) as first, OutputFolder(target) as second:
        assert os.path.isdir(first.partial)
        assert os.path.isdir(second.partial)


def test_source_date_epoch_is_a_time(monkeypatch):
    assert epoch({}) is None
    assert epoch({"SOURCE_DATE_EPOCH": "12"}) == 12
    for text in ("x", "-1", "1.5", "99999999999"):
        with pytest.raises(UserError, match="SOURCE_DATE_EPOCH"):
            epoch({"SOURCE_DATE_EPOCH": text})
