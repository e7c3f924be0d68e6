# SPDX-License-Identifier: Apache-2.0
"""`singularity instance run`: a container with its runscript that goes on in the background."""

from __future__ import annotations

from pysingularity.cli import instance_start
from pysingularity.cli.options import Arguments

USAGE, COUNT, PAYLOAD, OPTIONS, HELP = (
    instance_start.USAGE,
    instance_start.COUNT,
    instance_start.PAYLOAD,
    instance_start.OPTIONS,
    instance_start.HELP,
)


def run(arguments: Arguments, environ: dict[str, str]) -> int:
    """Start the instance and its runscript."""
    return instance_start.launch("run", arguments, environ)
