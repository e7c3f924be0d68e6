# SPDX-License-Identifier: Apache-2.0
"""A registry's image to one file: ours against Apptainer, and against what the work costs at the least.

    python bench/pull.py 127.0.0.1:5000/lab/big:1 [--rounds 1]

Measured are wall, CPU, peak memory of the whole process tree (proportional set size), bytes written, and the size of
the result, each tool with an empty cache, taking turns. The floor is SHA-256 of the layers, inflating, reading tar
headers and deflating every block, with the same libraries, in one process and nothing else. REFERENCE_APPTAINER
names the other tool's command; without it only ours is measured. The registry speaks plain http.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from pysingularity import thirdparty
from pysingularity.reference import parse_reference
from pysingularity.registry import oci
from pysingularity.registry.inflate import Inflate
from pysingularity.registry.settings import settings_from
from pysingularity.registry.tar import TarReader
from pysingularity.squashfs import codecs

thirdparty.enable()
BLOCK = 131072


def descendants(top: int) -> list[int]:
    """Return a process and everything below it."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/stat", "rb") as file:
                    parent = int(file.read().rpartition(b")")[2].split()[1])
            except (OSError, IndexError, ValueError):
                continue
            children.setdefault(parent, []).append(int(entry))
    found, stack = [], [top]
    while stack:
        one = stack.pop()
        found.append(one)
        stack += children.get(one, ())
    return found


def memory(pid: int) -> int:
    """Return the proportional set size of a process in KiB."""
    try:
        with open(f"/proc/{pid}/smaps_rollup", "rb") as file:
            for line in file:
                if line.startswith(b"Pss:"):
                    return int(line.split()[1])
    except (OSError, ValueError):
        pass
    return 0


def measure(argv: list[str], env: dict[str, str]) -> dict[str, float]:
    """Run a command and return what it cost."""
    peak = 0
    start = time.monotonic()
    process = subprocess.Popen(argv, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    over = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not over.wait(0.1):
            peak = max(peak, sum(memory(pid) for pid in descendants(process.pid)))

    watcher = threading.Thread(target=watch)
    watcher.start()
    errors = process.stderr.read() if process.stderr else b""
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    wall = time.monotonic() - start
    over.set()
    watcher.join()
    if process.returncode:
        sys.exit(f"{argv}: {process.returncode}\n{errors.decode(errors='replace')}")
    cpu = usage.ru_utime + usage.ru_stime
    return {"wall": wall, "cpu": cpu, "peak": peak / 1024, "written": usage.ru_oublock * 512 / 1e6}


def floor(reference: str) -> dict[str, float]:
    """Return CPU seconds of the parts that nobody can leave out."""
    settings = settings_from({"no_https": True})
    repository = oci.Repository(parse_reference("docker://" + reference), settings)
    manifest = repository.manifest(parse_reference("docker://" + reference).tag)
    if manifest.is_index:
        manifest = repository.manifest(oci.choose(manifest, settings.arch, "", reference).digest)
    _, compress, _ = codecs.compressor("gzip", None)
    found = {"hash": 0.0, "inflate": 0.0, "parse": 0.0, "deflate": 0.0}
    for layer in oci.layers_of(manifest, reference):
        data = b"".join(repository.open_blob(layer).pieces(1 << 20))
        at = time.process_time()
        hashlib.sha256(data).digest()
        found["hash"] += time.process_time() - at
        plain = Inflate(_reader(data), "floor")
        at = time.process_time()
        while plain.read(1 << 20):
            pass
        inflate = time.process_time() - at
        found["inflate"] += inflate
        at = time.process_time()
        for _ in TarReader(Inflate(_reader(data), "floor")):
            pass
        found["parse"] += max(time.process_time() - at - inflate, 0.0)
        plain = Inflate(_reader(data), "floor")
        while block := plain.read(BLOCK):
            at = time.process_time()
            compress(block)
            found["deflate"] += time.process_time() - at
    found["all"] = sum(found.values())
    return found


def _reader(data: bytes):
    at = 0

    def read(size: int) -> bytes:
        nonlocal at
        at += size
        return data[at - size : at]

    return read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("reference", help="HOST:PORT/NAME:TAG of a registry that speaks plain http")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--floor", action="store_true", help="measure the floor as well")
    arguments = parser.parse_args()
    ours = str(Path(sys.executable).parent / "singularity")
    other = os.environ.get("REFERENCE_APPTAINER") or shutil.which("apptainer")
    print(f"{'tool':<22}{'wall s':>9}{'CPU s':>9}{'peak MiB':>10}{'written MB':>12}{'size MB':>9}")
    for _ in range(arguments.rounds):
        for name in ("ours", "ours, second", "ours, zstd", "apptainer"):
            if name == "apptainer" and not other:
                continue
            if name != "ours, second":
                folder = Path(tempfile.mkdtemp(prefix="pull-", dir="/tmp"))
                folder.chmod(0o777)
            env = {
                **os.environ,
                "SINGULARITY_CACHEDIR": str(folder),
                "APPTAINER_CACHEDIR": str(folder),
                "APPTAINER_TMPDIR": str(folder),
                "AS_UID": "1000",
            }
            target = str(folder / (name.replace(", ", "-") + ".sif"))
            words = [*other.split()] if name == "apptainer" and other else [ours]
            extra = ["--compress", "zstd"] if "zstd" in name else []
            argv = [*words, "pull", *extra, "--no-https", target, "docker://" + arguments.reference]
            cost = measure(argv, env)
            size = os.stat(target).st_size / 1e6
            row = f"{cost['wall']:9.2f}{cost['cpu']:9.2f}{cost['peak']:10.0f}{cost['written']:12.0f}{size:9.1f}"
            print(f"{name:<22}{row}", flush=True)
            if name != "ours":
                shutil.rmtree(folder, ignore_errors=True)
    if arguments.floor:
        parts = floor(arguments.reference)
        print("floor, CPU s: " + ", ".join(f"{name} {value:.2f}" for name, value in parts.items()))


if __name__ == "__main__":
    main()
