# SPDX-License-Identifier: Apache-2.0
"""Removing and measuring working folders, also when files in them belong to a sandbox's ids or are closed to us.

An ordinary user has to become the root of those ids once more, in a process of its own:
`python -m pysingularity.hub.engines.sweep FOLDER`, or `... --size FOLDER ENOUGH`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from pysingularity.hub.engines.sandbox import enter_ids

_SELF = (sys.executable, "-I", "-m", "pysingularity.hub.engines.sweep")


def sweep(folder: Path) -> None:
    """Remove a working folder.

    The sandbox of a worker that was killed takes a moment to die and may still write; so it is tried for two seconds.
    """
    for attempt in range(20):
        if not os.path.lexists(folder):
            return
        if attempt:
            time.sleep(0.1)
        shutil.rmtree(folder, ignore_errors=True)
        if folder.exists() and os.geteuid() != 0:
            subprocess.run([*_SELF, str(folder)], check=False, capture_output=True)
            shutil.rmtree(folder, ignore_errors=True)


def size_of(folder: Path, enough: int) -> int:
    """Return the bytes that a working folder occupies on disk, or more than `enough` as soon as that is clear."""
    total, closed = _walk(str(folder), enough)
    if closed and total <= enough and os.geteuid() != 0:
        result = subprocess.run([*_SELF, "--size", str(folder), str(enough)], check=False, capture_output=True)
        total = max(total, int(result.stdout)) if result.stdout.strip().isdigit() else total
    return total


def _walk(folder: str, enough: int) -> tuple[int, bool]:
    """Return the bytes below a folder, and whether a part of it was closed to us."""
    total, closed, todo = 0, False, [folder]
    while todo and total <= enough:
        try:
            with os.scandir(todo.pop()) as entries:
                for entry in entries:
                    try:
                        status = entry.stat(follow_symlinks=False)
                    except FileNotFoundError:
                        continue
                    total += status.st_blocks * 512
                    if entry.is_dir(follow_symlinks=False):
                        todo.append(entry.path)
        except FileNotFoundError:
            continue
        except OSError:
            closed = True
    return total, closed


def main(words: list[str]) -> int:
    """Remove words[0], or print the size of words[1]."""
    if not os.path.isabs(words[-1 if len(words) == 1 else 1]):
        return 2
    enter_ids()
    if words[0] == "--size":
        print(_walk(words[1], int(words[2]))[0])
        return 0
    for top, folders, _ in os.walk(words[0]):
        for name in folders:
            path = os.path.join(top, name)
            if not os.path.islink(path):
                os.chmod(path, 0o700)
    shutil.rmtree(words[0], ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
