# SPDX-License-Identifier: Apache-2.0
"""The house rules that a program can check: style, types, arrows, licences, and what must not be named."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TOP = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
SOURCES = sorted((TOP / "src").rglob("*.py"))


def run(*words: str) -> None:
    """Run a checker and show only its own words when it complains."""
    program = shutil.which(words[0], path=str(BIN))
    if program is None:
        pytest.skip(f"needs {words[0]}")
    result = subprocess.run([program, *words[1:]], cwd=TOP, capture_output=True, text=True, check=False)
    if result.returncode:
        pytest.fail(result.stdout + result.stderr, pytrace=False)


def test_ruff_finds_nothing():
    run("ruff", "check", "--no-cache", ".")


def test_files_are_formatted():
    run("ruff", "format", "--no-cache", "--check", ".")


def test_types_hold():
    run("mypy", "--cache-dir=/dev/null")


def test_arrows_point_downwards():
    run("lint-imports", "--no-cache")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(TOP / "src")))
def test_module_says_its_licence_and_what_belongs_in_it(path):
    text = path.read_text()
    assert text.startswith("# SPDX-License-Identifier: Apache-2.0\n")
    assert ast.get_docstring(ast.parse(text))


def test_every_command_of_the_table_has_its_file():
    from pysingularity.cli.commands import COMMANDS

    missing = [name for name, entry in COMMANDS.items() if not (TOP / f"src/pysingularity/cli/{entry[0]}.py").exists()]
    assert missing == []


def test_lock_files_have_hashes_and_no_addresses():
    for path in TOP.glob("requirements*.lock"):
        text = path.read_text()
        assert "--hash=sha256:" in text
        assert "://" not in text
