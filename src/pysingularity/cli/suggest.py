# SPDX-License-Identifier: Apache-2.0
"""The nearest valid name to a misspelt one, for commands, options and sections. Loaded only when something is wrong."""

from __future__ import annotations

import difflib


def nearest(word: str, known: list[str]) -> str:
    """Return the known name most like `word`, or "" when none is near."""
    found = difflib.get_close_matches(word.lower(), known, n=1, cutoff=0.6)
    return found[0] if found else ""
