# SPDX-License-Identifier: Apache-2.0
"""Dockerfile → values, with file, line and column for everything that is wrong. No input or output.

What the lines mean for an image is `build.dockerfile`; variables and quotes are `dockerwords`. The rules are those of
the Dockerfile reference: directives (`# escape=`, `# syntax=`) stand at the very top; a comment begins a line; an
escape sign at a line's end joins the next, over comments and empty lines; a word `<<NAME` of RUN, COPY or ADD takes the
following lines up to NAME.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field

from pysingularity.errors import RecipeError
from pysingularity.recipe.dockerwords import raw_words

LARGEST = 16 << 20
#: Instruction → the options that it takes.
INSTRUCTIONS: dict[str, tuple[str, ...]] = {
    "FROM": ("platform",),
    "RUN": ("mount", "network", "security"),
    "CMD": (),
    "LABEL": (),
    "MAINTAINER": (),
    "EXPOSE": (),
    "ENV": (),
    "ADD": ("chown", "chmod", "link", "checksum", "exclude", "unpack", "keep-git-dir"),
    "COPY": ("from", "chown", "chmod", "link", "parents", "exclude"),
    "ENTRYPOINT": (),
    "VOLUME": (),
    "USER": (),
    "WORKDIR": (),
    "ARG": (),
    "ONBUILD": (),
    "STOPSIGNAL": (),
    "HEALTHCHECK": ("interval", "timeout", "start-period", "start-interval", "retries"),
    "SHELL": (),
}
#: Options that may be given without a value.
SWITCHES = ("link", "parents", "unpack", "keep-git-dir")
WITH_HEREDOCS = ("RUN", "COPY", "ADD")
NOT_IN_ONBUILD = ("ONBUILD", "FROM", "MAINTAINER")
_DIRECTIVE = re.compile(r"#[ \t]*([A-Za-z][A-Za-z0-9]*)[ \t]*=[ \t]*(.+?)[ \t]*\Z")
_HEREDOC = re.compile(r"(\d*)<<(-?)([^<]+)\Z")
_STAGE = re.compile(r"[a-z][a-z0-9_.-]*\Z")
#: Instructions people invent, and what they mean by them.
_MEANT = {"INCLUDE": "COPY", "EXEC": "RUN", "EXPORT": "ENV", "SET": "ENV", "CD": "WORKDIR", "IMPORT": "FROM"}


@dataclass(frozen=True)
class Heredoc:
    """Lines that belong to an instruction.

    Arguments:
        name: the word that ends them.
        content: the lines, each with its line feed.
        expand: variables are put in (for COPY and ADD): the name was not quoted.
    """

    name: str
    content: str
    expand: bool = True


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Arguments:
        name: in capital letters.
        text: what stands behind the name and the options, continued lines joined.
        flags: names and values of its options, in order; a switch without a value has "true".
        heredocs: its here-documents.
        line: where it begins, from 1.
        source: that line as written.
    """

    name: str
    text: str
    flags: tuple[tuple[str, str], ...] = ()
    heredocs: tuple[Heredoc, ...] = ()
    line: int = field(default=0, compare=False)
    source: str = field(default="", compare=False)

    def flag(self, name: str) -> str:
        """Return the last value of an option, or ""."""
        return next((value for key, value in reversed(self.flags) if key == name), "")

    def has(self, name: str) -> bool:
        """Return whether a switch is on."""
        return self.flag(name).lower() not in ("", "false", "0")

    def all(self, name: str) -> list[str]:
        """Return the values of an option that may be repeated."""
        return [value for key, value in self.flags if key == name]

    @property
    def listed(self) -> list[str] | None:
        """The words of the exec form `["a", "b"]`, or None."""
        if self.text[:1] != "[":
            return None
        try:
            found = json.loads(self.text)
        except (ValueError, RecursionError):
            return None
        if not isinstance(found, list) or not all(isinstance(word, str) for word in found):
            return None
        return found

    def written(self) -> str:
        """Return the instruction as one text: hashed, and kept as a trigger of ONBUILD."""
        head = " ".join([self.name, *(f"--{key}={value}" for key, value in self.flags), self.text])
        return head + "".join(f"\n{one.content}{one.name}" for one in self.heredocs)

    def wrong(self, message: str, file: str, *, word: str = "", hint: str = "", id: str = "dockerfile") -> RecipeError:  # noqa: A002
        """Return an error that points at this instruction, at `word` when it stands on its first line."""
        at = self.source.find(word) if word else -1
        column = at + 1 if at >= 0 else len(self.source) - len(self.source.lstrip()) + 1
        return RecipeError(id, message, file=file, line=self.line, column=column, text=self.source, hint=hint)


