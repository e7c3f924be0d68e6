# SPDX-License-Identifier: Apache-2.0
"""`serve`: one process tree with everything in it. The parent opens the port, starts children, and restarts the dead.

Web processes share the parent's listening socket; one robot process builds. The parent itself does nothing that could
fail, and takes all of them with it when it ends, however it ends.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import uvicorn

from pysingularity import messages
from pysingularity.errors import HostError
from pysingularity.hub import robots
from pysingularity.hub.app import make_app
from pysingularity.hub.context import Hub
from pysingularity.hub.front import Protocol
from pysingularity.hub.settings import Settings, load_settings
from pysingularity.linux import process

#: Seconds that children have to end when asked.
PATIENCE = 15.0
#: A child that dies sooner than this after its start is restarted with a pause.
YOUNG = 5.0


def listen(host: str, port: int) -> socket.socket:
    """Open the hub's port.

    Raises:
        HostError: the address is taken, or not one of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    handle = socket.socket(family, socket.SOCK_STREAM)
    handle.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        handle.bind((host, port))
    except OSError as error:
        handle.close()
        raise HostError("cannot-listen", f"{host} port {port}: {error.strerror}", hint="choose another: --port NUMBER")
    handle.listen(1024)
    return handle


def serve(settings: Settings, arguments: list[str], *, as_json: bool = False) -> int:
    """Run the hub until a signal ends it.

    Arguments:
        arguments: what children need to read the same settings (`--data …`).
        as_json: say where the hub is as JSON, once it listens.
    """
    handle = listen(settings.host, settings.port)
    host, port = handle.getsockname()[:2]
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    kinds = ["web"] * settings.processes + ["work"]
    children: list[tuple[str, subprocess.Popen[bytes], float]] = [
        (kind, _start(kind, handle, arguments), time.monotonic()) for kind in kinds
    ]
    shown = f"[{host}]" if ":" in host else host
    url = settings.url or f"http://{shown}:{port}"
    print(json.dumps({"name": settings.name, "url": url}) if as_json else f"{settings.name}: {url}", flush=True)
    try:
        while not ended.wait(0.2):
            for place, (kind, child, since) in enumerate(children):
                if child.poll() is not None:
                    messages.error(f"hub: the {kind} process ended with {child.returncode}; starting another")
                    if time.monotonic() - since < YOUNG and ended.wait(2.0):
                        break
                    children[place] = (kind, _start(kind, handle, arguments), time.monotonic())
    finally:
        handle.close()
        for _, child, _ in children:
            child.terminate()
        deadline = time.monotonic() + PATIENCE
        for _, child, _ in children:
            try:
                child.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
    return 0


def _start(kind: str, handle: socket.socket, arguments: list[str]) -> subprocess.Popen[bytes]:
    argv = [
        sys.executable,
        "-I",
        "-m",
        "pysingularity.hub.serve",
        kind,
        str(handle.fileno()),
        str(os.getpid()),
        *arguments,
    ]
    return subprocess.Popen(argv, pass_fds=[handle.fileno()], stdin=subprocess.DEVNULL)


def web(settings: Settings, handle: socket.socket) -> None:
    """Be a web process on an open socket."""
    hub = Hub(settings)
    config = uvicorn.Config(
        make_app(hub),
        # Our own protocol sends files by sendfile(2); other loops than Python's do not offer that.
        http=Protocol,
        loop="asyncio",
        ws="none",
        log_level="warning",
        access_log=False,
        # Headers of proxies are read by `doors`, which knows whom to trust.
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=5,
        timeout_keep_alive=30,
    )
    uvicorn.Server(config).run(sockets=[handle])
    hub.close()


def work(settings: Settings) -> None:
    """Be the robot process."""
    hub = Hub(settings)
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    robots.run(hub, ended)
    hub.close()


def main(words: list[str]) -> int:
    """Be a child of `serve`: KIND DESCRIPTOR PARENT DATA [HOST PORT URL]."""
    kind, descriptor, parent, data, host, port, url = words
    process.die_with_parent(signal.SIGTERM, int(parent))
    settings = load_settings(Path(data), host=host, port=int(port), **({"url": url} if url else {}))
    if kind == "web":
        web(settings, socket.socket(fileno=int(descriptor)))
    else:
        os.close(int(descriptor))
        work(settings)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
