# SPDX-License-Identifier: Apache-2.0
"""The engine for clusters: each build is one batch job of Slurm, submitted by sbatch(1) and watched by squeue(1).

The data folder lies on a file system that the nodes share with the hub; specification, log and result of a job are
files in it. Jobs go on when the hub ends and are found again by their number. What the scheduler says only tells
whether it is worth waiting: a build is done when its result is there. Why these three programs and no library is in
docs/decisions/0010-slurm.md.
"""

from __future__ import annotations

import getpass
import json
import os
import re
import shlex
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from pysingularity import messages
from pysingularity.errors import HostError
from pysingularity.hub.engines.base import Engine
from pysingularity.hub.settings import Settings

#: States of squeue(1) in which a job is no more; everything else may still become a result.
ENDED = {
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"),
    *("REVOKED", "SPECIAL_EXIT", "TIMEOUT"),
}
#: The cluster's fault, not the build's: another node may do better.
UNLUCKY = {"BOOT_FAIL", "NODE_FAIL", "PREEMPTED", "REVOKED"}
#: Seconds that the scheduler gives a job beyond the build's own limit, so that the job can say itself what happened.
MARGIN = 300
#: Seconds for an answer of Slurm's programs; they try for a while themselves when the controller is away.
PATIENCE = 30
#: Variables that Slurm's programs and the job get from the hub.
_PASSED = ("PATH", "LANG", "TZ", "HOME", "USER", "LOGNAME", "SLURM_CONF", "LD_LIBRARY_PATH")


