# SPDX-License-Identifier: Apache-2.0
"""Help and the manual are made from the tables, and say everything the tables hold."""

from __future__ import annotations

from pathlib import Path

import pytest

from pysingularity.cli.commands import COMMANDS
from pysingularity.cli.help import find, manual, page, settings
from pysingularity.config import TABLE
from pysingularity.errors import UsageError


def leaves(table=COMMANDS, parents=()):
    for name in table:
        words = [*parents, name]
        module, _, sub = find(words)
        if sub is None:
            yield words, module
        else:
            yield from leaves(sub, words)


ALL = [(words, module) for words, module in leaves()]


@pytest.mark.parametrize(("words", "module"), ALL, ids=[" ".join(words) for words, _ in ALL])
def test_every_option_is_in_the_help_of_its_command(words, module):
    text = "\n".join(page(words))
    assert f"singularity {' '.join(words)}" in text
    for option in module.OPTIONS:
        assert (f"--{option.long}" in text) or option.hidden


@pytest.mark.parametrize(("words", "module"), ALL, ids=[" ".join(words) for words, _ in ALL])
def test_no_option_is_listed_twice_or_shares_a_letter(words, module):
    names = [name for option in module.OPTIONS for name in (option.long, *option.aliases)]
    letters = [option.short for option in module.OPTIONS if option.short]
    assert sorted(names) == sorted(set(names))
    assert sorted(letters) == sorted(set(letters))


@pytest.mark.parametrize(("words", "module"), ALL, ids=[" ".join(words) for words, _ in ALL])
def test_option_help_is_a_sentence_without_a_full_stop(words, module):
    for option in module.OPTIONS:
        assert option.help
        assert option.help[0].isupper()
        assert not option.help.endswith(".")


def test_overview_lists_every_command():
    text = "\n".join(page([]))
    for name in COMMANDS:
        assert f"  {name} " in text


def test_help_of_a_misspelt_command_names_the_nearest():
    with pytest.raises(UsageError, match="exec"):
        list(page(["exce"]))


@pytest.mark.parametrize(("name", "made"), [("commands", manual), ("settings", settings)])
def test_reference_in_the_repository_is_current(name, made):
    file = Path(__file__).parent.parent.parent / f"docs/reference/{name}.md"
    assert file.read_text() == "\n".join(made()) + "\n", "run scripts/reference"


def test_every_setting_is_in_the_reference():
    text = "\n".join(settings())
    for key, (_, _, allowed, meaning) in TABLE.items():
        assert f"| `{key}` |" in text
        assert meaning in text
        assert all(word in text for word in allowed)