@dataclass(frozen=True)
class DockerStage:
    """A FROM and what follows it.

    Arguments:
        base: the image as written, variables and all.
        platform: value of --platform, as written.
        name: behind AS, in small letters, or "".
        start: the FROM.
        instructions: the rest.
    """

    base: str
    platform: str
    name: str
    start: Instruction
    instructions: tuple[Instruction, ...] = ()


@dataclass(frozen=True)
class Dockerfile:
    """A Dockerfile.

    Arguments:
        stages: in order.
        arguments: the ARG instructions above the first FROM.
        escape: the escape sign.
        file: its name for messages.
        text: the whole.
        remarks: what the person may want to mend.
    """

    stages: tuple[DockerStage, ...]
    arguments: tuple[Instruction, ...] = ()
    escape: str = "\\"
    file: str = field(default="", compare=False)
    text: str = field(default="", compare=False)
    remarks: tuple[str, ...] = field(default=(), compare=False)


def looks_like(text: str, name: str = "") -> bool:
    """Return whether a file is a Dockerfile: by its first line that says something, then by its name."""
    for line in text.split("\n"):
        words = line.strip().split(None, 1)
        if not words or words[0][0] == "#":
            continue
        if ":" in words[0] or (len(words) > 1 and words[1][:1] == ":"):  # `Bootstrap: docker`, `From: x`
            return False
        if words[0].upper() in ("FROM", "ARG"):
            return True
        break
    base = name.rpartition("/")[2].lower()
    return base.startswith(("dockerfile", "containerfile")) or base.endswith((".dockerfile", ".containerfile"))


def parse(data: bytes | str, file: str = "") -> Dockerfile:
    """Read a Dockerfile.

    Raises:
        RecipeError: with the place.
    """
    if len(data) > LARGEST:
        raise RecipeError("too-large", f"no Dockerfile has more than {LARGEST >> 20} MiB", file=file)
    text = data.decode("utf-8", "surrogateescape") if isinstance(data, bytes) else data
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise RecipeError("not-text", "this is not a text file", file=file, line=line, hint="is it an image?")
    reader = _Reader(text.removeprefix("\ufeff"), file)
    return _stages(reader)


