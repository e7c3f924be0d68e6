# SPDX-License-Identifier: Apache-2.0
"""`singularity recipe check`: what is wrong with a definition file or Dockerfile, before a build needs it."""

from __future__ import annotations

from pysingularity import messages
from pysingularity.cli.options import MANY, TEXT, Arguments, Option
from pysingularity.errors import SingularityError

USAGE = "FILE..."
COUNT = (1, None)
HELP = """\
Read each FILE as a build would, and print what is wrong with it: file, line and column, the line, and what may have
been meant. Nothing is fetched or built.

    singularity recipe check *.def Dockerfile
"""
OPTIONS = (
    Option("build-arg", "Give a template its value", kind=MANY, metavar="NAME=VALUE"),
    Option("build-arg-file", "Read values of templates from a file", kind=TEXT, metavar="FILE"),
    Option("warn-unused-build-args", "Warn instead of giving up when a given value is not used"),
)


def run(arguments: Arguments, environ: dict[str, str]) -> int:
    """Check every file; the status tells whether all are fine."""
    from pysingularity.cli import build, dockerfile
    from pysingularity.recipe.dockerfile import looks_like

    status = 0
    for path in map(str, arguments.positional):
        try:
            text = build.read_text(path)
            if looks_like(text[:65536].decode("utf-8", "surrogateescape"), path):
                dockerfile.stages(dockerfile.request(text, path, arguments, environ), arguments)
            else:
                build.read_recipe(text, path, arguments)
        except SingularityError as error:
            messages.error(str(error))
            status = error.exit_code
    return status
