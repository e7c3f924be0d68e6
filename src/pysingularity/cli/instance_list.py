# SPDX-License-Identifier: Apache-2.0
"""`singularity instance list`: name, process, address and image of every running instance."""

from __future__ import annotations

import posix

from pysingularity.cli.options import TEXT, Arguments, Option
from pysingularity.errors import UserError
from pysingularity.runtime.instances import listing

USAGE = "[NAME-PATTERN]"
COUNT = (0, 1)
OPTIONS = (
    Option("json", "Print a JSON object", short="j", env=("JSON",)),
    Option("logs", "Show where the logs are", short="l", env=("LOGS",)),
    Option("all", "List the instances of all users (root)", short="a", env=("ALL",)),
    Option("user", "List the instances of USER (root)", short="u", kind=TEXT, metavar="USER", env=("USER",)),
)
HELP = """
A pattern is a shell pattern: `singularity instance list 'web*'`.
"""


def run(arguments: Arguments, environ: dict[str, str]) -> int:
    """Print the instances."""
    pattern = arguments.positional[0] if arguments.positional else "*"
    # SINGULARITY_USER is no wish to see that user's instances when it names ourselves.
    users = [str(arguments.user)] if arguments.user else [""]
    if (arguments.all or "user" in arguments.given) and posix.getuid() != 0:
        raise UserError("needs-root", "only root sees the instances of other users")
    if arguments.all:
        import pwd

        users = sorted({account.pw_name for account in pwd.getpwall()})
    found = [one for user in users for one in listing(home_of(user, environ), pattern, user)]
    if arguments.json:
        import json

        print(json.dumps({"instances": [one.json() for one in found]}, indent=4))
        return 0
    if arguments.logs:
        rows: list[tuple[str, ...]] = [("INSTANCE NAME", "PID", "LOGS")]
        for one in found:
            rows += [(one.name, one.pid, one.err), ("", "", one.out)]
    else:
        rows = [("INSTANCE NAME", "PID", "IP", "IMAGE")]
        rows += [(one.name, one.pid, one.ip, one.image) for one in found]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("    ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0


def home_of(user: str, environ: dict[str, str]) -> dict[str, str]:
    """Return the environment in which a user's entries are looked for; our own for ourselves."""
    if not user:
        return environ
    import pwd

    try:
        return {"HOME": pwd.getpwnam(user).pw_dir}
    except KeyError:
        raise UserError("no-such-user", f"there is no user {user}") from None
