# SPDX-License-Identifier: Apache-2.0
"""The option reader: what pflag accepts for Singularity, with its precedence of command line and environment."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pysingularity.cli.options import LIST, MANY, TEXT, Option
from pysingularity.cli.scan import scan
from pysingularity.errors import UsageError

TABLE = (
    Option("bind", "Bind", short="B", kind=MANY, metavar="SRC", env=("BIND", "BINDPATH")),
    Option("cleanenv", "Clean", short="e", env=("CLEANENV",)),
    Option("contain", "Contain", short="c"),
    Option("home", "Home", short="H", kind=TEXT, env=("HOME",)),
    Option("security", "Security", kind=LIST, env=("SECURITY",)),
    Option("pull", "Pull", kind=TEXT, choices=("always", "never")),
    Option("cwd", "Directory", kind=TEXT, aliases=("pwd",)),
)


def read(*words, payload=True, **environ):
    return scan(list(words), TABLE, environ, payload=payload)


def test_options_end_at_the_first_positional_of_a_payload():
    found = read("-e", "image", "-c", "--bind", "x")
    assert (found.cleanenv, found.contain, found.bind) == (True, False, [])
    assert found.positional == ["image", "-c", "--bind", "x"]


def test_options_may_follow_positionals_elsewhere():
    found = read("out", "-e", "spec", payload=False)
    assert found.cleanenv is True
    assert found.positional == ["out", "spec"]


def test_double_dash_ends_the_options():
    assert read("-e", "--", "-c").positional == ["-c"]


def test_short_options_combine_and_take_attached_values():
    found = read("-ecB/a:/b", "-H=/h", "i")
    assert (found.cleanenv, found.contain, found.bind, found.home) == (True, True, ["/a:/b"], "/h")


def test_long_values_stand_behind_an_equals_sign_or_next():
    assert read("--home=/a", "--pwd", "/b").cwd == "/b"


@pytest.mark.parametrize(("text", "value"), [("false", False), ("NO", False), ("1", True), ("On", True)])
def test_booleans_can_be_given_as_words(text, value):
    assert read(f"--cleanenv={text}").cleanenv is value
    assert read(SINGULARITY_CLEANENV=text).cleanenv is value


def test_word_that_is_no_boolean_is_a_usage_error():
    with pytest.raises(UsageError, match="SINGULARITY_CLEANENV"):
        read(SINGULARITY_CLEANENV="perhaps")


def test_command_line_wins_over_environment_and_singularity_over_apptainer():
    assert read(SINGULARITY_HOME="/s", APPTAINER_HOME="/a").home == "/s"
    assert read("-H", "/c", SINGULARITY_HOME="/s").home == "/c"
    assert read(APPTAINER_HOME="/a").home == "/a"
    assert read(SINGULARITY_HOME="").home is None


def test_binds_of_the_environment_add_to_those_of_the_command_line():
    assert read("-B", "/c", SINGULARITY_BIND="/e").bind == ["/e", "/c"]


def test_given_holds_what_was_spelt_out_only():
    assert read("-e", SINGULARITY_HOME="/s").given == {"cleanenv"}


@pytest.mark.parametrize("words", [["--nosuch"], ["-z"], ["--home"], ["-B"], ["--pull", "sometimes"], ["--bidn", "x"]])
def test_what_cannot_be_understood_is_a_usage_error(words):
    with pytest.raises(UsageError) as caught:
        read(*words)
    assert caught.value.exit_code == 1


def test_misspelt_option_names_the_nearest():
    with pytest.raises(UsageError, match="--cleanenv"):
        read("--cleanev")


@given(st.lists(st.text(max_size=8), max_size=8))
def test_any_words_give_arguments_or_a_usage_error(words):
    try:
        scan(words, TABLE, {}, payload=True)
    except UsageError as error:
        assert error.message
