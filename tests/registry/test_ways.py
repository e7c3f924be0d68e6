# SPDX-License-Identifier: Apache-2.0
"""Ways to a registry: TLS with a login, own certificates, mirrors, proxies, expiring tokens; asked by the command."""

from __future__ import annotations

import base64
import json
import os
import select
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pysingularity.registry.http import _left_out
from registries import FakeRegistry, digest, free_port, gz, send

SINGULARITY = str(Path(sys.executable).parent / "singularity")


@pytest.fixture
def cli(environ, tmp_path):
    def run(*words, code=0, text="", **more):
        result = subprocess.run(
            [SINGULARITY, *map(str, words)],
            env={**environ, **more},
            cwd=tmp_path,
            input=text,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert result.returncode == code, result.stderr
        assert "Traceback" not in result.stderr
        return result

    return run


class Proxy:
    """An HTTP proxy that notes what it was asked for: absolute addresses, and CONNECT."""

    def __init__(self, leads_to: dict[str, tuple[str, int]] | None = None) -> None:
        self.asked: list[str] = []
        self.heads: list[bytes] = []
        self._names = leads_to or {}
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._server.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._server.accept()
            except OSError:
                return
            threading.Thread(target=self._one, args=(client,), daemon=True).start()

    def _one(self, client: socket.socket) -> None:
        with client:
            head = b""
            while b"\r\n\r\n" not in head:
                data = client.recv(65536)
                if not data:
                    return
                head += data
            self.heads.append(head)
            method, target, _ = head.split(b"\r\n")[0].decode().split(" ")
            self.asked.append(f"{method} {target}")
            place = target if method == "CONNECT" else target.split("/")[2]
            host, _, port = place.partition(":")
            other = self._names.get(host) or (host, int(port or 80))
            with socket.create_connection(other) as server:
                if method == "CONNECT":
                    client.sendall(b"HTTP/1.1 200 fine\r\n\r\n")
                else:
                    path = "/" + target.split("/", 3)[3]
                    lines = head.replace(target.encode(), path.encode(), 1)
                    server.sendall(lines.replace(b"\r\n", b"\r\nConnection: close\r\n", 1))
                while True:
                    ready, _, _ = select.select([client, server], [], [], 20)
                    if not ready:
                        return
                    for one in ready:
                        data = one.recv(65536)
                        if not data:
                            return
                        (server if one is client else client).sendall(data)

    def close(self) -> None:
        self._server.close()


@pytest.fixture
def proxy():
    made = []

    def make(**names):
        made.append(Proxy(names))
        return made[-1]

    yield make
    for one in made:
        one.close()


def skopeo_send(tool, tmp_path, host, folder, tag="1"):
    """Put an image into a registry that wants TLS and a login, by a program that is not ours."""
    tar = tmp_path / "one.tar"
    tar.write_bytes(b"")
    (tmp_path / "certs").mkdir(exist_ok=True)
    (tmp_path / "certs/ca.crt").write_bytes((folder / "ca.pem").read_bytes())
    umoci, skopeo = tool("umoci"), tool("skopeo")
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/a").write_text("1")
    subprocess.run(["tar", "-cf", tar, "-C", tmp_path / "tree", "."], check=True)
    for words in (
        ("init", "--layout", "img"),
        ("new", "--image", "img:t"),
        ("config", "--image", "img:t", "--architecture", "amd64"),
        ("raw", "add-layer", "--image", "img:t", str(tar)),
    ):
        subprocess.run([umoci, *words], cwd=tmp_path, check=True, capture_output=True)
    subprocess.run(
        [
            *(skopeo, "copy", "-q", "--insecure-policy", "--dest-creds", "me:secret"),
            *("--dest-cert-dir", tmp_path / "certs", f"oci:{tmp_path}/img:t", f"docker://{host}/lab/x:{tag}"),
        ],
        check=True,
        capture_output=True,
    )


@pytest.mark.registry
def test_registry_with_tls_and_login_filled_by_skopeo(docker_registry, cli, environ, tmp_path, tool):
    host, folder = docker_registry(auth=True, tls=True)
    skopeo_send(tool, tmp_path, host, folder)
    reference = f"docker://{host}/lab/x:1"
    assert "certificate" in cli("pull", "x.sif", reference, code=255).stderr
    own = tmp_path / "home/.config/containers/certs.d" / host
    own.mkdir(parents=True)
    (own / "ca.crt").write_bytes((folder / "ca.pem").read_bytes())
    assert "login" in cli("pull", "x.sif", reference, code=255).stderr
    name = {"SINGULARITY_DOCKER_USERNAME": "me", "SINGULARITY_DOCKER_PASSWORD": "secret"}
    cli("pull", "a.sif", reference, **name)
    refused = cli(
        "pull", "-F", "a.sif", reference, code=255, SINGULARITY_DOCKER_USERNAME="me", SINGULARITY_DOCKER_PASSWORD="no"
    )
    assert "login" in refused.stderr and "no" not in refused.stderr.split()  # the password is not shown
    config = tmp_path / "home/.docker/config.json"
    config.parent.mkdir()
    helper = tmp_path / "bin/docker-credential-vault"
    helper.parent.mkdir()
    helper.write_text(f'#!/bin/sh\nread s; [ "$s" = {host} ] && echo \'{{"Username":"me","Secret":"secret"}}\'\n')
    helper.chmod(0o755)
    config.write_text(json.dumps({"credHelpers": {host: "vault"}}))
    cli("pull", "b.sif", reference, PATH=f"{helper.parent}:{environ['PATH']}")
    config.write_text(json.dumps({"auths": {host: {"auth": base64.b64encode(b"me:secret").decode()}}}))
    cli("pull", "c.sif", reference)
    config.unlink()
    auth = tmp_path / "auth.json"
    auth.write_text(json.dumps({"auths": {f"{host}/lab": {"auth": base64.b64encode(b"me:secret").decode()}}}))
    cli("pull", "--authfile", auth, "d.sif", reference)
    cli("registry", "login", "-u", "me", "--password-stdin", host, text="secret\n")
    cli("pull", "e.sif", reference)
    assert host in cli("registry", "list").stdout
    cli("registry", "logout", f"docker://{host}")
    assert "login" in cli("pull", "-F", "e.sif", reference, code=255).stderr
    files = {(tmp_path / f"{name}.sif").read_bytes() for name in "abcde"}
    assert len(files) == 1


@pytest.mark.registry
def test_mirror_is_asked_first_and_the_registry_when_it_fails(docker_registry, cli, environ, tmp_path):
    host, _ = docker_registry()
    plain, secret = send(host, [gz(("a", b"1"))])[0], f"127.0.0.1:{free_port()}"
    mirror = FakeRegistry()
    try:
        mirror.add([gz(("a", b"1"))])
        conf = tmp_path / "registries.conf"
        environ["CONTAINERS_REGISTRIES_CONF"] = str(conf)
        insecure = f'[[registry]]\nprefix = "docker.io/lab"\nlocation = "{host}/a"\ninsecure = true\n'
        conf.write_text(insecure)
        found = json.loads(cli("pull", "--json", "x.sif", "docker://lab/b:1").stdout)
        assert found["manifest"] == plain  # plain http, because the file says so; no --no-https
        conf.write_text(insecure + f'[[registry.mirror]]\nlocation = "{mirror.host}/a"\ninsecure = true\n')
        cli("pull", "-F", "--disable-cache", "x.sif", "docker://lab/b:1")
        assert any("/v2/a/b/manifests/1" in path for _, path, _ in mirror.log)
        mirror.manifests.clear()
        cli("pull", "-F", "--disable-cache", "x.sif", "docker://lab/b:1")  # the mirror lost it
        conf.write_text(insecure + f'[[registry.mirror]]\nlocation = "{secret}/a"\ninsecure = true\n')
        cli("pull", "-F", "--disable-cache", "x.sif", "docker://lab/b:1")  # no mirror there at all
        conf.write_text(f'[[registry]]\nlocation = "{host}"\nblocked = true\n')
        assert "blocks" in cli("pull", "-F", "x.sif", f"docker://{host}/a/b:1", code=255).stderr
        conf.write_text(f'[[registry]]\nlocation = "{host}"\n')
        said = cli("pull", "-F", "x.sif", f"docker://{host}/a/b:1", code=255).stderr
        assert "plain http" in said and "--no-https" in said
        conf.write_text("[[registry]\n")
        assert str(conf) in cli("pull", "-F", "x.sif", "docker://lab/b:1", code=255).stderr
    finally:
        mirror.close()


@pytest.mark.registry
def test_proxy_of_the_environment_is_used_and_left_out_where_it_should_be(docker_registry, cli, fake, proxy, tmp_path):
    fake.add([gz(("a", b"1"))])
    port = int(fake.host.partition(":")[2])
    one = proxy(registry=("127.0.0.1", port))
    reference = f"docker://registry.test:{port}/a/b:1"
    one._names["registry.test"] = ("127.0.0.1", port)
    cli("pull", "--no-https", "x.sif", reference, http_proxy=one.address)
    assert one.asked and all(f"registry.test:{port}/v2/" in line for line in one.asked)
    count = len(one.asked)
    cli("pull", "--no-https", "y.sif", f"docker://{fake.host}/a/b:1", http_proxy=one.address, no_proxy="127.0.0.1")
    assert len(one.asked) == count
    host, folder = docker_registry(tls=True)
    said = cli(
        "pull",
        "z.sif",
        f"docker://{host}/a/nosuch:1",
        code=255,
        https_proxy=one.address,
        SSL_CERT_FILE=str(folder / "ca.pem"),
    )
    assert "not found" in said.stderr
    assert one.asked[-1] == f"CONNECT {host}"
    gone = f"http://127.0.0.1:{free_port()}"
    said = cli(
        "pull", "z.sif", f"docker://{host}/a/nosuch:1", code=255, https_proxy=gone, SSL_CERT_FILE=str(folder / "ca.pem")
    )
    assert f"refused by the proxy {gone}" in said.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("host", "without", "found"),
    [
        ("reg.test:5000", "reg.test", True),
        ("reg.test:5000", "other, REG.test:5000", True),
        ("reg.test:5001", "reg.test:5000", False),
        ("a.reg.test", ".reg.test", True),
        ("a.reg.test", "reg.test", True),
        ("areg.test", "reg.test", False),
        ("[::1]:5000", "[::1]", True),
        ("[::1]", "[::1]", True),
        ("anything", "*", True),
        ("anything", "", False),
        ("anything", ",", False),
    ],
)
def test_no_proxy_names_hosts_and_domains(host, without, found):
    assert _left_out(host, without) is found


