# SPDX-License-Identifier: Apache-2.0
"""Environment scripts understood without a shell mean what a shell makes of them."""

from __future__ import annotations

import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pysingularity.image import scripts
from pysingularity.runtime import environment
from pysingularity.runtime.environment import HardLineError, evaluate

START = {"HOME": "/home/u", "PATH": "/bin:/usr/bin", "EMPTY": "", "WORDS": "a b"}


def ours(text):
    env, assigned = dict(START), set()
    evaluate(text, env, assigned)
    return env


def shell(text):
    """Return what /bin/sh has in its environment after the text."""
    result = subprocess.run(
        ["/bin/sh", "-c", '. "$0"; exec cat /proc/self/environ', "/dev/stdin"],
        input=text,
        env=START,
        capture_output=True,
        text=True,
        check=True,
    )
    found = dict(entry.split("=", 1) for entry in result.stdout.split("\0") if entry)
    for name in ("PWD", "OLDPWD", "_", "SHLVL"):
        found.pop(name, None)
    return found


@pytest.mark.parametrize(
    "text",
    [
        "",
        "#!/bin/sh\n\n# nothing\n",
        "export A=1\nexport B=$A C='x y'  # comment",
        "A=1\nexport A",
        "A=1; export A; B=2",
        "PATH=/opt/bin:$PATH",
        'export A="${A:-"a b"}"',
        'export A="${HOME:-x}/y" B="${EMPTY:-e}" C="${EMPTY-e}" D="${EMPTY:+e}" E="${HOME+set}"',
        r'export A="\$x \"q\" \\ \` \n" B=a\ b',
        "export A='single $x `y`'",
        "[ -n \"${A:-}\" ] || A='docker'\nexport A\n[ -n \"${HOME:-}\" ] || HOME='no'\nexport HOME",
        'export A="$WORDS"',
        "export A=#no B=x#y",
        "A=1 B=2",
        "\texport A=1\r",
    ],
)
def test_assignments_are_those_of_a_shell(text):
    assert ours(text) == shell(text.replace("\r", ""))


@pytest.mark.parametrize(
    "text",
    [
        "export A=$(id)",
        "export A=`id`",
        "if true; then export A=1; fi",
        "export A=$WORDS",
        "A=~/x",
        "export A=*",
        'export A="x\ny"',
        "A=1 true",
        "unset A",
        "export -n A",
        "A=1 && B=2",
        'A="${HOME#/}"',
        "A=$1",
        ". /other",
        "A=(1 2)",
        "A+=x",
        "echo hi",
        "export A={a,b}",
        "A=1 # fine\nfor x in 1; do :; done",
        "cat <<E\nE",
    ],
)
def test_everything_else_is_left_to_a_shell(text):
    with pytest.raises(HardLineError):
        ours(text)


piece = st.sampled_from(
    ["a", " ", "$HOME", "${NO:-d}", "'", '"', "\\", "$", "`", ";", "=", "#", "\n", "é", "*", "{", "}"]
)


@settings(max_examples=150, deadline=None)
@given(st.lists(piece, max_size=8).map("".join))
def test_whatever_is_understood_is_understood_as_a_shell_does(value):
    text = f"export A={value}\n"
    try:
        mine = ours(text)
    except HardLineError:
        return
    assert mine == shell(text)


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(exclude_characters="\0\n\r", exclude_categories=["Cs"])))
def test_oci_variables_of_any_content_need_no_shell(value):
    text = scripts.docker_environment([f"A={value}"])
    assert ours(text)["A"] == value


def test_names_that_no_shell_accepts_stay_outside():
    host = {
        "BASH_FUNC_x%%": "() { :; }",
        "OK": "1",
        "SINGULARITY_X": "1",
        "APPTAINERENV_Y": "2",
        "LD_LIBRARY_PATH": "/x",
    }
    assert environment.from_host(host, clean=False) == {"OK": "1"}


def test_clean_lets_only_terminal_and_proxies_pass():
    host = {"TERM": "x", "HTTPS_PROXY": "p", "A": "1"}
    assert environment.from_host(host, clean=True) == {"TERM": "x", "HTTPS_PROXY": "p"}


def test_singularity_prefix_beats_the_other_one():
    assert environment.insisted({"SINGULARITYENV_A": "1", "APPTAINERENV_A": "2", "APPTAINERENV_B": "3"}) == {
        "A": "1",
        "B": "3",
    }
