# SPDX-License-Identifier: Apache-2.0
"""How long from a push to the log, and how many builds a second leave the queue?

    python bench/hub_builds.py                 both, on SQLite; run it with the interpreter that has the hub installed
    python bench/hub_builds.py --pushes 20     more pushes
    python bench/hub_builds.py --database URL  the queue on PostgreSQL (an empty database)

Pushes are real: `git push` to a bare repository whose post-receive hook calls a real hub on loopback, and the build is
that of our own `singularity build` with a recipe of busybox from scratch. Times count from the moment when `git push`
begins. Claims are the statement that workers use, each in a transaction of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

RECIPE = """\
Bootstrap: scratch

%setup
    mkdir -p "$SINGULARITY_ROOTFS/bin"
    cp {busybox} "$SINGULARITY_ROOTFS/bin/sh"

%post
    echo the first line of post
"""
HOOK = """\
#!/bin/sh
while read before after ref; do
    body="{{\\"ref\\": \\"$ref\\", \\"before\\": \\"$before\\", \\"after\\": \\"$after\\"}}"
    proof=$(printf %s "$body" | openssl dgst -sha256 -hmac "{secret}" -r | cut -d' ' -f1)
    curl --noproxy '*' -sS -o /dev/null -X POST -H 'X-Singularity-Event: push' \\
        -H "X-Hub-Signature-256: sha256=$proof" --data-binary "$body" "{url}"
done
"""
GIT = {
    "PATH": os.environ.get("PATH", "/usr/bin:/bin"),
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_CONFIG_GLOBAL": "/dev/null",
    **{f"GIT_{who}_{what}": "a@b" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")},
}
COMMAND = [sys.executable, "-m", "pysingularity.hub.command"]


class Hub:
    """A hub on loopback with one collection and its repository."""

    def __init__(self, folder: Path) -> None:
        self.data = folder / "data"
        self.command("init")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        settings = f'[sources]\nprotocols = ["file"]\nlocal = [{json.dumps(str(folder))}]\n[storage]\nreserve = 0\n'
        (self.data / "hub.toml").write_text(settings)
        self.command("user", "add", "lab", "--admin", "--password-stdin", text="correct horse\n")
        self.token = self.command("token", "create", "--user", "lab").strip()
        self.bare, self.work = folder / "tools.git", folder / "work"
        self.git(folder, "init", "--quiet", "--bare", "--initial-branch=main", str(self.bare))
        self.git(folder, "clone", "--quiet", str(self.bare), str(self.work))
        made = json.loads(self.command("collection", "add", "lab/tools", "--git", f"file://{self.bare}"))
        url = (
            f"http://127.0.0.1:{self.port}"
            + made["webhook_url"].partition("/api/")[1]
            + made["webhook_url"].partition("/api/")[2]
        )
        hook = self.bare / "hooks" / "post-receive"
        hook.parent.mkdir(exist_ok=True)
        hook.write_text(HOOK.format(secret=made["webhook_secret"], url=url))
        hook.chmod(0o755)
        self.process = subprocess.Popen(
            [*COMMAND, "serve", "--data", str(self.data), "--port", str(self.port)], stdout=subprocess.DEVNULL
        )
        while True:
            try:
                self.get("/healthz")
                break
            except OSError:
                time.sleep(0.1)

    def command(self, *words: str, text: str = "") -> str:
        """Run singularity-hub."""
        argv = [*COMMAND, *words, "--data", str(self.data)]
        return subprocess.run(argv, input=text, text=True, check=True, stdout=subprocess.PIPE).stdout

    def git(self, folder: Path, *words: str) -> None:
        """Run git."""
        subprocess.run(["git", *words], cwd=folder, env=GIT, check=True, stderr=subprocess.DEVNULL)

    def get(self, path: str) -> bytes:
        """GET."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", headers={"Authorization": f"Bearer {self.token}"}
        )
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30) as answer:
            return answer.read()

    def push(self, number: int, recipe: str) -> dict[str, float]:
        """Push a change and return the seconds to what came of it."""
        known = {one["id"] for one in json.loads(self.get("/api/v1/builds"))["builds"]}
        (self.work / "Singularity").write_text(f"{recipe}    echo {number}\n")
        self.git(self.work, "add", "--all")
        self.git(self.work, "commit", "--quiet", "-m", f"{number}")
        begun = time.perf_counter()
        pushing = threading.Thread(target=self.git, args=(self.work, "push", "--quiet", "origin", "HEAD:main"))
        pushing.start()
        found: dict[str, float] = {}
        marks = {
            "first line of the log": b"Build ",
            "builder's first step": b"==> Preparing",
            "line of %post": b"first line of post\n",
        }
        build = None
        while build is None:
            build = next(
                (one for one in json.loads(self.get("/api/v1/builds"))["builds"] if one["id"] not in known), None
            )
            time.sleep(0.01)
        while True:
            text = self.get(f"/api/v1/builds/{build['id']}/log")
            for name, mark in marks.items():
                if name not in found and mark in text:
                    found[name] = time.perf_counter() - begun
            state = json.loads(self.get(f"/api/v1/builds/{build['id']}"))
            if state["finished_at"]:
                break
            time.sleep(0.02)
        pushing.join()
        if state["state"] != "done":
            sys.exit(f"the build is {state['state']}: {text.decode()}")
        found["image to be pulled"] = time.perf_counter() - begun
        return found

    def stop(self) -> None:
        """End it."""
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(30)


