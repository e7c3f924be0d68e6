# SPDX-License-Identifier: Apache-2.0
"""Words of a Dockerfile: quotes, escapes and variables, as its builders understand them. No input or output.

Forms: $NAME, ${NAME}, ${NAME:-word} and ${NAME-word}, :+ and +, :? and ?, # ## % %% with a pattern, / and // with a
pattern and a replacement. `words` splits at blanks outside quotes, also those that an unquoted variable brings; `word`
never splits. Source: Dockerfile reference, "Environment replacement".
"""

from __future__ import annotations

import re
from collections.abc import Mapping

#: Parameters of shells that are one sign long; empty here.
_SPECIAL = "@*#?-$!"
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*|[0-9]+")


class WordError(ValueError):
    """A text that cannot be read; the message says why."""


class Lexer:
    """Reads words.

    Arguments:
        env: values of variables.
        escape: the escape sign of the file.

    Attributes:
        missing: names without a value that were asked for.
    """

    def __init__(self, env: Mapping[str, str], escape: str = "\\") -> None:
        self.env, self._escape = env, escape
        self.missing: set[str] = set()
        self._text, self._at = "", 0
        self._found: list[str] = []
        self._word: str | None = None

    def word(self, text: str) -> str:
        """Return a text with variables put in, and without its quotes.

        Raises:
            WordError: a quote or brace that is not closed, an unknown form, a variable that had to be set.
        """
        return self._read(text)[0]

    def words(self, text: str) -> list[str]:
        """Return the words of a text; raises as `word`."""
        return self._read(text)[1]

    def _read(self, text: str) -> tuple[str, list[str]]:
        self._text, self._at, self._found, self._word = text, 0, [], None
        whole = self._until("")
        self._split(" ")
        return whole, self._found

    def _raw(self, text: str) -> None:
        self._word = (self._word or "") + text

    def _split(self, text: str) -> None:
        for sign in text:
            if not sign.isspace():
                self._raw(sign)
            elif self._word is not None:
                self._found.append(self._word)
                self._word = None

    def _peek(self) -> str:
        return self._text[self._at : self._at + 1]

    def _next(self) -> str:
        sign = self._peek()
        self._at += 1
        return sign

    def _until(self, stop: str) -> str:
        """Read up to the sign `stop` (taken, not returned), or to the end when it is empty."""
        found: list[str] = []
        while sign := self._peek():
            if sign == stop:
                self._at += 1
                return "".join(found)
            if sign in "'\"":
                self._at += 1
                part = self._single() if sign == "'" else self._double()
                self._raw(part)
            elif sign == "$":
                part = self._variable()
                self._split(part)
            else:
                part = self._next()
                if part == self._escape:
                    part = self._next()
                    self._raw(part)
                else:
                    self._split(part)
            found.append(part)
        if stop:
            raise WordError(f"a {stop} is missing at the end")
        return "".join(found)

    def _single(self) -> str:
        end = self._text.find("'", self._at)
        if end < 0:
            raise WordError("the quote ' is never closed")
        found = self._text[self._at : end]
        self._at = end + 1
        return found

    def _double(self) -> str:
        found: list[str] = []
        while sign := self._peek():
            if sign == '"':
                self._at += 1
                return "".join(found)
            if sign == "$":
                found.append(self._variable())
                continue
            self._at += 1
            if sign == self._escape:
                following = self._next()
                if not following:
                    break
                sign = following if following in ('"', "$", self._escape) else sign + following
            found.append(sign)
        raise WordError('the quote " is never closed')

    def _variable(self) -> str:
        self._at += 1  # the dollar
        if self._peek() != "{":
            name = self._name()
            return self._value(name) or "" if name else "$"
        self._at += 1
        if self._peek() in ("", "{", ":"):
            raise WordError("${ needs the name of a variable and a closing brace")
        name = self._name()
        sign = self._next()
        if not name:
            raise WordError(f"${{{sign}: a variable's name begins with a letter or _")
        if sign == "}":
            return self._value(name) or ""
        if sign == ":":
            return self._default(name, self._next(), colon=True)
        if sign in ("+", "-", "?"):
            return self._default(name, sign, colon=False)
        if sign in ("#", "%", "/"):
            return self._change(name, sign)
        if not sign:
            raise WordError("a } is missing at the end")
        raise WordError(f"${{{name}{sign}...}}: there is no such form of a variable")

    def _default(self, name: str, kind: str, *, colon: bool) -> str:
        if kind not in ("+", "-", "?") or not kind:
            raise WordError(f"${{{name}:{kind}...}}: there is no such form of a variable")
        word = self._inner("}")
        known = name in self.env
        value = self.env.get(name, "")
        there = bool(value) if colon else known
        if kind == "+":
            self._value(name)
            return word if there else ""
        if there:
            return value
        if kind == "?":
            raise WordError(f"{name}: {word or 'has to be set'}")
        self._value(name)
        return word

    def _inner(self, stop: str) -> str:
        """Read a word inside braces; it never splits by itself."""
        kept = self._found, self._word
        self._found, self._word = [], None
        try:
            return self._until(stop)
        finally:
            self._found, self._word = kept

    def _change(self, name: str, kind: str) -> str:
        value = self._value(name) or ""
        twice = self._peek() == kind
        if twice:
            self._at += 1
        if kind == "/":
            pattern = _regex(self._raw_until("/"))
            new = self._inner("}")
            return re.sub(pattern, lambda _: new, value, count=0 if twice else 1)
        pattern = _regex(self._raw_until("}"))
        cuts = range(len(value) + 1)
        if kind == "#":
            for end in reversed(cuts) if twice else cuts:
                if re.fullmatch(pattern, value[:end], re.DOTALL):
                    return value[end:]
        else:
            for start in cuts if twice else reversed(cuts):
                if re.fullmatch(pattern, value[start:], re.DOTALL):
                    return value[:start]
        return value

    def _raw_until(self, stop: str) -> str:
        found: list[str] = []
        while sign := self._next():
            if sign == stop:
                return "".join(found)
            if sign == self._escape:
                sign += self._next()
            found.append(sign)
        raise WordError(f"a {stop} is missing at the end")

    def _name(self) -> str:
        match = _NAME.match(self._text, self._at)
        if match is not None:
            self._at = match.end()
            return match[0]
        sign = self._peek()
        if sign and sign in _SPECIAL:
            self._at += 1
            return sign
        return ""

    def _value(self, name: str) -> str | None:
        value = self.env.get(name)
        if value is None:
            self.missing.add(name)
        return value


