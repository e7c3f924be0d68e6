# SPDX-License-Identifier: Apache-2.0
"""The way out of a sandbox: a small forward proxy that looks at every address before it connects.

One per job, on a Unix socket that only that sandbox sees. Names are resolved here and the resolved address is what is
connected to, so that a name cannot lead anywhere else. Loopback, link-local (the cloud's metadata), private and
multicast networks are refused unless the administrator allowed them. Speaks CONNECT, and plain requests with an
absolute address. A proxy of the site can stand behind it; then names are judged by it, addresses by us.
"""

from __future__ import annotations

import base64
import fnmatch
import ipaddress
import os
import re
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from pysingularity.hub.engines.sandbox import pump

_HEAD = 64 << 10
_TARGET = re.compile(r"(?:\[([0-9a-fA-F:.]+)\]|([A-Za-z0-9_.-]+))(?::(\d{1,5}))?\Z")


@dataclass(frozen=True)
class Policy:
    """What may be reached.

    Arguments:
        allow, deny: host names (`.example.org` for all below, shell patterns), addresses, networks; with `:PORT` for
            one port only.
        closed: only what is in `allow`.
        upstream: address of the site's proxy, "" for none.
        direct: hosts that are reached without it (`no_proxy`).
    """

    allow: list[str] = field(default_factory=list)
    deny: list[str] = field(default_factory=list)
    closed: bool = False
    upstream: str = ""
    direct: list[str] = field(default_factory=list)

    def allows_name(self, host: str, port: int) -> bool | None:
        """Return what the lists say about a name: True, False, or None when its address decides."""
        if _listed(host, port, self.deny):
            return False
        if _listed(host, port, self.allow):
            return True
        return False if self.closed and not any(_network(item) for item in self.allow) else None

    def allows_address(self, address: str, port: int) -> bool:
        """Return whether an address may be connected to."""
        if _listed(address, port, self.deny):
            return False
        if _listed(address, port, self.allow):
            return True
        return not self.closed and ipaddress.ip_address(address).is_global


