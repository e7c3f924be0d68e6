# SPDX-License-Identifier: Apache-2.0
"""What tests of the hub bring along: real git repositories, and a hub that runs as people run it, with a client."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from pysingularity.hub.accounts.people import add_user
from pysingularity.hub.accounts.rights import ALL_SCOPES, Principal
from pysingularity.hub.catalog import add_collection
from pysingularity.hub.context import Hub
from pysingularity.hub.models import Collection, User
from users import User as Account

COMMAND = [sys.executable, "-m", "pysingularity.hub.command"]
BUILDER = Path(__file__).parent / "builder.py"
GIT = {
    "PATH": os.environ.get("PATH", "/usr/bin:/bin"),
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_CONFIG_GLOBAL": "/dev/null",
    **{f"GIT_{who}_NAME": "A" for who in ("AUTHOR", "COMMITTER")},
    **{f"GIT_{who}_EMAIL": "a@b" for who in ("AUTHOR", "COMMITTER")},
}
RECIPE = "Bootstrap: scratch\n\n%post\n    echo hello from post\n\n%labels\n    KIND test\n"


def wait_for(condition: Callable[[], Any], seconds: float = 60.0, what: str = "it") -> Any:
    """Return the first true value of a condition."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.05)
    raise AssertionError(f"{what} did not happen within {seconds} s")


class Repository:
    """A git repository with a working tree."""

    def __init__(self, path: Path, user: Account | None = None) -> None:
        self.path, self.user = path, user
        path.mkdir(parents=True)
        if user is not None:
            user.own(path)
        self.git("init", "--quiet", "--initial-branch=main")
        self.clock = 1_700_000_000

    def git(self, *words: str) -> str:
        """Run git and return what it says."""
        return self._run(words, GIT)

    def _run(self, words: Sequence[str], env: dict[str, str]) -> str:
        if self.user is not None:
            result = self.user(["git", *words], cwd=self.path, env=env)
        else:
            result = subprocess.run(
                ["git", *words], cwd=self.path, env=env, capture_output=True, text=True, check=False
            )
        assert result.returncode == 0, result.stderr
        return result.stdout.strip()

    def write(self, files: dict[str, str | bytes]) -> None:
        """Write files without committing them."""
        for name, content in files.items():
            path = self.path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.encode() if isinstance(content, str) else content)

    def commit(self, files: dict[str, str | bytes] | None = None, message: str = "change") -> str:
        """Write files, commit everything, and return the commit."""
        self.write(files or {})
        self.git("add", "--all")
        self.clock += 60
        stamp = f"{self.clock} +0000"
        dates = {"GIT_AUTHOR_DATE": stamp, "GIT_COMMITTER_DATE": stamp}
        self._run(["commit", "--quiet", "--allow-empty", "-m", message], {**GIT, **dates})
        return self.git("rev-parse", "HEAD")


def made_collection(hub: Hub, repository: Repository | None, name: str = "lab/tools", **fields: Any) -> Collection:
    """Make a collection of a repository without anybody asking over the network."""
    owner = name.partition("/")[0]
    with hub.write() as session:
        user = session.scalar(sa.select(User).where(User.name == owner)) or add_user(session, owner)
        url = f"file://{repository.path}" if repository is not None else ""
        collection = add_collection(session, Principal(user, ALL_SCOPES), name, git_url=url)
        for key, value in fields.items():
            setattr(collection, key, value)
        session.flush()
        return collection


class Answer:
    """What the server said."""

    def __init__(self, status: int, headers: Any, body: bytes) -> None:
        self.status, self.headers, self.body = status, headers, body

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def text(self) -> str:
        return self.body.decode()


