# SPDX-License-Identifier: Apache-2.0
"""Recipe → definition file: what is written here, the parser reads back equal."""

from __future__ import annotations

from pysingularity.errors import InternalError
from pysingularity.recipe.model import KEYWORDS, Recipe, Section, Stage


def write(recipe: Recipe) -> str:
    """Return a recipe as the text of a definition file.

    Raises:
        InternalError: the recipe holds something that the language cannot say (a comment sign in a header value, a body
            with a line that would start a section or a stage).
    """
    return "".join(_stage(stage) for stage in recipe.stages)


def _stage(stage: Stage) -> str:
    lines = []
    # The text is cut into stages before every Bootstrap: line, so that line comes first.
    for key in sorted(stage.header, key=lambda name: name != "bootstrap"):
        value = stage.header[key]
        parts = value.split("\n")
        hidden = any(
            part != part.lstrip() or part[:1] == "%" or part[:10].lower() == "bootstrap:" for part in parts[1:]
        )
        if hidden or "#" in value or "\r" in value or value.endswith("\\") or value != value.strip():
            raise InternalError("unwritable", f"{key}: a header cannot hold the value {value!r}")
        lines.append(f"{_spelling(key)}: " + value.replace("\n", "\\n\\\n"))
    return "".join(line.rstrip() + "\n" for line in lines) + "".join(_section(section) for section in stage.sections)


def _spelling(key: str) -> str:
    bare = key.rstrip("0123456789")
    return KEYWORDS.get(key) or KEYWORDS[bare + "#"].replace("#", key[len(bare) :])


def _section(section: Section) -> str:
    for line in section.body.split("\n"):
        if line.lstrip()[:1] == "%" or line[:10].lower() == "bootstrap:" or "\r" in line:
            raise InternalError("unwritable", f"%{section.name}: a body cannot hold the line {line!r}")
    if section.body and not section.body.endswith("\n"):
        raise InternalError("unwritable", f"%{section.name}: the last line of a body needs a line feed")
    head = f"%{section.name} {section.arguments}" if section.arguments else f"%{section.name}"
    return f"{head}\n{section.body}"
