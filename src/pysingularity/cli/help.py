# SPDX-License-Identifier: Apache-2.0
"""Help and the manual, both made from the option tables: `singularity help`, `--help`, and docs/reference.

Never loaded by a command that runs a container.
"""

from __future__ import annotations

import shutil
import sys
import textwrap

from pysingularity.cli.commands import COMMANDS
from pysingularity.cli.main import GLOBAL, load
from pysingularity.cli.options import FLAG, Arguments, Option
from pysingularity.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

USAGE = "[COMMAND [SUBCOMMAND]]"
COUNT = (0, None)
OPTIONS: tuple[Option, ...] = ()

INTRODUCTION = "Singularity containers for users without root: pull, build, run."


def run(arguments: Arguments, environ: dict[str, str]) -> int:
    """Print the help of a command, or the overview."""
    width = min(shutil.get_terminal_size((100, 24)).columns, 110)
    bold = sys.stdout.isatty() and not environ.get("NO_COLOR")
    print("\n".join(page(arguments.positional, width, bold)))
    return 0


def find(words: list[str]) -> tuple[ModuleType, str, dict[str, tuple[str, str, str]] | None]:
    """Return the module of a command given by its words, its summary, and its table of sub-commands.

    Raises:
        UsageError: there is no such command.
    """
    table: dict[str, tuple[str, str, str]] | None = COMMANDS
    module, summary = None, ""
    for word in words:
        if table is None or word not in table:
            from pysingularity.cli.suggest import nearest

            guess = nearest(word, list(table or ()))
            raise UsageError(
                "unknown-command",
                f'no help for "{" ".join(words)}": there is no such command',
                hint=f"did you mean: {guess}?" if guess else "see: singularity help",
            )
        name, _, summary = table[word]
        module = load(name)
        table = getattr(module, "SUBCOMMANDS", None)
    assert module is not None
    return module, summary, table


def page(words: list[str], width: int = 100, bold: bool = False) -> Iterator[str]:
    """Yield the lines of a help page; `words` name the command, none of them the overview."""
    head = (lambda text: f"\033[1m{text}\033[0m") if bold else (lambda text: text)
    if not words:
        yield f"{head('Usage:')} singularity [GLOBAL OPTIONS] COMMAND [OPTIONS] ARGUMENTS"
        yield ""
        yield INTRODUCTION
        yield from _commands(COMMANDS, head)
        yield from _options(GLOBAL, width, head, "Global options")
        yield ""
        yield "Help for a command: singularity help COMMAND"
        return
    module, summary, table = find(words)
    full = " ".join(words)
    if table is not None:
        yield f"{head('Usage:')} singularity {full} SUBCOMMAND [OPTIONS] ARGUMENTS"
        yield ""
        yield summary + "."
        yield from _commands(table, head)
        return
    yield f"{head('Usage:')} singularity {full} {'[OPTIONS] ' if _shown(module.OPTIONS) else ''}{module.USAGE}".rstrip()
    yield ""
    yield summary + "."
    text = textwrap.dedent(getattr(module, "HELP", "")).strip("\n")
    if text:
        yield ""
        yield text
    yield from _options(module.OPTIONS, width, head)


def _commands(table: dict[str, tuple[str, str, str]], head: object) -> Iterator[str]:
    widest = max(len(name) for name in table)
    groups: dict[str, list[str]] = {}
    for name, (_, group, summary) in table.items():
        groups.setdefault(group, []).append(f"  {name:<{widest}}  {summary}")
    for group, lines in groups.items():
        yield ""
        yield head(f"{group}:")  # type: ignore[operator]
        yield from lines


def spelling(option: Option) -> str:
    """Return how an option is written: "-B, --bind SRC[:DST[:OPTS]]"."""
    short = f"-{option.short}, " if option.short else "    "
    value = "" if option.kind == FLAG else f" {option.metavar or 'VALUE'}"
    return f"{short}--{option.long}{value}"


