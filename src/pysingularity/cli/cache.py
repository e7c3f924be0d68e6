# SPDX-License-Identifier: Apache-2.0
"""`singularity cache`: what the cache holds, and making room."""

from __future__ import annotations

USAGE = "list|clean"
HELP = "List what the cache of images, layers and tags holds, and remove some or all of it."
#: Sub-commands; see `cli.commands`.
SUBCOMMANDS: dict[str, tuple[str, str, str]] = {
    "list": ("cache_list", "Manage", "List what the cache holds"),
    "clean": ("cache_clean", "Manage", "Remove entries of the cache, or all"),
}
