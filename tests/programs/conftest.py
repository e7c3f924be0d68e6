# SPDX-License-Identifier: Apache-2.0
"""Real programs that start containers: installed once per session where ordinary users can read them."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from containers import box, busybox, image, own_tree, sing, squash

__all__ = ["box", "busybox", "image", "sing", "squash"]
PROGRAMS = ("cwltool", "snakemake", "spython")


@pytest.fixture(scope="session")
def programs(user_space) -> Path:
    """Return the folder of the programs, installed from the Python index into an environment of their own."""
    venv = user_space / "programs"
    subprocess.run([sys.executable, "-m", "venv", venv], check=True, capture_output=True)
    command = [venv / "bin/pip", "install", "--quiet", "--no-input", *PROGRAMS]
    result = subprocess.run(command, capture_output=True, text=True, timeout=900)
    if result.returncode:
        pytest.skip(f"the Python index gives no {', '.join(PROGRAMS)}: {result.stderr[-300:]}")
    return venv / "bin"


@pytest.fixture
def sif(sing, as_user, box) -> Path:
    """A SIF file with busybox and bash, whose runscript runs its arguments, as without entry point."""
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("needs bash on the host, to put it into an image")
    listing = subprocess.run(["ldd", bash], check=True, capture_output=True, text=True).stdout
    for path in [*re.findall(r"(/\S+) \(0x", listing), bash]:
        place = box / (path.lstrip("/") if path != bash else "bin/bash")
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, place)
    (box / ".singularity.d/runscript").write_text('#!/bin/sh\nexec "$@"\n')
    own_tree(box, as_user.uid, as_user.gid)
    sing("-q", "build", as_user.tmp / "tools.sif", box, check=True)
    return as_user.tmp / "tools.sif"


MPI = """\
Bootstrap: debootstrap

%post
    apt-get update
    apt-get install -y --no-install-recommends openmpi-bin python3-mpi4py
    apt-get clean
"""


@pytest.fixture(scope="session")
def mpi_image(user_space) -> Path:
    """Return an image with Open MPI and its Python module, made from Debian's packages."""
    top = user_space / "mpi"
    top.mkdir()
    (top / "mpi.def").write_text(MPI)
    command = [sys.executable, "-m", "pysingularity", "-q", "build", top / "mpi.sif", top / "mpi.def"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=1200, stdin=subprocess.DEVNULL)
    assert result.returncode == 0, result.stderr[-3000:]
    (top / "mpi.sif").chmod(0o755)
    return top / "mpi.sif"
