# SPDX-License-Identifier: Apache-2.0
"""What happens to every request before and after the application, in plain ASGI so that nothing slows a stream down.

In front: a short secret in the path (`/t/SECRET/...`) becomes part of the request, and the free prefix that shub
clients may put before `/api/container/` is taken off. Behind: headers that protect browsers. Besides: how a file goes
into a connection by sendfile(2), which uvicorn does not do by itself.
"""

from __future__ import annotations

import asyncio
import io
import re
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

#: Nothing on a page comes from elsewhere, and nobody puts our pages into his.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "connect-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
)
HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"same-origin"),
    (b"content-security-policy", POLICY.encode()),
)
#: Bytes and seconds for which a refusal waits for the rest of a request.
DRAIN, DRAIN_SECONDS = 64 << 20, 5.0
#: The ASGI extension by which an application hands over a file instead of its bytes.
ZERO_COPY = "http.response.zerocopysend"
_SHARE = re.compile(r"/t/([0-9A-Za-z]{8,64})(/.*)\Z", re.DOTALL)
_CONTAINER = "/api/container/"
#: Doors that answer HEAD in their own way, and streams, which have no end.
_OWN_HEAD = re.compile(r"^/v[12](/|$)|/download(/|$)|/stream$")


class Front:
    """The outermost layer of the application."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and its answer back with our headers."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        shorten(scope)
        if scope["method"] == "HEAD" and not _OWN_HEAD.search(scope["path"]):
            # Whatever can be got can be asked about; the server, which keeps the first scope, sends no body.
            scope = {**scope, "method": "GET"}

        rest = _Rest(scope, receive)

        async def add_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                if message["status"] >= 400:
                    await rest.drain()
                headers = message.setdefault("headers", [])
                known = {name.lower() for name, _ in headers}
                message["headers"] = [*headers, *((name, value) for name, value in HEADERS if name not in known)]
            await send(message)

        await self.app(scope, rest.receive, add_headers)


class _Rest:
    """What is still to come of a request's body.

    Clients that are refused while they send see a broken connection in place of our answer, when it is closed with
    their bytes unread; so a refusal waits for a body that is not too long.
    """

    def __init__(self, scope: Scope, receive: Receive) -> None:
        self._receive = receive
        headers = dict(scope["headers"])
        # Who expects our word first sends nothing when it is no.
        self._open = b"expect" not in headers and (b"content-length" in headers or b"transfer-encoding" in headers)

    async def receive(self) -> Message:
        """Receive for the application."""
        message = await self._receive()
        if message["type"] != "http.request" or not message.get("more_body", False):
            self._open = False
        return message

    async def drain(self) -> None:
        """Read the rest, within limits of bytes and time."""
        left = DRAIN
        try:
            async with asyncio.timeout(DRAIN_SECONDS):
                while self._open and left > 0:
                    left -= len((await self.receive()).get("body", b""))
        except TimeoutError:
            return


def shorten(scope: Scope) -> None:
    """Take prefixes off a request's path; the secret goes to `scope["share"]`."""
    path: str = scope["path"]
    if match := _SHARE.match(path):
        scope["share"], path = match[1], match[2]
    at = path.find(_CONTAINER)
    if at > 0 and not path.startswith(("/api/", "/v1/", "/v2/")):
        path = path[at:]
    if path != scope["path"]:
        scope["path"] = path
        scope["raw_path"] = path.encode("utf-8", "surrogatepass")


class Protocol(HttpToolsProtocol):
    """uvicorn's HTTP/1.1 with the zero-copy extension."""

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        cycle.scope["extensions"] = {ZERO_COPY: {}}

        async def with_files(scope: Any, receive: Any, send: Any) -> None:
            async def hand_over(message: Any) -> None:
                if message["type"] == ZERO_COPY:
                    await _send_file(cycle, message)
                else:
                    await send(message)

            await app(scope, receive, hand_over)

        super()._start_asgi_task(cycle, with_files)


async def _send_file(cycle: Any, message: Any) -> None:
    """Let the kernel move a stretch of a file into a connection, then go on as if it had been a body."""
    file: io.FileIO = message["file"]
    count: int = message["count"]
    if count and not cycle.disconnected:
        try:
            await asyncio.get_running_loop().sendfile(cycle.transport, file, message["offset"], count)
        except (ConnectionError, RuntimeError):
            # The client went away, perhaps in the middle: there is nobody left to tell.
            cycle.transport.abort()
            cycle.disconnected = True
            return
    cycle.expected_content_length -= count
    await cycle.send({"type": "http.response.body", "body": b"", "more_body": message.get("more_body", False)})
