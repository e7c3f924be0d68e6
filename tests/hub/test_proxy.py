# SPDX-License-Identifier: Apache-2.0
"""A hub of several web processes behind nginx, as the how-to has it: addresses, pushes, pulls, a live log."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from pysingularity.hub.builds.log import log_path
from pysingularity.hub.context import Hub
from pysingularity.hub.settings import load_settings

from .conftest import make_data, started
from .shelf import SINGULARITY, make_sif, put_image, run
from .test_pages import put_build
from .world import Server, wait_for

NGINX = shutil.which("nginx") or "/usr/sbin/nginx"


@pytest.fixture(scope="module")
def stand(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Hub]]:
    """A hub with two web processes."""
    data = make_data(tmp_path_factory.mktemp("proxy"))
    text = (data / "hub.toml").read_text()
    (data / "hub.toml").write_text("processes = 2\n" + text.replace("[builds]", "[builds]\nworkers = 0", 1))
    server = started(data)
    hub = Hub(load_settings(data))
    yield server, hub
    hub.close()
    server.stop()


@pytest.fixture
def proxy(clean: tuple[Server, Hub], tmp_path: Path) -> Iterator[str]:
    """The address of nginx in front of the hub, with the lines of docs/how-to/hub-people.md."""
    if not os.access(NGINX, os.X_OK):
        pytest.skip("needs nginx: apt install nginx-light")
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "hub-people.md").read_text()
    location = re.search(r"    location / \{.*?\n    \}", page, re.DOTALL)[0]
    location = location.replace("127.0.0.1:8080", f"127.0.0.1:{clean[0].port}")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folders = "".join(
        f"{name}_temp_path {tmp_path}/{name};" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    user = "user root;" if os.getuid() == 0 else ""
    (tmp_path / "nginx.conf").write_text(
        f"{user} daemon off; pid {tmp_path}/pid; error_log {tmp_path}/errors; events {{}}\n"
        f"http {{ access_log off; {folders} server {{ listen 127.0.0.1:{port};\n{location}\n}} }}\n"
    )
    process = subprocess.Popen([NGINX, "-c", tmp_path / "nginx.conf", "-e", tmp_path / "errors"])

    def up() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    wait_for(up, what="nginx")
    yield f"http://127.0.0.1:{port}"
    process.terminate()
    process.wait(20)


def test_clients_behind_a_proxy_push_and_pull(clean: tuple[Server, Hub], proxy: str, tmp_path: Path):
    server, _ = clean
    host = proxy.removeprefix("http://")
    path = make_sif(tmp_path / "a.sif", "proxied", pad=12 << 20)
    env = {"SINGULARITY_CACHEDIR": str(tmp_path / "cache"), "SINGULARITY_LIBRARY_TOKEN": server.token}
    # several parts, each to an address that the hub made of what the proxy was asked for
    result = run(*SINGULARITY, "push", "-U", "--library", proxy, path, "library://lab/tools/tools:v1", env=env)
    assert result.returncode == 0, result.stderr
    for number, words in enumerate(
        (
            ("--no-https", f"shub://{host}/lab/tools:v1"),
            ("--library", proxy, "library://lab/tools/tools:v1"),
            ("--no-https", f"oras://{host}/lab/tools:v1"),
        )
    ):
        target = tmp_path / f"{number}.sif"
        result = run(*SINGULARITY, "pull", "--disable-cache", *words[:-1], target, words[-1], env=env)
        assert result.returncode == 0, result.stderr
        assert target.read_bytes() == path.read_bytes()
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    request = urllib.request.Request(f"{proxy}/api/container/lab/tools:v1", headers={"Host": "hub.example.org"})
    with opener.open(request) as answer:
        assert json.load(answer)["image"].startswith("http://hub.example.org/api/v1/images/")


def test_live_log_comes_through_a_proxy_line_by_line(clean: tuple[Server, Hub], proxy: str, tmp_path: Path):
    _, hub = clean
    put_image(hub, make_sif(tmp_path / "a.sif"), "lab/tools", tags=["latest"])
    number = put_build(hub, state="building", log=b"first\n", finished_at=None, worker="w", leased_until=1e12)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"{proxy}/api/v1/builds/{number}/log/stream", timeout=60) as stream:
        lines = iter(stream.readline, b"")
        assert next(line for line in lines if line.startswith(b"data: ")) == b"data: first\n"
        with log_path(hub.settings.folder("logs"), number).open("ab") as file:
            file.write(b"second\n")
        # it arrives while the build still runs: nothing was held back
        assert next(line for line in lines if b"second" in line) == b"data: second\n"


def test_every_web_process_knows_every_session_and_token(clean: tuple[Server, Hub], proxy: str):
    server, _ = clean
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    headers = {"Authorization": f"Bearer {server.token}"}
    for _ in range(20):
        with opener.open(urllib.request.Request(f"{proxy}/api/v1/user", headers=headers)) as answer:
            assert json.load(answer)["name"] == "lab"