class Server:
    """`singularity-hub serve` as a process, and a client for it."""

    def __init__(self, data: Path, user: Account | None = None) -> None:
        self.data, self.user = data, user
        self.token = ""
        #: More variables for the hub.
        self.environ: dict[str, str] = {}
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[str] | None = None

    def command(self, *words: str, text: str = "") -> str:
        """Run singularity-hub and return what it prints."""
        argv = [*COMMAND, *words, "--data", str(self.data)]
        if self.user is not None:
            result = self.user(argv, input=text, timeout=60)
        else:
            result = subprocess.run(argv, input=text, capture_output=True, text=True, check=False, timeout=60)
        assert result.returncode == 0, result.stderr
        return result.stdout

    def start(self) -> None:
        """Start it and wait until it answers."""
        argv = [*COMMAND, "serve", "--data", str(self.data), "--port", str(self.port)]
        if self.user is not None:
            self.process = self.user.popen(argv, env=self.environ, stdout=subprocess.PIPE, text=True)
        else:
            environ = {**os.environ, **self.environ}
            self.process = subprocess.Popen(argv, env=environ, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        assert "http://" in self.process.stdout.readline()
        wait_for(lambda: self._up(), what="an answer")

    def _up(self) -> bool:
        try:
            return self.get("/healthz").status == 200
        except OSError:
            return False

    def stop(self, number: int = signal.SIGTERM) -> None:
        """End it."""
        if self.process is not None:
            self.process.send_signal(number)
            self.process.wait(30)
            assert self.process.stdout is not None
            self.process.stdout.close()
            self.process = None

    def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        headers: dict[str, str] | None = None,
        token: str | None = None,
    ) -> Answer:
        """Send a request; a body that is no bytes goes as JSON."""
        given = dict(headers or {})
        secret = self.token if token is None else token
        if secret:
            given.setdefault("Authorization", f"Bearer {secret}")
        data = body
        if body is not None and not isinstance(body, bytes):
            data = json.dumps(body).encode()
            given.setdefault("Content-Type", "application/json")
        request = urllib.request.Request(self.url + path, data=data, headers=given, method=method)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=30) as answer:
                return Answer(answer.status, answer.headers, answer.read())
        except urllib.error.HTTPError as error:
            with error:
                return Answer(error.code, error.headers, error.read())

    def get(self, path: str, **options: Any) -> Answer:
        """GET."""
        return self.request("GET", path, **options)

    def post(self, path: str, body: Any = None, **options: Any) -> Answer:
        """POST."""
        return self.request("POST", path, body, **options)

    def connect(self, repository: Repository, name: str = "lab/tools", **more: Any) -> dict[str, Any]:
        """Connect a repository and return the first build that comes of it."""
        made = self.post("/api/v1/collections", {"name": name, "git_url": f"file://{repository.path}", **more})
        assert made.status == 201, made.text
        try:
            return wait_for(lambda: self.builds(name), what="a build")[0]
        except AssertionError as error:
            raise AssertionError(self.get(f"/api/v1/collections/{name}/deliveries").json["deliveries"]) from error

    def builds(self, name: str = "lab/tools", query: str = "") -> list[dict[str, Any]]:
        """Return the builds of a collection, the newest first."""
        return self.get(f"/api/v1/builds?collection={name}{query}").json["builds"]

    def log(self, build: int) -> str:
        """Return a build's log."""
        return self.get(f"/api/v1/builds/{build}/log").text

    def family(self) -> list[int]:
        """Return the numbers of the hub's processes, the parent first."""
        assert self.process is not None
        out = subprocess.run(["pgrep", "-P", str(self.process.pid)], capture_output=True, text=True, check=False).stdout
        return [self.process.pid, *map(int, out.split())]

    def kill(self) -> None:
        """End all of it at once, with no chance to say good-bye."""
        for pid in reversed(self.family()):
            os.kill(pid, signal.SIGKILL)
        self.stop(signal.SIGKILL)

    def ended(self, build: int, seconds: float = 60.0) -> dict[str, Any]:
        """Wait for the end of a build and return it."""
        from pysingularity.hub.builds.states import FINAL

        def look() -> Any:
            value = self.get(f"/api/v1/builds/{build}").json
            return value if value["state"] in FINAL else None

        return wait_for(look, seconds, f"the end of build {build}")
