# SPDX-License-Identifier: Apache-2.0
"""Webhooks: where forges knock, and the record of their exchanges."""

from __future__ import annotations

from typing import Annotated, Any

import sqlalchemy as sa
from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool

from pysingularity.hub.accounts.rights import need_change
from pysingularity.hub.api.views import delivery_view
from pysingularity.hub.catalog import get_collection
from pysingularity.hub.doors import Number, TheHub, Who, get_hub
from pysingularity.hub.errors import NotFound, TooLarge
from pysingularity.hub.models import Delivery
from pysingularity.hub.sources.intake import receive

router = APIRouter(prefix="/api/v1", tags=["webhooks"])


@router.post("/hooks/{hook}", status_code=202, responses={200: {"description": "Nothing has to be done."}})
async def hook(hook: str, request: Request) -> Response:
    """Take in what a forge sends; answered at once, worked off behind it."""
    hub = get_hub(request)
    body = await read_body(request, hub.settings.sources.payload_limit)
    headers = {name.lower(): value for name, value in request.headers.items()}
    status, answer = await run_in_threadpool(receive, hub, hook, headers, body)
    return JSONResponse(answer, status)


async def read_body(request: Request, limit: int) -> bytes:
    """Return the body of a request.

    Raises:
        TooLarge: more than `limit` bytes; the rest is not read.
    """
    chunks, size = [], 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit:
            raise TooLarge("payload-too-large", f"the body has more than {limit} bytes")
        chunks.append(chunk)
    return b"".join(chunks)


@router.get("/collections/{owner}/{name}/deliveries")
def index(
    owner: str, name: str, hub: TheHub, who: Who, limit: Annotated[int, Query(ge=1, le=200)] = 50
) -> dict[str, Any]:
    """List the exchanges of a collection, the newest first."""
    with hub.read() as session:
        collection = get_collection(session, owner, name)
        need_change(session, who, collection, "admin")
        rows = session.scalars(
            sa.select(Delivery).where(Delivery.collection_id == collection.id).order_by(Delivery.id.desc()).limit(limit)
        )
        return {"deliveries": [delivery_view(row) for row in rows]}


@router.get("/collections/{owner}/{name}/deliveries/{number}")
def show(owner: str, name: str, number: Number, hub: TheHub, who: Who) -> dict[str, Any]:
    """Show one exchange with what was sent."""
    with hub.read() as session:
        collection = get_collection(session, owner, name)
        need_change(session, who, collection, "admin")
        row = session.get(Delivery, number) if number < 1 << 62 else None
        if row is None or row.collection_id != collection.id:
            raise NotFound("no-such-delivery", f"exchange {number}: there is no such exchange")
        return delivery_view(row, full=True)
