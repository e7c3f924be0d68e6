# SPDX-License-Identifier: Apache-2.0
"""Definition file → Recipe, with file, line and column for everything that is wrong. No input or output.

The language is the one that files written since Singularity 2 rely on, oddities included:

- The text is cut into stages before every line that begins, in its first column, with `bootstrap:` in any case.
- A stage is a header of `Keyword: value` lines, then sections. A line whose first word begins with a percent sign
  starts a section, also inside a here-document; the section's name ends at the first blank (a tab does not end it).
- In a header a comment sign cuts the line, wherever it stands; a backslash at the end joins the next line, and a
  backslash-n before it keeps the line break.
- Bodies are verbatim, except that CR LF line ends become LF. Sections of one name add up.
- A missing `Bootstrap:` is no error of the language: `recipe.check` refuses it before a build.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise

from pysingularity.errors import RecipeError
from pysingularity.recipe import templates
from pysingularity.recipe.model import APP_SECTIONS, KEYWORDS, SECTIONS, Recipe, Section, Stage

#: A definition file above this size is refused unread: no person writes one, and reading must stay bounded.
LARGEST = 16 << 20

_STAGE = re.compile(r"^bootstrap:", re.IGNORECASE | re.MULTILINE)
_NUMBER = re.compile(r"[0-9]+$")
#: Sections people invent, and what they mean by them.
_MEANT = {
    "install": "post",
    "run": "runscript",
    "exec": "runscript",
    "cmd": "runscript",
    "entrypoint": "runscript",
    "env": "environment",
    "export": "environment",
    "configure": "post",
    "build": "post",
    "clean": "post",
    "cleanup": "post",
    "check": "test",
    "copy": "files",
    "file": "files",
    "start": "startscript",
    "args": "arguments",
    "label": "labels",
}


def parse(text: bytes | str, file: str = "", arguments: Mapping[str, str] | None = None) -> Recipe:
    """Read a definition file.

    Arguments:
        text: the whole file; bytes are UTF-8, and what is not survives unchanged.
        file: name for messages.
        arguments: values for templates; None leaves `{{ NAME }}` as it stands.

    Raises:
        RecipeError: with the place; the ids are "not-text", "too-large", "no-stages", "header-line",
            "unknown-keyword", "unknown-section", "app-name", "template-undefined".
    """
    if len(text) > LARGEST:
        raise RecipeError("too-large", f"no definition file has more than {LARGEST >> 20} MiB", file=file)
    if isinstance(text, bytes):
        text = text.decode("utf-8", "surrogateescape")
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise RecipeError("not-text", "this is not a text file", file=file, line=line, hint="is it an image?")
    text = text.removeprefix("\ufeff")
    stages: list[Stage] = []
    filled: list[str] = []
    used: set[str] = set()
    remarks: list[str] = []
    cuts = sorted({0, len(text), *(match.start() for match in _STAGE.finditer(text))})
    for start, end in pairwise(cuts):
        piece, first = text[start:end], text.count("\n", 0, start) + 1
        if arguments is None:
            content = templates.plain(piece, first)
        else:
            content = templates.fill(piece, arguments, _defaults(piece, file, first, remarks), file=file, first=first)
        used |= content.used
        filled.append(content.text)
        stage = _stage(content, file)
        if stage.header or stage.sections:
            stages.append(stage)
    if not stages:
        raise RecipeError(
            "no-stages",
            "there is nothing to build in this file" if text.strip() else "this file is empty",
            file=file,
            hint="a definition file begins with a line such as: Bootstrap: docker",
        )
    unused = tuple(name for name in arguments or () if name not in used and not _nested(name, stages))
    return Recipe(stages, file, "".join(filled), unused, tuple(remarks))


def _nested(name: str, stages: list[Stage]) -> bool:
    """Return whether a value is used by the default of another one, in a line of %arguments."""
    wanted = re.compile(r"\{\{\s*" + re.escape(name) + r"\s*\}\}")
    return any(wanted.search(stage.body("arguments")) for stage in stages)


def _lines(text: str) -> list[str]:
    """Split at line feeds and drop a carriage return before each; no empty line behind the last line feed."""
    lines = text.split("\n")
    if lines[-1] == "":
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


def _starts_section(line: str) -> bool:
    return line.lstrip()[:1] == "%"


def _defaults(text: str, file: str, first: int, remarks: list[str]) -> dict[str, str]:
    """Return the values of a stage's %arguments sections.

    Read before templates are filled and before anything else is checked: the values may be needed in the header.
    """
    found: dict[str, str] = {}
    inside = False
    for number, line in enumerate(_lines(text), first):
        if _starts_section(line):
            inside = _name(line)[0] == "arguments"
        elif inside and line.strip() and not line.lstrip().startswith("#"):
            entry = templates.pair(line)
            if entry is None:
                remarks.append(f"{file}:{number}: skipped, a line of %arguments is NAME=VALUE: {line.strip()}")
                continue
            found[entry[0]] = entry[1]
    return found


def _name(line: str) -> tuple[str, str]:
    """Return name and arguments of a line that starts a section."""
    name, _, arguments = line.strip("\r\n").lstrip().lstrip("%").partition(" ")
    return name.lower(), arguments


def _stage(content: templates.Filled, file: str) -> Stage:
    lines = _lines(content.text)
    head = next((at for at, line in enumerate(lines) if _starts_section(line)), len(lines))
    header, places = _header(lines[:head], content.lines, file)
    sections = []
    at = head
    while at < len(lines):
        end = at + 1
        while end < len(lines) and not _starts_section(lines[end]):
            end += 1
        body = "".join(line + "\n" for line in lines[at + 1 : end])
        sections.append(_section(lines[at], body, content.lines[at], file))
        at = end
    return Stage(header, sections, content.lines[0], places)


def _header(lines: list[str], numbers: list[int], file: str) -> tuple[dict[str, str], dict[str, int]]:
    """Return keyword → value and keyword → line."""
    header: dict[str, str] = {}
    places: dict[str, int] = {}
    pending = joined = ""
    for line, number in zip(lines, numbers, strict=False):
        stripped = line.strip()
        if not stripped or stripped[0] == "#":
            if pending:  # a continuation that nothing follows
                header[pending], pending, joined = joined.strip(), "", ""
            continue
        content = stripped.split("#")[0]
        if joined:
            key, value = pending, joined + content.strip()
        else:
            key, colon, value = content.partition(":")
            if not colon:
                raise _not_a_header(line, number, file)
            key, value = key.strip().lower(), value.strip()
            _check_keyword(key, line, number, file)
            places[key] = number
        pending = joined = ""
        if value.endswith("\\"):
            joined, pending = value[:-1], key
            if joined.endswith("\\n"):
                joined = joined[:-2] + "\n"
            continue
        header[key] = value
    if pending:
        header[pending] = joined.strip()
    return header, places


def _check_keyword(key: str, line: str, number: int, file: str) -> None:
    if key in KEYWORDS and not key.endswith("#"):
        return
    if _NUMBER.search(key) and _NUMBER.sub("#", key) in KEYWORDS:
        return
    from difflib import get_close_matches  # only when something is wrong

    word = line.strip().split(":")[0].strip()
    near = get_close_matches(key, list(KEYWORDS), n=1, cutoff=0.7)
    if near:
        hint = f"did you mean {KEYWORDS[near[0]]}?"
    elif key in ("name", "version", "author", "maintainer", "description", "license"):
        hint = f"put it into a %labels section: {word} VALUE"
    else:
        hint = "keywords: " + ", ".join(name for name in KEYWORDS.values() if name[0] != "#")
    raise RecipeError(
        "unknown-keyword",
        f'"{word}" is no keyword of a header',
        file=file,
        line=number,
        column=line.index(line.strip()) + 1,
        text=line,
        hint=hint,
    )


def _not_a_header(line: str, number: int, file: str) -> RecipeError:
    """Return the error for a header line without a colon."""
    word = line.split("#")[0].split()[0] if line.split("#")[0].split() else line.strip()
    hint = "a script belongs below a section line such as %post"
    message = "a header line is KEYWORD: VALUE, and this one has no colon"
    if line.lstrip()[:1] == "<":
        message, hint = "this looks like a saved web page, not a definition file", "download the file itself (raw)"
    elif word.lower() in ("disttype", "mirrorurl", "osversion", "include", "setup", "bootstrap", "from"):
        key = "Bootstrap" if word.lower() == "disttype" else word
        hint = f"did you mean {key}: {line.strip()[len(word) :].strip().strip(chr(34))}?"
    return RecipeError(
        "header-line", message, file=file, line=number, column=line.index(line.strip()) + 1, text=line, hint=hint
    )


def _section(line: str, body: str, number: int, file: str) -> Section:
    name, arguments = _name(line)
    column = len(line) - len(line.lstrip()) + 1
    if name in APP_SECTIONS:
        if not arguments.split():
            raise RecipeError(
                "app-name",
                f"%{name} needs the name of its app",
                file=file,
                line=number,
                column=column,
                text=line,
                hint=f"write: %{name} NAME",
            )
        app = arguments.split()[0]
        if "/" in app or app in (".", ".."):
            raise RecipeError(
                "app-name", f'"{app}" cannot name an app', file=file, line=number, column=column, text=line
            )
        return Section(name, arguments, body, number)
    if name in SECTIONS:
        return Section(name, arguments, body, number)
    raise RecipeError(
        "unknown-section",
        f'"%{name}" is no section' if name else "a percent sign without a section's name",
        file=file,
        line=number,
        column=column,
        text=line,
        hint=_section_hint(name, line),
    )


def _section_hint(name: str, line: str) -> str:
    from difflib import get_close_matches  # only when something is wrong

    word = name.split("\t")[0] or (line.replace("%", " ").split() or [""])[0].lower()
    known = [*SECTIONS, *APP_SECTIONS]
    if word in known:
        return f"write %{word}, then a blank before any arguments"
    guess = _MEANT.get(word) or next(iter(get_close_matches(word, known, n=1, cutoff=0.6)), "")
    if guess:
        return f"did you mean %{guess}?"
    return "a line that begins with % starts a section, inside a script as well: put another character before it"
