# SPDX-License-Identifier: Apache-2.0
"""`singularity shell`: open a shell within a container. Start ring."""

from __future__ import annotations

from pysingularity.cli import shared
from pysingularity.cli.options import TEXT, Arguments, Option

USAGE = "IMAGE"
COUNT = (1, None)
PAYLOAD = True
OPTIONS = (
    *shared.OPTIONS,
    Option("shell", "Use this shell of the container", short="s", kind=TEXT, metavar="PATH", env=("SHELL",)),
)
HELP = """
Opens bash without its rc file, or sh where the image has no bash. Commands may come on standard input.

    singularity shell debian.sif
    singularity shell --writable -H $HOME:/home box/
    echo 'cat /etc/os-release' | singularity shell debian.sif
"""


def run(arguments: Arguments, environ: dict[str, str]) -> int:
    """Become the shell."""
    shared.start("shell", arguments, environ)
