# SPDX-License-Identifier: Apache-2.0
"""Exchanges with forges: checked and written down at once, worked off by a robot afterwards.

The forge gets its answer within milliseconds; fetching and planning happen behind it. Every exchange stays readable
with its headers (without secrets), so that an owner can see why nothing was built.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import sqlalchemy as sa

from pysingularity.hub.builds.planning import Plan, look
from pysingularity.hub.context import Hub
from pysingularity.hub.errors import HubError, Invalid, NotFound
from pysingularity.hub.models import Collection, Delivery, now
from pysingularity.hub.sources import webhooks
from pysingularity.hub.sources.webhooks import BadSignature, Work

#: Bytes of a body that are kept.
KEPT = 64 << 10
_HIDDEN = ("authorization", "cookie", "x-gitlab-token")


def receive(hub: Hub, hook: str, headers: Mapping[str, str], body: bytes) -> tuple[int, dict[str, object]]:
    """Take in one exchange and return (status, answer).

    Arguments:
        hook: the collection's secret name, from the address.
        headers: names in lower case.

    Raises:
        NotFound: no collection has this hook.
        HubError: refused; the refusal is written down, too.
    """
    with hub.read() as session:
        collection = session.scalar(sa.select(Collection).where(Collection.hook == hook))
    if collection is None:
        raise NotFound("no-such-hook", "there is no such webhook")
    forge = webhooks.forge_of(headers)
    delivery = Delivery(
        collection_id=collection.id,
        delivery="",
        forge=forge or "unknown",
        event=webhooks.event_of(headers, forge) if forge else "",
        headers={name: _shown(name, value) for name, value in list(headers.items())[:60]},
        body=body[:KEPT].decode("utf-8", "replace").replace("\0", ""),
        status=202,
        state="waiting",
    )
    try:
        if not forge:
            raise Invalid("unknown-forge", "no header names an event (X-GitHub-Event, X-Gitea-Event, X-Gitlab-Event)")
        webhooks.check_proof(headers, forge, body, collection.hook_secret, at=now())
        work = webhooks.read_payload(forge, delivery.event, body, headers.get("content-type", ""))
    except HubError as error:
        _refuse(hub, delivery, error, body)
        raise
    delivery.delivery = webhooks.delivery_of(headers, forge, body)
    if delivery.delivery.startswith(webhooks.NAMELESS):
        # A hook that always says the same means another push each time; looking twice does no harm.
        delivery.delivery += f"-{now():.6f}"
    delivery.work = work.values()
    if work.kind in ("ping", "ignored"):
        delivery.state, delivery.status = "ignored", 200
        delivery.result = "pong" if work.kind == "ping" else work.reason
        delivery.finished_at = now()
    answer: dict[str, object] = {
        "state": delivery.state,
        "message": delivery.result or "the repository will be looked at",
    }
    delivery.answer = str(answer["message"])
    with hub.write() as session:
        known = session.scalar(
            sa.select(Delivery).where(Delivery.collection_id == collection.id, Delivery.delivery == delivery.delivery)
        )
        if known is not None:  # sent again: answered again, done once
            return 200, {"id": known.id, "state": known.state, "message": "this exchange is already known"}
        session.add(delivery)
        session.flush()
        answer["id"] = delivery.id
    return delivery.status, answer


def _refuse(hub: Hub, delivery: Delivery, error: HubError, body: bytes) -> None:
    """Write a refusal down. Strangers must not fill the disk: the last one of each collection is kept per minute."""
    delivery.delivery = f"refused-{int(now() // 60)}"
    delivery.state, delivery.status, delivery.answer = "refused", error.status, error.message
    delivery.result, delivery.finished_at = error.message, now()
    if isinstance(error, BadSignature):
        delivery.body = f"[{len(body)} bytes whose sender is not known are not kept]"
    with hub.write() as session:
        session.execute(
            sa.delete(Delivery).where(
                Delivery.collection_id == delivery.collection_id, Delivery.delivery == delivery.delivery
            )
        )
        session.add(delivery)


def _shown(name: str, value: str) -> str:
    if name in _HIDDEN:
        return "[secret]"
    return value[:300].encode("utf-8", "replace").decode().replace("\0", "")


def resync(hub: Hub, collection_id: int, *, by: str) -> int:
    """Note that somebody wants the repository looked at; returns the number of the exchange."""
    stamp = f"resync-{by}-{now():.3f}"
    with hub.write() as session:
        row = Delivery(
            collection_id=collection_id,
            delivery=stamp + "-" + hashlib.sha256(stamp.encode()).hexdigest()[:8],
            forge="hub",
            event="resync",
            status=202,
            state="waiting",
            work=Work("push", reason=f"asked for by {by}").values(),
        )
        session.add(row)
        session.flush()
        return row.id


def work_off(hub: Hub) -> int:
    """Work off all waiting exchanges, the oldest first; returns how many there were.

    The one robot of a hub does this; a robot that died half-way leaves the exchange waiting, and planning is
    repeatable.
    """
    count = 0
    while True:
        with hub.read() as session:
            row = session.scalar(sa.select(Delivery).where(Delivery.state == "waiting").order_by(Delivery.id).limit(1))
        if row is None:
            return count
        count += 1
        try:
            result, state = _do(hub, row), "done"
        except HubError as error:
            result, state = error.message, "failed"
        with hub.write() as session:
            session.execute(
                sa.update(Delivery)
                .where(Delivery.id == row.id)
                .values(state=state, result=result, finished_at=now())
                .execution_options(synchronize_session=False)
            )


def _do(hub: Hub, row: Delivery) -> str:
    work = row.work
    kind = str(work.get("kind"))
    with hub.write() as session:
        collection = session.get_one(Collection, row.collection_id)
        number = str(work.get("repository") or "")
        if number and not collection.forge_id:
            collection.forge, collection.forge_id = row.forge, number
        elif number and collection.forge_id != number and collection.forge == row.forge:
            return f"this is about another repository (number {number}, not {collection.forge_id})"
        if work.get("description") and not collection.description:
            collection.description = str(work["description"])[:500]
    if kind == "rename":
        return "the repository was renamed; its address here stays, forges redirect it"
    plan = Plan()
    if kind == "deployment":
        if "deployment" not in collection.triggers:
            return "deployments do not build in this collection"
        plan = look(hub, row.collection_id, trigger="deployment", delivery_id=row.id)
    elif kind == "tag":
        from pysingularity.hub.builds.releases import look_at_tag  # both plan; this one rarely

        plan = look_at_tag(hub, row.collection_id, str(work.get("ref")), delivery_id=row.id)
    else:
        plan = look(hub, row.collection_id, delivery_id=row.id)
    parts = [f"build{'s' if len(plan.builds) > 1 else ''} {', '.join(map(str, plan.builds))}"] if plan.builds else []
    return "; ".join([*parts, *plan.remarks[:20]]) or "nothing changed"
