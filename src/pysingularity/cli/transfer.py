# SPDX-License-Identifier: Apache-2.0
"""How a transfer is shown: a line a layer and a total on a terminal, plain lines with percentages elsewhere."""

from __future__ import annotations

import os
import threading
import time

from pysingularity import messages
from pysingularity.registry.fetch import IMAGE
from pysingularity.terminal import size

#: Lines on a terminal; more layers than this share the total's line.
MOST_LINES = 20


class Display:
    """Shows `progress(text, done, total)` calls; a context manager. Threads may call it.

    On a terminal every transfer has a line that moves, their total is below, and then how far the image is that is made
    of them. Elsewhere a line is printed per transfer at each quarter, or each time it has doubled when its length is
    not known (total 0). `-q` shows nothing.
    """

    def __init__(self) -> None:
        self._live = os.isatty(2) and os.environ.get("TERM", "dumb") != "dumb"
        self._quiet = messages.level < messages.INFO
        self._lines: dict[str, tuple[int, int]] = {}
        self._drawn = 0
        self._last = 0.0
        self._lock = threading.RLock()

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *_: object) -> None:
        if self._live and not self._quiet and self._lines:
            self._draw()

    def __call__(self, text: str = "", done: int = 0, total: int = 0) -> None:
        """Show how far something is; without numbers the text is said."""
        if self._quiet:
            return
        with self._lock:
            if not total and not done:
                self._erase()
                messages.info(text)
                return
            before = self._lines.get(text, (-1, total))[0]
            self._lines[text] = done, total
            if self._live:
                now = time.monotonic()
                if now - self._last > 0.1 or (total and done >= total):
                    self._last = now
                    self._draw()
            elif not total:
                if done >> 22 and done.bit_length() != before.bit_length():
                    messages.info(f"{text}: {size(done)}")
            elif before < 0 or 4 * done // total != 4 * before // total:
                share = f"{100 * done // total:3d} %"
                messages.info(f"{text}: {share} of {size(total)}")

    def _erase(self) -> None:
        if self._drawn:
            os.write(2, b"\033[%dA\033[J" % self._drawn)
            self._drawn = 0

    def _draw(self) -> None:
        try:
            width = os.get_terminal_size(2).columns
        except OSError:
            width = 80
        self._erase()
        moving = [(text, *self._lines[text]) for text in self._lines if text != IMAGE]
        rows = moving[-MOST_LINES:]
        if len(moving) > 1 and all(total for _, _, total in moving):
            rows.append(("total", sum(done for _, done, _ in moving), sum(total for _, _, total in moving)))
        if IMAGE in self._lines:
            rows.append((IMAGE, *self._lines[IMAGE]))
        longest = max(len(text) for text, _, _ in rows)
        lines = [f"{text:<{longest}}  {_bar(done, total)}" for text, done, total in rows]
        os.write(2, "".join(line[: width - 1] + "\n" for line in lines).encode("utf-8", "replace"))
        self._drawn = len(lines)


def _bar(done: int, total: int) -> str:
    if not total:
        return size(done)
    share = min(done / total, 1.0)
    filled = round(20 * share)
    return f"{'=' * filled}{' ' * (20 - filled)} {100 * share:3.0f} % of {size(total)}"
