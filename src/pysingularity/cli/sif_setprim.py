# SPDX-License-Identifier: Apache-2.0
"""`singularity sif setprim`: choose the primary system partition of a SIF file."""

from __future__ import annotations

from pysingularity.cli.options import Arguments, Option
from pysingularity.cli.sif_text import number, opened

USAGE = "ID FILE"
COUNT = (2, 2)
HELP = """\
Make a system partition the primary one: the root file system of the container.

    singularity sif setprim 4 image.sif
"""
OPTIONS: tuple[Option, ...] = ()


def run(arguments: Arguments, environ: dict[str, str]) -> int:  # noqa: ARG001
    """Change the roles of the partitions."""
    which = number(arguments.positional[0])
    with opened(arguments.positional[1], writable=True) as sif:
        sif.set_primary(which)
    return 0
