# SPDX-License-Identifier: Apache-2.0
"""Fixtures around a small Debian mirror; what it is made of stands in `deb_mirror`."""

from __future__ import annotations

from pathlib import Path

import pytest
from deb_mirror import Bench, Mirror

from keys import keys

__all__ = ["bench", "keys", "mirror"]


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
