# SPDX-License-Identifier: Apache-2.0
"""What forges send, right and wrong: proofs over raw bytes, payloads of every forge, and the exchange that is kept."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pysingularity.hub.context import Hub
from pysingularity.hub.errors import HubError, Invalid, NotFound
from pysingularity.hub.models import Build, Collection, Delivery
from pysingularity.hub.sources import webhooks
from pysingularity.hub.sources.intake import receive, work_off
from pysingularity.hub.sources.webhooks import BadSignature, Work, check_proof, forge_of, read_payload

from .world import RECIPE, Repository, Server, made_collection, wait_for

SECRET = "the collection's secret"
SHA, OTHER, ZERO = "a" * 40, "b" * 40, "0" * 40


def sha256(body: bytes, secret: str = SECRET) -> str:
    return hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()


def signed(forge: str, event: str, body: bytes, secret: str = SECRET, delivery: str = "d1") -> dict[str, str]:
    """Return the headers that a forge sends."""
    if forge == "github":
        return {
            "x-github-event": event,
            "x-github-delivery": delivery,
            "x-hub-signature-256": "sha256=" + sha256(body, secret),
            "x-hub-signature": "sha1=" + hmac.new(secret.encode(), body, hashlib.sha1).hexdigest(),
        }
    if forge == "gitea":
        return {
            "x-gitea-event": event,
            "x-github-event": event,
            "x-gitea-delivery": delivery,
            "x-gitea-signature": sha256(body, secret),
        }
    if forge == "gitlab":
        return {"x-gitlab-event": event, "x-gitlab-event-uuid": delivery, "x-gitlab-token": secret}
    return {
        "x-singularity-event": event,
        "x-singularity-delivery": delivery,
        "x-hub-signature-256": "sha256=" + sha256(body, secret),
    }


EVENTS = {"github": "push", "gitea": "push", "gitlab": "Push Hook", "plain": "push"}


def push_body(forge: str, ref: str = "refs/heads/main", before: str = SHA, after: str = OTHER, **more: Any) -> bytes:
    place = {"id": 7, "clone_url": "https://git.example.org/lab/tools.git", "git_http_url": "https://git.example.org/x"}
    holder = {"project": place} if forge == "gitlab" else {"repository": place}
    return json.dumps({"ref": ref, "before": before, "after": after, **holder, **more}).encode()


# --- proofs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("forge", EVENTS)
def test_proof_of_each_forge_holds_for_its_bytes_and_no_others(forge: str):
    body = push_body(forge)
    headers = signed(forge, EVENTS[forge], body)
    assert forge_of(headers) == forge
    check_proof(headers, forge, body, SECRET, at=time.time())
    with pytest.raises(BadSignature):
        check_proof(signed(forge, EVENTS[forge], body, "another secret"), forge, body, SECRET, at=time.time())
    if forge != "gitlab":  # whose token does not depend on the body
        # The same JSON, written otherwise: what was signed are bytes, not values.
        with pytest.raises(BadSignature):
            check_proof(headers, forge, body.replace(b": ", b":"), SECRET, at=time.time())


@pytest.mark.parametrize(
    "change",
    [
        {"x-hub-signature-256": ""},
        {"x-hub-signature-256": "sha256="},
        {"x-hub-signature-256": "sha1=" + "0" * 40},
        {"x-hub-signature-256": "\udcff"},
        {"x-hub-signature-256": sha256(b"x")},
        {"x-hub-signature-256": "SHA256=" + sha256(push_body("github"))},
    ],
)
def test_wrong_signatures_are_refused(change: dict[str, str]):
    body = push_body("github")
    headers = signed("github", "push", body) | change
    with pytest.raises(BadSignature):
        check_proof(headers, "github", body, SECRET, at=time.time())


def test_sha1_alone_is_never_enough():
    body = push_body("github")
    headers = signed("github", "push", body)
    del headers["x-hub-signature-256"]
    with pytest.raises(BadSignature, match="SHA-1"):
        check_proof(headers, "github", body, SECRET, at=time.time())


def test_gitea_in_its_githubs_clothes_is_checked_by_either_signature():
    body = push_body("gitea")
    headers = signed("gitea", "push", body)
    check_proof(headers, "gitea", body, SECRET, at=0)
    headers["x-hub-signature-256"] = "sha256=" + sha256(b"other")
    with pytest.raises(BadSignature):
        check_proof(headers, "gitea", body, SECRET, at=0)


@pytest.mark.parametrize("late", [0, 200, -200, 400, -400])
def test_gitlabs_signing_token_holds_for_five_minutes(late: int):
    body, at = push_body("gitlab"), 1_700_000_000
    text = f"m1.{at}.".encode() + body
    proof = base64.b64encode(hmac.new(SECRET.encode(), text, hashlib.sha256).digest()).decode()
    headers = {
        "x-gitlab-event": "Push Hook",
        "webhook-id": "m1",
        "webhook-timestamp": str(at),
        "webhook-signature": f"v1,AAAA v1,{proof}",
    }
    if abs(late) <= webhooks.TOLERANCE:
        check_proof(headers, "gitlab", body, SECRET, at=at + late)
    else:
        with pytest.raises(BadSignature, match="time"):
            check_proof(headers, "gitlab", body, SECRET, at=at + late)


def test_whoever_leaves_gitlabs_signature_out_still_needs_the_token():
    with pytest.raises(BadSignature):
        check_proof({"x-gitlab-event": "Push Hook"}, "gitlab", b"{}", SECRET, at=0)
    with pytest.raises(BadSignature):
        check_proof({"x-gitlab-event": "Push Hook", "x-gitlab-token": ""}, "gitlab", b"{}", SECRET, at=0)


# --- payloads --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("forge", EVENTS)
def test_push_names_branch_and_commits(forge: str):
    work = read_payload(forge, EVENTS[forge], push_body(forge))
    assert (work.kind, work.ref, work.before, work.after, work.repository) == ("push", "main", SHA, OTHER, "7")


@pytest.mark.parametrize("forge", EVENTS)
def test_tags_deletions_and_other_refs(forge: str):
    event = "Tag Push Hook" if forge == "gitlab" else EVENTS[forge]
    assert read_payload(forge, event, push_body(forge, "refs/tags/v1.0")).kind == "tag"
    assert read_payload(forge, event, push_body(forge, after=ZERO)).kind == "deleted"
    assert read_payload(forge, event, push_body(forge, before=ZERO)).before == ""
    assert read_payload(forge, event, push_body(forge, "refs/pull/7/head")).kind == "ignored"


def test_github_deployments_count_when_their_task_is_deploy():
    value = {"deployment": {"task": "deploy", "ref": "main", "sha": SHA}, "repository": {"id": 7}}
    assert read_payload("github", "deployment", json.dumps(value).encode()).kind == "deployment"
    value["deployment"]["task"] = "lint"
    assert read_payload("github", "deployment", json.dumps(value).encode()).kind == "ignored"


def test_renames_and_pings_are_known_and_the_rest_ignored():
    renamed = json.dumps({"action": "renamed", "repository": {"id": 7}}).encode()
    assert read_payload("github", "repository", renamed).kind == "rename"
    assert read_payload("github", "ping", b'{"zen": "x"}').kind == "ping"
    assert read_payload("github", "star", b"{}").kind == "ignored"


def test_form_bodies_hold_the_payload_in_a_field():
    from urllib.parse import urlencode

    body = urlencode({"payload": push_body("github").decode()}).encode()
    assert read_payload("github", "push", body, "application/x-www-form-urlencoded").ref == "main"


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"{", b"[]", b"7", b'"x"', b"\xff\xfe", b"[" * 100_000, b'{"ref": "refs/heads/--upload-pack=x"}'),
        push_body("github", "refs/heads/../../x"),
        push_body("github", after="--option"),
        push_body("github", before="HEAD"),
    ],
)
def test_nonsense_is_refused(body: bytes):
    with pytest.raises(Invalid):
        read_payload("github", "push", body)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=30),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)
NAMES = ("ref", "before", "after", "repository", "project", "deployment", "action", "checkout_sha", "status")
FIELDS = st.fixed_dictionaries({}, optional=dict.fromkeys(NAMES, JSON))


@given(
    forge=st.sampled_from(sorted(EVENTS)),
    event=st.sampled_from(
        ["push", "Push Hook", "Tag Push Hook", "deployment", "Deployment Hook", "repository", "ping"]
    ),
    value=FIELDS | JSON,
)
@settings(max_examples=300, deadline=None)
def test_any_payload_is_read_or_refused(forge: str, event: str, value: object):
    body = json.dumps(value).encode()
    try:
        work = read_payload(forge, event, body)
    except Invalid:
        return
    assert isinstance(work, Work)
    json.dumps(work.values()).encode()  # the database takes it
    for sha in (work.before, work.after):
        assert sha == "" or (len(sha) in (40, 64) and set(sha) <= set("0123456789abcdef"))
    assert not work.ref.startswith("-") or work.kind == "deployment"


@given(body=st.binary(max_size=200), headers=st.dictionaries(st.text(max_size=20), st.text(max_size=60), max_size=4))
@settings(max_examples=200, deadline=None)
def test_nobody_gets_past_the_proof_by_luck(body: bytes, headers: dict[str, str]):
    for forge in EVENTS:
        with pytest.raises(BadSignature):
            check_proof(headers, forge, body, SECRET, at=time.time())


# --- the exchange ----------------------------------------------------------------------------------------------------


@pytest.fixture
def collection(hub: Hub, repository: Repository) -> Collection:
    return made_collection(hub, repository)


def deliveries(hub: Hub) -> list[Delivery]:
    with hub.read() as session:
        return list(session.scalars(sa.select(Delivery).order_by(Delivery.id)))


def builds(hub: Hub) -> list[Build]:
    with hub.read() as session:
        return list(session.scalars(sa.select(Build).order_by(Build.id)))


def hook(hub: Hub, collection: Collection, forge: str, body: bytes, delivery: str = "d1", **changes: str):
    headers = signed(forge, EVENTS[forge], body, collection.hook_secret, delivery) | changes
    return receive(hub, collection.hook, headers, body)


@pytest.mark.parametrize("forge", EVENTS)
def test_push_becomes_a_build_by_what_git_says(hub: Hub, collection: Collection, repository: Repository, forge: str):
    repository.commit({"Singularity": RECIPE, "notes": "x"})
    work_off(hub)
    head = repository.commit({"Singularity.gpu": RECIPE})
    # The payload lies about everything but that something happened: its list of files counts for nothing.
    lie = [{"id": OTHER, "added": ["Singularity.fake"], "modified": ["Singularity"], "removed": []}]
    status, answer = hook(hub, collection, forge, push_body(forge, before=OTHER, after=SHA, commits=lie))
    assert (status, answer["state"]) == (202, "waiting")
    assert work_off(hub) == 1
    assert [(one.recipe, one.commit) for one in builds(hub)] == [("Singularity", head), ("Singularity.gpu", head)]
    hook(hub, collection, forge, push_body(forge, commits=lie), "d2")
    work_off(hub)
    assert len(builds(hub)) == 2
    assert deliveries(hub)[-1].result == "nothing changed"


def test_repeated_exchange_is_answered_again_and_done_once(hub: Hub, collection: Collection, repository: Repository):
    repository.commit({"Singularity": RECIPE})
    body = push_body("github")
    first = hook(hub, collection, "github", body)
    work_off(hub)
    again = hook(hub, collection, "github", body)
    assert (first[0], again[0]) == (202, 200)
    assert again[1]["id"] == first[1]["id"]
    assert work_off(hub) == 0
    assert len(builds(hub)) == 1


def test_replay_under_another_id_builds_nothing_again(hub: Hub, collection: Collection, repository: Repository):
    repository.commit({"Singularity": RECIPE})
    body = push_body("github")
    for number in range(3):
        hook(hub, collection, "github", body, f"replay-{number}")
    work_off(hub)
    assert len(builds(hub)) == 1


def test_hook_that_always_says_the_same_is_heard_each_time(hub: Hub, collection: Collection, repository: Repository):
    body = b'{"ref": "refs/heads/main"}'
    headers = signed("plain", "push", body, collection.hook_secret)
    del headers["x-singularity-delivery"]
    for number in range(2):
        repository.commit({"Singularity": f"{RECIPE}# {number}\n"})
        assert receive(hub, collection.hook, headers, body)[0] == 202
        assert receive(hub, collection.hook, headers, body)[0] == 202
        work_off(hub)
    assert len(builds(hub)) == 2


def test_refused_exchanges_are_kept_without_their_body_and_do_not_pile_up(hub: Hub, collection: Collection):
    body = push_body("github")
    for _ in range(20):
        with pytest.raises(BadSignature):
            receive(hub, collection.hook, signed("github", "push", body, "wrong"), body)
    kept = deliveries(hub)
    assert 1 <= len(kept) <= 2  # the minute may turn
    assert (kept[0].state, kept[0].status) == ("refused", 401)
    assert "clone_url" not in kept[0].body
    assert builds(hub) == []


def test_secrets_of_an_exchange_are_not_kept(hub: Hub, collection: Collection):
    body = push_body("gitlab")
    hook(hub, collection, "gitlab", body, authorization="Bearer hush")
    headers = deliveries(hub)[0].headers
    assert headers["x-gitlab-token"] == headers["authorization"] == "[secret]"


def test_hook_of_nobody_and_of_another_collection(hub: Hub, collection: Collection):
    with pytest.raises(NotFound):
        receive(hub, "nobody", signed("github", "push", b"{}"), b"{}")
    other = made_collection(hub, None, "lab/other")
    body = push_body("github")
    with pytest.raises(BadSignature):
        receive(hub, other.hook, signed("github", "push", body, collection.hook_secret), body)


def test_request_of_no_forge_is_refused(hub: Hub, collection: Collection):
    with pytest.raises(Invalid):
        receive(hub, collection.hook, {"content-type": "application/json"}, b"{}")


def test_ping_is_answered_and_does_nothing(hub: Hub, collection: Collection):
    body = b'{"zen": "Keep it logically awesome."}'
    status, answer = receive(hub, collection.hook, signed("github", "ping", body, collection.hook_secret), body)
    assert (status, answer["message"]) == (200, "pong")
    assert work_off(hub) == 0


def test_renamed_repository_is_known_by_its_number(hub: Hub, collection: Collection, repository: Repository):
    repository.commit({"Singularity": RECIPE})
    hook(hub, collection, "github", push_body("github"))
    work_off(hub)
    value = json.loads(push_body("github"))
    value["repository"]["id"] = 8
    repository.commit({"Singularity": RECIPE + "\n"})
    hook(hub, collection, "github", json.dumps(value).encode(), "d2")
    work_off(hub)
    assert "another repository" in deliveries(hub)[-1].result
    assert len(builds(hub)) == 1


def test_unreachable_repository_fails_the_exchange_and_says_why(
    hub: Hub, collection: Collection, repository: Repository
):
    import shutil

    shutil.rmtree(repository.path)
    hook(hub, collection, "github", push_body("github"))
    work_off(hub)
    assert deliveries(hub)[0].state == "failed"
    assert "repository" in deliveries(hub)[0].result


@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_signed_exchange_is_written_down_or_refused(hub: Hub, collection: Collection, data: st.DataObject):
    forge = data.draw(st.sampled_from(sorted(EVENTS)))
    body = json.dumps(data.draw(FIELDS | JSON)).encode()
    more = data.draw(
        st.dictionaries(
            st.sampled_from(["user-agent", "x-github-delivery", "content-type", "x-request"]),
            st.text(st.characters(min_codepoint=1, max_codepoint=255), max_size=20),
        )
    )
    try:
        status, _ = hook(hub, collection, forge, body, str(hash(body)), **more)
    except HubError as error:
        assert error.status in (400, 401, 422)
        return
    assert status in (200, 202)


def test_bad_requests_over_the_wire(server: Server, repository: Repository):
    made = server.post("/api/v1/collections", {"name": "lab/tools"}).json
    path = made["webhook_url"].partition(str(server.port))[2]
    body = push_body("github")
    good = signed("github", "push", body, made["webhook_secret"])
    assert server.post(path, body, headers=good, token="").status == 202
    for headers in ({}, {"X-GitHub-Event": "push"}, {**good, "x-hub-signature-256": "sha256=" + "0" * 64}):
        answer = server.post(path, body, headers=headers, token="")
        assert answer.status in (400, 401, 422), answer.text
        assert {"code", "message", "id"} <= set(answer.json["error"])
    assert server.post("/api/v1/hooks/none", body, headers=good, token="").status == 404
    assert server.get(path, token="").status == 405
    started = time.monotonic()
    large = server.post(path, b"x" * (26 << 20), headers=signed("github", "push", b"x"), token="")
    assert large.status == 413
    assert time.monotonic() - started < 20
    found = server.get("/api/v1/collections/lab/tools/deliveries").json["deliveries"]
    assert {one["state"] for one in found} >= {"refused"}


def test_resync_button_looks_again(server: Server, repository: Repository):
    server.post("/api/v1/collections", {"name": "lab/tools", "git_url": f"file://{repository.path}"})
    wait_for(lambda: server.get("/api/v1/collections/lab/tools/deliveries").json["deliveries"][0]["state"] != "waiting")
    repository.commit({"Singularity": RECIPE})
    assert server.post("/api/v1/collections/lab/tools/resync").status == 202
    assert wait_for(lambda: server.builds(), what="a build")[0]["recipe"] == "Singularity"
