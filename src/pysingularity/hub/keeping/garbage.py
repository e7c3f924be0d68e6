# SPDX-License-Identifier: Apache-2.0
"""What may go: old images by the rules of retention, then files that nothing speaks of, by mark and sweep.

A file is removed when no image and no manifest has needed it for the time of grace; uploads and images that were
announced and never came go after their own time. Frozen images and whatever a tag names never go. It runs beside a
serving hub: rows go first, in the transaction that finds them unneeded, and a file whose age shows that somebody has
just brought it again stays.
"""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from pysingularity.hub.accounts.audit import record
from pysingularity.hub.builds.log import log_path
from pysingularity.hub.builds.states import FINAL
from pysingularity.hub.context import Hub
from pysingularity.hub.models import (
    Blob,
    BlobLink,
    Build,
    Collection,
    Container,
    Delivery,
    Image,
    Manifest,
    SignIn,
    Tag,
    Upload,
    now,
)

DAY = 86400.0


@dataclass
class Report:
    """What was removed, or would be."""

    images: list[int] = field(default_factory=list)
    blobs: int = 0
    bytes: int = 0
    uploads: int = 0
    logs: int = 0
    deliveries: int = 0

    def view(self) -> dict[str, Any]:
        """Return it as JSON-able values."""
        return {
            "images": self.images,
            "blobs": self.blobs,
            "bytes": self.bytes,
            "uploads": self.uploads,
            "logs": self.logs,
            "deliveries": self.deliveries,
        }


def collect(hub: Hub, *, grace: float | None = None, dry_run: bool = False) -> Report:
    """Remove what may go and say what it was.

    Arguments:
        grace: seconds that an unneeded file stays; None is as the settings say.
        dry_run: only say it.
    """
    report = Report()
    keep = hub.settings.keep
    patience = keep.grace if grace is None else grace
    _retire(hub, report, dry_run)
    _end_uploads(hub, report, dry_run)
    _sweep(hub, report, patience, dry_run)
    _forget_history(hub, report, dry_run)
    if not dry_run:
        with hub.write() as session:
            session.execute(sa.delete(SignIn).where(SignIn.expires_at < now()))
            if any(report.view().values()):
                record(session, "gc", "collect", "", **report.view())
    return report


# --- retention -------------------------------------------------------------------------------------------------------


def expired_images(hub: Hub, session: Session) -> list[int]:
    """Return the images that no rule keeps.

    Kept are: frozen ones, those that a tag names, the newest `last` of each tag besides those, those pulled within
    `pulled_days`, and everything where `last` is 0. A collection's own rules overrule the hub's.
    """
    keep = hub.settings.keep
    tagged = set(session.scalars(sa.select(Tag.image_id).where(Tag.image_id.is_not(None))))
    rows = session.execute(
        sa.select(Image.id, Image.container_id, Image.tag, Image.arch, Image.frozen, Image.pulled_at, Collection.keep)
        .join(Container, Container.id == Image.container_id)
        .join(Collection, Collection.id == Container.collection_id)
        .where(Image.blob.is_not(None))
        .order_by(Image.id.desc())
    )
    seen: dict[tuple[int, str, str], int] = defaultdict(int)
    found = []
    for number, container, tag, arch, frozen, pulled, own in rows:
        last = int(own.get("last", keep.last))
        days = float(own.get("pulled_days", keep.pulled_days))
        if not last or frozen or number in tagged:
            continue
        seen[container, tag, arch] += 1
        fresh = pulled is not None and pulled > now() - days * DAY
        if seen[container, tag, arch] > last and not fresh:
            found.append(number)
    return found


def _retire(hub: Hub, report: Report, dry_run: bool) -> None:
    with hub.write() as session:
        report.images = expired_images(hub, session)
        if not dry_run:
            for start in range(0, len(report.images), 500):
                session.execute(sa.delete(Image).where(Image.id.in_(report.images[start : start + 500])))


def _end_uploads(hub: Hub, report: Report, dry_run: bool) -> None:
    """Remove uploads that nobody goes on with, and files of uploads that no row knows."""
    limit = now() - hub.settings.storage.upload_days * DAY
    with hub.write() as session:
        old = list(session.scalars(sa.select(Upload.id).where(Upload.changed_at < limit)))
        known = set(session.scalars(sa.select(Upload.id))) - set(old)
        if not dry_run:
            session.execute(sa.delete(Upload).where(Upload.changed_at < limit))
            session.execute(sa.delete(Image).where(Image.blob.is_(None), Image.created_at < limit))
    report.uploads = len(old)
    for folder in (hub.settings.folder("uploads"), hub.storage.staging()):
        for path in folder.iterdir() if folder.exists() else ():
            try:
                stale = path.stat().st_mtime < limit and path.name.partition(".")[0] not in known
            except FileNotFoundError:
                continue
            if stale and path.is_file() and not dry_run:
                path.unlink(missing_ok=True)


# --- mark and sweep --------------------------------------------------------------------------------------------------


def needed(session: Session) -> set[str]:
    """Return the SHA-256 of every file that an image or a manifest needs."""
    marks = {mark for mark in session.scalars(sa.select(Image.blob).distinct()) if mark}
    for references in session.scalars(sa.select(Manifest.references)):
        marks.update(one.removeprefix("sha256:") for one in references)
    return marks


def _sweep(hub: Hub, report: Report, grace: float, dry_run: bool) -> None:
    limit = time.time() - grace
    stored = {sha256: (size, changed) for sha256, size, changed in hub.storage.list()}
    with hub.read() as session:
        marks = needed(session)
    old = [sha256 for sha256, (_, changed) in stored.items() if sha256 not in marks and changed <= limit]
    with hub.write() as session:
        # Asked again: while this transaction holds the database, nobody can begin to need one of them.
        marks = needed(session)
        # A file that was pushed for a manifest which is still to come is linked, and young.
        young = set(session.scalars(sa.select(BlobLink.sha256).where(BlobLink.created_at > limit)))
        gone = [sha256 for sha256 in old if sha256 not in marks and sha256 not in young]
        report.blobs = len(gone)
        report.bytes = sum(stored[sha256][0] for sha256 in gone)
        if dry_run:
            return
        for start in range(0, len(gone), 500):
            session.execute(sa.delete(Blob).where(Blob.sha256.in_(gone[start : start + 500])))
        for sha256 in gone:
            hub.storage.remove(sha256)


# --- history ---------------------------------------------------------------------------------------------------------


def _forget_history(hub: Hub, report: Report, dry_run: bool) -> None:
    """Remove logs and exchanges with forges that are older than the settings keep them (0 keeps all)."""
    keep = hub.settings.keep
    with hub.write() as session:
        if keep.delivery_days:
            old = sa.and_(
                Delivery.received_at < now() - keep.delivery_days * DAY,
                Delivery.state.in_(["done", "failed", "ignored", "refused"]),
            )
            report.deliveries = session.scalar(sa.select(sa.func.count()).select_from(Delivery).where(old)) or 0
            if not dry_run:
                session.execute(sa.delete(Delivery).where(old))
        builds = sa.select(Build.id).where(Build.state.in_(FINAL), Build.log_size > 0)
        if not keep.log_days:
            return
        for number in session.scalars(builds.where(Build.finished_at < now() - keep.log_days * DAY)).all():
            path = log_path(hub.settings.folder("logs"), number)
            if path.exists():
                report.logs += 1
                if not dry_run:
                    path.unlink()