def _network(item: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network | None:
    try:
        return ipaddress.ip_network(item, strict=False)
    except ValueError:
        return None


def _listed(host: str, port: int, items: list[str]) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        address = None
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    for whole in items:
        item, colon, number = whole.rpartition(":")
        if not (colon and number.isdigit() and ":" not in item.strip("[]")):
            item, number = whole, ""
        if number and int(number) != port:
            continue
        network = _network(item)
        if network is not None:
            if address is not None and address.version == network.version and address in network:
                return True
        elif address is None:
            name, wanted = host.lower().rstrip("."), item.lower()
            if name == wanted.removeprefix(".") or fnmatch.fnmatchcase(
                name, "*" + wanted if wanted[:1] == "." else wanted
            ):
                return True
    return False


class Refused(Exception):
    """A connection is not made; the words go to the client and into the log."""


class Proxy:
    """Serves one Unix socket until it is closed.

    Arguments:
        path: of the socket.
        policy: what may be reached.
        tell: gets a sentence for each refusal.
    """

    def __init__(self, path: Path, policy: Policy, tell: Callable[[str], None]) -> None:
        self.policy, self.tell = policy, tell
        self._told: set[str] = set()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:  # the path may be longer than a socket's address
            self._listener.bind(f"/proc/self/fd/{folder}/{path.name}")
        finally:
            os.close(folder)
        path.chmod(0o666)  # only the sandbox has a way to it
        self._listener.listen(128)
        threading.Thread(target=self._serve, daemon=True, name="egress").start()

    def close(self) -> None:
        """Take no more connections."""
        try:
            self._listener.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._client, args=(client,), daemon=True).start()

    def _client(self, client: socket.socket) -> None:
        with client:
            client.settimeout(60)
            try:
                head, rest = _read_head(client)
                method, target, version = head.split(b"\r\n", 1)[0].decode("latin-1").split(" ", 2)
                if method == "CONNECT":
                    host, port = _split(target, 443)
                    server = self._open(host, port, tunnel=True)
                    client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
                else:
                    address = urlsplit(target)
                    if address.scheme != "http" or not address.hostname:
                        raise Refused("this is a proxy: requests name an http:// address")
                    server = self._open(address.hostname, address.port or 80, tunnel=False)
                    path = (
                        target
                        if self._via(address.hostname)
                        else (address.path or "/") + ("?" + address.query if address.query else "")
                    )
                    rest = _request(head, method, path, version, self._credentials(address.hostname)) + rest
            except (Refused, ValueError) as error:
                self._refuse(client, str(error))
                return
            except OSError as error:
                _answer(client, "502 Bad Gateway", f"the build's proxy cannot connect: {error}")
                return
            with server:
                client.settimeout(None)
                server.settimeout(None)
                server.sendall(rest)
                back = threading.Thread(target=pump, args=(server, client), daemon=True)
                back.start()
                pump(client, server)
                back.join()

    def _refuse(self, client: socket.socket, text: str) -> None:
        if text not in self._told and len(self._told) < 100:
            self._told.add(text)
            self.tell(f"network: {text}")
        _answer(client, "403 Forbidden", text)

    def _via(self, host: str) -> bool:
        return bool(self.policy.upstream) and not any(
            host == item.lstrip(".") or host.endswith("." + item.lstrip(".")) or item == "*"
            for item in self.policy.direct
        )

    def _credentials(self, host: str) -> str:
        upstream = urlsplit(self.policy.upstream)
        if not self._via(host) or upstream.username is None:
            return ""
        pair = f"{upstream.username}:{upstream.password or ''}".encode()
        return f"Proxy-Authorization: Basic {base64.b64encode(pair).decode()}\r\n"

    def _open(self, host: str, port: int, *, tunnel: bool) -> socket.socket:
        verdict = self.policy.allows_name(host, port)
        if verdict is False:
            raise Refused(f"{host}:{port} may not be reached from builds")
        if self._via(host):
            try:
                literal = str(ipaddress.ip_address(host))
            except ValueError:
                literal = ""
            if literal and verdict is None and not self.policy.allows_address(literal, port):
                raise Refused(f"{host}:{port} may not be reached from builds")
            upstream = urlsplit(self.policy.upstream)
            server = socket.create_connection((upstream.hostname or "", upstream.port or 80), timeout=30)
            if tunnel:
                name = f"[{host}]" if ":" in host else host
                server.sendall(
                    f"CONNECT {name}:{port} HTTP/1.1\r\nHost: {name}:{port}\r\n{self._credentials(host)}\r\n".encode()
                )
                head, rest = _read_head(server)
                if head.split(b" ", 2)[1:2] != [b"200"] or rest:
                    server.close()
                    raise OSError(f"the site's proxy says: {head.splitlines()[0][:200].decode('latin-1')}")
            return server
        last: OSError = OSError(f"{host}: no address")
        refused = False
        for family, kind, number, _, where in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            if verdict is not True and not self.policy.allows_address(str(where[0]), port):
                refused = True
                continue
            server = socket.socket(family, kind, number)
            server.settimeout(30)
            try:
                server.connect(where)
            except OSError as error:
                server.close()
                last = error
                continue
            return server
        if refused:
            raise Refused(f"{host}:{port} may not be reached from builds")
        raise last


def _read_head(handle: socket.socket) -> tuple[bytes, bytes]:
    data = b""
    while b"\r\n\r\n" not in data:
        chunk = handle.recv(1 << 14)
        if not chunk:
            raise OSError("the connection ended in the middle of a request")
        data += chunk
        if len(data) > _HEAD:
            raise Refused("the request is too long")
    head, _, rest = data.partition(b"\r\n\r\n")
    return head, rest


def _split(target: str, port: int) -> tuple[str, int]:
    match = _TARGET.match(target)
    if match is None:
        raise Refused("this is no address")
    return match[1] or match[2], int(match[3] or port)


def _request(head: bytes, method: str, path: str, version: str, credentials: str) -> bytes:
    """Return a request for the server: its own path, one request per connection, nothing that was meant for a proxy."""
    lines = [
        line
        for line in head.decode("latin-1").split("\r\n")[1:]
        if not line.lower().startswith(("proxy-", "connection:", "keep-alive:"))
    ]
    start = f"{method} {path} {version}\r\n" + "".join(line + "\r\n" for line in lines)
    return (start + credentials + "Connection: close\r\n\r\n").encode("latin-1")


def _answer(client: socket.socket, status: str, text: str) -> None:
    body = (text + "\n").encode()
    head = f"HTTP/1.1 {status}\r\nContent-Type: text/plain\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    try:
        client.sendall(head.encode() + body)
    except OSError:  # it did not wait for the answer
        pass
