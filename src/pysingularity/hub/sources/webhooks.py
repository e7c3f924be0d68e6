# SPDX-License-Identifier: Apache-2.0
"""What forges send, read without any I/O: who sent it, whether the proof holds, and what it asks for.

GitHub, Gitea/Forgejo and GitLab, and a plain `post-receive` hook that sends GitHub's shape. A payload only says *that*
something happened and to which branch; what changed is asked of git. Sources: the forges' webhook documentation.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pysingularity.hub.errors import HubError, Invalid
from pysingularity.hub.sources.git import SHA, ZERO, check_branch

#: Seconds that a signed time stamp may differ from ours.
TOLERANCE = 300
#: How ids begin that are made of the body.
NAMELESS = "sha256:"
_DELIVERY = re.compile(r"[\x21-\x7e]{1,200}\Z")


class BadSignature(HubError):
    """The proof is missing or wrong: whoever sent this does not know the secret."""

    status = 401


@dataclass(frozen=True)
class Work:
    """What an exchange asks the hub to do.

    Arguments:
        kind: "push" (a branch moved), "tag" (a tag was made), "deleted" (a branch or tag is gone), "deployment",
            "rename" (the repository has another name), "ping", or "ignored".
        ref: branch or tag, without `refs/heads/`.
        before, after: commits as the forge says; "" when it does not.
        repository: the repository's own number at its forge.
        address: its present address for cloning.
        reason: why it is ignored.
    """

    kind: str
    ref: str = ""
    before: str = ""
    after: str = ""
    repository: str = ""
    address: str = ""
    default_branch: str = ""
    description: str = ""
    reason: str = ""

    def values(self) -> dict[str, Any]:
        """Return the fields as JSON can hold them."""
        return asdict(self)


def forge_of(headers: Mapping[str, str]) -> str:
    """Return who sends: "gitea" (which copies GitHub's headers), "gitlab", "github", "plain"; "" for nobody we know."""
    if "x-gitea-event" in headers or "x-forgejo-event" in headers:
        return "gitea"
    if "x-gitlab-event" in headers:
        return "gitlab"
    if "x-github-event" in headers:
        return "github"
    return "plain" if "x-singularity-event" in headers else ""


def event_of(headers: Mapping[str, str], forge: str) -> str:
    """Return the event's name as the forge writes it."""
    names = {
        "gitea": ("x-gitea-event", "x-forgejo-event"),
        "gitlab": ("x-gitlab-event",),
        "github": ("x-github-event",),
        "plain": ("x-singularity-event",),
    }[forge]
    return next((headers[name] for name in names if name in headers), "")[:100]


def delivery_of(headers: Mapping[str, str], forge: str, body: bytes) -> str:
    """Return the id of the exchange; where the forge sends none, the digest of the body."""
    names = {
        "gitea": ("x-gitea-delivery", "x-forgejo-delivery"),
        "gitlab": ("idempotency-key", "x-gitlab-event-uuid", "webhook-id"),
        "github": ("x-github-delivery",),
        "plain": ("x-singularity-delivery",),
    }[forge]
    for name in names:
        if _DELIVERY.match(headers.get(name, "")) and not headers[name].startswith(NAMELESS):
            return headers[name]
    return NAMELESS + hashlib.sha256(body).hexdigest()


def check_proof(headers: Mapping[str, str], forge: str, body: bytes, secret: str, *, at: float) -> None:
    """Check that the sender knows the collection's secret; compares in constant time, over the bytes as they came.

    Arguments:
        headers: names in lower case.
        at: the time, for signatures that carry one.

    Raises:
        BadSignature: missing, of a kind that is not accepted (SHA-1), or wrong.
    """
    key = secret.encode()
    if forge == "gitlab":
        if "webhook-signature" in headers:
            return _check_signed_time(headers, body, key, at)
        if _same(headers.get("x-gitlab-token", ""), secret):
            return None
        raise BadSignature("bad-signature", "X-Gitlab-Token is not the collection's secret")
    expected = hmac.new(key, body, hashlib.sha256).hexdigest()
    given = headers.get("x-hub-signature-256", "")
    if given:
        if _same(given, "sha256=" + expected):
            return None
    elif forge == "gitea" and "x-gitea-signature" in headers:
        if _same(headers["x-gitea-signature"], expected):
            return None
    elif "x-hub-signature" in headers:
        raise BadSignature("bad-signature", "signatures by SHA-1 are not accepted; send X-Hub-Signature-256")
    else:
        raise BadSignature("bad-signature", "the request is not signed (X-Hub-Signature-256)")
    raise BadSignature("bad-signature", "the signature does not fit the collection's secret")


def _check_signed_time(headers: Mapping[str, str], body: bytes, key: bytes, at: float) -> None:
    stamp, number = headers.get("webhook-timestamp", ""), headers.get("webhook-id", "")
    if not stamp.isascii() or not stamp.isdigit() or abs(int(stamp[:20]) - at) > TOLERANCE:
        raise BadSignature("bad-signature", "the signed time is missing or too far from the hub's clock")
    if key.startswith(b"whsec_"):
        try:
            key = base64.b64decode(key.removeprefix(b"whsec_"), validate=True)
        except ValueError:
            raise BadSignature("bad-signature", "the collection's secret is no signing token")
    text = f"{number}.{stamp}.".encode("utf-8", "surrogateescape") + body
    expected = "v1," + base64.b64encode(hmac.new(key, text, hashlib.sha256).digest()).decode()
    if True not in [_same(one, expected) for one in headers["webhook-signature"].split()]:
        raise BadSignature("bad-signature", "the signature does not fit the collection's secret")


def _same(given: str, expected: str) -> bool:
    return hmac.compare_digest(given.encode("utf-8", "surrogateescape"), expected.encode())


def read_payload(forge: str, event: str, body: bytes, content_type: str = "application/json") -> Work:
    """Return what an exchange asks for.

    Raises:
        Invalid: the body is not what this forge sends for this event.
    """
    value = _json(body, content_type)
    if forge == "gitlab":
        return _gitlab(event, value)
    return _github(event, value)


def _json(body: bytes, content_type: str) -> dict[str, Any]:
    form = content_type.partition(";")[0].strip().lower() == "application/x-www-form-urlencoded"
    if form and not body.lstrip().startswith(b"{"):  # what curl calls a body whose kind nobody named
        from urllib.parse import parse_qs  # GitHub's other content type; nobody should choose it

        fields = parse_qs(body.decode("utf-8", "replace"), max_num_fields=100)
        body = fields.get("payload", [""])[0].encode()
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        raise Invalid("bad-payload", "the body is no JSON")
    if not isinstance(value, dict):
        raise Invalid("bad-payload", "the body is no JSON object")
    return value


def _github(event: str, value: dict[str, Any]) -> Work:
    repository = _object(value, "repository")
    common = {
        "repository": _text(repository, "id"),
        "address": _text(repository, "clone_url"),
        "default_branch": _text(repository, "default_branch"),
        "description": _text(repository, "description"),
    }
    if event == "ping":
        return Work("ping", **common)
    if event == "push":
        return _push(_text(value, "ref"), _text(value, "before"), _text(value, "after"), common)
    if event == "deployment":
        deployment = _object(value, "deployment")
        if not _text(deployment, "task").startswith("deploy"):
            return Work("ignored", reason="a deployment whose task is not deploy", **common)
        return Work("deployment", _text(deployment, "ref"), after=_sha(_text(deployment, "sha")), **common)
    if event == "repository" and value.get("action") in ("renamed", "transferred"):
        return Work("rename", **common)
    return Work("ignored", reason=f"nothing to do for the event {event or 'without a name'}", **common)


def _gitlab(event: str, value: dict[str, Any]) -> Work:
    project = _object(value, "project")
    common = {
        "repository": _text(project, "id"),
        "address": _text(project, "git_http_url"),
        "default_branch": _text(project, "default_branch"),
        "description": _text(project, "description"),
    }
    if event in ("Push Hook", "Tag Push Hook"):
        after = _text(value, "after") or _text(value, "checkout_sha")
        return _push(_text(value, "ref"), _text(value, "before"), after, common)
    if event == "Deployment Hook" and value.get("status") == "success":
        return Work("deployment", _text(value, "ref"), after=_sha(_text(value, "sha")), **common)
    return Work("ignored", reason=f"nothing to do for the event {event or 'without a name'}", **common)


def _push(ref: str, before: str, after: str, common: dict[str, str]) -> Work:
    for prefix, kind in (("refs/heads/", "push"), ("refs/tags/", "tag")):
        if ref.startswith(prefix):
            name = check_branch(ref.removeprefix(prefix))
            if ZERO.match(after):
                return Work("deleted", name, _sha(before), "", **common)
            return Work(kind, name, _sha(before), _sha(after), **common)
    return Work("ignored", reason=f"{ref[:100]!r} is neither a branch nor a tag", **common)


def _sha(text: str) -> str:
    if not text or ZERO.match(text):
        return ""
    if not SHA.match(text):
        raise Invalid("bad-payload", f"{text[:100]!r} is no commit id")
    return text


def _object(value: dict[str, Any], name: str) -> dict[str, Any]:
    found = value.get(name)
    return found if isinstance(found, dict) else {}


def _text(value: dict[str, Any], name: str) -> str:
    """Return a field as text; numbers are written out, everything else counts as missing."""
    found = value.get(name)
    if isinstance(found, bool) or not isinstance(found, str | int):
        return ""
    if isinstance(found, int) and abs(found) >= 1 << 64:
        return ""
    # Text that no database takes (NUL, lone surrogates) is replaced: it comes from outside and is only shown.
    return str(found)[:2000].replace("\0", "").encode("utf-8", "replace").decode()
