# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks share: run commands in turn in the same minute, and print medians and ratios.

A figure of one run on a busy machine says little; commands are interleaved (A B C, A B C, ...) so that a slow minute
slows all of them, and ratios are made pair by pair. Benchmarks print; they never decide a test.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field


@dataclass
class Series:
    """Wall seconds, processor seconds (with children) and peak memory (MiB, largest process) of one command."""

    name: str
    command: Sequence[str] | Callable[[], object]
    before: Callable[[], object] | None = None
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    peak: list[float] = field(default_factory=list)

    def once(self, environ: dict[str, str] | None = None, count: bool = True) -> None:
        """Run the command once and note its figures."""
        if self.before:
            self.before()
        started = time.perf_counter()
        if callable(self.command):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            self.command()
            wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
            cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            peak = after.ru_maxrss
        else:
            child = subprocess.Popen(
                self.command, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL
            )
            complaint = child.stderr.read()
            _, status, usage = os.wait4(child.pid, 0)
            child.returncode = os.waitstatus_to_exitcode(status)
            child.stderr.close()
            wall = time.perf_counter() - started
            if child.returncode:
                sys.exit(f"{self.name}: {self.command} ended with {child.returncode}\n{complaint.decode()}")
            cpu, peak = usage.ru_utime + usage.ru_stime, usage.ru_maxrss
        if count:
            self.wall.append(wall)
            self.cpu.append(cpu)
            self.peak.append(peak / 1024)


def interleave(series: list[Series], runs: int, environ: dict[str, str] | None = None, warmup: int = 1) -> None:
    """Run every series `runs` times, in turn, after uncounted warm-ups."""
    for number in range(warmup + runs):
        for one in series:
            one.once(environ, count=number >= warmup)


def table(series: list[Series], base: str = "", unit: float = 1.0) -> None:
    """Print a row per series: median and minimum of wall, median processor time, peak, and the ratio to `base`.

    Arguments:
        unit: 1 prints seconds, 1000 milliseconds.
    """
    name = "ms" if unit == 1000 else "s"
    reference = next((one for one in series if one.name == base), None)
    print(
        f"{'':<34} {'wall ' + name:>10} {'min':>9} {'cpu ' + name:>10} {'peak MiB':>9} "
        f"{'wall ratio':>11} {'cpu ratio':>10}"
    )
    for one in series:
        ratios = ""
        if reference is not None and reference is not one:
            wall = statistics.median(a / b for a, b in zip(one.wall, reference.wall, strict=True))
            cpu = statistics.median(a / b for a, b in zip(one.cpu, reference.cpu, strict=True) if b)
            ratios = f"{wall:>11.2f} {cpu:>10.2f}"
        print(
            f"{one.name:<34} {statistics.median(one.wall) * unit:>10.2f} {min(one.wall) * unit:>9.2f} "
            f"{statistics.median(one.cpu) * unit:>10.2f} {max(one.peak):>9.0f} {ratios}"
        )
    if reference is not None:
        print(f"ratios: median of pairs against {base}, {len(reference.wall)} runs each, in turn")


def enter_tree(path: str | None):
    """Return the `peer.Tree` of a root folder, None for none. Ends the benchmark when not started as root."""
    if not path:
        return None
    if os.getuid() != 0:
        sys.exit("--tree needs root, to enter the tree; everything measured runs as ordinary users")
    from peer import Tree

    return Tree(path)


def drop_privileges(name: str = "pysing") -> dict[str, str]:
    """Become an ordinary user when started as root; return the environment to run commands with."""
    import pwd

    account = pwd.getpwnam(name) if os.getuid() == 0 else pwd.getpwuid(os.getuid())
    if os.getuid() == 0:
        os.setgroups([])
        os.setgid(account.pw_gid)
        os.setuid(account.pw_uid)
    os.environ.update(HOME=account.pw_dir, USER=account.pw_name, LOGNAME=account.pw_name)
    return dict(os.environ)
