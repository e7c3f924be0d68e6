# SPDX-License-Identifier: Apache-2.0
"""Debian versions in dpkg's order: `key(version)` is a sort key, `satisfies` a versioned relation.

Source: deb-version(7). A version is [epoch:]upstream[-revision]; the two texts are compared in turns, a part without
digits (where ~ sorts before the end, the end before letters, letters before everything else) and a number.
"""

from __future__ import annotations

import re
from functools import lru_cache

_PAIRS = re.compile(r"([^0-9]*)([0-9]*)")
_VALID = re.compile(r"(?:([0-9]+):(?=.))?((?(1)[0-9A-Za-z.+~:-]|[0-9A-Za-z.+~-])*(?<!-))")

#: A part of the sort key: characters by their rank (0 closes a part) and numbers, in turns.
Part = tuple[tuple[int, ...] | int, ...]
Key = tuple[int, Part, Part]


def _rank(character: str) -> int:
    if character == "~":
        return -1
    return ord(character) if character.isalpha() else ord(character) + 256


@lru_cache(maxsize=1 << 16)
def _part(text: str) -> Part:
    found: list[tuple[int, ...] | int] = []
    for letters, digits in _PAIRS.findall(text)[: -1 if text else None]:
        found += (*map(_rank, letters), 0), int(digits or 0)
    # Where one text ends, the other's next part is compared with an empty one; then 1.0~ comes before 1.0.
    found.append((0,))
    return tuple(found)


@lru_cache(maxsize=1 << 16)
def key(version: str) -> Key:
    """Return a sort key: `key(a) < key(b)` exactly when dpkg calls a earlier than b.

    Raises:
        ValueError: the text is no version.
    """
    match = _VALID.fullmatch(version)
    if match is None or not version:
        raise ValueError(f"no Debian version: {version!r}")
    upstream, _, revision = match[2].rpartition("-") if "-" in match[2] else (match[2], "", "")
    return int(match[1] or 0), _part(upstream), _part(revision)


def satisfies(version: str, relation: str, wanted: str) -> bool:
    """Return whether `version` stands in a relation ("<<", "<=", "=", ">=", ">>", and dpkg's old "<", ">") to another.

    Raises:
        ValueError: one of the texts is no version, or the relation is unknown.
    """
    left, right = key(version), key(wanted)
    match relation:
        case ">=" | ">":  # the single signs always meant "or equal" (deb-control(5))
            return left >= right
        case "<=" | "<":
            return left <= right
        case "=":
            return left == right
        case ">>":
            return left > right
        case "<<":
            return left < right
    raise ValueError(f"unknown relation {relation!r}")
