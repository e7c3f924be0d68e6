# SPDX-License-Identifier: Apache-2.0
"""Logs: byte for byte what was written, without secrets, never longer than allowed, readable from any offset."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from pysingularity.events import Event
from pysingularity.hub.builds.log import MASK, STEP, LogWriter
from pysingularity.hub.engines.job import Job


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


def job(tmp_path: Path, log: LogWriter) -> Job:
    limits = {"seconds": 60, "memory": 1 << 30, "disk": 1 << 30, "processes": 10, "reserve": 0, "log": 1 << 20}
    return Job(tmp_path, {"limits": limits, "token": "t", "environment": {}, "build": 1, "sandbox": "none"}, log)


def test_events_of_a_builder_become_a_log_that_people_read(tmp_path: Path):
    lines = [
        Event("start", {"step": 1, "title": "Unpacking"}),
        *[Event("progress", {"step": 1, "text": "compressing", "done": number}) for number in range(50)],
        Event("progress", {"step": 1, "text": "layer", "done": 5, "total": 10}),
        Event("log", {"step": 1, "text": "\x1b[31mred\x1b[0m no end"}),
        Event("message", {"level": "warning", "text": "odd"}),
        Event("end", {"step": 1, "status": "cached", "seconds": 1.0}),
        Event("start", {"step": 2, "title": "Writing"}),
        Event("progress", {"step": 2, "text": "compressing"}),
        Event("failed", {"id": "full", "message": "no space", "hint": "make room"}),
    ]
    with LogWriter(tmp_path / "log", limit=1 << 20) as log:
        working = job(tmp_path, log)
        for line in lines:
            working._event(line.line().encode())
        working._event(b"no JSON at all")
    text = (tmp_path / "log").read_text()
    assert text.splitlines() == [
        *("==> Unpacking", "compressing", "\x1b[31mred\x1b[0m no end", "WARNING: odd", "==> Writing", "compressing"),
        *("ERROR: no space", "    hint: make room", "no JSON at all"),
    ]
    assert [(step["name"], step["status"]) for step in working.steps] == [
        ("Unpacking", "cached"),
        ("Writing", "running"),
    ]
    assert all(text.encode()[step["offset"] :].startswith(b"==> " + step["name"].encode()) for step in working.steps)
    assert working.failure == {"id": "full", "message": "no space"}


@given(
    line=st.binary(max_size=200) | st.text(max_size=80).map(lambda text: Event("log", {"text": text}).line().encode())
)
@settings(max_examples=150, deadline=None)
def test_any_line_of_a_builder_is_taken(tmp_path_factory, line: bytes):
    folder = tmp_path_factory.mktemp("job")
    with LogWriter(folder / "log", limit=1 << 20) as log:
        job(folder, log)._event(line)


@given(pieces=st.lists(st.binary(max_size=300), max_size=20), limit=st.integers(4096, 8192))
@settings(max_examples=150, deadline=None)
def test_any_output_keeps_its_lines_without_nul(tmp_path_factory, pieces: list[bytes], limit: int):
    text = written(tmp_path_factory.mktemp("log"), pieces, limit)
    whole = b"".join(pieces).replace(b"\0", b"")
    if b"://" not in whole and len(whole) < limit - 1:
        assert text.rstrip(b"\n") == whole.rstrip(b"\n")
    assert len(text) <= limit + 100
    assert b"\0" not in text
