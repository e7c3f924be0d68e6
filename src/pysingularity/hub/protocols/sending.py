# SPDX-License-Identifier: Apache-2.0
"""Sending stored files: ranges, validators, sendfile; and counting who pulled what.

A file is never loaded: either the kernel moves it into the connection (see `front`), or, under a server without that
extension, a thread reads one piece after the other.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Mapping

import sqlalchemy as sa
from fastapi import Request, Response
from fastapi.responses import RedirectResponse
from starlette.concurrency import run_in_threadpool
from starlette.types import Receive, Scope, Send

from pysingularity.hub.accounts.rights import Principal
from pysingularity.hub.context import Hub
from pysingularity.hub.doors import Limits
from pysingularity.hub.errors import HubError, NotFound
from pysingularity.hub.front import ZERO_COPY
from pysingularity.hub.models import Blob, Collection, Image, Pull, now

CHUNK = 1 << 20
DAY = 86400
BYTES = "application/octet-stream"
_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})\Z")


class WrongRange(HubError):
    """A part that the file does not have."""

    status = 416


class FilePart(Response):
    """A stretch of an open file.

    Arguments:
        file: closed when it was sent.
        offset, count: bytes.
    """

    def __init__(self, file: io.FileIO, offset: int, count: int, *, status: int, headers: Mapping[str, str]) -> None:
        super().__init__(None, status, headers={**headers, "Content-Length": str(count)})
        self.file, self.offset, self.count = file, offset, count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        """Send headers and bytes."""
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            if scope["method"] == "HEAD" or not self.count:
                await send({"type": "http.response.body", "body": b"", "more_body": False})
            elif ZERO_COPY in scope.get("extensions", ()):
                await send({"type": ZERO_COPY, "file": self.file, "offset": self.offset, "count": self.count})
            else:
                await self._send_bytes(send)
        finally:
            self.file.close()

    async def _send_bytes(self, send: Send) -> None:
        at, end = self.offset, self.offset + self.count
        while at < end:
            data = await run_in_threadpool(os.pread, self.file.fileno(), min(CHUNK, end - at), at)
            if not data:
                raise OSError(f"a stored file ended at {at} of {end} bytes")
            at += len(data)
            await send({"type": "http.response.body", "body": data, "more_body": at < end})


def parse_range(text: str, size: int) -> tuple[int, int] | None:
    """Return (offset, count) of a `Range` header, or None when the whole file is to be sent.

    Several ranges at once and other units are answered with the whole file (RFC 9110 §14.2 allows it).

    Raises:
        WrongRange: the file has no such part.
    """
    match = _RANGE.match(text.strip())
    if match is None or not (match[1] or match[2]):
        return None
    if not match[1]:
        count = min(int(match[2]), size)
        first = size - count
    else:
        first = int(match[1])
        last = min(int(match[2]), size - 1) if match[2] else size - 1
        if match[2] and int(match[2]) < first:
            return None
        count = last - first + 1
    if count <= 0 or first >= size:
        raise WrongRange(
            "wrong-range", f"the file has {size} bytes, not {text[:60]}", headers={"Content-Range": f"bytes */{size}"}
        )
    return first, count


def send_blob(
    request: Request,
    hub: Hub,
    sha256: str,
    *,
    media_type: str = BYTES,
    name: str = "",
    headers: Mapping[str, str] | None = None,
    redirect: int = 302,
) -> Response:
    """Return the answer that sends a blob, or sends the client to a signed link.

    Arguments:
        name: proposed to browsers as the file's name.
        redirect: status of the answer with a signed link.

    Raises:
        NotFound: it is not there any more, or scrubbing found it damaged.
        WrongRange: no such part.
    """
    with hub.read() as session:
        blob = session.get(Blob, sha256)
    if blob is None:
        raise NotFound("no-such-blob", "there is no such file")
    if blob.damaged:
        raise NotFound("damaged", "the stored file is damaged and is not served; ask the administrator")
    tag = f'"{sha256}"'
    common = {"ETag": tag, "Accept-Ranges": "bytes", "Content-Type": media_type, **(headers or {})}
    if name:
        common["Content-Disposition"] = f'attachment; filename="{name}"'
    if tag in [one.strip() for one in request.headers.get("if-none-match", "").split(",")]:
        return Response(None, 304, headers=common)
    if hub.settings.storage.signed_links:
        link = hub.storage.link(sha256, hub.settings.storage.link_seconds)
        if link is not None:
            return RedirectResponse(link, redirect, headers={"Cache-Control": "no-store"})
    part = None
    if "range" in request.headers and request.headers.get("if-range", tag) == tag:
        part = parse_range(request.headers["range"], blob.size)
    try:
        file = io.FileIO(hub.storage.open(sha256), "r")
    except FileNotFoundError:
        raise NotFound("no-such-blob", "the stored file is gone; ask the administrator")
    if part is None:
        return FilePart(file, 0, blob.size, status=200, headers=common)
    offset, count = part
    common["Content-Range"] = f"bytes {offset}-{offset + count - 1}/{blob.size}"
    return FilePart(file, offset, count, status=206, headers=common)


def starts_pull(request: Request, answer: Response) -> bool:
    """Return whether an answer begins a download: no HEAD, nothing unchanged, no later part of one under way."""
    if request.method != "GET" or answer.status_code == 304:
        return False
    if answer.status_code == 206:
        return answer.headers["content-range"].startswith("bytes 0-")
    return True


def count_pull(request: Request, hub: Hub, who: Principal, image: Image, answer: Response) -> None:
    """Note that somebody pulls an image.

    Raises:
        TooMany: more than one person may in an hour.
    """
    if not starts_pull(request, answer):
        return
    try:
        _note_pull(request, hub, who, image)
    except BaseException:
        if isinstance(answer, FilePart):
            answer.file.close()
        raise


def _note_pull(request: Request, hub: Hub, who: Principal, image: Image) -> None:
    limits: Limits = request.app.state.limits
    limits.pulls.take(who.key())
    day = int(now() // DAY)
    with hub.write() as session:
        session.execute(
            sa.update(Image).where(Image.id == image.id).values(pulls=Image.pulls + 1, pulled_at=now()),
            execution_options={"synchronize_session": False},
        )
        session.execute(
            sa.update(Collection)
            .where(Collection.id == image.container.collection_id)
            .values(pulls=Collection.pulls + 1),
            execution_options={"synchronize_session": False},
        )
        row = session.get(Pull, (image.id, day), with_for_update=True)
        if row is None:
            session.add(Pull(image_id=image.id, day=day, count=1))
        else:
            row.count += 1
