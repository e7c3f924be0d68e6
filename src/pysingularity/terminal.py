# SPDX-License-Identifier: Apache-2.0
"""How events are shown: folded on a terminal, whole in a log file, one JSON object per line for programs.

On a terminal one line moves while a step runs, and one line stays when it is done; the output of its programs is kept
back and shown only when the step fails. Everywhere else the output passes through as it comes, so that a batch log
holds everything. `-q` shows nothing of a step that succeeds. Written with plain escape sequences: a progress line needs
no library. Conversation goes to standard error, a JSON stream to standard output.
"""

from __future__ import annotations

import os
import sys
import time

from pysingularity import messages
from pysingularity.errors import UserError
from pysingularity.events import Event, Listener

#: Output of a step that is kept back for the case that it fails; the beginning is dropped beyond this.
KEPT = 4 << 20


def listener(*, as_json: bool = False) -> Listener:
    """Return what shows events in the way that fits: JSON lines, a terminal, or plain lines."""
    if as_json:
        return Stream()
    if os.isatty(2) and os.environ.get("TERM", "dumb") != "dumb" and messages.level < messages.DEBUG:
        return Folded()
    return Plain()


def seconds(value: float) -> str:
    """Return a duration for people: "0.4 s", "12 s", "3 min 05 s"."""
    if value < 9.95:
        return f"{value:.1f} s"
    if value < 120:
        return f"{value:.0f} s"
    return f"{int(value) // 60} min {int(value) % 60:02d} s"


