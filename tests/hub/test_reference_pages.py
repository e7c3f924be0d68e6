# SPDX-License-Identifier: Apache-2.0
"""The hub's reference pages say what the program does: they are made from it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TOP = Path(__file__).parent.parent.parent


@pytest.mark.parametrize("page", ["settings", "commands"])
def test_page_is_current(page: str):
    made = subprocess.run(
        [sys.executable, TOP / "scripts" / "hub_reference.py", page], capture_output=True, text=True, check=True
    ).stdout
    assert made == (TOP / "docs" / "reference" / f"hub-{page}.md").read_text(), "run scripts/reference"


def test_every_setting_has_its_row_with_the_default_of_the_class():
    from pysingularity.hub.settings import BuildSettings, SlurmSettings

    text = (TOP / "docs" / "reference" / "hub-settings.md").read_text()
    for group in (BuildSettings, SlurmSettings):
        for name, field in group.model_fields.items():
            if name == "slurm":
                continue  # a table of its own
            assert f"| `{name}` |" in text
            if isinstance(field.default, int | float) and not isinstance(field.default, bool):
                assert f"`{field.default}`" in text
