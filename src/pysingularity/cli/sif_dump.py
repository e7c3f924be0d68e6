# SPDX-License-Identifier: Apache-2.0
"""`singularity sif dump`: write the bytes of an object to standard output."""

from __future__ import annotations

from pysingularity.cli import results
from pysingularity.cli.options import Arguments, Option
from pysingularity.cli.sif_text import number, opened

USAGE = "ID FILE"
COUNT = (2, 2)
HELP = """\
Write the bytes of an object to standard output.

    singularity sif dump 1 image.sif > image.def
"""
OPTIONS: tuple[Option, ...] = ()


def run(arguments: Arguments, environ: dict[str, str]) -> int:  # noqa: ARG001
    """Write the object."""
    which = number(arguments.positional[0])
    with opened(arguments.positional[1]) as sif:
        for piece in sif.chunks(sif.get(which)):
            results.write_bytes(piece)
    return 0
