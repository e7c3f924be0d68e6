# SPDX-License-Identifier: Apache-2.0
"""`singularity sif header`: show the global header of a SIF file."""

from __future__ import annotations

from pysingularity.cli import results
from pysingularity.cli.options import Arguments, Option
from pysingularity.cli.sif_text import header_json, header_text, opened

USAGE = "FILE"
COUNT = (1, 1)
HELP = """\
Show the global header of a SIF file: identity, times, architecture and the places of its parts.

    singularity sif header image.sif
"""
OPTIONS = (Option("json", "Print JSON", short="j"),)


def run(arguments: Arguments, environ: dict[str, str]) -> int:  # noqa: ARG001
    """Print the header."""
    with opened(arguments.positional[0]) as sif:
        if arguments.json:
            results.write_json(header_json(sif.header))
        else:
            results.write(header_text(sif.header))
    return 0
