# SPDX-License-Identifier: Apache-2.0
"""The embedded engine: jobs as child processes of the robot, ended with it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from pysingularity.hub.engines.base import Engine
from pysingularity.linux import process


class LocalEngine(Engine):
    """Runs jobs on this machine. A job is named `PID-START`, so that a number used again is not mistaken for it."""

    name = "local"

    def __init__(self) -> None:
        self._children: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, folder: Path, spec: dict[str, Any]) -> str:
        """Start the job's process."""
        (folder / "job.json").write_text(json.dumps({**spec, "parent": os.getpid()}))
        # Only the robot's way to git and certificates; the job passes on no more than its specification says.
        kept = {name: os.environ[name] for name in ("PATH", "LANG", "TZ") if name in os.environ}
        with (folder / "job.err").open("wb") as errors:
            child = subprocess.Popen(
                [sys.executable, "-I", "-m", "pysingularity.hub.engines.job", str(folder / "job.json")],
                env=kept,
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=errors,
                stderr=errors,
                start_new_session=True,
            )
        name = f"{child.pid}-{process.start_time(child.pid)}"
        self._children[name] = child
        return name

    def running(self, job: str) -> bool:
        """Return whether the job's process lives."""
        child = self._children.get(job)
        if child is None:
            return False
        if child.poll() is None:
            return True
        del self._children[job]
        return False

    def cancel(self, job: str) -> None:
        """Send SIGTERM."""
        self._signal(job, signal.SIGTERM)

    def kill(self, job: str) -> None:
        """Send SIGKILL; the sandbox dies with its job."""
        self._signal(job, signal.SIGKILL)

    def _signal(self, job: str, number: int) -> None:
        child = self._children.get(job)
        if child is not None and child.poll() is None:
            child.send_signal(number)

    def close(self) -> None:
        """End all jobs."""
        for child in list(self._children.values()):
            if child.poll() is None:
                child.kill()
            child.wait()
        self._children.clear()
