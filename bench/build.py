# SPDX-License-Identifier: Apache-2.0
"""The large recipe of the tutorial: a user's build against real root's chroot and `apptainer build --fakeroot`.

    python bench/build.py [--runs N] [--wheels DIR] [--small] [--without-peer]

Start as root: the build runs as an ordinary user with subordinate ids, %post once more in a chroot as real root, and
the peer as the ordinary user of its own tree (REFERENCE_APPTAINER=COMMAND, which sees /tmp). All start from the same
small Debian and install the same packages from the same mirror, one after the other. Then the last step of the recipe
is changed and it is built again, and once more without a change.

--wheels names a folder of wheels that pip looks into first (PyTorch for the processor); --small takes a recipe of two
packages, to see that the benchmark works.
"""

from __future__ import annotations

import argparse
import json
import os
import pwd
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TUTORIAL = Path(__file__).parent.parent / "docs/tutorials/a-simulation-from-download-to-recipe.md"
SMALL = """\
%post
    #step packages of Debian
    export DEBIAN_FRONTEND=noninteractive
    apt-get update
    apt-get install -y python3-pip
    apt-get clean

    #step packages of Python
    pip install --break-system-packages --no-cache-dir --find-links /wheels h5py

    #step mount points
    mkdir -p /dataset
"""
#: What changes in the last step.
CHANGE = ("mkdir -p /dataset", "mkdir -p /dataset /another")
CHROOT = """
for one in proc dev sys; do mount --rbind /$one $0/$one; done
for one in resolv.conf hosts ssl/certs/ca-certificates.crt; do
    touch $0/etc/$one; mount --bind /etc/$one $0/etc/$one
done
mkdir -p $0/wheels; mount --bind "$2" $0/wheels
exec env -i $PROXIES PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C \\
    chroot $0 sh -ec "$1"
"""
CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"


