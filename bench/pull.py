# SPDX-License-Identifier: Apache-2.0
"""A registry's image to one file: ours against Apptainer, and against what the work costs at the least.

    python bench/pull.py                       makes and serves the large Python image first (largeimage.py)
    python bench/pull.py 127.0.0.1:5000/lab/big:1 [--rounds 1] [--floor]

Measured are wall, CPU, peak memory of the whole process tree (proportional set size), bytes written, and the size of
the result, each tool with an empty cache, taking turns; then what a cached image costs (pull again, exec), and what a
second image costs on layers that the cache knows. The floor is SHA-256 of the layers, inflating, reading tar headers
and deflating every block, with the same libraries, in one process and nothing else. Started by root, everything runs
as an ordinary user. REFERENCE_APPTAINER names the other tool's command; without it only ours is measured. The registry
speaks plain http.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import pwd
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


def measure(argv: list[str], env: dict[str, str], who: dict[str, int]) -> dict[str, float]:
    """Run a command (as somebody) and return what it cost."""
    peak = 0
    start = time.monotonic()
    process = subprocess.Popen(argv, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, **who)
    over = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not over.wait(0.25):
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


def account(name: str) -> dict[str, int]:
    """Return what makes a child an ordinary user, when we are root."""
    if os.getuid():
        return {}
    entry = pwd.getpwnam(name)
    return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}  # type: ignore[dict-item]


def row(name: str, cost: dict[str, float], target: str) -> None:
    """Print one line of the table."""
    size = os.stat(target).st_size / 1e6 if target else 0.0
    figures = f"{cost['wall']:9.2f}{cost['cpu']:9.2f}{cost['peak']:10.0f}{cost['written']:12.0f}{size:9.1f}"
    print(f"{name:<34}{figures}", flush=True)


class Bench:
    """The tools, and folders for them."""

    def __init__(self, reference: str, place: str, user: str) -> None:
        self.reference, self.place = reference, place
        self.who = account(user)
        self.ours = str(Path(sys.executable).parent / "singularity")
        self.other = (os.environ.get("REFERENCE_APPTAINER") or shutil.which("apptainer") or "").split()

    def folder(self) -> Path:
        """Return a new folder that everybody may write."""
        found = Path(tempfile.mkdtemp(prefix="pull-", dir=self.place))
        found.chmod(0o777)
        return found

    def environ(self, folder: Path) -> dict[str, str]:
        """Return variables that keep everything in a folder."""
        names = ("SINGULARITY_CACHEDIR", "APPTAINER_CACHEDIR", "APPTAINER_TMPDIR", "SINGULARITY_TMPDIR")
        return {**os.environ, **dict.fromkeys(names, str(folder)), "AS_UID": "1000"}

    def run(
        self, words: list[str], folder: Path, target: str = "", name: str = "", *, tool: str = "ours"
    ) -> dict[str, float]:
        """Run a command of a tool and print what it cost."""
        argv = [self.ours, *words] if tool == "ours" else [*self.other, *words]
        home = {"HOME": str(folder)} if tool == "ours" and self.who else {}
        cost = measure(argv, {**self.environ(folder), **home}, self.who if tool == "ours" else {})
        if name:
            row(name, cost, target)
        return cost


def ratio(title: str, one: float, other: float, bound: float) -> None:
    """Print a figure beside its bound."""
    print(f"{title:<60}{one / other:8.3f}   (at most {bound:.3f})")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reference", nargs="?", help="HOST:PORT/NAME:TAG of a registry that speaks plain http")
    parser.add_argument("--shared", default="", help="two images that share most layers (TAG,TAG)")
    parser.add_argument("--cached", action="store_true", help="measure only what the cache is good for")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--floor", action="store_true", help="measure the floor as well")
    parser.add_argument("--ours", action="store_true", help="leave the other tool out")
    parser.add_argument("--image", default="/var/tmp/pysingularity-large", help="folder of the large image")
    parser.add_argument("--place", default="/tmp", help="folder for caches and results")
    parser.add_argument("--user", default="pysing", help="ordinary user to become when started by root")
    arguments = parser.parse_args()
    process = None
    reference, (first, _, second) = arguments.reference, arguments.shared.partition(",")
    if not reference:
        import largeimage

        largeimage.make(Path(arguments.image))
        process, name = largeimage.serve(Path(arguments.image))
        reference, first, second = f"{name}:large", "first", "second"
    bench = Bench(reference, arguments.place, arguments.user)
    if arguments.ours:
        bench.other = []
    try:
        if not arguments.cached:
            compare(bench, arguments.rounds)
        again(bench)
        if first:
            shared(bench, first, second)
        if arguments.floor:
            parts = floor(reference)
            print("floor, CPU s: " + ", ".join(f"{name} {value:.2f}" for name, value in parts.items()))
    finally:
        if process is not None:
            process.terminate()


def compare(bench: Bench, rounds: int) -> None:
    """Pull with empty caches, in turn."""
    print(f"{'tool':<34}{'wall s':>9}{'CPU s':>9}{'peak MiB':>10}{'written MB':>12}{'size MB':>9}")
    sums: dict[str, dict[str, float]] = {}
    for _ in range(rounds):
        for name in ("ours", "ours, zstd", "apptainer"):
            if name == "apptainer" and not bench.other:
                continue
            folder = bench.folder()
            target = str(folder / "image.sif")
            extra = ["--compress", "zstd"] if "zstd" in name else []
            words = ["pull", *extra, "--no-https", target, "docker://" + bench.reference]
            cost = bench.run(words, folder, target, name, tool="apptainer" if name == "apptainer" else "ours")
            cost["size"] = os.stat(target).st_size
            total = sums.setdefault(name, dict.fromkeys(cost, 0.0))
            for key, value in cost.items():
                total[key] = max(total[key], value) if key == "peak" else total[key] + value
            shutil.rmtree(folder, ignore_errors=True)
    if "apptainer" in sums:
        for key, bound in (("wall", 1 / 6), ("cpu", 1 / 6), ("size", 1.02)):
            ratio(f"ours to apptainer: {key}", sums["ours"][key], sums["apptainer"][key], bound)


def again(bench: Bench) -> None:
    """Use what the cache has: the same image once more, and run it."""
    folder = bench.folder()
    target = str(folder / "image.sif")
    pull = ["pull", "-F", "--no-https", target, "docker://" + bench.reference]
    bench.run(pull, folder)
    run = ["exec", "--no-https", "docker://" + bench.reference, "true"]
    for title, words, bound in (("pull of a cached image, ms", pull, 150), ("exec of a cached image, ms", run, 100)):
        costs = [bench.run(words, folder) for _ in range(21)]
        times = sorted(1000 * cost["wall"] for cost in costs)
        cpu = sorted(1000 * cost["cpu"] for cost in costs)[10]
        print(f"{title:<60}{times[10]:8.0f}   (at most {bound}; least {times[0]:.0f}; CPU {cpu:.0f})")
    shutil.rmtree(folder, ignore_errors=True)


def shared(bench: Bench, first: str, second: str) -> None:
    """Pull two images that share most layers, in one cache, and the second one in an empty cache as well."""
    name = f"docker://{bench.reference.rpartition(':')[0]}"
    folder, other = bench.folder(), bench.folder()
    costs = []
    for title, tag, place in (
        (f"{first}, nothing known", first, folder),
        (f"{second}, layers known", second, folder),
        (f"{second}, nothing known", second, other),
    ):
        target = str(place / f"{tag}.sif")
        costs.append(bench.run(["pull", "--no-https", target, f"{name}:{tag}"], place, target, title))
    words = ["cmp", str(folder / f"{second}.sif"), str(other / f"{second}.sif")]
    same = subprocess.run(words, check=False).returncode == 0
    ratio("CPU of the second image to that of the first", costs[1]["cpu"], costs[0]["cpu"], 0.2)
    print(f"with and without known layers the file is {'the same' if same else 'DIFFERENT'}")
    for one in (folder, other):
        shutil.rmtree(one, ignore_errors=True)


if __name__ == "__main__":
    main()