def size(value: float) -> str:
    """Return a number of bytes for people, in binary units: "812 B", "1.2 MiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1000 or unit == "GiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if value >= 100 or unit == "B" else f"{value:.1f} {unit}"


def amount(done: int, total: int) -> str:
    """Return how far something is: a share when the whole is known."""
    if not total:
        return size(done) if done else ""
    share = f"{100 * done // total} %"
    return f"{share} of {size(total)}" if total > 4096 else f"{done}/{total}"


def ask_passphrase(*, twice: bool = False) -> bytes:
    """Ask for a passphrase: on the terminal and without showing it, else as the next line of standard input.

    Arguments:
        twice: have it typed again, because nobody can look up what was mistyped.

    Raises:
        UserError: the two are different.
    """
    if not os.isatty(0):
        # Byte by byte: what comes behind the line is the program's.
        line = bytearray()
        while (one := os.read(0, 1)) and one != b"\n":
            line += one
        return bytes(line.removesuffix(b"\r"))
    import getpass  # only for people

    try:
        found = getpass.getpass("Enter encryption passphrase: ")
        if twice and found != getpass.getpass("Retype encryption passphrase: "):
            raise UserError("passphrases-differ", "the two passphrases are different")
    except EOFError:
        raise UserError("no-key", "no passphrase was given") from None
    return os.fsencode(found)


class Stream:
    """One JSON object per line on standard output."""

    def __call__(self, event: Event) -> None:
        """Write an event."""
        try:
            sys.stdout.write(event.line() + "\n")
            sys.stdout.flush()
        except BrokenPipeError:  # the reader has gone; the build goes on, its file is what counts
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


class Plain:
    """Whole lines on standard error, for files and batch logs."""

    def __init__(self) -> None:
        self._count = 0
        self._titles: dict[int, str] = {}
        self._share = -1
        self._kept = bytearray()

    def __call__(self, event: Event) -> None:
        """Show an event."""
        step = event.number("step")
        if event.kind == "plan":
            steps = event.fields.get("steps")
            self._count = len(steps) if isinstance(steps, list) else 0
        elif event.kind == "start":
            self._titles[step] = event.text("title")
            self._share = -1
            self._kept.clear()
            messages.info(f"{self._place(step)}{event.text('title')}")
        elif event.kind == "log":
            self._log(event.text("text"))
        elif event.kind == "progress":
            self._progress(event)
        elif event.kind == "end":
            self._end(event, step)
        elif event.kind == "message":
            messages.say(messages.WARNING if event.text("level") == "warning" else messages.INFO, event.text("text"))
        elif event.kind == "result":
            self._result(event)

    def _place(self, step: int) -> str:
        return f"[{step}/{self._count}] " if self._count else ""

    def _log(self, text: str) -> None:
        data = text.encode("utf-8", "surrogateescape")
        if messages.level >= messages.INFO:
            _write(data)
        else:
            self._keep(data)

    def _keep(self, data: bytes) -> None:
        self._kept += data
        if len(self._kept) > KEPT:
            del self._kept[: len(self._kept) - KEPT]

    def _progress(self, event: Event) -> None:
        done, total = event.number("done"), event.number("total")
        if not total:
            if not done:  # a new thing is begun
                messages.verbose(event.text("text"))
            return
        share = 10 * done // total
        if share == self._share or share in (0, 10):
            return
        self._share = share
        messages.info(f"  {event.text('text')} {amount(done, total)}")

    def _end(self, event: Event, step: int) -> None:
        status, title = event.text("status"), self._titles.get(step, "")
        took = seconds(float(event.text("seconds") or 0))
        if status == "failed":
            self._show_kept()
            messages.error(f"{self._place(step)}{title}: failed after {took}")
        else:
            messages.info(f"{self._place(step)}{title}: {'from the cache' if status == 'cached' else took}")

    def _show_kept(self) -> None:
        if self._kept:
            _write(bytes(self._kept) if self._kept.endswith(b"\n") else bytes(self._kept) + b"\n")
            self._kept.clear()

    def _result(self, event: Event) -> None:
        bytes_ = event.number("size")
        what = f" ({size(bytes_)})" if bytes_ else ""
        messages.info(f"{event.text('path')}{what} made in {seconds(float(event.text('seconds') or 0))}")


class Folded(Plain):
    """One moving line while a step runs, one line that stays when it is done."""

    def __init__(self) -> None:
        super().__init__()
        self._step, self._begun, self._tail, self._detail, self._drawn = 0, 0.0, "", "", 0.0

    def __call__(self, event: Event) -> None:
        """Show an event."""
        if event.kind in ("message", "result", "failed", "end", "start"):
            self._clear()
        if event.kind == "start":
            self._step, self._begun, self._tail, self._detail = event.number("step"), time.monotonic(), "", ""
            self._titles[self._step] = event.text("title")
            self._kept.clear()
        else:
            super().__call__(event)
        if event.kind == "end":
            self._step = 0
        if self._step:
            self._draw(force=event.kind == "start")

    def tick(self) -> None:
        """Draw the line again: time passes also where nothing is told."""
        if self._step:
            self._draw(force=True)

    def _log(self, text: str) -> None:
        self._keep(text.encode("utf-8", "surrogateescape"))
        lines = [line.strip() for line in text.replace("\r", "\n").split("\n") if line.strip()]
        if lines:
            self._tail = lines[-1]

    def _progress(self, event: Event) -> None:
        self._detail = f"{event.text('text')} {amount(event.number('done'), event.number('total'))}".strip()

    def _draw(self, *, force: bool) -> None:
        now = time.monotonic()
        if (not force and now - self._drawn < 0.08) or messages.level < messages.INFO:
            return
        self._drawn = now
        title = self._titles.get(self._step, "")
        took = seconds(now - self._begun)
        text = f"{self._place(self._step)}{title}  {took}  {self._detail or self._tail}"
        clean = "".join(char if char.isprintable() else " " for char in text)
        width = os.get_terminal_size(2).columns if os.isatty(2) else 80
        _write(f"\r\033[K{clean[: max(width - 1, 20)]}".encode("utf-8", "replace"))

    def _clear(self) -> None:
        if self._step and messages.level >= messages.INFO:
            _write(b"\r\033[K")


def _write(data: bytes) -> None:
    while data:
        try:
            data = data[os.write(2, data) :]
        except OSError:  # nobody listens any more
            return
