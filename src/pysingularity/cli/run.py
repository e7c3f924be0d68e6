# SPDX-License-Identifier: Apache-2.0
"""`singularity run`: run the program that a container was made for. Start ring."""

from __future__ import annotations

from pysingularity.cli import shared
from pysingularity.cli.options import Arguments

USAGE = "IMAGE [ARGUMENT...]"
COUNT = (1, None)
PAYLOAD = True
OPTIONS = shared.OPTIONS
HELP = """
Runs the %runscript of the image (ENTRYPOINT and CMD of an OCI image) with the arguments; an image without one runs
/bin/sh. An image file with the execute bit set is a program that does the same.

    singularity run demo.sif --help
    singularity run --app foo tools.sif input.txt
    ./demo.sif --help
"""


def run(arguments: Arguments, environ: dict[str, str]) -> int:
    """Become the runscript."""
    shared.start("run", arguments, environ)
