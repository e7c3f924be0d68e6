# SPDX-License-Identifier: Apache-2.0
"""`singularity sif new`: create a SIF file without objects."""

from __future__ import annotations

import time

from pysingularity.cli.options import Arguments, Option
from pysingularity.cli.sif_text import status_one

USAGE = "FILE"
COUNT = (1, 1)
HELP = """\
Create a SIF file without objects; add them with `singularity sif add`.

    singularity sif new image.sif
"""
OPTIONS = (Option("force", "Replace a file that exists", short="F"),)


def run(arguments: Arguments, environ: dict[str, str]) -> int:
    """Create the file."""
    from pysingularity.image.output import OutputFile, epoch
    from pysingularity.sif.file import create, random_identity

    with status_one():
        when = epoch(environ)
        with OutputFile(arguments.positional[0], force=bool(arguments.force)) as output:
            # Without a date from outside, the file is a new individual; with one, it is reproducible.
            identity = random_identity() if when is None else bytes(16)
            create(output.fd, [], identity=identity, when=int(time.time()) if when is None else when, launch=b"")
            output.publish()
    return 0
