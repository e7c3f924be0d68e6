# SPDX-License-Identifier: Apache-2.0
"""`singularity registry`: names and passwords for registries."""

from __future__ import annotations

USAGE = "login|logout|list"
HELP = "Log in to and out of registries, and list where we are known."
#: Sub-commands; see `cli.commands`.
SUBCOMMANDS: dict[str, tuple[str, str, str]] = {
    "login": ("registry_login", "Manage", "Log in to a registry"),
    "logout": ("registry_logout", "Manage", "Forget name and password of a registry"),
    "list": ("registry_list", "Manage", "List the registries that we have a password for"),
}
