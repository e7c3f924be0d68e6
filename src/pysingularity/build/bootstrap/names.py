# SPDX-License-Identifier: Apache-2.0
"""The nearest agent to a misspelt one. Loaded only when something is wrong."""

from __future__ import annotations

import difflib

from pysingularity.build.bootstrap import AGENTS, MISSING


def guess(word: str) -> str:
    """Return a hint that names the agent most like `word`, or all of them."""
    near = difflib.get_close_matches(word, [*AGENTS, *MISSING], n=1, cutoff=0.6)
    return f"did you mean Bootstrap: {near[0]}?" if near else "agents: " + ", ".join(sorted(AGENTS))
