# SPDX-License-Identifier: Apache-2.0
"""`singularity completion`: the scripts are read by the shells and offer what the tables hold."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest


def script(shell):
    command = [sys.executable, "-m", "pysingularity", "completion", shell]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def offered(*words):
    """Return what bash would offer for the last of these words."""
    line = " ".join(f"'{word}'" for word in words)
    code = f'COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _singularity; printf "%s\\n" "${{COMPREPLY[@]}}"'
    result = subprocess.run(["bash", "-c", script("bash") + code], capture_output=True, text=True, check=True, cwd="/")
    assert result.stderr == ""
    return result.stdout.split()


def test_commands_and_their_sub_commands_are_offered():
    assert {"exec", "instance", "pull"} <= set(offered("singularity", ""))
    assert offered("singularity", "inst") == ["instance"]
    assert set(offered("singularity", "-q", "instance", "st")) == {"start", "stats", "stop"}
    assert "exec" in offered("singularity", "help", "ex")


def test_options_are_offered_where_they_belong():
    assert offered("singularity", "exec", "--writable-") == ["--writable-tmpfs"]
    assert offered("singularity", "instance", "start", "--pid-") == ["--pid-file"]
    assert offered("singularity", "version", "--writ") == []
    assert offered("singularity", "exec", "--runscript") == []  # hidden


def test_files_are_offered_for_everything_else():
    assert "usr" in offered("singularity", "exec", "us")


@pytest.mark.parametrize(("shell", "check"), [("zsh", ["-n"]), ("fish", ["--no-execute"])])
def test_other_shells_can_read_their_script(shell, check, tmp_path):
    path = tmp_path / "script"
    path.write_text(script(shell))
    assert "writable-tmpfs" in path.read_text()
    if shutil.which(shell) is None:
        pytest.skip(f"needs {shell}")
    subprocess.run([shell, *check, path], check=True)


def test_unknown_shell_is_a_usage_error():
    command = [sys.executable, "-m", "pysingularity", "completion", "csh"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (1, "")
