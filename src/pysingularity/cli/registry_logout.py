# SPDX-License-Identifier: Apache-2.0
"""`singularity registry logout`: forget a name and password."""

from __future__ import annotations

from pysingularity import messages
from pysingularity.cli.options import Arguments
from pysingularity.cli.registry_login import AUTHFILE, host_of

USAGE = "REGISTRY"
COUNT = (1, 1)
HELP = "Forget the name and password that `registry login` keeps for a registry."
OPTIONS = (AUTHFILE,)


def run(arguments: Arguments, environ: dict[str, str]) -> int:
    """Log out."""
    from pysingularity.registry.credentials import own_file, store

    host = host_of(arguments.positional[0])
    path = str(arguments.authfile or "") or own_file(environ)
    if store(path, host, None):
        messages.info(f"Logged out of {host}")
    else:
        messages.warning(f"{path}: was not logged in to {host}")
    return 0