class TokenRegistry(FakeRegistry):
    """A registry whose tokens are for one repository and expire in the middle, from a server of its own."""

    def __init__(self, expire: tuple[int, ...]) -> None:
        super().__init__()
        self.expire, self.served, self.age = expire, 0, 0
        self.given: dict[str, int] = {}
        self.lock = threading.Lock()
        self.tokens = FakeRegistry()
        self.tokens.spoil = self._token
        self.asked: list[str] = []

    def _token(self, handler) -> bool:
        self.asked.append(handler.path)
        wanted = "Basic " + base64.b64encode(b"me:secret").decode()
        if handler.headers.get("Authorization") != wanted:
            handler.answer(401, b'{"details":"wrong name or password"}')
            return True
        token = f"token-{len(self.given)}"
        self.given[token] = self.age
        handler.answer(200, json.dumps({"access_token": token, "expires_in": 300}).encode())
        return True

    def lets_in(self, handler) -> bool:
        given = handler.headers.get("Authorization", "").removeprefix("Bearer ")
        with self.lock:
            if self.given.get(given) == self.age:
                self.served += 1
                self.age += self.served in self.expire
                return True
        challenge = f'Bearer realm="http://{self.tokens.host}/token",service="reg.test",scope="repository:a/b:pull"'
        handler.answer(401, b'{"errors":[{"code":"UNAUTHORIZED"}]}', WWW_Authenticate=challenge)
        return False

    def close(self) -> None:
        self.tokens.close()
        super().close()


def test_tokens_are_asked_for_with_scope_and_again_when_they_have_expired(cli):
    registry = TokenRegistry(expire=(2, 6))
    try:
        layers = [gz((f"f{number}", os.urandom(2000))) for number in range(6)]
        reference = registry.add(layers)
        name = {"SINGULARITY_DOCKER_USERNAME": "me", "SINGULARITY_DOCKER_PASSWORD": "secret"}
        cli("pull", "--no-https", "x.sif", reference, **name)
        assert len(registry.given) == 3
        assert all("scope=repository%3Aa%2Fb%3Apull" in path and "service=reg.test" in path for path in registry.asked)
        blobs = [path for _, path, headers in registry.log if headers.get("Authorization") and "/blobs/" in path]
        assert {path.rpartition("/")[2] for path in blobs} >= {digest(layer) for layer in layers}
        refused = cli(
            "pull", "--no-https", "y.sif", reference, code=255, **{**name, "SINGULARITY_DOCKER_PASSWORD": "x"}
        )
        assert "refuses user me" in refused.stderr
        nobody = cli("pull", "--no-https", "y.sif", reference, code=255).stderr
        assert "refuses anonymous access" in nobody and f"registry login {registry.host}" in nobody
    finally:
        registry.close()
