# SPDX-License-Identifier: Apache-2.0
"""The command as a whole: version, unknown words, verbosity, help."""

from __future__ import annotations

import pytest

from pysingularity.cli.main import globals_end
from pysingularity.version import FULL, LEVEL


def test_version_line_is_what_tools_parse(as_user):
    assert as_user(["singularity", "--version"]).stdout == f"singularity version {FULL}\n"
    assert as_user(["singularity", "version"]).stdout == f"{FULL}\n"
    assert FULL.startswith(f"{LEVEL}+pysingularity.")


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        (["nosuch"], 1, 'unknown command "nosuch"'),
        (["exce"], 1, "did you mean: singularity exec"),
        (["--nosuch"], 1, "unknown flag: --nosuch"),
        (["exec"], 1, "too few arguments"),
        (["version", "extra"], 1, "too many arguments"),
        (["--config", "/nosuch.conf", "exec", "/", "true"], 255, "/nosuch.conf"),
    ],
)
def test_mistakes(as_user, words, status, says):
    result = as_user(["singularity", *words])
    assert result.returncode == status
    assert says in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("words", [["exec", "--help"], ["help", "exec"], ["exec", "-h"]])
def test_help_lists_every_option(as_user, words):
    result = as_user(["singularity", *words])
    assert result.returncode == 0
    for name in ("--bind", "--nv", "--writable-tmpfs", "--fakeroot", "--explain-env"):
        assert name in result.stdout
    assert "--dry-run" not in result.stdout


def test_nothing_to_do_shows_help(as_user):
    result = as_user(["singularity"])
    assert result.returncode == 0
    assert "exec" in result.stdout


def test_globals_end_knows_which_option_takes_a_value():
    assert globals_end(["-q", "-c", "file", "exec", "-c"]) == 3
    assert globals_end(["--config=file", "exec"]) == 1
    assert globals_end(["-d"]) == 1


def test_settings_are_read_from_the_named_file(as_user, box):
    path = as_user.write("my.conf", "image driver = nonsense\n")
    result = as_user(["singularity", "-c", path, "exec", box, "true"])
    assert result.returncode == 255
    assert f"{path}:1: image driver = nonsense" in result.stderr


def test_fault_of_ours_is_one_line_that_asks_for_a_report(monkeypatch, capfd):
    from pysingularity.cli import main as module
    from pysingularity.cli import version

    monkeypatch.setattr(version, "run", lambda arguments, environ: {}["gone"])
    assert module.main(["version"]) == 255
    said = capfd.readouterr().err
    assert said.startswith("FATAL:   internal error: KeyError: 'gone' (")
    assert "--debug" in said
    assert "Traceback" not in said


def test_missing_package_of_others_is_named(monkeypatch, capfd):
    from pysingularity.cli import main as module
    from pysingularity.cli import version

    def run(arguments, environ):
        raise ModuleNotFoundError("No module named 'urllib3'", name="urllib3")

    monkeypatch.setattr(version, "run", run)
    assert module.main(["version"]) == 255
    said = capfd.readouterr().err.splitlines()
    assert "the Python package urllib3 is not installed" in said[0]
    assert said[1].endswith("-m pip install urllib3")
