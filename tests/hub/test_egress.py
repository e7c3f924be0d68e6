# SPDX-License-Identifier: Apache-2.0
"""The builds' way out: what may be reached, by name and by address, and what a hostile client gets."""

from __future__ import annotations

import base64
import contextlib
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pysingularity.hub.engines import egress
from pysingularity.hub.engines.egress import Policy, Proxy


@pytest.mark.parametrize(
    ("address", "allowed"),
    [
        ("8.8.8.8", True),
        ("2606:4700:4700::1111", True),
        *((one, False) for one in ("127.0.0.1", "127.8.9.1", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1")),
        *(
            (one, False)
            for one in ("169.254.169.254", "100.64.0.1", "::1", "::", "fe80::1", "fc00::1", "fd00:ec2::254")
        ),
        *((one, False) for one in ("::ffff:127.0.0.1", "::ffff:169.254.169.254", "::ffff:10.0.0.1", "255.255.255.255")),
    ],
)
def test_only_public_addresses_are_reached_unless_allowed(address: str, allowed: bool):
    assert Policy().allows_address(address, 80) is allowed
    assert Policy(deny=[address]).allows_address(address, 80) is False
    assert Policy(closed=True).allows_address(address, 80) is False


def test_networks_ports_and_names_of_the_lists():
    policy = Policy(
        allow=["10.0.0.0/8", "mirror.lab:443", ".example.org", "*.cdn.net"], deny=["10.9.0.0/16", "evil.org"]
    )
    assert policy.allows_address("10.1.1.1", 80)
    assert policy.allows_address("::ffff:10.1.1.1", 80)
    assert not policy.allows_address("10.9.1.1", 80)
    assert policy.allows_name("mirror.lab", 443) is True
    assert policy.allows_name("MIRROR.lab.", 443) is True
    assert policy.allows_name("mirror.lab", 80) is None
    assert policy.allows_name("example.org", 80) is True
    assert policy.allows_name("a.b.example.org", 80) is True
    assert policy.allows_name("notexample.org", 80) is None
    assert policy.allows_name("x.cdn.net", 80) is True
    assert policy.allows_name("evil.org", 80) is False
    assert Policy(closed=True, allow=["a.org"]).allows_name("b.org", 80) is False


class Server(BaseHTTPRequestHandler):
    """Answers with what it was asked."""

    def do_GET(self) -> None:
        body = f"{self.command} {self.path} {self.headers.get('Proxy-Authorization', '')}".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def target() -> Iterator[int]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()


@pytest.fixture
def proxied(tmp_path: Path):
    """Start a proxy with a policy; returns a function that sends bytes to it, and what it said."""
    proxies: list[Proxy] = []
    said: list[str] = []

    def start(policy: Policy):
        path = tmp_path / f"proxy{len(proxies)}"
        proxies.append(Proxy(path, policy, said.append))

        def send(data: bytes, then: bytes = b"") -> bytes:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
                client.settimeout(10)
                client.connect(str(path))
                client.sendall(data)
                answer = client.recv(1 << 16)
                if then and b" 200 " in answer:
                    client.sendall(then)
                elif not then:
                    with contextlib.suppress(OSError):
                        client.shutdown(socket.SHUT_WR)
                # Whoever answers writes head and body separately, and closes behind them.
                with contextlib.suppress(OSError):
                    while more := client.recv(1 << 16):
                        answer += more
                return answer

        return send

    start.said = said  # type: ignore[attr-defined]
    yield start
    for proxy in proxies:
        proxy.close()


def get(port: int, host: str = "127.0.0.1", more: str = "") -> bytes:
    return f"GET http://{host}:{port}/x?y HTTP/1.1\r\nHost: {host}\r\n{more}\r\n".encode()


def test_requests_and_tunnels_to_what_is_allowed(proxied, target: int):
    send = proxied(Policy(allow=[f"127.0.0.1:{target}"]))
    assert send(get(target)).endswith(b"GET /x?y ")
    tunnel = f"CONNECT 127.0.0.1:{target} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
    assert send(tunnel, b"GET /inside HTTP/1.1\r\nHost: x\r\n\r\n").endswith(b"GET /inside ")
    assert b" 403 " in send(get(target + 1))


def test_secrets_for_a_proxy_do_not_go_to_the_server(proxied, target: int):
    send = proxied(Policy(allow=["127.0.0.1"]))
    assert b"hush" not in send(get(target, more="Proxy-Authorization: Basic hush\r\n"))


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0", "127.1", "2130706433", "0x7f000001"])
def test_every_spelling_of_loopback_is_refused(proxied, target: int, host: str):
    send = proxied(Policy())
    for request in (get(target, host), f"CONNECT {host}:{target} HTTP/1.1\r\n\r\n".encode()):
        answer = send(request)
        assert b" 403 " in answer or b" 502 " in answer
        assert b"GET /" not in answer


def test_name_that_leads_inside_is_refused_by_its_address(proxied, target: int, monkeypatch: pytest.MonkeyPatch):
    real = socket.getaddrinfo

    def resolve(host: str, *words: object, **options: object):
        return real("127.0.0.1" if host == "rebind.example.org" else host, *words, **options)

    monkeypatch.setattr(egress.socket, "getaddrinfo", resolve)
    send = proxied(Policy())
    assert b" 403 " in send(get(target, "rebind.example.org"))
    assert any("rebind.example.org" in line for line in proxied.said)


def test_site_proxy_stands_behind_with_its_own_password(proxied, target: int):
    upstream = f"http://me:word@127.0.0.1:{target}"
    send = proxied(Policy(upstream=upstream, direct=["intern.lab"]))
    answer = send(get(80, "far.example.org"))
    assert b"http://far.example.org:80/x?y" in answer
    assert base64.b64encode(b"me:word") in answer
    # What the site's proxy would reach for us is still not ours to ask for.
    assert b" 403 " in send(get(80, "169.254.169.254"))
    assert b" 403 " in send(get(80, "10.0.0.1"))


def test_refusals_are_said_once(proxied, target: int):
    send = proxied(Policy())
    for _ in range(5):
        send(get(target))
    assert len(proxied.said) == 1


@given(data=st.binary(max_size=300) | st.text(max_size=100).map(lambda text: f"GET {text} HTTP/1.1\r\n\r\n".encode()))
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_request_is_answered_or_dropped_and_the_next_one_served(proxied, target: int, data: bytes):
    send = proxied(Policy(allow=[f"127.0.0.1:{target}"], closed=True))
    try:
        answer = send(data + b"\r\n\r\n")
    except OSError:
        answer = b""
    assert not answer or answer.startswith(b"HTTP/1.1 ")
    assert send(get(target)).endswith(b"GET /x?y ")
