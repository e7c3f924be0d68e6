# SPDX-License-Identifier: Apache-2.0
"""`singularity sif del`: delete an object of a SIF file."""

from __future__ import annotations

from pysingularity.cli.options import Arguments, Option
from pysingularity.cli.sif_text import number, opened

USAGE = "ID FILE"
COUNT = (2, 2)
HELP = """\
Delete an object. Its bytes stay in the file until something else is written there, unless they are to be overwritten.

    singularity sif del 4 image.sif
"""
OPTIONS = (
    Option("zero", "Overwrite the object's bytes with zeros"),
    Option("compact", "Cut the file behind the last object that remains"),
)


def run(arguments: Arguments, environ: dict[str, str]) -> int:  # noqa: ARG001
    """Delete the object."""
    which = number(arguments.positional[0])
    with opened(arguments.positional[1], writable=True) as sif:
        sif.delete(which, zero=bool(arguments.zero), compact=bool(arguments.compact))
    return 0
