# SPDX-License-Identifier: Apache-2.0
"""Conversation with the person: INFO, WARNING, ERROR and FATAL lines on standard error. Results go to standard output.

Lines have Singularity's nine-character prefix, colours only on a terminal. Progress bars and tables live in `terminal`.
Start ring: imports only sys and posix.
"""

from __future__ import annotations

import posix
import sys

FATAL, ERROR, WARNING, INFO, VERBOSE, DEBUG = -4, -3, -2, 1, 4, 5
#: Lines above this level are not printed.
level = INFO
colour: bool | None = None

_NAMES = {FATAL: "FATAL:", ERROR: "ERROR:", WARNING: "WARNING:", INFO: "INFO:", VERBOSE: "VERBOSE:", DEBUG: "DEBUG:"}
_COLOURS = {FATAL: "31", ERROR: "31", WARNING: "33", INFO: "34", VERBOSE: "34", DEBUG: "34"}


def configure(settings: object, environ: dict[str, str]) -> None:
    """Set the level from options (debug, verbose, quiet, silent, nocolor) and SINGULARITY_MESSAGELEVEL.

    May be called twice, before and behind the command's name; an option given in either place counts.
    """
    global level, colour
    number = environ.get("SINGULARITY_MESSAGELEVEL") or environ.get("APPTAINER_MESSAGELEVEL") or ""
    if level == INFO and number.lstrip("-").isdigit():
        level = int(number)
    for name, value in (("verbose", VERBOSE), ("debug", DEBUG), ("quiet", WARNING), ("silent", ERROR)):
        if name in getattr(settings, "given", ()) and getattr(settings, name, False):
            level = value
    if getattr(settings, "debug", False) and level == INFO:
        level = DEBUG
    if getattr(settings, "nocolor", False) or environ.get("NO_COLOR"):
        colour = False


def say(kind: int, text: str) -> None:
    """Print a message of a kind, when the level admits it."""
    global colour
    if kind > level:
        return
    if colour is None:
        colour = posix.isatty(2)
    prefix = f"{_NAMES[kind]:<9}"
    if colour:
        prefix = f"\033[{_COLOURS[kind]}m{prefix}\033[0m"
    data = f"{prefix}{text}\n".encode("utf-8", "surrogateescape")
    sys.stdout.flush()
    try:
        posix.write(2, data)
    except OSError:  # nobody listens any more
        pass


def fatal(text: str) -> None:
    """Say why we give up."""
    say(FATAL, text)


def error(text: str) -> None:
    """Say what went wrong."""
    say(ERROR, text)


def warning(text: str) -> None:
    """Say what the person may want to mend."""
    say(WARNING, text)


def info(text: str) -> None:
    """Say what is being done."""
    say(INFO, text)


def verbose(text: str) -> None:
    """Say more of what is being done."""
    say(VERBOSE, text)


def debug(text: str) -> None:
    """Say everything."""
    say(DEBUG, text)