def _regex(pattern: str) -> str:
    """Return a shell pattern as a regular expression."""
    found = []
    at = 0
    while at < len(pattern):
        sign = pattern[at]
        at += 1
        if sign == "*":
            found.append(".*")
        elif sign == "?":
            found.append(".")
        elif sign == "\\" and at < len(pattern):
            found.append(re.escape(pattern[at]))
            at += 1
        else:
            found.append(re.escape(sign))
    return "".join(found)


def raw_words(text: str, escape: str = "\\") -> list[str]:
    """Split at blanks outside quotes; quotes, escapes and variables stay as they are."""
    found: list[str] = []
    word, quote, at = "", "", 0
    while at < len(text):
        sign = text[at]
        at += 1
        if sign == escape and quote != "'" and at < len(text):
            sign += text[at]
            at += 1
        elif quote:
            quote = "" if sign == quote else quote
        elif sign in "'\"":
            quote = sign
        elif sign.isspace():
            if word:
                found.append(word)
            word = ""
            continue
        word += sign
    if word:
        found.append(word)
    return found


def pairs(text: str, escape: str = "\\") -> list[tuple[str, str]]:
    """Return names and raw values of an ENV or LABEL line: NAME=VALUE ..., or the old NAME VALUE.

    Raises:
        WordError: a word without an equals sign, a name without a value.
    """
    words = raw_words(text, escape)
    if not words:
        raise WordError("a name and a value are missing")
    if "=" not in words[0]:
        name, _, value = text.strip().partition(" ") if " " in text.strip() else text.strip().partition("\t")
        if not value.strip():
            raise WordError(f"{name} has no value: write {name}=VALUE")
        return [(name, value.strip())]
    found = []
    for word in words:
        name, equals, value = word.partition("=")
        if not equals:
            raise WordError(f"{word} has no value: write {word}=VALUE")
        if not name:
            raise WordError(f"{word} has no name before the equals sign")
        found.append((name, value))
    return found
