# SPDX-License-Identifier: Apache-2.0
"""What the lines of a section say: pairs of %files, names and values of %labels, the command of %post -c.

Functions from text to values; doing what they say is `build`.
"""

from __future__ import annotations

from dataclasses import dataclass

from pysingularity.errors import RecipeError
from pysingularity.recipe.model import Recipe, Section, Stage


@dataclass(frozen=True)
class FilePair:
    """One line of %files.

    Arguments:
        source: path or pattern as written, without its quotes; `{{ }}` are already filled.
        target: place in the image; "" means the same path as the source.
        stage: name of the stage the source is taken from, or "" for the host.
        line: number of the line, for messages.
    """

    source: str
    target: str
    stage: str = ""
    line: int = 0


def file_pairs(stage: Stage, file: str, app: str = "", remarks: list[str] | None = None) -> list[FilePair]:
    """Return the pairs of all %files sections of a stage (or of an app's %appfiles), in order.

    Arguments:
        remarks: filled with lines on what was ignored.

    Raises:
        RecipeError: a quote that is not closed.
    """
    found = []
    remarks = [] if remarks is None else remarks
    for section in stage.all("appfiles" if app else "files", app):
        origin = "" if app else origin_of(section)
        if not app and section.arguments.strip() and not origin:
            said = section.arguments.strip()
            remarks.append(f"{file}:{section.line}: ignored, %files takes no arguments but: from STAGE: {said}")
        for number, line in enumerate(section.body.split("\n"), section.line + 1):
            text = line.strip()
            if not text or text[0] == "#":
                continue
            words = _words(text, file, number)
            # A remark behind the names is common in real files and was always dropped.
            words = words[
                : next((at for at, (word, quoted) in enumerate(words) if word[0:1] == "#" and not quoted), 99)
            ]
            if len(words) > 2:
                extra = " ".join(word for word, _ in words[2:])
                remarks.append(f'{file}:{number}: ignored, a line of %files has a source and a target: "{extra}"')
            target = words[1][0] if len(words) > 1 else ""
            found.append(FilePair(words[0][0], target, origin, number))
    return found


def origin_of(section: Section) -> str:
    """Return the stage of a `%files from STAGE`, "" for all other arguments, which never meant anything."""
    words = section.arguments.split()
    return words[1] if len(words) == 2 and words[0].lower() == "from" else ""


def _words(text: str, file: str, number: int) -> list[tuple[str, bool]]:
    """Split a line at blanks outside quotes; return words and whether each was quoted."""
    words: list[tuple[str, bool]] = []
    word, inside, quoted, quote = "", False, False, ""
    for char in text:
        if quote:
            if char == quote:
                quote = ""
            else:
                word += char
        elif char in "\"'" and not inside:  # an apostrophe inside a name is part of it
            quote, inside, quoted = char, True, True
        elif char in " \t":
            if inside:
                words.append((word, quoted))
            word, inside, quoted = "", False, False
        else:
            word += char
            inside = True
    if quote:
        raise RecipeError(
            "files-quote",
            f"the quote {quote} is never closed",
            file=file,
            line=number,
            column=text.rindex(quote) + 1,
            text=text,
        )
    if inside:
        words.append((word, quoted))
    return words


def labels(text: str) -> dict[str, str]:
    """Return the labels of a %labels or %applabels body: name, blank, value as written. The last line wins."""
    found: dict[str, str] = {}
    for line in text.split("\n"):
        line = line.strip()
        if line and line[0] != "#":
            words = line.split(None, 1)
            found[words[0]] = words[1].strip() if len(words) > 1 else ""
    return found


def shell_of(arguments: str) -> str:
    """Return the command line of `%post -c COMMAND...`, or "" when the section names none."""
    words = arguments.split(None, 1)
    return words[1].strip() if len(words) > 1 and words[0] == "-c" else ""


def interpreter(body: str, arguments: str) -> tuple[str, str]:
    """Return the first line and the rest of a script section that becomes a file.

    A first line of the body that names an interpreter counts; else it is /bin/sh with the section's arguments.
    """
    lines = body.split("\n", 1)
    if lines[0].strip().startswith("#!"):
        return lines[0].strip(), lines[1] if len(lines) > 1 else ""
    return f"#!/bin/sh {arguments}".rstrip(), body


def check(recipe: Recipe) -> None:
    """Refuse what the language admits and no build can follow.

    Raises:
        RecipeError: a stage without Bootstrap:, `%files from` a stage that is not above.
    """
    names: list[str] = []
    for stage in recipe.stages:
        if not stage.agent:
            raise RecipeError(
                "no-bootstrap",
                "the header does not say where to start from" if stage.header else "there is no header",
                file=recipe.file,
                line=stage.line,
                hint="begin the stage with a line such as: Bootstrap: docker (it must stand before the other keywords)",
            )
        for section in stage.all("files"):
            origin = origin_of(section)
            if origin and origin not in names:
                earlier = ", ".join(names) or "none; a stage is named by a header line Stage: NAME"
                raise RecipeError(
                    "unknown-stage",
                    f'there is no stage "{origin}" above this one',
                    file=recipe.file,
                    line=section.line,
                    column=1,
                    text=f"%files {section.arguments}",
                    hint=f"stages above: {earlier}",
                )
        if stage.name:
            names.append(stage.name)