class _Reader:
    """Instructions of a file, one after the other."""

    def __init__(self, text: str, file: str, first: int = 1) -> None:
        self.text, self.file, self.first = text, file, first
        self.lines = [line.removesuffix("\r") for line in text.split("\n")]
        self.at = 0
        self.escape = "\\"
        self.remarks: list[str] = []

    def fail(self, number: int, message: str, *, word: str = "", hint: str = "", id: str = "dockerfile") -> RecipeError:  # noqa: A002
        """Return an error for line `number` (from 0)."""
        source = self.lines[number]
        return Instruction("", "", line=number + self.first, source=source).wrong(
            message, self.file, word=word, hint=hint, id=id
        )

    def directives(self) -> None:
        """Read the directives at the top."""
        seen: set[str] = set()
        for number, line in enumerate(self.lines):
            match = _DIRECTIVE.match(line.strip())
            if match is None or match[1].lower() not in ("syntax", "escape", "check"):
                return
            key, value = match[1].lower(), match[2]
            if key in seen:
                raise self.fail(number, f"the directive {key} stands here twice")
            seen.add(key)
            if key == "escape":
                if value not in ("\\", "`"):
                    raise self.fail(number, f"escape={value}: the escape sign is \\ or `", word=value)
                self.escape = value
            elif key == "syntax":
                name = value.split("@")[0].removeprefix("docker.io/")
                if not name.startswith(("docker/dockerfile:", "docker/dockerfile-upstream:")) and name not in (
                    "docker/dockerfile",
                    "docker/dockerfile-upstream",
                ):
                    raise self.fail(
                        number,
                        f"syntax={value}: this file is written in another language than Dockerfile",
                        word=value,
                        id="other-syntax",
                        hint="only docker/dockerfile is understood here",
                    )

    def next(self) -> Instruction | None:
        """Return the next instruction, or None at the end."""
        while self.at < len(self.lines):
            line = self.lines[self.at].strip()
            if line and line[0] != "#":
                return self._instruction()
            self.at += 1
        return None

    def _continues(self, line: str) -> str | None:
        """Return a line without the escape sign at its end, None when it is the last one."""
        cut = line.rstrip(" \t")
        if cut.endswith(self.escape) and not cut.endswith(self.escape * 2):
            return cut[:-1]
        return None

    def _instruction(self) -> Instruction:
        start = self.at
        line = self.lines[start].lstrip()
        self.at += 1
        joined = ""
        while (part := self._continues(line)) is not None:
            joined += part
            line = ""
            while self.at < len(self.lines):
                following = self.lines[self.at]
                self.at += 1
                if following.strip() and following.lstrip()[0] != "#":
                    line = following
                    break
            else:
                break
        joined = (joined + line).strip()
        name, _, rest = (joined.split(None, 1)[0], "", joined[len(joined.split(None, 1)[0]) :].strip())
        word, name = name, name.upper()
        if name not in INSTRUCTIONS:
            raise self.fail(
                start, f'"{word}" is no instruction', word=word, hint=_guess(name), id="unknown-instruction"
            )
        flags, rest = self._flags(name, rest, start)
        if not rest:
            raise self.fail(start, f"{name} needs something behind it", word=word)
        heredocs: tuple[Heredoc, ...] = ()
        inner = rest.split(None, 1)[0].upper() if name == "ONBUILD" else name
        if inner in WITH_HEREDOCS:
            heredocs = tuple(self._heredocs(rest))
        return Instruction(name, rest, flags, heredocs, start + self.first, self.lines[start])

    def _flags(self, name: str, rest: str, start: int) -> tuple[tuple[tuple[str, str], ...], str]:
        """Take the options off the front of an instruction's text."""
        found: list[tuple[str, str]] = []
        while rest.startswith("--"):
            word = raw_words(rest, self.escape)[0]
            at = len(word)
            if word == "--":
                return tuple(found), rest[at:].strip()
            key, equals, value = word[2:].partition("=")
            if key not in INSTRUCTIONS[name]:
                if not INSTRUCTIONS[name]:  # CMD --help is no option of CMD
                    break
                known = ", ".join(f"--{one}" for one in INSTRUCTIONS[name])
                near = _near(key, INSTRUCTIONS[name])
                raise self.fail(
                    start,
                    f"{name} has no option --{key}",
                    word=word,
                    hint=f"did you mean --{near}?" if near else f"options of {name}: {known}",
                    id="unknown-option",
                )
            if not equals and key not in SWITCHES:
                raise self.fail(start, f"--{key} needs a value: --{key}=VALUE", word=word)
            if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
                value = value[1:-1]
            found.append((key, value if equals else "true"))
            rest = rest[at:].strip()
        return tuple(found), rest

    def _heredocs(self, text: str) -> list[Heredoc]:
        found = []
        for word in raw_words(text, self.escape):
            match = _HEREDOC.match(word)
            if match is None:
                continue
            name = match[3]
            quoted = len(name) > 1 and name[0] == name[-1] and name[0] in "'\""
            name = name[1:-1] if quoted else name
            if not name or any(sign in name for sign in "'\"(") or name.isspace():
                continue
            begun = self.at - 1
            lines = []
            while True:
                if self.at >= len(self.lines):
                    raise self.fail(
                        begun,
                        f"the here-document <<{name} is never ended",
                        word=word,
                        hint=f"write a line that says {name} and nothing else behind it",
                        id="heredoc",
                    )
                line = self.lines[self.at]
                self.at += 1
                line = line.lstrip("\t") if match[2] else line
                if line == name:
                    break
                lines.append(line + "\n")
            found.append(Heredoc(name, "".join(lines), not quoted))
        return found