class SlurmEngine(Engine):
    """Runs jobs on a cluster. A job is named by Slurm's number."""

    name = "slurm"
    settle = 20.0

    def __init__(self, settings: Settings) -> None:
        self.settings = settings.builds.slurm
        self._lock = threading.Lock()
        #: number → (state, reason) as of `_asked`, and since when a job interests us: older lists say nothing about it.
        self._states: dict[str, tuple[str, str]] = {}
        self._since: dict[str, float] = {}
        self._asked = self._wanted = float("-inf")
        self._away = False
        self._hurry, self._closed = threading.Event(), threading.Event()
        threading.Thread(target=self._watch, daemon=True, name="slurm").start()

    @property
    def survives(self) -> bool:
        """Slurm goes on without us."""
        return True

    def start(self, folder: Path, spec: dict[str, Any]) -> str:
        """Submit the job.

        Raises:
            HostError: Slurm refuses it, or does not answer.
        """
        values = {**spec, "die_with_parent": False, "scratch": self.settings.scratch}
        (folder / "job.json").write_text(json.dumps(values))
        python = self.settings.python or sys.executable
        words = [python, "-I", "-m", "pysingularity.hub.engines.job", str(folder / "job.json")]
        script = "#!/bin/sh\nexec " + shlex.join(words) + "\n"
        answer = self._call(["sbatch", *self.options(folder, values)], text=script).strip()
        match = re.match(r"(\d+)", answer)
        if match is None:
            raise HostError("slurm", f"sbatch said {answer[:200]!r} in place of a number")
        self._state(match[1])
        return match[1]

    def options(self, folder: Path, spec: dict[str, Any]) -> list[str]:
        """Return the options of sbatch for a job."""
        mine, limits = self.settings, spec["limits"]
        found = [
            "--parsable",
            f"--job-name=hub-build-{spec['build']}",
            "--chdir=/",
            f"--output={_pattern(folder / 'job.err')}",
            "--open-mode=append",
            "--no-requeue",  # the hub decides about another attempt
            "--export=PATH,LANG,TZ",
            f"--time={-(-(int(limits['seconds']) + MARGIN) // 60)}",
            f"--cpus-per-task={mine.cpus}",
        ]
        if limits["memory"]:
            found.append(f"--mem={-(-int(limits['memory']) >> 20)}M")
        names = ("partition", "account", "qos", "constraint", "gres")
        found += [f"--{name}={value}" for name in names if (value := getattr(mine, name))]
        return [*found, *mine.options]

    # --- what becomes of it ---

    def running(self, job: str) -> bool:
        """Return whether a job waits, runs, or nobody knows."""
        state = self._state(job)
        return state is not None and state[0] not in ENDED

    def waits(self, job: str) -> str:
        """Return why a job waits."""
        state, reason = self._state(job) or ("", "")
        return f"job {job} waits in Slurm ({reason})" if state == "PENDING" else ""

    def verdict(self, job: str) -> tuple[str, str, str]:
        """Say what Slurm says of a job without a result."""
        state, reason = self._state(job) or ("gone", "")
        if state == "TIMEOUT":
            return "timed_out", "time-limit", f"Slurm ended job {job} at its time limit"
        if state == "OUT_OF_MEMORY":
            return "failed", "memory-limit", f"Slurm ended job {job}: out of memory"
        again = state in UNLUCKY or state in ("CANCELLED", "gone")
        said = state + (f", {reason}" if reason not in ("", "None") else "")
        return "queued" if again else "failed", "job-lost", f"job {job} left no result (Slurm says: {said})"

    def _state(self, job: str) -> tuple[str, str] | None:
        """Return (state, reason) of a job; None when Slurm has forgotten it, ("unknown", "") while nobody can say."""
        with self._lock:
            self._wanted = time.monotonic()
            since = self._since.get(job)
            if since is None:
                since = self._since[job] = self._wanted
                self._hurry.set()
            return ("unknown", "") if self._asked <= since else self._states.get(job)

    def _watch(self) -> None:
        """Ask Slurm now and then while somebody wants to know; workers never wait for its answer."""
        while not self._closed.is_set():
            self._hurry.wait(self.settings.poll)
            self._hurry.clear()
            if time.monotonic() - self._wanted < 3 * self.settings.poll:
                self._poll()
                self._closed.wait(min(1.0, self.settings.poll))

    def _poll(self) -> None:
        """Ask about all jobs of this account at once."""
        begun = time.monotonic()
        words = ["squeue", "--noheader", "--states=all", f"--user={getpass.getuser()}", "--format=%i|%T|%r"]
        try:
            text = self._call(words)
        except HostError as error:
            if not self._away:
                messages.warning(f"{error.message}; jobs are taken to be going on")
            self._away = True
            with self._lock:
                self._asked = float("-inf")  # nobody knows
            return
        self._away = False
        rows = [line.split("|", 2) for line in text.splitlines()]
        with self._lock:
            self._states = {row[0]: (row[1], row[2]) for row in rows if len(row) == 3}
            self._asked = begun

    def cancel(self, job: str) -> None:
        """Ask a job to end (SIGTERM)."""
        self._end(job, ["--signal=TERM", "--batch"])

    def kill(self, job: str) -> None:
        """Take a job out of the queue or off its node."""
        self._end(job, [])

    def _end(self, job: str, how: list[str]) -> None:
        state = self._state(job)
        if state is None or state[0] in ENDED:
            return
        if state[0] == "PENDING":
            how = []
        try:
            self._call(["scancel", "--quiet", *how, job])
        except HostError as error:
            # It ends by itself: its folder is not its own any more (see `job.Job.given_up`).
            messages.warning(f"job {job}: {error.message}")

    def close(self) -> None:
        """Stop watching; jobs go on."""
        self._closed.set()
        self._hurry.set()

    def _call(self, words: list[str], *, text: str = "") -> str:
        environment = {name: os.environ[name] for name in _PASSED if name in os.environ}
        try:
            result = subprocess.run(
                words, input=text, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False
            )
        except FileNotFoundError:
            raise HostError("no-slurm", f"{words[0]}: not found", hint="install Slurm's commands on the hub's machine")
        except subprocess.TimeoutExpired:
            raise HostError("slurm", f"{words[0]} did not answer within {PATIENCE} s")
        if result.returncode:
            lines = result.stderr.strip().splitlines() or [f"{words[0]} ended with {result.returncode}"]
            raise HostError("slurm", lines[-1][:500])
        return result.stdout


def _pattern(path: Path) -> str:
    """Return a path as sbatch's file name patterns have it."""
    return str(path).replace("%", "%%")
