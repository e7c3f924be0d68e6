# SPDX-License-Identifier: Apache-2.0
"""`singularity instance stats`: processor time, memory and processes of an instance, from /proc (no cgroup needed)."""

from __future__ import annotations

import os
import time

from pysingularity.cli.options import Arguments, Option
from pysingularity.runtime.instances import Instance, find

USAGE = "NAME"
COUNT = (1, 1)
OPTIONS = (
    Option("json", "Print one JSON object and end", short="j", env=("JSON",)),
    Option("no-stream", "Print once and end", env=("NO_STREAM",)),
)
HELP = """
Without --no-stream a line is printed every second until the instance ends or Ctrl-C. Memory is what the processes have
of their own plus their shares of what they have in common (proportional set size).
"""


def run(arguments: Arguments, environ: dict[str, str]) -> int:
    """Print what the instance uses."""
    instance = find(arguments.positional[0], environ)
    once = arguments.json or arguments.no_stream
    before, then = usage(instance), time.monotonic()
    if not arguments.json:
        print(f"{'INSTANCE NAME':<24} {'CPU %':>7} {'MEMORY MiB':>11} {'PROCESSES':>10}")
    while True:
        time.sleep(0.2 if once else 1)
        if not instance.alive():
            return 0
        now, moment = usage(instance), time.monotonic()
        share = 100 * max(now["cpu"] - before["cpu"], 0) / (moment - then)
        if arguments.json:
            import json

            print(
                json.dumps(
                    {
                        "instance": instance.name,
                        "cpuPercent": round(share, 1),
                        "cpuSeconds": round(now["cpu"], 2),
                        "memoryBytes": int(now["memory"]),
                        "processes": int(now["processes"]),
                    }
                )
            )
            return 0
        print(
            f"{instance.name:<24} {share:>7.1f} {now['memory'] / 2**20:>11.1f} {int(now['processes']):>10}", flush=True
        )
        if once:
            return 0
        before, then = now, moment


def usage(instance: Instance) -> dict[str, float]:
    """Return processor seconds, memory bytes and number of the processes in an instance's pid namespace."""
    space = os.stat(f"/proc/{instance.pid}/ns/pid_for_children").st_ino
    total = {"cpu": 0.0, "memory": 0.0, "processes": 0.0}
    ticks, page = os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE")
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if os.stat(f"/proc/{pid}/ns/pid").st_ino != space:
                continue
            with open(f"/proc/{pid}/stat", "rb") as file:
                fields = file.read().rpartition(b")")[2].split()
        except OSError:  # ended meanwhile, or another user's
            continue
        total["cpu"] += (int(fields[11]) + int(fields[12])) / ticks
        total["memory"] += _memory(pid, int(fields[21]) * page)
        total["processes"] += 1
    return total


def _memory(pid: str, resident: int) -> int:
    """Return a process's proportional set size, or its resident size where that is a secret (our process 1)."""
    try:
        with open(f"/proc/{pid}/smaps_rollup", "rb") as file:
            return next((int(line.split()[1]) * 1024 for line in file if line.startswith(b"Pss:")), resident)
    except OSError:
        return resident