def _stages(reader: _Reader) -> Dockerfile:
    reader.directives()
    before: list[Instruction] = []
    heads: list[tuple[Instruction, str, str, str]] = []
    bodies: list[list[Instruction]] = []
    while (one := reader.next()) is not None:
        if one.name == "FROM":
            heads.append((one, *_from(one, reader.file)))
            bodies.append([])
        elif bodies:
            _check(one, reader)
            bodies[-1].append(one)
        elif one.name == "ARG":
            before.append(one)
        else:
            raise one.wrong(
                f"{one.name} stands before the first FROM",
                reader.file,
                hint="a Dockerfile begins with FROM IMAGE; only ARG may stand above it",
                id="before-from",
            )
    if not heads:
        raise RecipeError(
            "no-stages",
            "there is no FROM in this file" if reader.text.strip() else "this file is empty",
            file=reader.file,
            hint="a Dockerfile begins with a line such as: FROM debian:12",
        )
    stages = tuple(
        DockerStage(base, platform, name, start, tuple(body))
        for (start, base, platform, name), body in zip(heads, bodies, strict=True)
    )
    return Dockerfile(stages, tuple(before), reader.escape, reader.file, reader.text, tuple(reader.remarks))


def _from(one: Instruction, file: str) -> tuple[str, str, str]:
    words = one.text.split()
    if len(words) == 3 and words[1].upper() == "AS":
        name = words[2].lower()
        if not _STAGE.match(name):
            hint = "letters, digits, - _ and ., a letter first"
            raise one.wrong(f"{words[2]}: a stage cannot be called so", file, word=words[2], hint=hint)
        return words[0], one.flag("platform"), name
    if len(words) != 1:
        hint = "write: FROM IMAGE, or FROM IMAGE AS NAME"
        raise one.wrong(f"FROM takes an image, and this has {len(words)} words", file, word=one.text, hint=hint)
    return words[0], one.flag("platform"), ""


def _check(one: Instruction, reader: _Reader) -> None:
    """Refuse what can be seen to be wrong without knowing any value."""
    if one.name in ("CMD", "ENTRYPOINT", "RUN") and one.text[0] == "[" and one.listed is None:
        if one.text.endswith("]"):
            reader.remarks.append(
                f"{reader.file}:{one.line}: this looks like a JSON list and is none (double quotes, no comma at the"
                f" end), so a shell gets it: {one.source.strip()}"
            )
    elif one.name == "SHELL" and not one.listed:
        raise one.wrong('SHELL takes a list: SHELL ["/bin/bash", "-c"]', reader.file)
    elif one.name in ("COPY", "ADD"):
        words = one.listed or raw_words(one.text, reader.escape)
        if len(words) < 2:
            raise one.wrong(f"{one.name} needs a source and a target", reader.file, hint=f"write: {one.name} SRC DST")
    elif one.name == "ONBUILD":
        trigger(one, reader.file, reader.escape)


def trigger(one: Instruction, file: str, escape: str = "\\") -> Instruction:
    """Return the instruction inside an ONBUILD.

    Raises:
        RecipeError: there is none that may stand there.
    """
    text = one.text + "".join(f"\n{doc.content}{doc.name}" for doc in one.heredocs)
    reader = _Reader(text, file, one.line)
    reader.escape = escape
    inner = reader.next()
    if inner is None or inner.name in NOT_IN_ONBUILD:
        word = one.text.split()[0]
        raise one.wrong(f"ONBUILD cannot hold {word.upper()}", file, word=word)
    return inner


def _near(word: str, known: tuple[str, ...]) -> str:
    from difflib import get_close_matches  # only when something is wrong

    return next(iter(get_close_matches(word, known, n=1, cutoff=0.6)), "")


def _guess(name: str) -> str:
    near = _MEANT.get(name) or _near(name, tuple(INSTRUCTIONS))
    if near:
        return f"did you mean {near}?"
    if name.endswith(("&&", ";", "\\")) or "/" in name or "=" in name:
        return "does the line above lack a \\ at its end?"
    return "instructions: " + ", ".join(INSTRUCTIONS)
