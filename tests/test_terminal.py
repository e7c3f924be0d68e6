# SPDX-License-Identifier: Apache-2.0
"""How events look: whole lines in a log, one line per step on a terminal, objects for programs."""

from __future__ import annotations

import json
import os
import pty

import pytest

from pysingularity import messages, terminal
from pysingularity.events import Event, Progress

STORY = [
    Event("plan", {"steps": [{"number": 1}, {"number": 2}]}),
    Event("start", {"step": 1, "title": "first"}),
    Event("log", {"step": 1, "text": "noise\n"}),
    Event("progress", {"step": 1, "text": "reading", "done": 50, "total": 100}),
    Event("end", {"step": 1, "status": "done", "seconds": 1.25}),
    Event("start", {"step": 2, "title": "second"}),
    Event("log", {"step": 2, "text": "reason\n"}),
    Event("end", {"step": 2, "status": "failed", "seconds": 0.5}),
]


@pytest.fixture(autouse=True)
def level(monkeypatch):
    monkeypatch.setattr(messages, "level", messages.INFO)
    monkeypatch.setattr(messages, "colour", False)


def test_log_file_gets_everything(capfd):
    show = terminal.Plain()
    for event in STORY:
        show(event)
    lines = capfd.readouterr().err.splitlines()
    assert lines[0] == "INFO:    [1/2] first"
    assert "noise" in lines and "reason" in lines
    assert "INFO:    [1/2] first: 1.2 s" in lines
    assert lines[-1] == "ERROR:   [2/2] second: failed after 0.5 s"
    assert "\033" not in "".join(lines) and "\r" not in "".join(lines)


def test_quiet_shows_only_what_failed(capfd, monkeypatch):
    monkeypatch.setattr(messages, "level", messages.WARNING)
    show = terminal.Plain()
    for event in STORY:
        show(event)
    assert capfd.readouterr().err == "reason\nERROR:   [2/2] second: failed after 0.5 s\n"


def test_terminal_folds_the_output_of_steps_that_succeed():
    leader, follower = pty.openpty()
    before = os.dup(2)
    os.dup2(follower, 2)
    try:
        show = terminal.listener()
        assert isinstance(show, terminal.Folded) or os.environ.get("TERM", "dumb") == "dumb"
        show = terminal.Folded()
        for event in STORY:
            show(event)
    finally:
        os.dup2(before, 2)
        os.close(before)
        os.close(follower)
    text = ""
    while True:  # what was written arrives in pieces, and an error tells the end
        try:
            text += os.read(leader, 65536).decode()
        except OSError:
            break
    os.close(leader)
    kept = [line.rsplit("\r\033[K")[-1].rstrip("\r") for line in text.split("\n")]
    assert "INFO:    [1/2] first: 1.2 s" in kept
    assert "noise" not in kept
    assert "reason" in kept


def test_stream_is_one_object_per_line(capfd):
    show = terminal.listener(as_json=True)
    for event in STORY:
        show(event)
    found = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [event["event"] for event in found] == [event.kind for event in STORY]


@pytest.mark.parametrize(("value", "text"), [(0.04, "0.0 s"), (9.9, "9.9 s"), (75, "75 s"), (185, "3 min 05 s")])
def test_durations(value, text):
    assert terminal.seconds(value) == text


@pytest.mark.parametrize(("value", "text"), [(0, "0 B"), (999, "999 B"), (1 << 20, "1.0 MiB"), (3 << 40, "3072 GiB")])
def test_sizes(value, text):
    assert terminal.size(value) == text


def test_progress_tells_few_of_many_calls_and_the_last():
    seen: list[Event] = []
    progress = Progress(seen.append, 1)
    for done in range(10001):
        progress("reading", done, 10000)
    assert len(seen) < 100
    assert seen[-1].fields["done"] == 10000
