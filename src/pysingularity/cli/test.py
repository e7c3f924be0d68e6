# SPDX-License-Identifier: Apache-2.0
"""`singularity test`: run the tests that were defined for a container. Start ring."""

from __future__ import annotations

from pysingularity.cli import shared
from pysingularity.cli.options import Arguments

USAGE = "IMAGE [ARGUMENT...]"
COUNT = (1, None)
PAYLOAD = True
OPTIONS = shared.OPTIONS
HELP = """
Runs the %test section of the image and ends with its status; an image without one passes.

    singularity test demo.sif
"""


def run(arguments: Arguments, environ: dict[str, str]) -> int:
    """Become the test."""
    shared.start("test", arguments, environ)
