# SPDX-License-Identifier: Apache-2.0
"""Scrubbing: every stored file is read again now and then, and one whose content changed is served no more."""

from __future__ import annotations

import os
from typing import Any

import sqlalchemy as sa

from pysingularity.hub.accounts.audit import record
from pysingularity.hub.context import Hub
from pysingularity.hub.models import Blob, now
from pysingularity.hub.storage.base import hash_file


def scrub(hub: Hub, *, older: float = 0.0, most: int = 0) -> dict[str, Any]:
    """Check stored files, those not checked for longest first, and note what was found.

    Arguments:
        older: only files not checked for so many seconds.
        most: no more than so many files; 0 is all.

    Returns:
        `checked`, `bytes`, and `damaged`: digest → what is wrong.
    """
    with hub.read() as session:
        due = sa.or_(Blob.checked_at.is_(None), Blob.checked_at <= now() - older)
        query = sa.select(Blob).where(due).order_by(Blob.checked_at.is_not(None), Blob.checked_at, Blob.sha256)
        rows = session.scalars(query.limit(most) if most else query).all()
    damaged: dict[str, str] = {}
    total = 0
    for blob in rows:
        problem = _check(hub, blob)
        total += blob.size
        if problem:
            damaged[blob.sha256] = problem
        with hub.write() as session:
            row = session.get(Blob, blob.sha256)
            if row is None:  # collected meanwhile
                damaged.pop(blob.sha256, None)
                continue
            if problem != row.damaged:
                record(session, "scrub", "blob.damaged" if problem else "blob.whole", blob.sha256, problem=problem)
            row.checked_at, row.damaged = now(), problem
    return {"checked": len(rows), "bytes": total, "damaged": damaged}


def _check(hub: Hub, blob: Blob) -> str:
    try:
        handle = hub.storage.open(blob.sha256)
    except FileNotFoundError:
        return "the file is missing"
    try:
        digests = hash_file(handle)
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    finally:
        os.close(handle)
    if digests.sha256 != blob.sha256:
        return f"has other content (sha256 {digests.sha256}, {digests.size} of {blob.size} bytes)"
    return ""
