# SPDX-License-Identifier: Apache-2.0
"""How fast a hub answers and sends: pages, concurrent pulls against nginx in the same minute, and memory under load.

    bench/hub.py [--images 10000] [--pulls 200] [--size 70] [--rounds 3] [--processes 1] [--folder DIR]

Makes a hub in a temporary folder, with 10,000 images in its database (500 of them in one collection) and one real file
of 70 MB. Pages are asked for one after the other; pulls are the two requests of a shub client, 200 at a time, by a
client that lets the kernel throw the bytes away (MSG_TRUNC), which costs the same for both servers. nginx is Debian's
(package nginx-light), with the same file and sendfile; left out when it is not installed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import urllib.request
from pathlib import Path

import sqlalchemy as sa

from pysingularity.hub.accounts.people import add_user
from pysingularity.hub.accounts.rights import ALL_SCOPES, Principal
from pysingularity.hub.catalog import add_collection, container_of
from pysingularity.hub.context import Hub
from pysingularity.hub.models import Blob, Build, Image, Tag, now
from pysingularity.hub.settings import load_settings, make_data_folder

HUB = [sys.executable, "-m", "pysingularity.hub.command"]


def fill(hub: Hub, count: int) -> None:
    """Put rows of images, tags and builds into the database: 500 in lab/big, the rest in 100 collections."""
    with hub.write() as session:
        user = add_user(session, "lab", password="correct horse", admin=True)
        who = Principal(user, ALL_SCOPES)
        shelves = [container_of(session, add_collection(session, who, "lab/big"), make=True)] * min(500, count)
        others = [container_of(session, add_collection(session, who, f"lab/c{n}"), make=True) for n in range(100)]
        shelves += [others[number % 100] for number in range(count - len(shelves))]
        digests = [f"{number:064x}" for number in range(count)]
        rows = [{"sha256": one, "md5": one[:32], "size": 70_000_000, "created_at": now()} for one in digests]
        session.execute(sa.insert(Blob), rows)
        definition = "Bootstrap: docker\nFrom: debian:12\n%post\n    apt-get install -y python3\n" * 10
        images = [
            Image(
                container_id=box.id,
                blob=digest,
                sha256=digest,
                version=digest[-32:],
                key=digest[-40:],
                commit=digest[-40:],
                size=70_000_000,
                arch="amd64",
                tag=f"t{number}",
                definition=definition,
                labels={"MAINTAINER": "lab", "VERSION": str(number), "org.label-schema.schema-version": "1.0"},
                details={"environment": {"90-environment.sh": "export A=b\n" * 20}, "runscript": "exec python3\n"},
                provenance={"predicate": {"buildDefinition": {"parameters": ["x" * 40] * 20}}},
            )
            for number, (box, digest) in enumerate(zip(shelves, digests, strict=True))
        ]
        session.add_all(images)
        session.flush()
        session.execute(
            sa.insert(Tag),
            [
                {"container_id": one.container_id, "name": one.tag, "arch": "amd64", "image_id": one.id}
                for one in images
            ],
        )
        session.execute(
            sa.insert(Build),
            [
                {"collection_id": one.container.collection_id, "state": "done", "commit": one.commit, "recipe": "S",
                 "tag": one.tag, "image_id": one.id, "turn": 0.0}
                for one in images
            ],
        )  # fmt: skip


def put_file(hub: Hub, size: int) -> str:
    """Put a file of random bytes into the store as lab/real:latest and return its digest."""
    import hashlib

    path = hub.storage.staging() / "bench"
    digest, left = hashlib.sha256(), size
    with path.open("wb") as file:
        while left > 0:
            piece = os.urandom(min(left, 1 << 20))
            digest.update(piece)
            file.write(piece)
            left -= len(piece)
    sha256 = digest.hexdigest()
    hub.storage.take(path, sha256)
    with hub.write() as session:
        user = session.execute(sa.text("select id from users where name = 'lab'")).scalar()
        from pysingularity.hub.models import User

        one = add_collection(session, Principal(session.get_one(User, user), ALL_SCOPES), "lab/real")
        box = container_of(session, one, make=True)
        session.add(Blob(sha256=sha256, md5=sha256[:32], size=size))
        session.flush()
        image = Image(container_id=box.id, blob=sha256, sha256=sha256, version=sha256[:32], key=sha256[:40], size=size)
        session.add(image)
        session.flush()
        session.add(Tag(container_id=box.id, name="latest", arch="", image_id=image.id))
    return sha256


# --- pages -----------------------------------------------------------------------------------------------------------


def pages(url: str, token: str, runs: int, parent: int) -> None:
    """Ask for every kind of page and print milliseconds."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def ask(path: str, kind: str) -> int:
        headers = {"Accept": kind, "Authorization": f"Bearer {token}"}
        with opener.open(urllib.request.Request(url + path, headers=headers), timeout=60) as answer:
            return len(answer.read())

    paths = [
        ("a page of 500 images", "/lab/big?rows=500", "text/html"),
        ("500 images as JSON", "/api/v1/images/lab/big?limit=500", "*/*"),
        ("a collection, 50 images", "/lab/big", "text/html"),
        ("home", "/", "text/html"),
        ("search for a name", "/search?q=c42", "text/html"),
        ("search for a label", "/search?q=schema-version", "text/html"),
        ("search for nothing there", "/search?q=nowhere+at+all", "text/html"),
        ("a user's 102 collections", "/lab", "text/html"),
        ("administration", "/admin", "text/html"),
        ("an image by name", "/api/v1/images/lab/c42:t642", "*/*"),
        ("shub", "/api/container/lab/c42:t642", "*/*"),
        ("library search", "/v1/search?value=c42", "*/*"),
        ("OCI catalog", "/v2/_catalog?n=1000", "*/*"),
        ("OCI tags of 500", "/v2/lab/big/tags/list", "*/*"),
        ("500 builds as JSON", "/api/v1/builds?limit=500", "*/*"),
        ("badge", "/badge/lab/big.svg", "*/*"),
        ("health", "/healthz", "*/*"),
        ("metrics", "/metrics", "*/*"),
    ]
    print(f"{'page':<34} {'median ms':>10} {'max ms':>9} {'cpu ms':>9} {'bytes':>9}")
    for name, path, kind in paths:
        size, times = ask(path, kind), []
        before = processor(parent)
        for _ in range(runs):
            started = time.perf_counter()
            ask(path, kind)
            times.append((time.perf_counter() - started) * 1000)
        cost = (processor(parent) - before) / runs * 1000
        print(f"{name:<34} {statistics.median(times):>10.1f} {max(times):>9.1f} {cost:>9.1f} {size:>9}")


