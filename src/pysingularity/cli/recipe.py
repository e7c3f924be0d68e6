# SPDX-License-Identifier: Apache-2.0
"""`singularity recipe`: definition files of images and sandboxes."""

from __future__ import annotations

SUBCOMMANDS: dict[str, tuple[str, str, str]] = {
    "show": ("recipe_show", "Recipes", "Show the definition file that an image was built from"),
    "check": ("recipe_check", "Recipes", "Read a definition file or Dockerfile and tell what is wrong with it"),
    "history": ("recipe_history", "Recipes", "Write what was done by hand in a sandbox as a definition file"),
}
