# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pysingularity.build.deb.version import key, satisfies

ORDER = [
    "0~~",
    "0~~a",
    "0~",
    "0",
    "0a",
    "0a1",
    "0+",
    "0.0",
    "1~rc1-1",
    "1-0~1",
    "1-1",
    "1.0-1",
    "1.0+b1",
    "2:0",
    "10:0",
]
TEXT = st.from_regex(r"(?:[0-2]:)?[0-9][0-9a-bA.+~]{0,5}(?:-[0-9a-b.+~]{1,4})?", fullmatch=True)


def test_versions_sort_as_policy_says() -> None:
    assert sorted(ORDER[5:] + ORDER[:5], key=key) == ORDER


@pytest.mark.parametrize(
    ("one", "other"), [("1.0", "1.0-0"), ("0:1", "1"), ("1.00", "1.0"), ("1", "1-0"), ("1a0", "1a")]
)
def test_different_texts_can_be_the_same_version(one: str, other: str) -> None:
    assert key(one) == key(other)


@pytest.mark.parametrize("text", ["", "-", "a:1", "1_2", "1 2", "1:", "é1"])
def test_what_is_no_version_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no Debian version"):
        key(text)


@settings(max_examples=150, deadline=None)
@given(TEXT, TEXT)
def test_order_is_the_one_of_dpkg(tool, one: str, other: str) -> None:
    dpkg = tool("dpkg")
    for relation, word in (("<<", "lt"), ("=", "eq"), (">>", "gt")):
        said = subprocess.run([dpkg, "--compare-versions", one, word, other], stderr=subprocess.DEVNULL).returncode == 0
        assert satisfies(one, relation, other) is said
        if said:
            break


@given(TEXT)
def test_old_relation_signs_include_equality(text: str) -> None:
    assert satisfies(text, "<", text)
    assert satisfies(text, ">", text)
    assert satisfies(text, "<=", text)
    assert satisfies(text, ">=", text)
    assert not satisfies(text, "<<", text)


def test_an_unknown_relation_is_an_error() -> None:
    with pytest.raises(ValueError, match="unknown relation"):
        satisfies("1", "==", "1")
