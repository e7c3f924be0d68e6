# SPDX-License-Identifier: Apache-2.0
"""What happened, as values: the events of builds and pulls. How they are shown is `terminal`.

An event is a kind and a few plain fields, and one line of JSON in `--json` streams and between processes:

    plan      steps=[{number, kind, title, id}]        what will be done; `id` is the step's content hash
    start     step, title                              a step begins
    progress  step, text, done, total                  within a step; total 0 when it is not known
    log       step, text                               output of a program of the step, as it came
    message   level, text                              INFO and WARNING lines
    end       step, status, seconds, cpu               status: done, cached, failed; processor seconds with programs
    result    path, size, seconds, bases=[{uri, digest}]   the work is finished; what was fetched to begin with
    failed    id, message, hint, log                   the work is given up; `log` is a file with all output, or ""

Every event has `event` and `time` (seconds since 1970). Fields may be added; readers ignore what they do not know.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable

KINDS = ("plan", "start", "progress", "log", "message", "end", "result", "failed")


class Event:
    """One thing that happened.

    Arguments:
        kind: one of KINDS.
        fields: plain values that JSON can hold.
        at: seconds since 1970; now when it is not given.
    """

    __slots__ = ("at", "fields", "kind")

    def __init__(self, kind: str, fields: dict[str, object] | None = None, at: float | None = None) -> None:
        self.kind, self.fields = kind, fields or {}
        self.at = time.time() if at is None else at

    def __repr__(self) -> str:
        return f"Event({self.kind!r}, {self.fields!r})"

    def text(self, name: str) -> str:
        """Return a field as text, "" when it is absent."""
        value = self.fields.get(name, "")
        return value if isinstance(value, str) else str(value)

    def number(self, name: str) -> int:
        """Return a field as a whole number, 0 when it is absent or no number."""
        value = self.fields.get(name, 0)
        return int(value) if isinstance(value, (int, float)) else 0

    def line(self) -> str:
        """Return the event as one line of JSON, without a line feed."""
        return json.dumps({"event": self.kind, "time": round(self.at, 3), **self.fields}, ensure_ascii=True)


#: Whoever wants to know.
Listener = Callable[[Event], None]


def read(line: str | bytes) -> Event:
    """Return the event of a JSON line.

    Raises:
        ValueError: the line is no event.
    """
    value = json.loads(line)
    if not isinstance(value, dict) or not isinstance(value.get("event"), str):
        raise ValueError("not an event")
    kind, at = value.pop("event"), value.pop("time", None)
    return Event(kind, value, at)


class Progress:
    """Turns many small `progress(text, done, total)` calls into few events: at most ten a second and one at the end.

    Arguments:
        listen: who gets the events.
        step: number of the step they belong to.
    """

    __slots__ = ("_last", "_listen", "_text", "step")

    def __init__(self, listen: Listener, step: int) -> None:
        self._listen, self.step, self._last, self._text = listen, step, 0.0, ""

    def __call__(self, text: str = "", done: int = 0, total: int = 0) -> None:
        """Say how far the work is; see `bootstrap.BootstrapRequest`."""
        now = time.monotonic()
        finished = bool(total) and done >= total
        if now - self._last < 0.1 and not finished and (total or text == self._text):
            return
        self._last, self._text = now, text
        self._listen(Event("progress", {"step": self.step, "text": text, "done": done, "total": total}))
