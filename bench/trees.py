# SPDX-License-Identifier: Apache-2.0
"""Folders that images are made of in benchmarks: a Debian root file system, and a large Python environment.

They come from the package mirror and the Python index, and belong to the user who runs the benchmark, so that every
program may read them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

DEBIAN = "Bootstrap: debootstrap\nInclude: python3 locales\n"
PYTHON = (
    "numpy scipy pandas scikit-learn matplotlib pyarrow numba opencv-python-headless transformers sympy plotly bokeh "
    "statsmodels"
).split()


def debian(folder: Path, singularity: str) -> None:
    """Make a root file system of about 200 MB whose files belong to the caller."""
    recipe = folder.with_suffix(".def")
    recipe.write_text(DEBIAN)
    # With subordinate ids some files would belong to others, whom the peers may not read.
    environ = {**os.environ, "SINGULARITY_ROOTLESS": "notify"}
    subprocess.run([singularity, "-q", "build", "--sandbox", folder, recipe], check=True, env=environ)
    subprocess.run(["chmod", "-R", "u+rwX", folder], check=True)


def python(folder: Path, singularity: str) -> None:  # noqa: ARG001
    """Make a Python environment of more than 1 GB and about 40,000 files."""
    venv = folder.with_suffix(".venv")
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    subprocess.run([venv / "bin/pip", "install", "--quiet", "--target", folder, *PYTHON], check=True)
    subprocess.run(["rm", "-rf", venv], check=True)


TREES = {"debian": debian, "python": python}
