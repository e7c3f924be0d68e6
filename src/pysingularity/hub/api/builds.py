# SPDX-License-Identifier: Apache-2.0
"""Builds over JSON: list, show, start, cancel, retry, and the log as text, ranges and a live stream."""

from __future__ import annotations

import asyncio
import io
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any

import sqlalchemy as sa
from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, Field
from starlette.concurrency import run_in_threadpool

from pysingularity.hub.accounts.audit import record
from pysingularity.hub.accounts.rights import Principal, need_change, need_see, visible
from pysingularity.hub.api.views import build_view
from pysingularity.hub.builds import queue
from pysingularity.hub.builds.log import log_path
from pysingularity.hub.builds.planning import announce, manual
from pysingularity.hub.builds.states import ALL, FINAL
from pysingularity.hub.catalog import get_collection, parse_name
from pysingularity.hub.context import Hub
from pysingularity.hub.doors import Number, TheHub, Who, base_url, limited
from pysingularity.hub.errors import Invalid, NotFound
from pysingularity.hub.models import Build, Collection
from pysingularity.hub.protocols.sending import FilePart, WrongRange, parse_range

router = APIRouter(prefix="/api/v1", tags=["builds"], dependencies=[Depends(limited)])
#: Seconds between two looks at a growing log, and between two signs of life on a quiet one.
TAIL, HEARTBEAT = 0.2, 15.0
PIECE = 64 << 10


class NewBuild(BaseModel):
    """A build that somebody asks for."""

    model_config = {"extra": "forbid"}
    collection: str = Field(max_length=200, description="OWNER/NAME")
    recipe: str = Field("", max_length=1000, description="path in the repository; empty: the one of the tag")
    tag: str = Field("", max_length=64)
    ref: str = Field("", max_length=255, description="branch, tag or commit; empty: the default branch")
    branch: str = Field("", max_length=255, description="the same as ref")
    commit: str = Field("", max_length=64, description="the same as ref")
    publish: bool = True


def get_build(hub: Hub, who: Principal, number: int) -> Build:
    """Return a build that somebody may see.

    Raises:
        NotFound: there is none, or it is in a collection that he may not see.
    """
    with hub.read() as session:
        build = session.get(Build, number) if number < 1 << 62 else None
        if build is None:
            raise NotFound("no-such-build", f"build {number}: there is no such build")
        try:
            need_see(session, who, build.collection)
        except NotFound:
            raise NotFound("no-such-build", f"build {number}: there is no such build")
    return build


@router.get("/builds")
def index(
    request: Request,
    hub: TheHub,
    who: Who,
    collection: Annotated[str, Query(max_length=200)] = "",
    state: Annotated[str, Query(max_length=200)] = "",
    tag: Annotated[str, Query(max_length=64)] = "",
    commit: Annotated[str, Query(max_length=64)] = "",
    limit: Annotated[int, Query(ge=1, le=500)] = 50,
    before: Annotated[int, Query(ge=0, le=1 << 62)] = 0,
) -> dict[str, Any]:
    """List builds, the newest first; `state` may name several, separated by commas."""
    query = sa.select(Build).join(Collection, Collection.id == Build.collection_id).where(visible(who))
    with hub.read() as session:
        if collection:
            row = get_collection(session, *parse_name(collection))
            need_see(session, who, row)
            query = query.where(Build.collection_id == row.id)
        if state:
            states = state.split(",")
            if any(one not in ALL for one in states):
                raise Invalid("wrong-state", f"states are {', '.join(ALL)}")
            query = query.where(Build.state.in_(states))
        if tag:
            query = query.where(Build.tag == tag)
        if commit:
            query = query.where(Build.commit == commit)
        if before:
            query = query.where(Build.id < before)
        found = session.scalars(query.order_by(Build.id.desc()).limit(limit)).all()
    base = base_url(request)
    return {"builds": [build_view(one, base) for one in found], "limit": limit}


@router.get("/builds/{number}")
def show(number: Number, request: Request, hub: TheHub, who: Who) -> dict[str, Any]:
    """Show a build."""
    return build_view(get_build(hub, who, number), base_url(request))


@router.post("/builds", status_code=201)
def create(new: NewBuild, request: Request, hub: TheHub, who: Who) -> dict[str, Any]:
    """Start a build of any recipe of any commit."""
    with hub.read() as session:
        collection = get_collection(session, *parse_name(new.collection))
        need_change(session, who, collection, "build")
    build = manual(
        hub,
        collection.id,
        recipe=new.recipe,
        tag=new.tag,
        ref=new.ref or new.commit or new.branch,
        by=who.name,
        publish=new.publish,
    )
    with hub.write() as session:
        record(session, who, "build.start", collection.full_name, build=build.id)
    return build_view(get_build(hub, who, build.id), base_url(request))


