# SPDX-License-Identifier: Apache-2.0
"""The tutorials are run: files are written, commands typed, and what they print is compared."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "docs/tutorials"
_BLOCK = re.compile(r"^```(file (\S+)|console)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.network
@pytest.mark.rootless
@pytest.mark.long
@pytest.mark.parametrize("page", sorted(path.name for path in FOLDER.glob("*.md")))
def test_tutorial_works_as_it_is_written(as_user, page):
    blocks = list(_BLOCK.finditer((FOLDER / page).read_text()))
    assert blocks
    for block in blocks:
        if block[2]:
            as_user.write(block[2], block[3])
            continue
        for typed in re.split(r"^\$ ", block[3], flags=re.MULTILINE)[1:]:
            command, _, wanted = typed.partition("\n")
            result = as_user(["sh", "-c", command], timeout=600)
            assert result.returncode == 0, f"{command}\n{result.stderr[-3000:]}"
            assert result.stdout == wanted.rstrip("\n") + ("\n" if wanted.strip() else ""), command
