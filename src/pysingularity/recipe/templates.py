# SPDX-License-Identifier: Apache-2.0
"""Template values in a definition file: `{{ NAME }}` from --build-arg, a file of them, or a %arguments section.

The rules are those that files in the wild were written for: a template counts anywhere in the text, also in the header;
a value may itself contain templates, once; a template behind a comment sign on its line is left alone (the sign must
be followed by something other than an exclamation mark, so `#{{ X }}` and `#!{{ X }}` are templates).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from pysingularity.errors import RecipeError, UserError

_TEMPLATE = re.compile(r"\{\{[ \t\r\n\f]*([0-9A-Za-z_]+)[ \t\r\n\f]*\}\}")
_COMMENT = re.compile(r"#[^!]")


def pair(text: str) -> tuple[str, str] | None:
    """Return name and value of `NAME=VALUE`, both without blanks around them, or None when it is no such thing."""
    name, equals, value = text.partition("=")
    name = name.strip()
    return (name, value.strip()) if equals and name else None


def from_options(words: list[str], file: str = "") -> dict[str, str]:
    """Return build arguments of the command line; they win over those of a file.

    Arguments:
        words: values of --build-arg.
        file: path of --build-arg-file, or "".

    Raises:
        UserError: a word or line is not NAME=VALUE, or the file cannot be read.
    """
    found: dict[str, str] = {}
    if file:
        try:
            with open(file, encoding="utf-8", errors="surrogateescape") as stream:
                lines = stream.read().splitlines()
        except OSError as error:
            raise UserError("build-arg-file", f"{file}: the file of build arguments cannot be read: {error.strerror}")
        for number, line in enumerate(lines, 1):
            if not line.strip() or line.lstrip().startswith("#"):
                continue
            entry = pair(line)
            if entry is None:
                raise RecipeError(
                    "build-arg", "a build argument is NAME=VALUE", file=file, line=number, column=1, text=line
                )
            found[entry[0]] = entry[1]
    for word in words:
        entry = pair(word)
        if entry is None:
            raise UserError("build-arg", f"--build-arg {word}: a build argument is NAME=VALUE")
        found[entry[0]] = entry[1]
    return found


class Filled:
    """Text with its templates replaced, and where each of its lines came from.

    Arguments:
        text: the result.
        lines: for each line of the result, the number of its line in the file.
        used: names of the values that were put in.
    """

    __slots__ = ("lines", "text", "used")

    def __init__(self, text: str, lines: list[int], used: set[str]) -> None:
        self.text, self.lines, self.used = text, lines, used


def plain(text: str, first: int) -> Filled:
    """Return text whose templates are left alone; `first` is the number of its first line."""
    return Filled(text, list(range(first, first + text.count("\n") + 1)), set())


def fill(text: str, given: Mapping[str, str], defaults: Mapping[str, str], *, file: str, first: int) -> Filled:
    """Return `text` with every template replaced by its value.

    Arguments:
        text: one stage.
        given: values of the command line.
        defaults: values of the stage's %arguments; `given` wins.
        file: name for messages.
        first: number of the text's first line in the file.

    Raises:
        RecipeError: a template has no value.
    """
    pieces: list[str] = []
    lines = [first]
    used: set[str] = set()
    at, line = 0, first
    for match in _TEMPLATE.finditer(text):
        start = match.start()
        begin = max(text.rfind("\n", 0, start) + 1, at)
        if _COMMENT.search(text, begin, start):
            continue
        name = match[1]
        before = text[at:start]
        pieces.append(before)
        for _ in range(before.count("\n")):
            line += 1
            lines.append(line)
        value = given.get(name, defaults.get(name))
        if value is None:
            raise _undefined(text, match, {**defaults, **given}, file, line)

        def inner(found: re.Match[str]) -> str:
            return given.get(found[1], defaults.get(found[1], found[0]))

        value = _TEMPLATE.sub(inner, value)
        pieces.append(value)
        lines += [line] * value.count("\n")
        line += match[0].count("\n")
        used.add(name)
        at = match.end()
    rest = text[at:]
    pieces.append(rest)
    for _ in range(rest.count("\n")):
        line += 1
        lines.append(line)
    return Filled("".join(pieces), lines, used)


def _undefined(text: str, match: re.Match[str], known: Mapping[str, str], file: str, line: int) -> RecipeError:
    """Return the error for a template without a value."""
    from difflib import get_close_matches  # only when something is wrong

    name = match[1]
    begin = text.rfind("\n", 0, match.start()) + 1
    end = text.find("\n", match.start())
    near = get_close_matches(name, list(known), n=1)
    hint = f"give it: --build-arg {name}=VALUE, or a line {name}=VALUE in %arguments"
    return RecipeError(
        "template-undefined",
        f"{{{{ {name} }}}} has no value",
        file=file,
        line=line,
        column=match.start() - begin + 1,
        text=text[begin : end if end >= 0 else len(text)],
        hint=f"did you mean {{{{ {near[0]} }}}}? Otherwise {hint}" if near else hint,
    )
