# SPDX-License-Identifier: Apache-2.0
"""`singularity run-help`: show the help text of an image or of one of its apps."""

from __future__ import annotations

from pysingularity.cli import results
from pysingularity.cli.options import TEXT, Arguments, Option
from pysingularity.image import metadata
from pysingularity.image.open import open_image

USAGE = "IMAGE"
COUNT = (1, 1)
HELP = """\
Show what the image's author wrote in %help (or in %apphelp of an app). Nothing is run in the image.

    singularity run-help image.sif
"""
OPTIONS = (Option("app", "Show the help of an app", kind=TEXT, metavar="NAME", env=("APP", "APPNAME")),)


def run(arguments: Arguments, environ: dict[str, str]) -> int:  # noqa: ARG001
    """Print the help text, or that there is none."""
    with open_image(arguments.positional[0]) as image:
        attributes = metadata.attributes_of(image)
    if arguments.app:
        attributes = attributes.get("apps", {}).get(str(arguments.app), {})
    text = attributes.get("helpfile")
    results.write(f"{text}\n" if text else "No help sections were defined for this image\n")
    return 0
