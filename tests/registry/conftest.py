# SPDX-License-Identifier: Apache-2.0
"""Registries on loopback: Debian's docker-registry, and one of our own that fails on purpose (tests/registries.py)."""

from __future__ import annotations

import socket
import subprocess
import time

import pytest

from pysingularity.registry.settings import settings_from
from registries import FakeRegistry, free_port


@pytest.fixture
def fake():
    registry = FakeRegistry()
    yield registry
    registry.close()


@pytest.fixture
def quick(monkeypatch):
    """Pauses between tries take no time; they are returned as a list."""
    seen = []
    monkeypatch.setattr("pysingularity.registry.http.time.sleep", seen.append)
    monkeypatch.setattr("pysingularity.registry.blobs.pause", lambda *_: 0.0)
    monkeypatch.setattr("pysingularity.registry.remote.pause", lambda *_: 0.0)
    return seen


@pytest.fixture
def environ(tmp_path):
    """An environment of its own: cache, home and temporary folder below the test's."""
    for name in ("home", "tmp"):
        (tmp_path / name).mkdir()
    return {
        "HOME": str(tmp_path / "home"),
        "SINGULARITY_CACHEDIR": str(tmp_path / "cachedir"),
        "SINGULARITY_TMPDIR": str(tmp_path / "tmp"),
        "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
    }


@pytest.fixture
def settings(environ):
    def make(**options):
        return settings_from({"no_https": True, **options}, environ)

    return make


@pytest.fixture(scope="session")
def docker_registry(tmp_path_factory, tool):
    """Debian's docker-registry: docker_registry(auth=True, tls=True) -> Address; stopped at the end."""
    program = tool("docker-registry")
    running = []

    def start(*, auth: bool = False, tls: bool = False):
        folder = tmp_path_factory.mktemp("registry")
        port = free_port()
        http = [f'addr: "127.0.0.1:{port}"']
        if tls:
            openssl = tool("openssl")
            subprocess.run(
                [
                    *(openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=test"),
                    *("-keyout", folder / "key.pem", "-out", folder / "ca.pem"),
                    *("-addext", "subjectAltName=IP:127.0.0.1"),
                ],
                check=True,
                capture_output=True,
            )
            http.append(f"tls: {{certificate: {folder}/ca.pem, key: {folder}/key.pem}}")
        text = "version: 0.1\nlog: {level: error, accesslog: {disabled: true}}\n"
        text += f"storage: {{filesystem: {{rootdirectory: {folder}/data}}}}\nhttp: {{{', '.join(http)}}}\n"
        if auth:
            (folder / "htpasswd").write_text(
                "me:$2b$05$abcdefghijklmnopqrstuuOQiyCxlgf/oeuTqixKmWdcYUh4Hjl0a\n"
            )  # bcrypt of "secret"
            text += f"auth: {{htpasswd: {{realm: test, path: {folder}/htpasswd}}}}\n"
        (folder / "config.yml").write_text(text)
        process = subprocess.Popen(
            [program, "serve", folder / "config.yml"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        running.append(process)
        for _ in range(200):
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                time.sleep(0.05)
        else:
            pytest.fail("docker-registry does not start")
        return f"127.0.0.1:{port}", folder

    yield start
    for process in running:
        process.terminate()
        process.wait()
