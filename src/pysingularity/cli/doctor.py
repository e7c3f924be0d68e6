# SPDX-License-Identifier: Apache-2.0
"""`singularity doctor`: one screen telling what works on this machine, and what to do about the rest."""

from __future__ import annotations

import os
import sys
import tempfile
import textwrap

from pysingularity.cli.options import Arguments, Option
from pysingularity.runtime.checks import FAILED, OK, WARNING, Check, all_checks

USAGE = ""
COUNT = (0, 0)
OPTIONS = (Option("json", "Print the checks as JSON", short="j"),)
HELP = """
Every check makes the very call that a container would make. The exit status is 1 when containers cannot run at all.
"""


def run(arguments: Arguments, environ: dict[str, str]) -> int:
    """Run the checks and print them."""
    checks = all_checks(environ, folders(environ))
    if arguments.json:
        import json

        print(json.dumps({"checks": [check.json() for check in checks]}, indent=2))
    else:
        show(checks, sys.stdout.isatty() and not environ.get("NO_COLOR"))
    return 1 if any(check.state == FAILED for check in checks) else 0


def folders(environ: dict[str, str]) -> dict[str, str]:
    """Return what the large folders are for, and where they are."""
    cache = environ.get("SINGULARITY_CACHEDIR") or environ.get("APPTAINER_CACHEDIR")
    temporary = environ.get("SINGULARITY_TMPDIR") or environ.get("APPTAINER_TMPDIR") or tempfile.gettempdir()
    return {"the cache": cache or os.path.join(environ.get("HOME", "/"), ".singularity", "cache"), "builds": temporary}


def show(checks: list[Check], colour: bool) -> None:
    """Print the checks for a person."""
    marks = {OK: ("ok", "32"), WARNING: ("--", "33"), FAILED: ("NO", "31")}
    widest = max(len(check.title) for check in checks)
    for check in checks:
        mark, code = marks[check.state]
        mark = f"\033[{code}m{mark}\033[0m" if colour else mark
        print(f"{mark}  {check.title:<{widest}}  {textwrap.shorten(check.detail, 160, placeholder=' ...')}")
        if check.remedy:
            print(f"    {'':<{widest}}  {check.remedy}")
