# SPDX-License-Identifier: Apache-2.0
"""The texts of --bind and --mount as values."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pysingularity.errors import UserError
from pysingularity.runtime.binds import ordered, parse_bind, parse_mount
from pysingularity.runtime.spec import BIND, Mount


def values(binds):
    return [(one.source, one.target, one.readonly) for one in binds]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/a", [("/a", "/a", False)]),
        ("/a:/b", [("/a", "/b", False)]),
        ("/a:/b:ro", [("/a", "/b", True)]),
        ("/a:/b:rw", [("/a", "/b", False)]),
        ("/a,/c:/d:ro", [("/a", "/a", False), ("/c", "/d", True)]),
        (r"/a\,b:/c\:d", [("/a,b", "/c:d", False)]),
        ("/a::ro", [("/a", "/a", True)]),
        ("", []),
    ],
)
def test_bind_texts(text, expected):
    assert values(parse_bind(text)) == expected


def test_options_behind_a_comma_belong_to_the_bind_before():
    (one,) = parse_bind("/i.sif:/d:image-src=/x,ro,id=3")
    assert (one.part, one.readonly, one.id) == ("/x", True, 3)


@pytest.mark.parametrize("text", ["/a:/b:zz", "/a:/b:ro:x", ":/b"])
def test_texts_that_are_no_binds_are_refused(text):
    with pytest.raises(UserError):
        parse_bind(text)


plain = st.text(st.characters(exclude_characters="\\\0,:\n", exclude_categories=["Cs"]), min_size=1).map(
    lambda text: "/" + text
)
odd = st.text(st.sampled_from("ab,:/ é"), min_size=1).map(lambda text: "/" + text)


@given(source=odd, target=odd, readonly=st.booleans())
def test_escaped_binds_read_back_equal(source, target, readonly):
    def escape(text):
        return text.replace(",", "\\,").replace(":", "\\:")

    text = f"{escape(source)}:{escape(target)}{':ro' if readonly else ''}"
    assert values(parse_bind(text)) == [(source, target, readonly)]


@given(source=plain | odd, target=plain | odd, readonly=st.booleans())
def test_quoted_mounts_read_back_equal(source, target, readonly):
    def field(name, value):
        return '"' + f"{name}={value}".replace('"', '""') + '"'

    text = f"type=bind,{field('source', source)},{field('destination', target)}{',ro' if readonly else ''}"
    one = parse_mount(text)
    assert (one.source, one.target, one.readonly) == (source, target, readonly)


@pytest.mark.parametrize(
    "text",
    ["type=tmpfs,source=/a,destination=/b", "source=/a", "destination=/b", "source=/a,dst=/b,what=1", '"source=/a'],
)
def test_texts_that_are_no_mounts_are_refused(text):
    with pytest.raises(UserError):
        parse_mount(text)


def test_outer_mounts_come_first_and_the_last_of_equal_targets_wins():
    mounts = [
        Mount(BIND, path, source=source) for path, source in [("/a/b", "1"), ("/a", "2"), ("/c", "3"), ("/a", "4")]
    ]
    assert [(one.target, one.source) for one in ordered(mounts)] == [("/c", "3"), ("/a", "4"), ("/a/b", "1")]
