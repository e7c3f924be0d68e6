# SPDX-License-Identifier: Apache-2.0
"""Read a command line by an option table, in microseconds: what pflag accepts, without argparse's 14 ms.

Grammar (as Singularity's): long flags `--x value` or `--x=value`; booleans `--x` or `--x=false`; short ones combine and
take attached values (`-eB/data`); `--` ends the options. For commands that carry a payload the options end at the first
positional, so that the payload's own flags are left alone. Every option with an environment key is also read from
SINGULARITY_KEY and APPTAINER_KEY; the command line wins, then SINGULARITY_. Start ring: imports only our own modules.
"""

from __future__ import annotations

from pysingularity.cli.options import FLAG, LIST, MANY, TEXT, Arguments, Option
from pysingularity.errors import UsageError

TRUE = {"1", "t", "true", "y", "yes", "on"}
FALSE = {"0", "f", "false", "n", "no", "off"}
PREFIXES = ("SINGULARITY_", "APPTAINER_")


def scan(
    words: list[str], options: tuple[Option, ...], environ: dict[str, str], *, payload: bool = False, command: str = ""
) -> Arguments:
    """Return what `words` ask for.

    Arguments:
        words: the command line behind the command's name.
        options: the command's table.
        environ: the environment variables.
        payload: options end at the first positional.
        command: name for messages.

    Raises:
        UsageError: unknown option, missing or unreadable value.
    """
    result = Arguments()
    long, short = {}, {}
    for option in options:
        long[option.long] = option
        for alias in option.aliases:
            long[alias] = option
        if option.short:
            short[option.short] = option
    values: dict[str, object] = {}
    at, count = 0, len(words)
    while at < count:
        word = words[at]
        at += 1
        if word == "--":
            result.positional += words[at:]
            break
        if word[:2] == "--":
            name, equals, value = word[2:].partition("=")
            option_found = long.get(name)
            if option_found is None:
                raise unknown("--" + name, long, command)
            if option_found.kind == FLAG:
                _store(values, option_found, value if equals else "true", "--" + name)
            else:
                if not equals:
                    if at == count:
                        raise _missing("--" + name, option_found, command)
                    value = words[at]
                    at += 1
                _store(values, option_found, value, "--" + name)
        elif word[:1] == "-" and len(word) > 1:
            rest = word[1:]
            while rest:
                letter, rest = rest[0], rest[1:]
                option_found = short.get(letter)
                if option_found is None:
                    raise unknown("-" + letter, long, command)
                if option_found.kind == FLAG:
                    if rest[:1] == "=":
                        _store(values, option_found, rest[1:], "-" + letter)
                        rest = ""
                    else:
                        _store(values, option_found, "true", "-" + letter)
                    continue
                if rest:
                    value = rest[1:] if rest[0] == "=" else rest
                elif at < count:
                    value = words[at]
                    at += 1
                else:
                    raise _missing("-" + letter, option_found, command)
                _store(values, option_found, value, "-" + letter)
                rest = ""
        else:
            result.positional.append(word)
            if payload:
                result.positional += words[at:]
                break
    result.given = set(values)
    for option in options:
        name = option.name
        found = _from_environment(option, environ)
        if found is not None:
            variable, text = found
            if name not in values:
                _store(values, option, text, variable)
            elif option.kind == MANY:
                mine = values.pop(name)
                _store(values, option, text, variable)
                values[name] += mine  # type: ignore[operator]
        if name in values:
            value_found = values[name]
        elif option.kind in (LIST, MANY):
            value_found = list(option.default or ())  # type: ignore[call-overload]
        else:
            value_found = option.default
        setattr(result, name, value_found)
    return result


def unknown(spelling: str, known: dict[str, Option], command: str) -> UsageError:
    """Return the error for an option that does not exist, with the nearest that does."""
    from pysingularity.cli.suggest import nearest  # difflib: only when something is wrong

    guess = nearest(spelling.lstrip("-"), [name for name, option in known.items() if not option.hidden])
    where = f" for {command}" if command else ""
    hint = f"did you mean --{guess}?" if guess else f"see: singularity {command} --help".replace("  ", " ")
    return UsageError("unknown-flag", f"unknown flag: {spelling}{where}", hint=hint)


def boolean(text: str, spelling: str) -> bool:
    """Return the truth value of a word.

    Raises:
        UsageError: the word is neither yes nor no.
    """
    word = text.lower()
    if word in TRUE:
        return True
    if word in FALSE:
        return False
    raise UsageError("bad-boolean", f"{spelling}: {text!r} is neither yes nor no", hint="use true or false")


def _from_environment(option: Option, environ: dict[str, str]) -> tuple[str, str] | None:
    """Return (variable, value) of the first variable that is set and not empty."""
    for key in option.env:
        for prefix in PREFIXES:
            text = environ.get(prefix + key)
            if text:
                return prefix + key, text
    for key in option.bare_env:
        text = environ.get(key)
        if text:
            return key, text
    return None


def _missing(spelling: str, option: Option, command: str) -> UsageError:
    return UsageError(
        "missing-value",
        f"flag needs an argument: {spelling} {option.metavar or 'VALUE'}",
        hint=f"see: singularity {command} --help".replace("  ", " "),
    )


def _store(values: dict[str, object], option: Option, text: str, spelling: str) -> None:
    kind = option.kind
    if kind == FLAG:
        values[option.name] = boolean(text, spelling)
    elif kind == TEXT:
        if option.choices and text not in option.choices:
            raise UsageError("bad-choice", f"{spelling}: {text!r} is not one of {', '.join(option.choices)}")
        values[option.name] = text
    else:
        words = [text] if kind == MANY else [word for word in text.split(",") if word]
        values.setdefault(option.name, [])
        values[option.name] += words  # type: ignore[operator]
