# SPDX-License-Identifier: Apache-2.0
"""Fixtures around a small Debian mirror; what it is made of stands in `deb_mirror`."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from deb_mirror import Bench, Key, Mirror


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory):
    """Two keys: the mirror's and a stranger's."""
    for program in ("gpg", "gpgv"):
        if shutil.which(program) is None:
            pytest.skip(f"needs the program {program}")
    # Short paths: the agent's socket has to fit into 107 bytes.
    base = Path(tmp_path_factory.mktemp("k"))
    yield Key(base / "a", "archive"), Key(base / "s", "stranger")
    for name in ("a", "s"):
        subprocess.run(["gpgconf", "--homedir", str(base / name), "--kill", "all"], check=False, capture_output=True)


@pytest.fixture
def mirror(tmp_path: Path, keys) -> Mirror:
    """A mirror with the smallest system; call publish() when it is complete."""
    made = Mirror(tmp_path / "mirror", keys[0])
    made.base()
    return made


@pytest.fixture
def bench(tmp_path: Path, keys) -> Bench:
    """A place to bootstrap in."""
    made = tmp_path / "bench"
    made.mkdir()
    return Bench(made, keys[0].public)
