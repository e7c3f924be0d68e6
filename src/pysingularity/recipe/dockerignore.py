# SPDX-License-Identifier: Apache-2.0
"""`.dockerignore`: which files of a folder a build does not see. No input or output.

Patterns are relative to the folder; `*` and `?` stay within a name, `**` stands for any number of folders, a line that
begins with `!` brings files back, and the last line that matches decides. What matches a folder matches all below it.
Source: Docker documentation, "Build context", .dockerignore files.
"""

from __future__ import annotations

import re
from collections.abc import Iterable


class Ignore:
    """Patterns of a `.dockerignore`.

    Arguments:
        lines: the lines of the file.
    """

    def __init__(self, lines: Iterable[str] = ()) -> None:
        self._rules: list[tuple[bool, re.Pattern[str]]] = []
        for line in lines:
            text = line.strip()
            if not text or line.startswith("#"):
                continue
            back = text[0] == "!"
            text = clean(text[1:].strip() if back else text)
            if text:
                self._rules.append((back, re.compile(_regex(text) + r"(?:/.*)?\Z", re.DOTALL)))
        #: Whether anything is brought back: then excluded folders have to be looked through.
        self.brings_back = any(back for back, _ in self._rules)

    def __bool__(self) -> bool:
        return bool(self._rules)

    def excludes(self, path: str) -> bool:
        """Return whether a path (relative, without a leading slash) is left out."""
        hidden = False
        for back, pattern in self._rules:
            # A rule that would change nothing need not be tried.
            if back == hidden and pattern.match(path):
                hidden = not back
        return hidden


def clean(pattern: str) -> str:
    """Return a pattern without leading and doubled slashes, dots, and steps upwards; "" for the folder itself."""
    parts: list[str] = []
    for part in pattern.split("/"):
        if part == "..":
            if parts:
                parts.pop()
        elif part not in ("", "."):
            parts.append(part)
    return "/".join(parts)


def _regex(pattern: str) -> str:
    found = []
    at = 0
    while at < len(pattern):
        sign = pattern[at]
        at += 1
        if sign == "*" and pattern[at : at + 1] == "*":
            at += 1
            if pattern[at : at + 1] == "/":  # **/ also stands for no folder at all
                at += 1
                found.append("(?:.*/)?")
            else:
                found.append(".*")
        elif sign == "*":
            found.append("[^/]*")
        elif sign == "?":
            found.append("[^/]")
        elif sign == "\\" and at < len(pattern):
            found.append(re.escape(pattern[at]))
            at += 1
        elif sign == "[" and (end := pattern.find("]", at + 1)) > 0:
            found.append(_set(pattern[at:end]))
            at = end + 1
        else:
            found.append(re.escape(sign))
    return "".join(found)


def _set(inner: str) -> str:
    """Return the expression of what stands between brackets; a range that runs backwards holds nothing."""
    # Only ^ turns a set around here; an exclamation mark is a sign like others.
    turned, signs = inner[:1] == "^", list(inner.removeprefix("^"))
    found = []
    while signs:
        first = signs.pop(0)
        if len(signs) > 1 and signs[0] == "-":
            last = signs[1]
            del signs[:2]
            if first <= last:
                found.append(f"{re.escape(first)}-{re.escape(last)}")
        else:
            found.append(re.escape(first))
    if not found:
        return "[^/]" if turned else "(?!)"
    return f"(?!/)[{'^' if turned else ''}{''.join(found)}]"


def name_pattern(pattern: str) -> re.Pattern[str]:
    """Return the pattern of one name of a COPY source, for `fullmatch`; `*` matches hidden names too."""
    return re.compile(_regex(pattern), re.DOTALL)
