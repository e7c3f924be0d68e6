# SPDX-License-Identifier: Apache-2.0
"""Logs: byte for byte what was written, without secrets, never longer than allowed, readable from any offset."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from pysingularity.hub.builds.log import MASK, STEP, LogWriter


def written(tmp: Path, pieces: list[bytes], limit: int = 1 << 20, secrets: list[str] | None = None) -> bytes:
    path = tmp / "log"
    path.unlink(missing_ok=True)
    with LogWriter(path, limit=limit, secrets=secrets or []) as log:
        for piece in pieces:
            log.write(piece)
    return path.read_bytes()


def test_secrets_are_masked_also_when_they_come_in_pieces(tmp_path: Path):
    text = written(
        tmp_path, [b"token is hush-", b"hush-123\nand https://me:pass", b"word@host/x\n"], secrets=["hush-hush-123"]
    )
    assert text == b"token is " + MASK + b"\nand https://" + MASK + b"@host/x\n"


def test_short_words_are_no_secrets(tmp_path: Path):
    assert written(tmp_path, [b"a b c\n"], secrets=["b"]) == b"a b c\n"


def test_log_that_is_full_says_so_once_and_ends_at_a_line(tmp_path: Path):
    text = written(tmp_path, [b"line %d\n" % number for number in range(1000)], limit=500)
    assert len(text) < 600
    assert text.count(b"the log is full") == 1
    assert text.rpartition(b"[the log")[0].endswith(b"\n")


def test_line_without_an_end_does_not_wait_for_ever(tmp_path: Path):
    path = tmp_path / "log"
    with LogWriter(path, limit=1 << 24) as log:
        for _ in range(40):
            log.write(b"x" * 4096)
        assert path.stat().st_size > 1 << 16


def test_steps_begin_where_they_say(tmp_path: Path):
    path = tmp_path / "log"
    with LogWriter(path, limit=1 << 20) as log:
        log.write(b"left open")
        at = log.step("Two\nlines")
        log.write(b"text\n")
    assert path.read_bytes()[at:].startswith(STEP + b"Two lines\n")


def test_second_writer_goes_on_where_the_first_was_killed(tmp_path: Path):
    written(tmp_path, [b"one\n"])
    with LogWriter(tmp_path / "log", limit=1 << 20) as log:
        at = log.step("next")
    assert (tmp_path / "log").read_bytes()[at:] == b"==> next\n"


@given(pieces=st.lists(st.binary(max_size=300), max_size=20), limit=st.integers(4096, 8192))
@settings(max_examples=150, deadline=None)
def test_any_output_keeps_its_lines_without_nul(tmp_path_factory, pieces: list[bytes], limit: int):
    text = written(tmp_path_factory.mktemp("log"), pieces, limit)
    whole = b"".join(pieces).replace(b"\0", b"")
    if b"://" not in whole and len(whole) < limit - 1:
        assert text.rstrip(b"\n") == whole.rstrip(b"\n")
    assert len(text) <= limit + 100
    assert b"\0" not in text
