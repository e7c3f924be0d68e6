# SPDX-License-Identifier: Apache-2.0
"""`singularity sif list`: list the objects of a SIF file."""

from __future__ import annotations

from pysingularity.cli import results
from pysingularity.cli.options import Arguments, Option
from pysingularity.cli.sif_text import list_text, object_json, opened

USAGE = "FILE"
COUNT = (1, 1)
HELP = """\
List the objects of a SIF file with their groups, links and places.

    singularity sif list image.sif
"""
OPTIONS = (Option("json", "Print JSON", short="j"),)


def run(arguments: Arguments, environ: dict[str, str]) -> int:  # noqa: ARG001
    """Print the table of objects."""
    with opened(arguments.positional[0]) as sif:
        if arguments.json:
            results.write_json({"objects": [object_json(one) for one in sif.descriptors]})
        else:
            results.write(list_text(sif))
    return 0
