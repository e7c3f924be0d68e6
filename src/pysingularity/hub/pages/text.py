# SPDX-License-Identifier: Apache-2.0
"""Text made readable, as HTML: terminal colours of build logs, and definition files with their parts marked.

What goes in is hostile; everything is escaped here, and only our own tags come out. Pure functions.
"""

from __future__ import annotations

import re
from html import escape

#: Select Graphic Rendition (ECMA-48, 8.3.117) is kept as classes, every other control sequence is dropped.
_SEQUENCE = re.compile(r"\x1b(?:\[([0-9;:?]*)[ -/]*([@-~])|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")
_NAMES = ("black", "red", "green", "yellow", "blue", "magenta", "cyan", "white")

_HEADER = re.compile(r"^(\s*)([A-Za-z][A-Za-z0-9]*)(\s*:)(.*)$")
_SECTION = re.compile(r"^(\s*)(%[A-Za-z]+)(.*)$")


def log_line(line: str, open_classes: tuple[str, ...] = ()) -> tuple[str, tuple[str, ...]]:
    """Return a log line as HTML, and the styles that go on in the next line.

    A carriage return inside a line means that what stood before was overwritten (progress bars): the last part is kept.
    """
    line = line.rstrip("\r\n").rpartition("\r")[2]
    styles, out, at = list(open_classes), [], 0

    def piece(text: str) -> None:
        text = escape(_CONTROL.sub("", text), quote=False)
        if text:
            out.append(f'<span class="{" ".join(styles)}">{text}</span>' if styles else text)

    for match in _SEQUENCE.finditer(line):
        piece(line[at : match.start()])
        at = match.end()
        if match.group(2) == "m":
            styles = _render(styles, match.group(1) or "0")
    piece(line[at:])
    return "".join(out), tuple(styles)


def _render(styles: list[str], codes: str) -> list[str]:
    numbers = [int(code) if code.isdigit() else 0 for code in codes.replace(":", ";").split(";")]
    at = 0
    while at < len(numbers):
        code = numbers[at]
        at += 1
        if code == 0:
            styles = []
        elif code in (1, 2, 3, 4):
            styles = [*styles, ("", "bold", "dim", "italic", "underline")[code]]
        elif code in (22, 23, 24):
            gone = {22: ("bold", "dim"), 23: ("italic",), 24: ("underline",)}[code]
            styles = [style for style in styles if style not in gone]
        elif 30 <= code <= 37 or 90 <= code <= 97:
            styles = [*_without(styles, "fg-"), "fg-" + _NAMES[code % 10]]
        elif 40 <= code <= 47 or 100 <= code <= 107:
            styles = [*_without(styles, "bg-"), "bg-" + _NAMES[code % 10]]
        elif code == 39:
            styles = _without(styles, "fg-")
        elif code == 49:
            styles = _without(styles, "bg-")
        elif code in (38, 48):  # 256 or true colours: the exact shade is not worth an inline style
            at += {5: 2, 2: 4}.get(numbers[at] if at < len(numbers) else 0, 1)
    return list(dict.fromkeys(styles))


def _without(styles: list[str], prefix: str) -> list[str]:
    return [style for style in styles if not style.startswith(prefix)]


def definition(text: str) -> list[str]:
    """Return the lines of a definition file as HTML with keywords, sections and comments marked."""
    lines = []
    in_section = False
    for line in text.splitlines():
        section = _SECTION.match(line)
        header = None if in_section else _HEADER.match(line)
        if section:
            in_section = True
            blank, name, rest = section.groups()
            lines.append(f'{blank}<span class="section">{escape(name)}</span>{escape(rest, quote=False)}')
        elif line.lstrip().startswith("#"):
            lines.append(f'<span class="comment">{escape(line, quote=False)}</span>')
        elif header:
            if header.group(2).lower() == "bootstrap":
                in_section = False
            blank, key, colon, value = header.groups()
            marked = f'<span class="keyword">{escape(key)}</span>'
            lines.append(f"{blank}{marked}{colon}{escape(value, quote=False)}")
        else:
            lines.append(escape(line, quote=False))
    return lines