@router.post("/builds/{number}/cancel", status_code=202)
def cancel(number: Number, request: Request, hub: TheHub, who: Who) -> dict[str, Any]:
    """Cancel a build that has not ended."""
    build = get_build(hub, who, number)
    with hub.write() as session:
        need_change(session, who, build.collection, "build")
        queue.cancel(session, number, by=who.name)
        record(session, who, "build.cancel", build.collection.full_name, build=number)
    return build_view(get_build(hub, who, number), base_url(request))


@router.post("/builds/{number}/retry", status_code=201)
def retry(number: Number, request: Request, hub: TheHub, who: Who) -> dict[str, Any]:
    """Queue a build of the same commit and recipe again."""
    build = get_build(hub, who, number)
    with hub.write() as session:
        need_change(session, who, build.collection, "build")
        again = queue.retry(session, session.get_one(Build, number), by=who.name)
        announce(hub, again, build.collection)
        record(session, who, "build.retry", build.collection.full_name, build=number)
    return build_view(get_build(hub, who, again.id), base_url(request))


@router.get("/builds/{number}/log", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
def log(number: Number, request: Request, hub: TheHub, who: Who, download: bool = False) -> Response:
    """Return the log so far, as text; understands Range."""
    get_build(hub, who, number)
    headers = {"Cache-Control": "no-cache", "Content-Type": "text/plain; charset=utf-8", "Accept-Ranges": "bytes"}
    if download:
        headers["Content-Disposition"] = f'attachment; filename="build-{number}.log"'
    try:
        file = io.FileIO(log_path(hub.settings.folder("logs"), number), "r")
    except FileNotFoundError:
        return Response("", headers=headers)
    # It may grow while it is sent: what there is now is the answer.
    size = os.fstat(file.fileno()).st_size
    try:
        part = parse_range(request.headers.get("range", ""), size)
    except WrongRange:
        file.close()
        raise
    if part is None:
        return FilePart(file, 0, size, status=200, headers=headers)
    offset, count = part
    headers["Content-Range"] = f"bytes {offset}-{offset + count - 1}/{size}"
    return FilePart(file, offset, count, status=206, headers=headers)


@router.get(
    "/builds/{number}/log/stream",
    response_class=StreamingResponse,
    responses={200: {"content": {"text/event-stream": {}}}},
)
def stream(
    number: Number, request: Request, hub: TheHub, who: Who, offset: Annotated[int, Query(ge=0, le=1 << 62)] = 0
) -> StreamingResponse:
    """Stream the log as server-sent events.

    Each event carries whole lines; its `id` is the byte offset behind them, so `Last-Event-ID` (or `offset`) continues
    without a gap. Events of kind `state` tell changes of state; the last one is such an event with a final state.
    """
    get_build(hub, who, number)
    last = request.headers.get("last-event-id", "")
    start = int(last) if last.isascii() and last.isdigit() and len(last) < 19 else offset
    return StreamingResponse(
        follow(hub, number, start),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
    )


async def follow(hub: Hub, number: int, offset: int) -> AsyncIterator[bytes]:
    """Yield server-sent events from an offset of a build's log until the build has ended and all was sent."""
    path = log_path(hub.settings.folder("logs"), number)
    told, quiet = "", 0.0
    yield b"retry: 1000\n\n"
    while True:
        # The state is read before the log: what a final state belongs to has been written by then.
        state = await run_in_threadpool(_state, hub, number)
        while True:
            data = await run_in_threadpool(_piece, path, offset, state in FINAL)
            if not data:
                break
            offset += len(data)
            yield _event(data, offset)
            quiet = 0.0
        if state in FINAL or not state:
            yield f"event: state\nid: {offset}\ndata: {state}\n\n".encode()
            return
        if state != told:
            told, quiet = state, 0.0
            yield f"event: state\nid: {offset}\ndata: {state}\n\n".encode()
        await asyncio.sleep(TAIL)
        quiet += TAIL
        if quiet >= HEARTBEAT:
            quiet = 0.0
            yield b": still here\n\n"


def _state(hub: Hub, number: int) -> str:
    with hub.read() as session:
        return session.scalar(sa.select(Build.state).where(Build.id == number)) or ""


def _piece(path: Path, offset: int, ended: bool) -> bytes:
    """Return whole lines from an offset; of a log that has ended, also a last line without an end."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return b""
    try:
        data = os.pread(handle, PIECE, offset)
    finally:
        os.close(handle)
    if ended and len(data) < PIECE:
        return data
    cut = data.rfind(b"\n") + 1
    return data[:cut] if cut or len(data) < PIECE else data


def _event(data: bytes, offset: int) -> bytes:
    # Only \n, \r\n and \r end a line of an event stream; a lone \r of a progress bar must not.
    text = data[:-1] if data.endswith(b"\n") else data
    lines = text.replace(b"\r\n", b"\n").replace(b"\r", b"\xe2\x90\x8d").split(b"\n")
    return b"id: %d\n" % offset + b"".join(b"data: " + line + b"\n" for line in lines) + b"\n"
