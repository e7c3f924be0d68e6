# SPDX-License-Identifier: Apache-2.0
"""`singularity completion`: words for the tabulator key, made from the option tables that feed reading and help."""

from __future__ import annotations

from pysingularity.cli import results
from pysingularity.cli.commands import COMMANDS
from pysingularity.cli.help import find
from pysingularity.cli.main import GLOBAL
from pysingularity.cli.options import FLAG, Arguments, Option

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

USAGE = "bash|zsh|fish"
COUNT = (1, 1)
OPTIONS: tuple[Option, ...] = ()
HELP = """\
Prints a script for the shell to read:

    source <(singularity completion bash)      # in ~/.bashrc; for zsh likewise, after compinit
    singularity completion fish > ~/.config/fish/completions/singularity.fish
"""

#: What every place of the command line offers: options and sub-commands by the words in front, files for the rest.
BASH = """\
_singularity() {
    local cur=${COMP_WORDS[COMP_CWORD]} path= word words at sub=
    for ((at = 1; at < COMP_CWORD; at++)); do
        word=${COMP_WORDS[at]}
        case $word in -*) continue ;; esac
        case "$path $word" in
%(known)s) path="$path $word" ;;
        *) break ;;
        esac
    done
    case $path in
%(words)s
    esac
    if [[ $cur == -* || -n $sub ]]; then
        COMPREPLY=($(compgen -W "$words" -- "$cur"))
    else
        COMPREPLY=($(compgen -f -- "$cur"))
    fi
}
complete -o filenames -F _singularity singularity
"""
ZSH = "autoload -Uz bashcompinit && bashcompinit\n"


def run(arguments: Arguments, environ: dict[str, str]) -> int:  # noqa: ARG001
    """Print the script.

    Raises:
        UsageError: no script for this shell is known.
    """
    from pysingularity.errors import UsageError

    shell = arguments.positional[0]
    if shell not in ("bash", "zsh", "fish"):
        raise UsageError("no-shell", f"completion: there is no script for {shell}", hint="bash, zsh or fish")
    text = _fish() if shell == "fish" else _bash()
    results.write(ZSH + text if shell == "zsh" else text)
    return 0


def _places() -> Iterator[tuple[list[str], tuple[Option, ...], dict[str, tuple[str, str, str]]]]:
    """Yield (words, options, sub-commands) of every command."""
    todo: list[list[str]] = [[name] for name in COMMANDS]
    while todo:
        words = todo.pop(0)
        module, _, table = find(words)
        yield words, () if table else module.OPTIONS, table or {}
        todo += [[*words, name] for name in table or ()]


def _spellings(options: tuple[Option, ...]) -> list[str]:
    shown = [option for option in options if not option.hidden]
    return [f"--{option.long}" for option in shown] + [f"-{option.short}" for option in shown if option.short]


def _bash() -> str:
    lines = [_case("''", [*COMMANDS, *_spellings(GLOBAL)], True)]
    known = []
    for words, options, table in _places():
        path = f"' {' '.join(words)}'"
        known.append(path)
        lines.append(_case(path, [*table, *_spellings(options), "--help"], bool(table) or words == ["help"]))
        if words == ["help"]:
            lines[-1] = _case(path, [*COMMANDS], True)
    rows = [" | ".join(known[at : at + 5]) for at in range(0, len(known), 5)]
    return BASH % {"known": "        " + " | \\\n        ".join(rows), "words": "\n".join(lines)}


def _case(path: str, words: list[str], sub: bool) -> str:
    return f"    {path}) words='{' '.join(words)}'{' sub=yes' if sub else ''} ;;"


def _fish() -> str:
    lines = ["complete -c singularity -n __fish_use_subcommand -f"]
    lines += [_fish_option("__fish_use_subcommand", option) for option in GLOBAL if not option.hidden]
    lines += _fish_commands("__fish_use_subcommand", COMMANDS)
    for words, options, table in _places():
        when = "; and ".join(f"__fish_seen_subcommand_from {word}" for word in words)
        if table:
            when = f"{when}; and not __fish_seen_subcommand_from {' '.join(table)}"
        lines += _fish_commands(_quoted(when), table)
        lines += [_fish_option(_quoted(when), option) for option in options if not option.hidden]
    return "\n".join(lines) + "\n"


def _fish_commands(when: str, table: dict[str, tuple[str, str, str]]) -> list[str]:
    return [
        f"complete -c singularity -n {when} -f -a {name} -d {_quoted(summary)}"
        for name, (_, _, summary) in table.items()
    ]


def _fish_option(when: str, option: Option) -> str:
    short = f" -s {option.short}" if option.short else ""
    value = "" if option.kind == FLAG else " -r"
    return f"complete -c singularity -n {when} -l {option.long}{short}{value} -d {_quoted(option.help)}"


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
