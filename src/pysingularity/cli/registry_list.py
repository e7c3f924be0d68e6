# SPDX-License-Identifier: Apache-2.0
"""`singularity registry list`: the registries in all files of credentials; never a password."""

from __future__ import annotations

from pysingularity.cli.options import Arguments, Option
from pysingularity.cli.registry_login import AUTHFILE

USAGE = ""
COUNT = (0, 0)
HELP = "List the registries that a name and password are known for, and the file that says so."
OPTIONS = (AUTHFILE, Option("json", "Print JSON", short="j"))


def run(arguments: Arguments, environ: dict[str, str]) -> int:
    """List the registries."""
    import base64
    import binascii

    from pysingularity.registry.credentials import files, read

    rows = []
    for path in files(environ, str(arguments.authfile or "")):
        auths = (read(path) or {}).get("auths")
        for host, entry in sorted(auths.items()) if isinstance(auths, dict) else ():
            user = ""
            if isinstance(entry, dict):
                user = str(entry.get("username") or "")
                try:
                    user = user or base64.b64decode(str(entry.get("auth") or "")).decode().partition(":")[0]
                except (binascii.Error, ValueError):
                    user = "(damaged)"
            rows.append({"registry": host, "user": user, "file": path})
    if arguments.json:
        from pysingularity.cli.results import write_json

        write_json(rows)
        return 0
    print(f"{'REGISTRY':<40} {'USER':<20} FILE")
    for row in rows:
        print(f"{row['registry']:<40} {row['user']:<20} {row['file']}")
    return 0
