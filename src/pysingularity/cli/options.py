# SPDX-License-Identifier: Apache-2.0
"""Options as values: one table per command feeds the fast reader, `--help`, completion and the manual.

An `Option` says everything about one flag; a command file lists its own in `OPTIONS` and borrows shared groups from
`cli.shared`. Reading them is `cli.scan`; showing them is `cli.help`. Start ring: imports nothing.
"""

from __future__ import annotations

TYPE_CHECKING = False

#: Kinds of value. FLAG takes none (or `=true`/`=false`); TEXT one, the last wins; LIST several, split at commas;
#: MANY several, kept whole (values that have their own escapes, such as --bind and --mount).
FLAG, TEXT, LIST, MANY = "flag", "text", "list", "many"


class Option:
    """One flag of a command.

    Arguments:
        long: name without dashes ("writable-tmpfs"); the attribute in `Arguments` has underscores instead.
        help: one sentence for `--help` and the manual, starting with a verb.
        short: one letter, or "".
        kind: FLAG, TEXT, LIST or MANY.
        metavar: name of the value in help ("SRC[:DST[:OPTS]]").
        env: keys of environment variables without prefix ("BIND", "BINDPATH"): each is looked up as
            SINGULARITY_KEY, then APPTAINER_KEY. MANY options add the environment's values to the command line's.
        bare_env: variables read without a prefix as well ("DOCKER_USERNAME").
        default: value when neither the command line nor the environment gives one.
        group: heading in help.
        hidden: left out of help (accepted for compatibility).
        aliases: further long names.
        choices: allowed values, or ().
    """

    __slots__ = (
        "aliases",
        "bare_env",
        "choices",
        "default",
        "env",
        "group",
        "help",
        "hidden",
        "kind",
        "long",
        "metavar",
        "name",
        "short",
    )

    def __init__(
        self,
        long: str,
        help: str,  # noqa: A002
        *,
        short: str = "",
        kind: str = FLAG,
        metavar: str = "",
        env: tuple[str, ...] = (),
        bare_env: tuple[str, ...] = (),
        default: object = None,
        group: str = "Options",
        hidden: bool = False,
        aliases: tuple[str, ...] = (),
        choices: tuple[str, ...] = (),
    ) -> None:
        self.long, self.help, self.short, self.kind, self.metavar = long, help, short, kind, metavar
        self.env, self.bare_env, self.group, self.hidden = env, bare_env, group, hidden
        self.aliases, self.choices = aliases, choices
        self.name = long.replace("-", "_")
        self.default = default if default is not None else {FLAG: False, TEXT: None}.get(kind)

    def __repr__(self) -> str:
        return f"Option(--{self.long})"


class Arguments:
    """What the user asked for: one attribute per option, `positional` for the rest, `given` for what was spelt out."""

    def __init__(self) -> None:
        self.positional: list[str] = []
        self.given: set[str] = set()

    def __getattr__(self, name: str) -> object:  # only reached for a name that no option of the command has
        raise AttributeError(name)

    if TYPE_CHECKING:

        def __setattr__(self, name: str, value: object) -> None:
            """Take any option's value."""
