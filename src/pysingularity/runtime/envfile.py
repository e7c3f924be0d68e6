# SPDX-License-Identifier: Apache-2.0
"""--env-file: a file in shell syntax, evaluated on the host with the caller's variables. Loaded only when asked for."""

from __future__ import annotations

import subprocess

from pysingularity.errors import UserError
from pysingularity.runtime import environment

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

#: Prints every variable with a zero byte behind it; `env` is not asked for -0, which busybox lacks.
SCRIPT = 'set -a; . "$0" >&2; exec cat /proc/self/environ'


def read_env_file(path: str, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that the file sets.

    Raises:
        UserError: it cannot be read, or its commands fail.
    """
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            text = file.read()
    except OSError as error:
        raise UserError("no-env-file", f"--env-file {path}: {error.strerror}") from None
    env = dict(environ)
    assigned: set[str] = set()
    try:
        environment.evaluate(text, env, assigned, export_all=True)
    except environment.HardLineError:
        return _by_shell(path, environ)
    return {name: env[name] for name in assigned}


def _by_shell(path: str, environ: Mapping[str, str]) -> dict[str, str]:
    name = path if "/" in path else f"./{path}"
    result = subprocess.run(
        ["/bin/sh", "-c", SCRIPT, name], env=dict(environ), stdin=subprocess.DEVNULL, capture_output=True, check=False
    )
    if result.returncode:
        complaint = result.stderr.decode(errors="replace").strip().splitlines()
        raise UserError("bad-env-file", f"--env-file {path}: {complaint[-1] if complaint else 'its commands failed'}")
    found = {}
    for entry in result.stdout.decode("utf-8", "surrogateescape").split("\0"):
        key, equals, value = entry.partition("=")
        if equals and environ.get(key) != value and key not in ("_", "SHLVL", "PWD", "OLDPWD"):
            found[key] = value
    return found
