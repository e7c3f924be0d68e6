# SPDX-License-Identifier: Apache-2.0
"""A root file system of a few megabytes, made of the host's shell and tools, so that builds run without a network."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

TOOLS = tuple("sh cat ls id mkdir touch rm env sleep stat chown chmod ln mv dd cp tar mknod".split())


def make_root(root: Path, tools: tuple[str, ...] = TOOLS) -> Path:
    """Fill a folder with programs of this machine and the libraries they need."""
    for name in ("bin", "etc", "tmp", "usr", "var/tmp", "proc", "sys", "dev", "opt"):
        (root / name).mkdir(parents=True, exist_ok=True)
    for folder in (root / "tmp", root / "var/tmp"):
        folder.chmod(0o1777)
    for name in tools:
        program = shutil.which(name)
        if program is None:
            pytest.skip(f"needs the program {name}")
        shutil.copy2(os.path.realpath(program), root / "bin" / name)
        found = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
        for library in re.findall(r"(/\S+) \(0x", found):
            place = root / library[1:]
            place.parent.mkdir(parents=True, exist_ok=True)
            if not place.exists():
                shutil.copy2(os.path.realpath(library), place)
    (root / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
    (root / "etc/group").write_text("root:x:0:\n")
    return root


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A small root file system; never written to."""
    root = make_root(tmp_path_factory.mktemp("tiny") / "root")
    for folder in (root, *root.parents):
        if folder.name.startswith("pytest"):
            folder.chmod(0o755)
    root.parent.chmod(0o755)
    return root


@pytest.fixture
def base(tiny, user_space) -> Path:
    """The small root where an ordinary user can read it."""
    place = user_space / "tiny"
    if not place.exists():
        shutil.copytree(tiny, place, symlinks=True)
        place.chmod(0o755)
    return place


@pytest.fixture
def perl_base(user_space) -> Path:
    """A root with perl: a program that renames without copying when that fails."""
    place = user_space / "perl"
    if not place.exists():
        make_root(place, (*TOOLS, "perl"))
        place.chmod(0o755)
    return place
