# SPDX-License-Identifier: Apache-2.0
"""Badges and treemaps: right proportions, well-formed SVG, and nothing hostile gets through."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pysingularity.hub.pages.pictures import Folder, Rectangle, badge, human_size, squarify, treemap

NAMES = st.text(st.characters(codec="utf-8", exclude_characters="/", exclude_categories=("Cc", "Cs", "Cn")), min_size=1)


@given(st.lists(st.integers(1, 10**9), min_size=1, max_size=60), st.integers(10, 2000), st.integers(10, 2000))
def test_rectangles_fill_the_place_in_proportion_to_the_sizes(sizes, width, height):
    sizes = sorted(sizes, reverse=True)
    found = squarify(sizes, Rectangle(0, 0, width, height))
    assert sum(one.width * one.height for one in found) == pytest.approx(width * height, rel=1e-6)
    for size, one in zip(sizes, found, strict=True):
        assert one.width * one.height == pytest.approx(size * width * height / sum(sizes), rel=1e-6)
        assert one.x >= -1e-6
        assert one.x + one.width <= width + 1e-6 * width
        assert one.y + one.height <= height + 1e-6 * height


def test_equal_sizes_give_squares_rather_than_stripes():
    found = squarify([1] * 16, Rectangle(0, 0, 400, 400))
    assert all(one.width == pytest.approx(100) and one.height == pytest.approx(100) for one in found)


@given(st.lists(st.tuples(NAMES, NAMES, st.integers(0, 10**6)), max_size=30))
def test_treemap_of_any_names_is_well_formed(files):
    root = Folder("")
    for folder, name, size in files:
        root.add(f"{folder}/{name}", size)
    ET.fromstring(treemap(root, link="/files/"))


def test_sizes_of_folders_are_those_of_what_lies_below():
    root = Folder("")
    root.add("usr/lib/a.so", 100)
    root.add("usr/bin/b", 50)
    assert root.size == 150
    assert root.children["usr"].children["lib"].size == 100
    assert root.children["usr"].files == 2


def test_names_cannot_bring_markup_into_a_picture():
    hostile = '"><script>alert(1)</script>'
    root = Folder("")
    root.add(hostile, 10)
    for text in (badge(hostile, hostile, "done"), treemap(root)):
        assert "<script" not in text
        ET.fromstring(text)


def test_badge_says_its_text_to_those_who_cannot_see():
    assert ET.fromstring(badge("build", "done", "done")).attrib["aria-label"] == "build: done"


@pytest.mark.parametrize(("size", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (5 << 40, "5.0 TiB")])
def test_sizes_for_people(size, text):
    assert human_size(size) == text
