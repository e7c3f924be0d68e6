# SPDX-License-Identifier: Apache-2.0
"""`singularity version`: the number alone; `singularity --version`: the line that tools parse."""

from __future__ import annotations

from pysingularity.cli.options import Arguments, Option
from pysingularity.version import FULL

USAGE = ""
COUNT = (0, 0)
OPTIONS = (Option("long", "Print the name as well", hidden=True),)


def run(arguments: Arguments, environ: dict[str, str]) -> int:  # noqa: ARG001
    """Print the version."""
    print(f"singularity version {FULL}" if arguments.long else FULL)
    return 0