# --- pulls -----------------------------------------------------------------------------------------------------------


def fetch(address: tuple[str, int], path: str, buffer: bytearray) -> int:
    """GET a file and let the kernel throw it away; return its bytes."""
    with socket.create_connection(address, timeout=300) as connection:
        connection.sendall(
            f"GET {path} HTTP/1.1\r\nHost: {address[0]}:{address[1]}\r\nConnection: close\r\n\r\n".encode()
        )
        head = b""
        while b"\r\n\r\n" not in head:
            piece = connection.recv(4096)
            if not piece:
                raise OSError(f"no answer: {head!r}")
            head += piece
        if b" 200 " not in head.split(b"\r\n", 1)[0]:
            raise OSError(head.split(b"\r\n", 1)[0].decode())
        total = len(head) - head.index(b"\r\n\r\n") - 4
        while count := connection.recv_into(buffer, len(buffer), socket.MSG_TRUNC):
            total += count
        return total


def shub_path(address: tuple[str, int], name: str) -> str:
    """Ask as a shub client does where an image is."""
    with socket.create_connection(address, timeout=300) as connection:
        ask = f"GET /api/container/{name} HTTP/1.1\r\nHost: {address[0]}:{address[1]}\r\nConnection: close\r\n\r\n"
        connection.sendall(ask.encode())
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
    return urllib.parse.urlsplit(json.loads(answer.partition(b"\r\n\r\n")[2])["image"]).path


def load(count: int, pull, expected: int) -> float:
    """Run `count` pulls at the same time and return bytes per second."""
    wrong: list[str] = []
    gate = threading.Barrier(count + 1)

    def one() -> None:
        buffer = bytearray(1 << 20)
        gate.wait()
        try:
            got = pull(buffer)
            if got != expected:
                wrong.append(f"{got} bytes instead of {expected}")
        except OSError as error:
            wrong.append(str(error))

    threads = [threading.Thread(target=one) for _ in range(count)]
    for thread in threads:
        thread.start()
    gate.wait()
    started = time.perf_counter()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - started
    if wrong:
        sys.exit(f"{len(wrong)} of {count} pulls failed: {wrong[0]}")
    return count * expected / seconds


