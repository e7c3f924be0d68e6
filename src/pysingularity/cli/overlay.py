# SPDX-License-Identifier: Apache-2.0
"""`singularity overlay`: file systems that keep the changes made in containers of a read-only image."""

from __future__ import annotations

HELP = """\
A folder given to --overlay does the same and needs no program; an ext3 file system is one file, which a network file
system handles better, and can travel inside a SIF file.
"""
SUBCOMMANDS: dict[str, tuple[str, str, str]] = {
    "create": ("overlay_create", "Images", "Create an ext3 file system for changes, in a file or in a SIF file"),
}
