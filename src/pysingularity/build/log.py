# SPDX-License-Identifier: Apache-2.0
"""The log of a build: everything that its programs printed, in a file that stays when the build fails.

A terminal shows one line per step, and the output of the step that failed; what happened before is looked up here. The
file lies in the user's cache folder, is written as things happen, so that even a machine that stops leaves it, and is
removed when the build succeeds. The newest ones are kept.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from pysingularity.folders import cache_folder

if TYPE_CHECKING:
    from pysingularity.events import Event, Listener

#: Folder below the cache folder.
FOLDER = "logs"
#: How many are kept.
KEPT = 20
#: What goes beyond is left out: nobody reads that much.
LARGEST = 256 << 20


class Log:
    """Passes events on to a listener, and keeps the output of programs.

    Arguments:
        environ: tells where the cache is.
        target: what is built.
        listen: who gets the events.

    Attributes:
        path: the file, "" when none could be made.
    """

    def __init__(self, environ: Mapping[str, str], target: str, listen: Listener) -> None:
        self._listen, self._size, self._useful = listen, 0, False
        self.path, self._fd = "", -1
        folder = os.path.join(cache_folder(environ), FOLDER)
        stamp = time.strftime("%Y%m%d-%H%M%S")
        path = os.path.join(folder, f"{os.path.basename(target)[:100]}-{stamp}-{os.getpid()}.log")
        try:
            os.makedirs(folder, mode=0o700, exist_ok=True)
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError:  # no cache, no log: the build goes on
            return
        self.path = path
        _shrink(folder)

    def __call__(self, event: Event) -> None:
        """Note an event and pass it on."""
        if event.kind == "start":
            self._write(f"==> {event.text('title')}\n")
        elif event.kind == "log":
            self._useful = True
            self._write(event.text("text"))
        elif event.kind == "message":
            self._write(f"{event.text('level')}: {event.text('text')}\n")
        elif event.kind == "end":
            self._write(f"==> {event.text('status')} after {event.text('seconds')} s\n")
        elif event.kind == "failed":
            self._write(f"==> {event.text('message')}\n{event.text('trace')}")
        self._listen(event)

    def tick(self) -> None:
        """Let a display that shows the time show it."""
        tick = getattr(self._listen, "tick", None)
        if tick is not None:
            tick()

    def _write(self, text: str) -> None:
        data = text.encode("utf-8", "surrogateescape")
        if self._fd < 0 or self._size > LARGEST:
            return
        self._size += len(data)
        if self._size > LARGEST:
            data = b"\n==> the rest is left out\n"
        try:
            while data:
                data = data[os.write(self._fd, data) :]
        except OSError:  # a full disk: what is there stays
            self._size = LARGEST + 1

    def useful(self) -> str:
        """Return the path of the file when a program has printed anything, otherwise ""."""
        return self.path if self._useful else ""

    def keep(self) -> str:
        """Close the file; return its path, or "" when no program has printed anything."""
        if not self._useful:
            self.drop()
        elif self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        return self.path

    def drop(self) -> None:
        """Remove the file: nothing went wrong."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            try:
                os.unlink(self.path)
            except OSError:
                pass
        self.path = ""


def _shrink(folder: str) -> None:
    """Remove all but the newest logs."""
    found = []
    for name in os.listdir(folder):
        path = os.path.join(folder, name)
        try:
            found.append((os.lstat(path).st_mtime, path))
        except OSError:  # another build removed it
            continue
    for _, path in sorted(found, reverse=True)[KEPT:]:
        try:
            os.unlink(path)
        except OSError:
            continue
