# SPDX-License-Identifier: Apache-2.0
"""Starts of containers as people meet them, against Apptainer and bubblewrap in the same minute, as an ordinary user.

    bench/runtime.py SANDBOX IMAGE.sif [--tree ROOT] [--runs 30] [--at-once 64] [--python IMAGE.sif SANDBOX MODULE]

Four tables: `exec true` (a sandbox, a SIF file cold and warm, --pid, joining an instance); many starts at once, per
second; memory that 16 containers of one image take together; and, with --python, importing a module (torch) from a SIF
file against the same tree as a folder (from memory; started as root also from the disk). SANDBOX and IMAGE must lie
below /tmp, which the tree of the peer (a root folder with Apptainer in it, entered once by root) shares. Without --tree
the peer is left out.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable

from common import Series, drop_privileges, enter_tree, interleave, table

#: Starts N commands at once and waits for them; what is measured is the whole.
MANY = 'n=$1; shift; while [ $n -gt 0 ]; do "$@" & n=$((n - 1)); done; wait'
COLD = ["env", "SINGULARITY_IMAGE_KEEP=0"]


def starts(ours: str, sandbox: str, image: str, tree, runs: int) -> None:
    """Print how long one start takes."""
    from peer import PeerSeries

    python = os.path.join(os.path.dirname(os.path.realpath(ours)), "python3")
    subprocess.run([ours, "-q", "instance", "start", image, "bench-join"], check=True)
    series = [
        Series("python3 -I -S -c pass", [python, "-I", "-S", "-c", "pass"]),
        Series("sandbox: singularity", [ours, "exec", sandbox, "true"]),
        Series("SIF cold: singularity", [*COLD, ours, "exec", image, "true"]),
        Series("SIF warm: singularity", [ours, "exec", image, "true"]),
        Series("sandbox, --pid: singularity", [ours, "exec", "--pid", sandbox, "true"]),
        Series("join an instance: singularity", [ours, "exec", "instance://bench-join", "true"]),
    ]
    if shutil.which("bwrap"):
        words = ["bwrap", "--ro-bind", sandbox, "/", "--dev-bind", "/dev", "/dev", "--proc", "/proc", "true"]
        series.append(Series("sandbox: bubblewrap", words))
    try:
        if tree:
            tree.run(["apptainer", "instance", "start", image, "bench-join"])
            series += [
                PeerSeries("sandbox: apptainer", tree, ["apptainer", "exec", sandbox, "true"]),
                PeerSeries("SIF: apptainer", tree, ["apptainer", "exec", image, "true"]),
                PeerSeries("sandbox, --pid: apptainer", tree, ["apptainer", "exec", "--pid", sandbox, "true"]),
                PeerSeries("join an instance: apptainer", tree, ["apptainer", "exec", "instance://bench-join", "true"]),
            ]
        interleave(series, runs, dict(os.environ), warmup=2)
    finally:
        subprocess.run([ours, "-q", "instance", "stop", "bench-join"], check=False)
        if tree:
            tree.run(["apptainer", "instance", "stop", "bench-join"])
    table(series, base="sandbox: singularity", unit=1000)
    for kind in ("sandbox", "SIF", "sandbox, --pid", "join an instance") if tree else ():
        print()
        mine = [one for one in series if one.name.startswith((f"{kind}: ", f"{kind} cold: ", f"{kind} warm: "))]
        table(mine, base=f"{kind}: apptainer", unit=1000)


def at_once(ours: str, sandbox: str, image: str, tree, count: int, runs: int) -> None:
    """Print how many starts per second there are when many are started at once."""
    from peer import PeerSeries

    def words(*command: str) -> list[str]:
        return ["sh", "-c", MANY, "many", str(count), *command]

    series = [
        Series("sandbox: singularity", words(ours, "exec", sandbox, "true")),
        Series("SIF cold: singularity", words(*COLD, ours, "exec", image, "true")),
        Series("SIF warm: singularity", words(ours, "exec", image, "true")),
    ]
    if tree:
        series += [
            PeerSeries("sandbox: apptainer", tree, words("apptainer", "exec", sandbox, "true")),
            PeerSeries("SIF: apptainer", tree, words("apptainer", "exec", image, "true")),
        ]
    interleave(series, runs, dict(os.environ))
    print(
        f"\n{count} starts at once on {len(os.sched_getaffinity(0))} processors: starts per second (median of {runs})"
    )
    for one in series:
        print(f"{one.name:<34} {count / statistics.median(one.wall):>8.1f}   best {count / min(one.wall):>8.1f}")


def memory(ours: str, image: str, count: int = 16) -> None:
    """Print what many containers of one image take together: servers, and the image's pages in the page cache."""
    print(f"\nmemory of {count} containers that read the same 40 MB of the image, together")
    for name, keep in (("each with its own mount", "0"), ("one mount, warm", "10")):
        environ = {**os.environ, "SINGULARITY_IMAGE_KEEP": keep}
        script = "find /usr/lib -type f -size +100k | head -60 | xargs cat > /dev/null; echo ready; read x"
        cached = _cached()
        started = [
            subprocess.Popen(
                [ours, "exec", image, "sh", "-c", script], env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
            for _ in range(count)
        ]
        for one in started:
            one.stdout.readline()
        servers = _servers()
        pss = sum(_pss(pid) for pid in servers)
        print(
            f"{name:<34} {len(servers):>3} servers with {pss / 2**20:>6.1f} MiB of their own, "
            f"page cache grew by {(_cached() - cached) / 2**20:>7.1f} MiB"
        )
        for one in started:
            one.communicate(b"\n")
        time.sleep(1)


def _cached() -> int:
    with open("/proc/meminfo") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("Cached:"))


