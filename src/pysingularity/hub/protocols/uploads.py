# SPDX-License-Identifier: Apache-2.0
"""Files on their way in: a row and a file that grows, in one go or in pieces, until its digest proves it whole.

What arrived stays when a connection breaks, so that the client goes on where it stopped. Two requests never write to
one upload at a time. Nothing here is believed before `store` has hashed it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
from pathlib import Path

import sqlalchemy as sa
from fastapi import Request
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from pysingularity.hub.accounts.rights import Principal
from pysingularity.hub.builds.publish import know_blob
from pysingularity.hub.context import Hub
from pysingularity.hub.errors import Conflict, HubError, Invalid, NoSpace, NotFound, TooLarge
from pysingularity.hub.models import Container, Upload, now
from pysingularity.hub.storage.base import Digests, hash_file
from pysingularity.hub.storage.quota import need_room

#: Bytes that are collected before a thread writes them.
CHUNK = 1 << 20
_ID = re.compile(r"[0-9a-f]{32}\Z")


class WrongOffset(HubError):
    """A piece that does not continue what is there."""

    status = 416


def begin(
    session: Session,
    who: Principal,
    container: Container,
    *,
    image_id: int | None = None,
    size: int = 0,
    sha256: str = "",
) -> Upload:
    """Start an upload."""
    upload = Upload(
        id=secrets.token_hex(16),
        user_id=who.user.id if who.user else None,
        container_id=container.id,
        image_id=image_id,
        size=size,
        sha256=sha256,
    )
    session.add(upload)
    session.flush()
    return upload


def find(session: Session, number: str) -> Upload:
    """Return an upload by its id.

    Raises:
        NotFound: none, or it has ended.
    """
    upload = session.get(Upload, number) if _ID.match(number) else None
    if upload is None:
        raise NotFound("no-such-upload", "there is no such upload; perhaps it ended or was too old")
    return upload


def path_of(hub: Hub, number: str) -> Path:
    """Return the file of an upload."""
    if not _ID.match(number):
        raise NotFound("no-such-upload", "there is no such upload")
    return hub.settings.folder("uploads") / number


def arrived(hub: Hub, number: str) -> int:
    """Return how many bytes of an upload are there."""
    try:
        return path_of(hub, number).stat().st_size
    except FileNotFoundError:
        return 0


def check_room(hub: Hub, container_id: int, size: int) -> None:
    """Refuse what would be too much, before it is sent.

    Raises:
        TooLarge, NoSpace: by limit, quota or disk.
    """
    limit = hub.settings.builds.image_limit
    if size > limit:
        raise TooLarge("image-too-large", f"{size} bytes are more than the {limit} that a file may have here")
    with hub.read() as session:
        need_room(hub, session, session.get_one(Container, container_id).collection, size)


async def append(request: Request, path: Path, *, at: int | None, limit: int) -> int:
    """Append a request's body to a file and return its size afterwards.

    Arguments:
        at: where the client believes that the file ends; None: wherever it does.
        limit: bytes that the whole file may have.

    Raises:
        WrongOffset: it ends elsewhere.
        Conflict: another request is writing to it.
        TooLarge: more than the limit.
        Invalid: the connection broke; what arrived is kept.
    """
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise Conflict("upload-busy", "another request is writing to this upload")
        size = os.fstat(handle).st_size
        if at is not None and at != size:
            raise WrongOffset("wrong-offset", f"{size} bytes are here, the piece begins at {at}")
        waiting = bytearray()
        try:
            async for piece in request.stream():
                size += len(piece)
                if size > limit:
                    raise TooLarge("image-too-large", f"more than {limit} bytes")
                waiting += piece
                if len(waiting) >= CHUNK:
                    await run_in_threadpool(_write, handle, waiting)
                    waiting = bytearray()
        except ClientDisconnect:
            raise Invalid("broken-upload", "the connection broke; what arrived is kept")
        finally:
            if waiting:
                await run_in_threadpool(_write, handle, waiting)
        return size
    finally:
        os.close(handle)


def _write(handle: int, data: bytearray) -> None:
    view = memoryview(data)
    try:
        while view:
            view = view[os.write(handle, view) :]
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpace("disk-full", "the hub's disk has no room for the rest")
        raise


def store(hub: Hub, path: Path, *, sha256: str, size: int | None = None, md5: str = "") -> Digests:
    """Move a file that was uploaded into the storage, once it is what it was said to be; the file is gone afterwards.

    Raises:
        Invalid: another size or digest; nothing of it is kept.
    """
    try:
        digests = hash_file(path)
        if size is not None and digests.size != size:
            raise Invalid("wrong-size", f"{digests.size} bytes arrived, {size} were announced")
        if digests.sha256 != sha256:
            raise Invalid("wrong-digest", f"the bytes that arrived are sha256:{digests.sha256}, not sha256:{sha256}")
        if md5 and digests.md5 != md5:
            raise Invalid("wrong-digest", f"the MD5 of what arrived is {digests.md5}, not {md5}")
        hub.storage.take(path, sha256)
    except FileNotFoundError:
        raise Invalid("wrong-size", "nothing arrived")
    finally:
        path.unlink(missing_ok=True)
    with hub.write() as session:
        know_blob(session, digests.sha256, digests.md5, digests.size)
    return digests


def forget(hub: Hub, number: str) -> None:
    """End an upload, whatever became of it."""
    path_of(hub, number).unlink(missing_ok=True)
    with hub.write() as session:
        session.execute(sa.delete(Upload).where(Upload.id == number))


def touch(hub: Hub, number: str) -> None:
    """Note that an upload is alive."""
    with hub.write() as session:
        session.execute(sa.update(Upload).where(Upload.id == number).values(changed_at=now()))
