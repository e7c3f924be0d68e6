# SPDX-License-Identifier: Apache-2.0
"""`singularity instance stop`: ask instances to end, then make them."""

from __future__ import annotations

import signal as signals

from pysingularity import messages
from pysingularity.cli.instance_list import home_of
from pysingularity.cli.options import TEXT, Arguments, Option
from pysingularity.errors import UsageError
from pysingularity.runtime.instances import listing, stop

USAGE = "[NAME-PATTERN]"
COUNT = (0, 1)
OPTIONS = (
    Option("all", "Stop all instances of this user", short="a", env=("ALL",)),
    Option("force", "Kill at once", short="F", env=("FORCE",)),
    Option("signal", "Send SIGNAL first", short="s", kind=TEXT, metavar="SIGNAL", default="SIGINT", env=("SIGNAL",)),
    Option("timeout", "Kill after SECONDS", short="t", kind=TEXT, metavar="SECONDS", default="10", env=("TIMEOUT",)),
    Option("user", "Stop instances of USER (root)", short="u", kind=TEXT, metavar="USER"),
)


def run(arguments: Arguments, environ: dict[str, str]) -> int:
    """Stop what matches; 1 when nothing does."""
    if not arguments.positional and not arguments.all:
        raise UsageError("argument-count", "name an instance (or a pattern), or give --all")
    pattern = arguments.positional[0] if arguments.positional else "*"
    number = signal_number(str(arguments.signal))
    try:
        timeout = float(str(arguments.timeout))
    except ValueError:
        raise UsageError("bad-number", f"--timeout: {arguments.timeout!r} is not a number of seconds") from None
    user = str(arguments.user or "")
    found = listing(home_of(user, environ), pattern, user)
    if not found:
        messages.error("no instance found" + (f" with name {pattern}" if arguments.positional else ""))
        return 1
    for one in found:
        messages.info(f"Stopping {one.name} instance of {one.image} (PID={one.pid})")
        if not stop(one, signal=number, timeout=timeout, force=bool(arguments.force)) and not arguments.force:
            messages.warning(f"{one.name} did not end within {timeout:g} s and was killed")
    # What has ended leaves no entry.
    listing(home_of(user, environ), pattern, user)
    return 0


def signal_number(text: str) -> int:
    """Return the number of a signal given as "9", "KILL" or "SIGKILL".

    Raises:
        UsageError: there is no such signal.
    """
    if text.isdigit() and 0 < int(text) < signals.NSIG:
        return int(text)
    name = text.upper() if text.upper().startswith("SIG") else "SIG" + text.upper()
    try:
        return int(signals.Signals[name])
    except KeyError:
        raise UsageError("bad-signal", f"--signal: there is no signal {text}", hint="see: kill -l") from None
