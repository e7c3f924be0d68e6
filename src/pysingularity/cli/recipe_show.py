# SPDX-License-Identifier: Apache-2.0
"""`singularity recipe show`: the definition file that an image keeps."""

from __future__ import annotations

from pysingularity.cli import results
from pysingularity.cli.options import Arguments
from pysingularity.errors import UserError

USAGE = "IMAGE"
COUNT = (1, 1)
HELP = """\
Print the definition file (or Dockerfile) that IMAGE was built from: a SIF file, a bare squashfs or a sandbox.

    singularity recipe show image.sif > image.def
"""
OPTIONS = ()


def run(arguments: Arguments, environ: dict[str, str]) -> int:  # noqa: ARG001
    """Print it."""
    from pysingularity.image import metadata
    from pysingularity.image.open import open_image

    path = str(arguments.positional[0])
    with open_image(path) as image:
        text = str(metadata.attributes_of(image).get("deffile") or "")
    if not text:
        raise UserError("no-definition", f"{path}: keeps no definition file")
    results.write(text.rstrip("\n") + "\n")
    return 0
