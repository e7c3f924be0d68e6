# SPDX-License-Identifier: Apache-2.0
"""The file with the modules of the start ring: made by itself, believed only while it is true."""

from __future__ import annotations

import compileall
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import pysingularity
from pysingularity.ring import NAMES
from pysingularity.version import FULL

PACKAGE = Path(pysingularity.__file__).parent


@pytest.fixture
def package(tmp_path):
    """A copy of the package, compiled as pip does it."""
    copy = tmp_path / "pysingularity"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("hub", "__pycache__"))
    compileall.compile_dir(copy, quiet=2)
    return copy


def version(package, *options):
    words = [sys.executable, "-I", "-S", *options, str(package / "start.py"), "version"]
    result = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr if not options else "") == (0, "")
    return result.stdout + (result.stderr if options else "")


def ring(package):
    return package / "__pycache__" / f"ring.{sys.implementation.cache_tag}"


def test_it_holds_what_starts_load():
    allowed = (Path(__file__).parent / "modules.txt").read_text().split()
    ours = {name[14:] for name in allowed if name.startswith("pysingularity.")}
    assert set(NAMES) == ours - {"start"}  # which reads the file


def test_the_first_start_makes_it_and_the_next_uses_it(package):
    assert version(package) == FULL + "\n"
    assert ring(package).is_file()
    for compiled in package.glob("cli/__pycache__/main.*"):
        compiled.unlink()
    assert version(package) == FULL + "\n"
    assert list(package.glob("cli/__pycache__/main.*")) == []  # nobody asked for it


def test_a_module_that_was_changed_is_read_anew(package):
    version(package)
    with open(package / "cli/main.py", "a") as file:
        file.write("\nprint('changed')\n")
    assert version(package) == "changed\n" + FULL + "\n"
    assert not ring(package).exists()
    assert version(package) == "changed\n" + FULL + "\n"
    assert ring(package).is_file()


@pytest.mark.parametrize("content", [b"", b"nothing of value", b"\xfb\x00\x00", b"N"])
def test_a_damaged_file_does_no_harm(package, content):
    version(package)
    ring(package).write_bytes(content)
    assert version(package) == FULL + "\n"
    assert ring(package).read_bytes() != content


@pytest.mark.rootless
def test_who_may_not_write_there_starts_without(as_user, package):
    copy = as_user.tmp / "lib"
    shutil.copytree(package, copy / "pysingularity")
    result = as_user([sys.executable, "-I", "-S", copy / "pysingularity/start.py", "version"])
    if os.getuid():
        pytest.skip("needs root, whose folder an ordinary user may not write into")
    assert (result.stdout, result.stderr) == (FULL + "\n", "")
    assert not ring(copy / "pysingularity").exists()


def test_a_package_that_is_not_compiled_is_left_alone(package):
    for folder in package.rglob("__pycache__"):
        shutil.rmtree(folder)
    assert version(package, "-B") == FULL + "\n"
    assert not ring(package).exists()
