# SPDX-License-Identifier: Apache-2.0
"""Rows as JSON: what each kind of thing says about itself. Fields may be added, never taken away or renamed."""

from __future__ import annotations

import time
from typing import Any

from sqlalchemy.orm import Session

from pysingularity.hub.catalog import tags_of
from pysingularity.hub.models import Build, Collection, Delivery, Image


def when(at: float | None) -> str | None:
    """Return a time as ISO 8601 in UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at)) if at is not None else None


def collection_view(one: Collection, base: str, *, secrets: bool = False) -> dict[str, Any]:
    """Return a collection; `secrets` for those who may change it."""
    value: dict[str, Any] = {
        "id": one.id,
        "name": one.full_name,
        "title": one.title,
        "description": one.description,
        "topics": one.topics,
        "private": one.private,
        "building": one.building,
        "git_url": public_url(one.git_url),
        "branches": one.branches,
        "default_branch": one.default_branch,
        "triggers": one.triggers,
        "poll": one.poll,
        "pulls": one.pulls,
        "stars": one.stars,
        "created_at": when(one.created_at),
        "changed_at": when(one.changed_at),
        "url": f"{base}/{one.full_name}",
    }
    if secrets:
        value |= {
            "webhook_url": f"{base}/api/v1/hooks/{one.hook}",
            "webhook_secret": one.hook_secret,
            "quota": one.quota,
            "keep": one.keep,
            "limits": one.limits,
            "commit_status": bool(one.status_token),
        }
    return value


def public_url(url: str) -> str:
    """Return a repository's address without a password in it."""
    scheme, slashes, rest = url.partition("://")
    if not slashes:
        return url
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


def build_view(one: Build, base: str) -> dict[str, Any]:
    """Return a build."""
    end = one.finished_at
    return {
        "id": one.id,
        "collection": one.collection.full_name,
        "state": one.state,
        "reason": one.reason,
        "error_id": one.error_id,
        "recipe": one.recipe,
        "tag": one.tag,
        "commit": one.commit,
        "branch": one.branch,
        "arch": one.arch,
        "trigger": one.trigger,
        "requested_by": one.requested_by,
        "publish": one.publish,
        "attempt": one.attempt,
        "retry_of": one.retry_of,
        "image_id": one.image_id,
        "engine": one.engine,
        "job": one.job,
        "node": one.node,
        "steps": one.steps,
        "created_at": when(one.created_at),
        "started_at": when(one.claimed_at),
        "finished_at": when(end),
        "seconds": round(end - one.claimed_at, 3) if end and one.claimed_at else None,
        "log_url": f"{base}/api/v1/builds/{one.id}/log",
        "url": f"{base}/{one.collection.full_name}/builds/{one.id}",
    }


def image_view(
    session: Session, one: Image, base: str, *, full: bool = False, tags: list[str] | None = None
) -> dict[str, Any]:
    """Return an image; `full` with its recipe, scripts and provenance.

    Arguments:
        tags: those that name it, when they are known already.
    """
    collection = one.container.collection
    value: dict[str, Any] = {
        "id": one.id,
        "collection": collection.full_name,
        "container": one.container.name,
        "tags": tags_of(session, one) if tags is None else tags,
        "tag": one.tag,
        "branch": one.branch,
        "commit": one.commit,
        "version": one.version,
        "sha256": one.sha256,
        "size": one.size,
        "arch": one.arch,
        "recipe": one.recipe,
        "frozen": one.frozen,
        "published": not one.hidden,
        "signed": one.signed,
        "encrypted": one.encrypted,
        "labels": one.labels,
        "pulls": one.pulls,
        "build_seconds": one.build_seconds,
        "created_by": one.created_by,
        "created_at": when(one.created_at),
        "download_url": f"{base}/api/v1/images/{one.id}/download",
        "url": f"{base}/{collection.full_name}/images/{one.id}",
    }
    if full:
        value |= {"definition": one.definition, "details": one.details, "provenance": one.provenance}
    return value


def delivery_view(one: Delivery, *, full: bool = False) -> dict[str, Any]:
    """Return an exchange with a forge."""
    value: dict[str, Any] = {
        "id": one.id,
        "delivery": one.delivery,
        "forge": one.forge,
        "event": one.event,
        "state": one.state,
        "status": one.status,
        "answer": one.answer,
        "result": one.result,
        "received_at": when(one.received_at),
        "finished_at": when(one.finished_at),
    }
    if full:
        value |= {"headers": one.headers, "body": one.body, "work": one.work}
    return value
