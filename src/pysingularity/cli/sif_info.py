# SPDX-License-Identifier: Apache-2.0
"""`singularity sif info`: show everything about one object of a SIF file."""

from __future__ import annotations

from pysingularity.cli import results
from pysingularity.cli.options import Arguments, Option
from pysingularity.cli.sif_text import info_text, number, object_json, opened

USAGE = "ID FILE"
COUNT = (2, 2)
HELP = """\
Show everything about one object of a SIF file. The ids are those of `singularity sif list`.

    singularity sif info 3 image.sif
"""
OPTIONS = (Option("json", "Print JSON", short="j"),)


def run(arguments: Arguments, environ: dict[str, str]) -> int:  # noqa: ARG001
    """Print the object's fields."""
    which = number(arguments.positional[0])
    with opened(arguments.positional[1]) as sif:
        one = sif.get(which)
        if arguments.json:
            results.write_json(object_json(one))
        else:
            results.write(info_text(one))
    return 0
