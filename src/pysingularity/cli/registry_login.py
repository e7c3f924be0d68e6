# SPDX-License-Identifier: Apache-2.0
"""`singularity registry login`: check a name and password at a registry, then keep them."""

from __future__ import annotations

import sys

from pysingularity import messages
from pysingularity.cli.options import TEXT, Arguments, Option
from pysingularity.errors import RegistryError, UsageError

USAGE = "REGISTRY"
COUNT = (1, 1)
HELP = """\
Log in to a registry. Name and password are tried at once, and kept in a file that only you can read.

    singularity registry login --username me oras://registry.example.org
    echo "$TOKEN" | singularity registry login -u me --password-stdin docker://docker.io
"""
AUTHFILE = Option("authfile", "Keep names and passwords in FILE", kind=TEXT, metavar="FILE", env=("AUTH_FILE",))
OPTIONS = (
    Option("username", "Log in as NAME", short="u", kind=TEXT, metavar="NAME", env=("LOGIN_USERNAME",)),
    Option("password", "Log in with PASSWORD", short="p", kind=TEXT, metavar="PASSWORD", env=("LOGIN_PASSWORD",)),
    Option("password-stdin", "Read the password from standard input"),
    Option("no-https", "Speak plain http to the registry", env=("NOHTTPS", "NO_HTTPS")),
    AUTHFILE,
)


def host_of(text: str) -> str:
    """Return the registry's name in what the user typed: with a scheme, without, or with a repository behind it."""
    for prefix in ("docker://", "oras://", "https://", "http://", "library://"):
        text = text.removeprefix(prefix)
    host = text.partition("/")[0]
    if not host:
        raise UsageError("no-registry", "no registry was named")
    return host


def run(arguments: Arguments, environ: dict[str, str]) -> int:
    """Log in."""
    from pysingularity import thirdparty
    from pysingularity.reference import Reference
    from pysingularity.registry.auth import Credentials
    from pysingularity.registry.credentials import own_file, store

    thirdparty.enable()
    from pysingularity.registry.oci import Repository
    from pysingularity.registry.settings import settings_from

    host = host_of(arguments.positional[0])
    user = str(arguments.username or "") or (input("Username: ") if sys.stdin.isatty() else "")
    if not user:
        raise UsageError("no-username", "registry login: no name was given", hint="use --username NAME")
    if arguments.password_stdin:
        password = sys.stdin.read().rstrip("\n")
    elif arguments.password:
        password = str(arguments.password)
    elif sys.stdin.isatty():
        from getpass import getpass

        password = getpass("Password: ")
    else:
        raise UsageError("no-password", "registry login: no password was given", hint="use --password-stdin")
    options = {"docker_username": user, "docker_password": password, "no_https": arguments.no_https}
    repository = Repository(Reference("docker", host=host, name="", digest=""), settings_from(options, environ))
    if not repository.lets_in():
        raise RegistryError("login-refused", f"{host} refuses {user} with this password")
    store(str(arguments.authfile or "") or own_file(environ), host, Credentials(user, password))
    messages.info(f"Logged in to {host} as {user}")
    return 0
