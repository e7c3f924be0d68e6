# SPDX-License-Identifier: Apache-2.0
"""The installed launcher finds the interpreter and the package, wherever pip put them, and starts without `site`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import pysingularity
from pysingularity.version import FULL

TOP = Path(__file__).parent.parent.parent
PACKAGE = Path(pysingularity.__file__).parent
LAUNCHER = TOP / "scripts/launcher/singularity"


@pytest.fixture(params=["lib/python3.99/site-packages", "lib/python3.99/dist-packages", "."])
def installed(request, tmp_path):
    """A prefix as a virtual environment, Debian's /usr/local or `pip install --target` has it, with a blank inside."""
    prefix = tmp_path / "a prefix"
    (prefix / "bin").mkdir(parents=True)
    shutil.copytree(PACKAGE, prefix / request.param / "pysingularity", ignore=shutil.ignore_patterns("hub"))
    for name in ("singularity", "run-singularity"):
        shutil.copy2(LAUNCHER.parent / name, prefix / "bin" / name)
    return prefix


def run(*argv, **environ):
    env = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", **environ}
    return subprocess.run([os.fspath(word) for word in argv], env=env, capture_output=True, text=True, check=False)


def test_launcher_finds_the_package_of_its_own_prefix(installed):
    result = run(installed / "bin/singularity", "version")
    assert (result.stdout, result.stderr) == (FULL + "\n", "")


def test_launcher_works_through_links_and_from_path(installed, tmp_path):
    (tmp_path / "one").symlink_to("a prefix/bin/singularity")
    (tmp_path / "two").symlink_to(tmp_path / "one")
    assert run(tmp_path / "two", "version").stdout == FULL + "\n"
    found = run("sh", "-c", "singularity version", PATH=f"{installed}/bin:{Path(sys.executable).parent}:/usr/bin:/bin")
    assert found.stdout == FULL + "\n"


def test_launcher_starts_isolated_and_without_site(installed):
    spy = installed / "python-spy"
    spy.write_text('#!/bin/sh\nprintf "%s\\n" "$1" "$2"\n')
    spy.chmod(0o755)
    assert run(installed / "bin/singularity", "version", SINGULARITY_PYTHON=str(spy)).stdout == "-I\n-S\n"


def test_variables_of_python_do_not_reach_the_launched_interpreter(installed, tmp_path):
    (tmp_path / "sys.py").write_text("raise SystemExit('hijacked')")
    (tmp_path / "zlib.py").write_text("raise SystemExit('hijacked')")
    assert run(installed / "bin/singularity", "version", PYTHONPATH=str(tmp_path)).stdout == FULL + "\n"


def test_plain_way_gives_the_same(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "pysingularity", "--version"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert result.stdout == f"singularity version {FULL}\n"


def test_run_singularity_takes_the_launcher_beside_it(installed):
    beside = installed / "bin/singularity"
    beside.write_text('#!/bin/sh\necho "$@"\n')
    assert run(installed / "bin/run-singularity", "x.sif", "-v").stdout == "run x.sif -v\n"


def test_commands_that_need_packages_find_them(installed):
    """`doctor` looks for third-party packages; started without `site` it has to find those of this interpreter."""
    result = run(installed / "bin/singularity", "doctor", "--json", HOME="/", SINGULARITY_PYTHON=sys.executable)
    assert "urllib3" in result.stdout
    assert '"missing: ' not in result.stdout
