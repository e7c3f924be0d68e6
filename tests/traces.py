# SPDX-License-Identifier: Apache-2.0
"""What a command of a test leaves behind: folders, partial results, processes. Other sessions do not count."""

from __future__ import annotations

import os
import subprocess
import zlib
from pathlib import Path


def leftovers(user) -> list[str]:
    """Return temporary folders, partial results and processes that a build of this test left."""
    found = [str(path) for path in (user.tmp / "scratch").glob("singularity-build-*")]
    found += [str(path) for path in user.tmp.glob(".*.partial")]
    mark = os.fsencode(user.tmp)
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes()
            if words and mark in words + (folder / "environ").read_bytes() and os.fsencode("singularity") in words:
                found.append(f"{folder.name} {words.replace(bytes(1), b' ').decode('utf-8', 'replace')}")
        except OSError:  # gone, or not ours to look at
            continue
    return found


def nap(user) -> str:
    """Return a time to sleep that no other test sleeps: its process can be told from all others."""
    return f"98766.{zlib.crc32(os.fsencode(user.tmp))}"


def sleeping(user) -> list[str]:
    """Return the lines of ps about a program of this test that sleeps for `nap`."""
    listing = subprocess.run(["ps", "-eo", "pid=,args="], capture_output=True, text=True).stdout
    return [line for line in listing.splitlines() if f"sleep {nap(user)}" in line and "sh -" not in line]
