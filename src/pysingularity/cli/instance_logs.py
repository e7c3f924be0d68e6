# SPDX-License-Identifier: Apache-2.0
"""`singularity instance logs`: what an instance has printed, and with --follow what it prints from now on."""

from __future__ import annotations

import os
import sys
import time

from pysingularity.cli.options import Arguments, Option
from pysingularity.errors import UserError
from pysingularity.runtime.instances import check_name, find, folder, load

USAGE = "NAME"
COUNT = (1, 1)
OPTIONS = (
    Option("follow", "Go on until the instance ends", short="f"),
    Option("err", "Show standard error instead of standard output", short="e"),
)
HELP = """
The logs of an instance that has ended stay until another one of that name starts.
"""


def run(arguments: Arguments, environ: dict[str, str]) -> int:
    """Copy the log to standard output."""
    name = check_name(arguments.positional[0])
    path = f"{folder(environ, 'logs')}/{name}.{'err' if arguments.err else 'out'}"
    if not os.path.exists(path):
        find(name, environ)  # says that there is no such instance
        raise UserError("no-log", f"{path}: there is no such log")
    with open(path, "rb") as file:
        while True:
            # Asked before reading: what was printed before the end must still be shown.
            running = arguments.follow and load(f"{folder(environ)}/{name}") is not None
            while data := file.read(1 << 16):
                sys.stdout.buffer.write(data)
            sys.stdout.flush()
            if not running:
                return 0
            time.sleep(0.1)
