# SPDX-License-Identifier: Apache-2.0
"""What `singularity exec` imports before it becomes the program: the list is short, and grows only on purpose.

`modules.txt` names the modules that may be loaded; every one costs each start of a job array.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import pysingularity

pytestmark = pytest.mark.rootless

ALLOWED = set((Path(__file__).parent / "modules.txt").read_text().split())
START = Path(pysingularity.__file__).parent / "start.py"
#: What the interpreter loads by itself.
OWN = set(
    subprocess.run(
        [sys.executable, "-I", "-S", "-c", "import sys; print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
)
#: Each of these costs more than everything we do.
HEAVY = {
    "re",
    "json",
    "typing",
    "pathlib",
    "subprocess",
    "logging",
    "argparse",
    "enum",
    "collections",
    "functools",
    "contextlib",
    "tempfile",
    "shutil",
    "socket",
    "dataclasses",
    "ctypes",
    "signal",
}


def loaded(result):
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if line.startswith("modules: ")]
    return set(lines[-1].split()[1:])


@pytest.mark.parametrize(
    "words",
    [
        ["exec", "BOX", "true"],
        ["run", "BOX"],
        ["shell", "BOX"],
        ["exec", "IMAGE", "true"],
        ["exec", "--pid", "-B", "/etc:/x", "--contain", "--env", "A=1", "BOX", "true"],
    ],
)
def test_only_light_modules_before_the_program(sing, box, request, words):
    paths = {"BOX": lambda: str(box), "IMAGE": lambda: str(request.getfixturevalue("image"))}
    words = [paths[word]() if word in paths else word for word in words]
    found = loaded(sing(words[0], "--dry-run", *words[1:]))
    assert found & HEAVY == set()
    assert sorted(found - ALLOWED - OWN) == []


@pytest.mark.fuse
def test_a_real_start_from_a_cold_image_imports_nothing_more(as_user, image):
    """`--dry-run` ends before the image is opened; this one goes the whole way, without site as the launcher does."""
    words = [sys.executable, "-I", "-S", "-X", "importtime", START, "exec", image, "true"]
    result = as_user([*map(str, words)], env={"SINGULARITY_IMAGE_KEEP": "0"})
    assert result.returncode == 0, result.stderr
    lines = [line.split("|") for line in result.stderr.splitlines() if line.startswith("import time:")]
    found = {line[2].strip() for line in lines} - {"imported package"}
    assert "pysingularity.image.mount" in found
    assert found & HEAVY == set()
    # Of other people's packages only the one that inflates, where it is installed.
    assert sorted(found - ALLOWED - OWN - {"deflate", "deflate._deflate", "_io"}) == []


def test_the_list_names_nothing_heavy():
    assert set() == ALLOWED & HEAVY
    assert "pysingularity.runtime.enter" in ALLOWED


def test_garbage_is_looked_for_by_commands_that_work_longer(tmp_path):
    code = """
import gc, sys
package = sys.modules["pysingularity"] = type(sys)("pysingularity")
package.__path__ = [sys.argv.pop(1)]
try:
    import pysingularity.start
finally:
    print(gc.isenabled())
"""
    for words, wanted in ((["version"], "False"), (["cache", "list"], "True")):
        argv = [sys.executable, "-I", "-S", "-c", code, str(START.parent), *words]
        result = subprocess.run(argv, capture_output=True, text=True, check=False, env={"HOME": str(tmp_path)})
        assert result.stdout.splitlines()[-1] == wanted, result.stderr