def pushes(folder: Path, count: int) -> None:
    """Measure pushes and print a table."""
    busybox = shutil.which("busybox") or sys.exit("needs busybox-static")
    hub = Hub(folder)
    try:
        rows = [hub.push(number, RECIPE.format(busybox=busybox)) for number in range(count + 1)][1:]
    finally:
        hub.stop()
    print(f"\n{'from git push to … (s)':32}{'median':>9}{'worst':>9}   {count} pushes")
    for name in rows[0]:
        values = [row[name] for row in rows]
        print(f"{name:32}{statistics.median(values):9.2f}{max(values):9.2f}")


def claims(folder: Path, url: str, builds: int) -> None:
    """Measure how fast a full queue is emptied and print a table."""
    from pysingularity.hub.accounts.people import add_user
    from pysingularity.hub.accounts.rights import ALL_SCOPES, Principal
    from pysingularity.hub.builds.queue import claim
    from pysingularity.hub.catalog import add_collection
    from pysingularity.hub.context import Hub as Opened
    from pysingularity.hub.models import Build
    from pysingularity.hub.settings import load_settings, make_data_folder

    if url:
        os.environ["SINGULARITY_HUB_DATABASE"] = url
    print(
        f"\n{'claims':32}{'a second':>9}{'CPU ms':>9}   of {builds} queued builds, {builds // 4} collections, 50 owners"
    )
    for workers in (1, 4):
        hub = Opened(load_settings(make_data_folder(folder / f"claims{workers}")))
        hub.database.migrate()
        with hub.write() as session:
            mark = f"{workers}-{os.getpid()}"
            owners = [Principal(add_user(session, f"o{number}-{mark}"), ALL_SCOPES) for number in range(50)]
            for number in range(builds // 4):
                who = owners[number % 50]
                collection = add_collection(session, who, f"{who.name}/c{number}")
                for tag in range(4):
                    build = Build(collection_id=collection.id, commit="c" * 40, recipe="Singularity", tag=f"t{tag}")
                    build.queue_owner, build.turn = collection.owner, float(tag)
                    session.add(build)
        taken = [0] * workers

        def work(place: int, hub: Opened = hub, taken: list[int] = taken) -> None:
            while True:
                with hub.write() as session:
                    # Four of a collection at a time, so that the whole queue can be emptied without finishing builds.
                    if claim(session, worker=f"w{place}", lease=60, active_per_collection=4) is None:
                        return
                taken[place] += 1

        threads = [threading.Thread(target=work, args=(place,)) for place in range(workers)]
        begun, used = time.perf_counter(), time.process_time()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        took, used = time.perf_counter() - begun, time.process_time() - used
        if sum(taken) != builds:
            sys.exit(f"{sum(taken)} claims of {builds}")
        name = f"{hub.database.engine.dialect.name}, {workers} worker{'s' if workers > 1 else ''}"
        print(f"{name:32}{builds / took:9.0f}{used / builds * 1000:9.2f}", flush=True)
        hub.close()


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pushes", type=int, default=10, help="0 leaves them out")
    parser.add_argument("--builds", type=int, default=4000, help="length of the queue; 0 leaves claims out")
    parser.add_argument("--database", default="", help="URL for the claims")
    parser.add_argument("--tmp", default=None)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="hub-builds-", dir=arguments.tmp))
    try:
        if arguments.pushes:
            pushes(folder, arguments.pushes)
        if arguments.builds:
            claims(folder, arguments.database, arguments.builds)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
