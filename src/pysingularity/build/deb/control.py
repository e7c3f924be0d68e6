# SPDX-License-Identifier: Apache-2.0
"""Control data: paragraphs of "Field: value" lines, and the relations (Depends, Conflicts, Provides …) inside them.

Sources: deb-control(5), deb822(5), Debian Policy chapter 7. Indexes of 60 000 paragraphs are not parsed here but cut in
`packages`, which asks for single paragraphs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

from pysingularity.errors import UserError

_RELATION = re.compile(
    r"([A-Za-z0-9][A-Za-z0-9+.-]*)(?::([a-z0-9-]+))?\s*"
    r"(?:\(\s*(<<|<=|=|>=|>>|<|>)\s*([^\s)]+)\s*\))?\s*(?:\[[^\]]*\])?\s*(?:<[^>]*>\s*)*"
)


class Relation(NamedTuple):
    """One package named in a relation; `arch` is "" when it has no qualifier, `relation` "" without a version."""

    name: str
    arch: str = ""
    relation: str = ""
    version: str = ""

    def __str__(self) -> str:
        name = f"{self.name}:{self.arch}" if self.arch else self.name
        return f"{name} ({self.relation} {self.version})" if self.relation else name


#: Alternatives, of which one is enough.
Group = tuple[Relation, ...]


def paragraph(text: str, what: str = "control data") -> dict[str, str]:
    """Read one paragraph; a folded value keeps its line breaks, each further line without its first blank.

    Raises:
        UserError: a line is neither a field nor a continuation.
    """
    fields: dict[str, str] = {}
    name = ""
    for line in text.split("\n"):
        if line[:1] in (" ", "\t"):
            if not name:
                raise UserError("bad-control", f"{what}: starts with a continued line")
            fields[name] += "\n" + line[1:].rstrip()
        elif line.strip() and line[0] != "#":
            name, colon, value = line.partition(":")
            if not colon or not name.strip():
                raise UserError("bad-control", f"{what}: no field: {line[:60]!r}")
            name = name.strip()
            fields[name] = value.strip()
    return fields


def paragraphs(text: str, what: str = "control data") -> Iterator[dict[str, str]]:
    """Read all paragraphs of a text; empty ones are passed over."""
    for block in re.split(r"\n[ \t\r]*\n+", text.replace("\r\n", "\n").strip("\n")):
        fields = paragraph(block, what)
        if fields:
            yield fields


@lru_cache(maxsize=1 << 14)
def relations(text: str) -> tuple[Group, ...]:
    """Read a relation field: groups that must all hold, each of alternatives.

    Raises:
        ValueError: the text is no such field.
    """
    groups: list[Group] = []
    for part in text.replace("\n", " ").split(","):
        if not part.strip():
            continue
        group = []
        for word in part.split("|"):
            match = _RELATION.fullmatch(word.strip())
            if match is None:
                raise ValueError(f"no relation: {word.strip()!r}")
            group.append(Relation(match[1], match[2] or "", match[3] or "", match[4] or ""))
        groups.append(tuple(group))
    return tuple(groups)


def single_relations(text: str) -> list[Relation]:
    """Read a relation field without alternatives (Provides, Conflicts, Breaks, Replaces)."""
    return [relation for group in relations(text) for relation in group]
