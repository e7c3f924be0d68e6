# SPDX-License-Identifier: Apache-2.0
"""Logs and definition files as HTML: colours kept, everything hostile escaped."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pysingularity.hub.pages.text import definition, log_line


def test_colours_become_classes_and_go_on_in_the_next_line():
    html, styles = log_line("a \x1b[1;31mred")
    assert html == 'a <span class="bold fg-red">red</span>'
    assert log_line("still", styles)[0] == '<span class="bold fg-red">still</span>'
    assert log_line("\x1b[0mplain", styles) == ("plain", ())


def test_progress_bar_shows_its_last_state():
    assert log_line("10%\r50%\r100%\n")[0] == "100%"


@pytest.mark.parametrize("line", ["\x1b]0;title\x07x", "\x1b[2Kx", "\x1b[?25lx", "\x07x", "\x1b[38;5;200mx"])
def test_other_control_sequences_are_dropped(line):
    assert log_line(line)[0] == "x"


@given(st.text())
def test_no_line_brings_tags_of_its_own(line):
    html, _ = log_line(line)
    assert re.fullmatch(r'(?:[^<>]|<span class="[a-z -]+">|</span>)*', html, re.DOTALL)


def test_parts_of_a_definition_file_are_marked():
    lines = definition("Bootstrap: docker\nFrom: x<y\n# why\n%post -c /bin/bash\n  echo: <b>\n")
    assert lines == [
        '<span class="keyword">Bootstrap</span>: docker',
        '<span class="keyword">From</span>: x&lt;y',
        '<span class="comment"># why</span>',
        '<span class="section">%post</span> -c /bin/bash',
        "  echo: &lt;b&gt;",
    ]


@given(st.text())
def test_definition_of_any_text_keeps_its_lines_and_escapes_them(text):
    lines = definition(text)
    assert len(lines) == len(text.splitlines())
    assert all(re.fullmatch(r'(?:[^<>]|<span class="[a-z]+">|</span>)*', line, re.DOTALL) for line in lines)