def recipe(small: bool) -> str:
    """Return the body of the recipe, from %post on."""
    if small:
        return SMALL
    text = TUTORIAL.read_text()
    body = re.search(r"^```file simulation\.def\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert body
    return body[1][body[1].index("%post") :]


def script(body: str) -> str:
    """Return the commands of %post."""
    return body[len("%post") :].split("\n%")[0]


class Work:
    """Folders and users of one measurement."""

    def __init__(self, base: Path, user: str, wheels: Path) -> None:
        self.base, self.wheels, self.account = base, wheels, pwd.getpwnam(user)
        self.cache = base / "cache"
        os.chown(base, self.account.pw_uid, self.account.pw_gid)
        self.environ = {
            "PATH": f"{Path(sys.executable).parent}:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": self.account.pw_dir,
            "USER": user,
            "SINGULARITY_CACHEDIR": str(self.cache),
            "SINGULARITY_TMPDIR": str(base),
            **{name: value for name, value in os.environ.items() if name.lower().endswith("_proxy")},
        }

    def build(self, *words: object, root: bool = False) -> list[dict]:
        """Build something; return the events."""
        command = ["singularity", "build", "--json", "--force", *map(str, words)]
        ids = {} if root else {"user": self.account.pw_uid, "group": self.account.pw_gid, "extra_groups": []}
        done = subprocess.run(
            command, cwd=self.base, env=self.environ, capture_output=True, text=True, check=False, **ids
        )
        if done.returncode:
            sys.exit(f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
        return [json.loads(line) for line in done.stdout.splitlines()]

    def write(self, name: str, text: str) -> Path:
        """Write a file that the user may read."""
        path = self.base / name
        path.write_text(text)
        return path


def phases(events: list[dict]) -> dict[str, float]:
    """Return the seconds of a build: of %post, its processor seconds, of making the image, and of everything."""
    found = {"post": 0.0, "post cpu": 0.0, "image": 0.0, "all": events[-1]["time"] - events[0]["time"]}
    kinds = {step["number"]: step["kind"] for step in events[0]["steps"]}
    for event in events:
        if event["event"] == "end":
            kind = kinds[event["step"]]
            if kind == "post":
                found["post"] += event["seconds"]
                found["post cpu"] += event["cpu"]
            elif kind in ("assemble", "metadata"):
                found["image"] += event["seconds"]
    return found


def by_root(work: Work, commands: str) -> tuple[float, float]:
    """Return the seconds and processor seconds of %post in a chroot of real root."""
    box = work.base / "chroot"
    work.build("--sandbox", "--fakeroot", box, "base.sif", root=True)
    proxies = " ".join(f"{name}={value}" for name, value in os.environ.items() if name.lower().endswith("_proxy"))
    words = ["unshare", "-m", "--pid", "--fork", "sh", "-c", CHROOT, box, commands, work.wheels]
    begun, used = time.perf_counter(), sum(os.times()[2:4])
    done = subprocess.run(
        words, env={"PROXIES": proxies, "PATH": os.environ["PATH"]}, capture_output=True, text=True, check=False
    )
    took, used = time.perf_counter() - begun, sum(os.times()[2:4]) - used
    if done.returncode:
        sys.exit(f"chroot: {done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    shutil.rmtree(box)
    return took, used


def by_peer(work: Work, text: str) -> dict[str, float]:
    """Return the seconds of Apptainer's build: of %post, of making the image, and of everything."""
    command = os.environ["REFERENCE_APPTAINER"].split()
    place = Path(tempfile.mkdtemp(prefix="bench-build-", dir="/tmp"))  # which its tree has, too
    try:
        shutil.copyfile(work.base / "base.sif", place / "base.sif")
        shutil.copytree(work.wheels, place / "wheels")
        shutil.copyfile(CERTIFICATES, place / "ca.crt")
        (place / "x.def").write_text(text.replace("From: base.sif", f"From: {place}/base.sif"))
        (place / "tmp").mkdir()
        subprocess.run(["chmod", "-R", "a+rwX", place], check=True)
        binds = f"{place}/wheels:/wheels,{place}/ca.crt:{CERTIFICATES}"
        words = ["build", "--fakeroot", "--bind", binds, f"{place}/x.sif", f"{place}/x.def"]
        environ = {**os.environ, "AS_UID": "1000", "APPTAINER_TMPDIR": f"{place}/tmp"}
        begun = time.perf_counter()
        at = {"begun": begun}
        said = []
        with subprocess.Popen(
            [*command, *words],
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as child:
            for line in child.stdout:
                said.append(line)
                if "Running post scriptlet" in line:
                    at["post"] = time.perf_counter()
                elif "Creating SIF file" in line:
                    at["image"] = time.perf_counter()
                elif "Build complete" in line:
                    at["done"] = time.perf_counter()
        if child.returncode:
            sys.exit(f"apptainer: {''.join(said)[-3000:]}")
        return {"post": at["image"] - at["post"], "image": at["done"] - at["image"], "all": at["done"] - begun}
    finally:
        subprocess.run(["rm", "-rf", place], check=False)


def show(name: str, seconds: list[float], against: list[float], goal: str) -> None:
    """Print a line of the table."""
    ratio = statistics.median(one / other for one, other in zip(seconds, against, strict=True)) if against else None
    text = f"{ratio:8.2f}" if ratio is not None else " " * 8
    print(f"{name:<52} {statistics.median(seconds):9.1f} {text}   {goal}", flush=True)


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--wheels", type=Path)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--without-peer", action="store_true")
    parser.add_argument("--without-root", action="store_true")
    parser.add_argument("--user", default="pysing")
    arguments = parser.parse_args()
    if os.getuid() != 0:
        sys.exit("start as root: one of the measurements is real root's")
    base = Path(tempfile.mkdtemp(prefix="bench-build-", dir="/var/tmp"))
    base.chmod(0o755)
    wheels = arguments.wheels or base / "wheels"
    wheels.mkdir(exist_ok=True)
    work = Work(base, arguments.user, wheels)
    body = recipe(arguments.small)
    header = "Bootstrap: localimage\nFrom: base.sif\n\n"
    peer = not arguments.without_peer and "REFERENCE_APPTAINER" in os.environ
    series: dict[str, list[float]] = {}

    def note(name: str, seconds: float) -> None:
        series.setdefault(name, []).append(seconds)
        print(f"  {name}: {seconds:.1f} s", file=sys.stderr, flush=True)

    try:
        # Apptainer wants the place of a bind to be there.
        text = "Bootstrap: debootstrap\nOSVersion: bookworm\nInclude: ca-certificates\n%post\n  mkdir /wheels\n"
        work.write("debian.def", text)
        work.build("base.sif", "debian.def")
        binds = ["--bind", f"{wheels}:/wheels", "--bind", f"{CERTIFICATES}:{CERTIFICATES}", "--notest"]
        for _ in range(arguments.runs):
            if not arguments.without_root:
                for what, seconds in zip(("root post", "root post cpu"), by_root(work, script(body)), strict=True):
                    note(what, seconds)
            work.write("x.def", header + body)
            for what, seconds in phases(work.build("--no-cache", *binds, "x.sif", "x.def")).items():
                note(f"ours {what}", seconds)
            note("steps all", phases(work.build(*binds, "x.sif", "x.def"))["all"])
            work.write("x.def", header + body.replace(*CHANGE))
            note("changed all", phases(work.build(*binds, "x.sif", "x.def"))["all"])
            begun = time.perf_counter()
            work.build(*binds, "x.sif", "x.def")
            note("unchanged all", time.perf_counter() - begun)
            if peer:
                for what, seconds in by_peer(work, header + body).items():
                    note(f"peer {what}", seconds)
        print(f"{'median of ' + str(arguments.runs):<52} {'seconds':>9} {'ratio':>8}")
        root, root_cpu = series.get("root post", []), series.get("root post cpu", [])
        if root:
            show("%post, chroot of real root", root, [], "")
            show("  its processor time", root_cpu, [], "")
        show("%post, ordinary user", series["ours post"], root, "at most 1.2 of real root's")
        show("  its processor time", series["ours post cpu"], root_cpu, "")
        show("image, ordinary user", series["ours image"], series.get("peer image", []), "at most 0.5 of Apptainer's")
        show("all, ordinary user", series["ours all"], series.get("peer all", []), "")
        show("the same with steps that are kept", series["steps all"], series["ours all"], "")
        show("  last step changed", series["changed all"], series["steps all"], "at most 0.2 of the first build")
        show("  nothing changed", series["unchanged all"], [], "at most 2 s")
        if peer:
            show("%post, apptainer build --fakeroot", series["peer post"], root, "")
            show("image, apptainer build --fakeroot", series["peer image"], [], "")
            show("all of apptainer build --fakeroot", series["peer all"], [], "")
    finally:
        shutil.rmtree(base, ignore_errors=True)


if __name__ == "__main__":
    main()
