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
from pysingularity.ring import PARTS
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
    # `start` reads the file; the others are small, and loaded by some starts only.
    alone = {"start", "cli.test", "runtime.network", "runtime.supervise"}
    assert {name for part in PARTS for name in part} == ours - alone


def test_each_module_comes_after_those_that_it_needs(package):
    """One that comes too early has the interpreter look for what it imports: then nothing is saved."""
    version(package)
    code = f"""
import sys
package = sys.modules["pysingularity"] = type(sys)("pysingularity")
package.__path__ = [{str(package)!r}]
sys.argv = ["singularity", "version"]
try:
    import pysingularity.start
except SystemExit:
    import pysingularity.sif.file, pysingularity.image.mount
"""
    words = [sys.executable, "-I", "-S", "-X", "importtime", "-c", code]
    result = subprocess.run(words, capture_output=True, text=True, check=True)
    looked_for = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    held = {f"pysingularity.{name}" for part in PARTS for name in part}
    # What the code asks for, and what brings a part.
    assert looked_for & held == {"pysingularity.sif.file", "pysingularity.image.mount", "pysingularity.sif"}


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
    before = ring(package).read_bytes()
    assert version(package) == "changed\n" + FULL + "\n"
    assert ring(package).read_bytes() != before
    assert version(package) == "changed\n" + FULL + "\n"


@pytest.mark.parametrize("damage", [lambda _: b"", lambda _: b"nothing of value at all", lambda data: data[:9000]])
def test_a_damaged_file_does_no_harm(package, damage):
    version(package)
    content = damage(ring(package).read_bytes())
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