def memory(parent: int) -> dict[str, float]:
    """Return MiB that belong to each child of `serve` alone or its share of them (PSS)."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
            status = (entry / "status").read_text()
            if f"PPid:\t{parent}\n" in status and b"pysingularity.hub.serve" in words:
                text = (entry / "smaps_rollup").read_text()
                kind = words[words.index(b"pysingularity.hub.serve") + 1].decode()
                pss = next(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:"))
                found[f"{kind} {entry.name}"] = pss / 1024
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
    return found


def processor(parent: int) -> float:
    """Return the processor seconds of a server's children: what its work costs, however busy the machine is."""
    ticks = 0
    children = subprocess.run(["pgrep", "-P", str(parent)], capture_output=True, text=True, check=False).stdout.split()
    for child in children:
        # Of the whole process, with threads that have ended.
        words = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
        ticks += int(words[11]) + int(words[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_nginx(folder: Path, file: Path) -> tuple[subprocess.Popen[bytes], int] | None:
    """Serve a file with nginx as Debian configures it: sendfile, tcp_nopush, a worker per processor."""
    program = shutil.which("nginx") or "/usr/sbin/nginx"
    if not os.access(program, os.X_OK):
        return None
    port, root = free_port(), folder / "nginx"
    (root / "files").mkdir(parents=True)
    os.link(file, root / "files" / "image.sif")
    user = "user root;" if os.getuid() == 0 else ""
    (root / "nginx.conf").write_text(
        f"{user} worker_processes auto; pid {root}/pid; error_log {root}/error.log; daemon off;\n"
        "events { worker_connections 1024; }\n"
        f"http {{ sendfile on; tcp_nopush on; access_log off; client_body_temp_path {root}/b; proxy_temp_path {root}/p;"
        f" fastcgi_temp_path {root}/f; uwsgi_temp_path {root}/u; scgi_temp_path {root}/s;\n"
        f" server {{ listen 127.0.0.1:{port} backlog=1024; root {root}/files; }} }}\n"
    )
    process = subprocess.Popen([program, "-c", root / "nginx.conf", "-e", root / "error.log"])
    return process, port


def wait_port(port: int) -> None:
    for _ in range(600):
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            time.sleep(0.1)
    sys.exit(f"nobody listens on port {port}")


def main() -> None:
    """Parse, make, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--pulls", type=int, default=200)
    parser.add_argument("--size", type=int, default=70, help="MB of the image that is pulled")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--runs", type=int, default=10, help="times that each page is asked for")
    parser.add_argument("--processes", type=int, default=1, help="web processes of the hub")
    parser.add_argument("--folder", help="where the temporary hub is made")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="bench-hub-", dir=options.folder))
    text = f"processes = {options.processes}\n[builds]\nworkers = 0\n[storage]\nreserve = 0\n"
    hub = Hub(load_settings(make_data_folder(folder / "data", text)))
    hub.database.migrate()
    fill(hub, options.images)
    size = options.size * 1_000_000
    sha256 = put_file(hub, size)
    file = hub.settings.folder("blobs") / sha256[:2] / sha256
    hub.close()
    words = ["--data", str(folder / "data")]
    token = subprocess.check_output(
        [*HUB, "token", "create", "--user", "lab", "--scope", "read,admin", *words], text=True
    )
    port = free_port()
    serve = subprocess.Popen([*HUB, "serve", "--port", str(port), *words], stdout=subprocess.DEVNULL)
    nginx = start_nginx(folder, file)
    try:
        wait_port(port)
        url = f"http://127.0.0.1:{port}"
        print(f"{options.images} images, {options.processes} web process(es)\n")
        pages(url, token.strip(), options.runs, serve.pid)
        address = ("127.0.0.1", port)
        rates: dict[str, list[float]] = {"nginx": [], "hub": []}
        spent: dict[str, list[float]] = {"nginx": [], "hub": []}
        peaks: dict[str, float] = memory(serve.pid)
        idle = dict(peaks)
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(0.2):
                for name, value in memory(serve.pid).items():
                    peaks[name] = max(peaks.get(name, 0), value)

        watcher = threading.Thread(target=watch)
        watcher.start()
        for number in range(options.rounds + 1 if options.pulls else 0):  # the first round only warms up
            for name in ("nginx", "hub"):
                if name == "nginx" and nginx is None:
                    continue
                parent = serve.pid if nginx is None or name == "hub" else nginx[0].pid
                before = processor(parent)
                if name == "nginx" and nginx is not None:
                    near = ("127.0.0.1", nginx[1])
                    rate = load(options.pulls, lambda buffer, near=near: fetch(near, "/image.sif", buffer), size)
                else:
                    rate = load(
                        options.pulls, lambda buffer: fetch(address, shub_path(address, "lab/real"), buffer), size
                    )
                if number:
                    rates[name].append(rate)
                    spent[name].append(processor(parent) - before)
        ended.set()
        watcher.join()
        print(f"\n{options.pulls} concurrent pulls of {options.size} MB, {options.rounds} rounds in turn")
        for name, found in rates.items():
            if found:
                used = statistics.median(spent[name])
                rate = statistics.median(found) / 1e6
                print(f"{name:<34} {rate:>10.0f} MB/s   (best {max(found) / 1e6:.0f}), {used:.1f} s of processor time")
        if rates["nginx"]:
            ratios = [ours / theirs for ours, theirs in zip(rates["hub"], rates["nginx"], strict=True)]
            print(f"{'hub / nginx':<34} {statistics.median(ratios):>10.2f}   ({min(ratios):.2f} to {max(ratios):.2f})")
            costs = [theirs / ours for ours, theirs in zip(spent["hub"], spent["nginx"], strict=True)]
            print(f"{'the same per processor second':<34} {statistics.median(costs):>10.2f}")
        print(f"\n{'memory (PSS)':<34} {'idle MiB':>10} {'peak MiB':>9}")
        for name, value in sorted(peaks.items()):
            print(f"{name:<34} {idle.get(name, 0):>10.0f} {value:>9.0f}")
    finally:
        serve.terminate()
        serve.wait()
        if nginx is not None:
            nginx[0].terminate()
            nginx[0].wait()
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