def _servers() -> list[str]:
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/comm") as file:
                if file.read() == "singularity-fs\n" and os.stat(f"/proc/{name}").st_uid in (0, os.getuid()):
                    found.append(name)
        except OSError:
            continue
    return found


def _pss(pid: str) -> int:
    """Return a process's memory: its proportional share where we may see it, else what is resident."""
    for path, word in ((f"/proc/{pid}/smaps_rollup", "Pss:"), (f"/proc/{pid}/status", "RssAnon:")):
        try:
            with open(path) as file:
                return next(int(line.split()[1]) * 1024 for line in file if line.startswith(word))
        except (OSError, StopIteration):
            continue
    return 0


def forgetter() -> Callable[[], object] | None:
    """Return a function that has the kernel forget what it has read from disks; None unless started as root.

    A child stays root for it, and ends with us.
    """
    if os.getuid() != 0:
        return None
    ask, say = os.pipe(), os.pipe()
    if os.fork() == 0:
        os.close(ask[1])
        while os.read(ask[0], 1):
            os.sync()
            with open("/proc/sys/vm/drop_caches", "w") as file:
                file.write("3")
            os.write(say[1], b".")
        os._exit(0)

    def forget() -> None:
        os.write(ask[1], b".")
        os.read(say[0], 1)

    return forget


def python(ours: str, image: str, sandbox: str, module: str, runs: int, forget: Callable[[], object] | None) -> None:
    """Print how long importing a module takes: from a folder, from a SIF file mounted anew, and from a warm one.

    And for the very first time, when nothing of the folder or the file has been read from the disk yet.
    """
    command = ["python3", "-c", f"import {module}"]
    series = [
        Series(f"import {module}: sandbox", [ours, "exec", sandbox, *command]),
        Series(f"import {module}: SIF, first", [*COLD, ours, "exec", image, *command]),
        Series(f"import {module}: SIF, again", [ours, "exec", image, *command]),
    ]
    interleave(series, runs, dict(os.environ))
    print()
    table(series, base=series[0].name, unit=1000)
    if forget is not None:
        series = [
            Series(f"import {module}: sandbox, from disk", [ours, "exec", sandbox, *command], forget),
            Series(f"import {module}: SIF, from disk", [*COLD, ours, "exec", image, *command], forget),
        ]
        interleave(series, runs, dict(os.environ), warmup=0)
        print()
        table(series, base=series[0].name, unit=1000)


def main() -> None:
    """Parse, run in turn, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sandbox")
    parser.add_argument("image")
    parser.add_argument("--tree", help="root folder of a system with Apptainer and a user of uid 1000")
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--at-once", type=int, default=64)
    parser.add_argument("--python", nargs=3, metavar=("IMAGE", "SANDBOX", "MODULE"))
    parser.add_argument("--only", choices=("starts", "at-once", "memory", "python"))
    parser.add_argument("--singularity", default=shutil.which("singularity"))
    parser.add_argument("--user", default="pysing")
    options = parser.parse_args()
    tree = enter_tree(options.tree)
    forget = forgetter()
    drop_privileges(options.user)
    os.environ["SINGULARITY_IMAGE_KEEP"] = "10"
    os.environ["SINGULARITY_CONFIGDIR"] = tempfile.mkdtemp(prefix="bench-runtime-")
    ours, many = options.singularity, max(3, options.runs // 6)
    todo = [options.only] if options.only else ["starts", "at-once", "memory", *(["python"] if options.python else [])]
    if "starts" in todo:
        starts(ours, options.sandbox, options.image, tree, options.runs)
    if "at-once" in todo:
        at_once(ours, options.sandbox, options.image, tree, options.at_once, many)
    if "memory" in todo:
        memory(ours, options.image)
    if "python" in todo:
        python(ours, *options.python, many, forget)
    shutil.rmtree(os.environ["SINGULARITY_CONFIGDIR"])


if __name__ == "__main__":
    main()
