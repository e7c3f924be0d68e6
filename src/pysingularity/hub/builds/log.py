# SPDX-License-Identifier: Apache-2.0
"""A build's log: a plain text file that only grows, read by byte offsets.

Steps are marked by lines that begin with `==> `, so that the page can fold them and a person can read the file as it
is. Before a byte is written, secrets are masked and NUL bytes dropped; a log that grows beyond its limit ends with a
notice, and the build goes on without it.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable
from pathlib import Path

STEP = b"==> "
_SECRET = re.compile(rb"(?<=://)[^/\s:@]{1,200}:[^/\s@]{1,200}(?=@)")
MASK = b"[secret]"


class LogWriter:
    """Appends to the log of a build.

    Arguments:
        path: the file; made when it is missing.
        limit: bytes after which only a notice follows.
        secrets: texts that are masked, besides passwords in addresses.
    """

    def __init__(self, path: Path, *, limit: int, secrets: Iterable[str] = ()) -> None:
        self.limit = limit
        self._secrets = [secret.encode() for secret in secrets if len(secret) >= 6]
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self.size = os.fstat(self._handle).st_size
        self.full = self.size >= limit
        self._rest = b""

    def write(self, data: bytes) -> None:
        """Append output as it comes; whole lines are written at once, the rest of a line waits for its end."""
        lines, feed, self._rest = (self._rest + data).rpartition(b"\n")
        if len(self._rest) > 1 << 16:  # a progress bar without an end, or somebody's joke
            lines, feed, self._rest = lines + feed + self._rest, b"\n", b""
        if feed:
            self._append(lines + feed)

    def line(self, text: str) -> None:
        """Append one line of the hub's own."""
        self.flush()
        self._append(text.encode("utf-8", "replace") + b"\n")

    def step(self, title: str) -> int:
        """Append the mark of a step and return where it begins."""
        self.flush()
        at = self.size
        self._append(STEP + title.encode("utf-8", "replace").replace(b"\n", b" ") + b"\n")
        return at

    def flush(self) -> None:
        """End a line that was left open."""
        if self._rest:
            rest, self._rest = self._rest, b""
            self._append(rest + b"\n")

    def _append(self, data: bytes) -> None:
        if self.full:
            return
        data = _SECRET.sub(MASK, data.replace(b"\0", b""))
        for secret in self._secrets:
            data = data.replace(secret, MASK)
        if self.size + len(data) > self.limit:
            self.full = True
            room = max(0, self.limit - self.size)
            data = data[: data.rfind(b"\n", 0, room) + 1]
            data += b"[the log is full: %d bytes; the rest is not kept]\n" % self.limit
        view = memoryview(data)
        while view:
            view = view[os.write(self._handle, view) :]
        self.size += len(data)

    def close(self) -> None:
        """Write what is left and close the file."""
        self.flush()
        os.close(self._handle)

    def __enter__(self) -> LogWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def log_path(folder: Path, build_id: int) -> Path:
    """Return the file of a build's log; a thousand per folder."""
    return folder / f"{build_id // 1000:04d}" / f"{build_id}.log"


def stamp() -> str:
    """Return the time as lines of the hub carry it."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())