def notes(option: Option) -> str:
    """Return what a reader should know beside the help sentence: choices, default and variables."""
    found = []
    if option.choices:
        found.append("one of " + ", ".join(option.choices))
    if option.default not in (None, False, (), []):
        found.append(f"default {option.default}")
    variables = [f"SINGULARITY_{key}" for key in option.env] + list(option.bare_env)
    if variables:
        found.append(", ".join(variables))
    return f" ({'; '.join(found)})" if found else ""


def _shown(options: tuple[Option, ...]) -> bool:
    return any(not option.hidden for option in options)


def _options(options: tuple[Option, ...], width: int, head: object, title: str = "") -> Iterator[str]:
    groups: dict[str, list[Option]] = {}
    for option in options:
        if not option.hidden:
            groups.setdefault(title or option.group, []).append(option)
    indent = 34
    for group, members in groups.items():
        yield ""
        yield head(f"{group}:")  # type: ignore[operator]
        for option in sorted(members, key=lambda option: option.long):
            left = "  " + spelling(option)
            lines = textwrap.wrap(option.help + notes(option), max(width - indent, 30)) or [""]
            if len(left) >= indent - 1:
                yield left
                left = ""
            yield f"{left:<{indent}}{lines[0]}"
            for line in lines[1:]:
                yield " " * indent + line


def manual() -> Iterator[str]:
    """Yield the lines of docs/reference/commands.md: every command with every option."""
    yield "# Commands"
    yield ""
    yield "Made from the option tables by `scripts/reference`; the same tables feed `--help`."
    yield ""
    yield "## Global options"
    yield ""
    yield from _table(GLOBAL)
    yield from _chapters(COMMANDS, [])


def settings() -> Iterator[str]:
    """Yield the lines of docs/reference/settings.md: every key of singularity.conf."""
    from pysingularity.config import FLAG, MANY, NUMBER, SYSTEM, TABLE

    yield "# Settings"
    yield ""
    yield "Made from the table that reads them (`pysingularity.config`) by `scripts/reference`."
    yield ""
    yield f"Settings are lines `key = value` in `{SYSTEM}`, then `singularity.conf` in `SINGULARITY_CONFIGDIR` or"
    yield "`~/.singularity`, then the file named by `--config` or `SINGULARITY_CONFIG_FILE`; later ones win. `#` at the"
    yield "start of a line begins a comment. Keys of other implementations are ignored. Options of a command win over"
    yield "settings."
    yield ""
    yield "| key | values | default | meaning |"
    yield "| --- | --- | --- | --- |"
    for key, (kind, default, allowed, meaning) in TABLE.items():
        values = {FLAG: "yes, no", NUMBER: "a number", MANY: "a text; the key may be repeated"}.get(kind)
        if isinstance(default, tuple):
            shown = "<br>".join(f"`{one}`" for one in default)
        else:
            shown = f"`{ {True: 'yes', False: 'no'}[bool(default)] if kind == FLAG else default }`"
        yield f"| `{key}` | {values or ', '.join(allowed)} | {shown} | {meaning} |"


def _chapters(table: dict[str, tuple[str, str, str]], parents: list[str]) -> Iterator[str]:
    for name in table:
        words = [*parents, name]
        module, summary, sub = find(words)
        yield ""
        yield f"{'#' * min(2 + len(parents), 4)} singularity {' '.join(words)}"
        yield ""
        yield summary + "."
        if sub is not None:
            yield from _chapters(sub, words)
            continue
        yield ""
        options = "[OPTIONS] " if _shown(module.OPTIONS) else ""
        yield f"    singularity {' '.join(words)} {options}{module.USAGE}".rstrip()
        text = textwrap.dedent(getattr(module, "HELP", "")).strip("\n")
        if text:
            yield ""
            yield from textwrap.indent(text, "    ").splitlines()
        if _shown(module.OPTIONS):
            yield ""
            yield from _table(module.OPTIONS)


def _table(options: tuple[Option, ...]) -> Iterator[str]:
    yield "| option | meaning |"
    yield "| --- | --- |"
    for option in sorted(options, key=lambda option: option.long):
        if not option.hidden:
            meaning = (option.help + notes(option)).replace("|", "\\|")
            yield f"| `{spelling(option).strip()}` | {meaning} |"
