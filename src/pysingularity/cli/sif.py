# SPDX-License-Identifier: Apache-2.0
"""`singularity sif`: look into a SIF file and change it, object by object. Each sub-command has its own file."""

from __future__ import annotations

HELP = """\
A SIF file holds the definition file, metadata, signatures and file systems of an image as numbered objects.

    singularity sif list image.sif
    singularity sif dump 1 image.sif
"""
SUBCOMMANDS: dict[str, tuple[str, str, str]] = {
    "list": ("sif_list", "Look", "List the objects"),
    "header": ("sif_header", "Look", "Show the global header"),
    "info": ("sif_info", "Look", "Show everything about one object"),
    "dump": ("sif_dump", "Look", "Write the bytes of an object to standard output"),
    "new": ("sif_new", "Change", "Create a SIF file without objects"),
    "add": ("sif_add", "Change", "Add an object"),
    "del": ("sif_del", "Change", "Delete an object"),
    "setprim": ("sif_setprim", "Change", "Choose the primary system partition"),
}
