# SPDX-License-Identifier: Apache-2.0
"""Worker and watcher: events and output in order, errors whole, nothing left behind whoever is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from pysingularity.build import worker
from pysingularity.errors import HostError, InternalError, RecipeError, UserError
from pysingularity.events import Event, read


def no_cleaning() -> None:
    raise AssertionError("nothing to clean")


def carry_out(work, clean=no_cleaning):
    seen: list[Event] = []
    return worker.carry_out(work, seen.append, clean), seen


def test_output_belongs_to_the_step_that_wrote_it():
    def work(tell):
        for number in range(1, 50):
            tell(Event("start", {"step": number}))
            os.write(tell.output, b"%d\n" % number)
            tell(Event("end", {"step": number}))
        tell(Event("result", {"path": "x"}))

    result, seen = carry_out(work)
    assert result.fields == {"path": "x"}
    step = 0
    for event in seen:
        if event.kind == "start":
            step = event.number("step")
        if event.kind == "log":
            assert event.fields == {"step": step, "text": f"{step}\n"}
    assert sum(event.kind == "log" for event in seen) == 49


def test_a_display_is_told_that_time_passes():
    ticks = []

    class Display:
        def __call__(self, event):
            pass

        def tick(self):
            ticks.append(1)

    def work(channel):
        time.sleep(2.5)
        channel(Event("result", {}))

    worker.carry_out(work, Display(), lambda: None)
    assert 1 <= len(ticks) <= 3


def test_much_output_does_not_block():
    def work(tell):
        tell(Event("start", {"step": 1}))
        subprocess.run([sys.executable, "-c", "print('x' * 3_000_000)"], stdout=tell.output, check=True)
        tell(Event("result", {}))

    _, seen = carry_out(work)
    assert sum(len(event.text("text")) for event in seen if event.kind == "log") == 3_000_001


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (UserError("some", "what", hint="try"), UserError),
        (RecipeError("some", "what", file="x.def", line=3, column=2, text="t", hint="try"), RecipeError),
        (OSError(28, "No space left on device", "/x"), HostError),
        (ValueError("odd"), InternalError),
    ],
)
def test_errors_cross_whole(error, kind):
    def work(tell):
        raise error

    with pytest.raises(kind) as caught:
        carry_out(work)
    if isinstance(error, UserError):
        assert str(caught.value) == str(error)
        assert caught.value.id == "some"


def test_missing_package_is_no_fault_of_ours():
    def work(tell):
        raise ModuleNotFoundError("No module named 'urllib3.util'", name="urllib3.util")

    with pytest.raises(HostError, match="the Python package urllib3 is not installed") as caught:
        carry_out(work)
    assert "pip install urllib3" in caught.value.hint


def test_killed_worker_is_cleaned_up_after(tmp_path):
    place = tmp_path / "place"
    place.mkdir()

    def work(tell):
        tell(Event("start", {"step": 1}))
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(HostError, match="signal 9"):
        carry_out(work, place.rmdir)
    assert not place.exists()


def test_event_line_is_read_back():
    event = Event("log", {"step": 3, "text": "ä\udcff\n"})
    assert read(event.line()).fields == event.fields
    with pytest.raises(ValueError):
        read("[1]")


def alive(pid: int) -> bool:
    """Say whether a process runs; one that only waits to be collected by a lazy init does not."""
    try:
        with open(f"/proc/{pid}/stat") as stream:
            return stream.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


SCRIPT = """
import os, sys, time
from pysingularity.build import worker
from pysingularity.events import Event
from pysingularity.image.output import Terminated

def work(tell):
    tell(Event("start", {"step": 1}))
    open(sys.argv[1], "w").write(str(os.getpid()))
    try:
        time.sleep(60)
    finally:
        os.unlink(sys.argv[1])

try:
    worker.carry_out(work, lambda event: None, lambda: print("cleaned", flush=True))
except Terminated as stopped:
    sys.exit(stopped.number)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_signal_to_the_watcher_ends_the_worker_in_order(tmp_path, number):
    mark = tmp_path / "mark"
    watcher = subprocess.Popen([sys.executable, "-c", SCRIPT, str(mark)], stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 20
    while not (mark.exists() and mark.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    pid = int(mark.read_text())
    watcher.send_signal(number)
    status = watcher.wait(20)
    assert status == (-9 if number == signal.SIGKILL else number)
    while mark.exists() or alive(pid):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    if number != signal.SIGKILL:
        assert watcher.stdout.read() == "cleaned\n"
    watcher.stdout.close()
