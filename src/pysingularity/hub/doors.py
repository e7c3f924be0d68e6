# SPDX-License-Identifier: Apache-2.0
"""What all doors share: who is asking, how the hub is called by him, and how a refusal looks.

Addresses in answers are made of the host that was asked for, so that the hub works behind proxies, under several
names, and for clients that send absolute-form request lines.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Annotated

from fastapi import Depends, Request, Response
from fastapi import Path as PathParameter
from fastapi.responses import JSONResponse

from pysingularity.hub.accounts import passes
from pysingularity.hub.accounts.limits import Limiter
from pysingularity.hub.accounts.rights import ALL_SCOPES, Principal
from pysingularity.hub.accounts.signin import COOKIE, check_csrf, check_password, find_sign_in
from pysingularity.hub.accounts.tokens import PREFIX, find_token
from pysingularity.hub.context import Hub
from pysingularity.hub.errors import Unauthenticated
from pysingularity.hub.models import SignIn, Token, User, now
from pysingularity.hub.settings import Settings

SAFE = ("GET", "HEAD", "OPTIONS")


class Limits:
    """The limits per time of one web process."""

    def __init__(self, settings: Settings) -> None:
        limits = settings.limits
        self.requests = Limiter(limits.requests_per_minute, 60, "too-many-requests", "too many requests in a minute")
        self.pulls = Limiter(limits.pulls_per_hour, 3600, "too-many-pulls", "too many downloads in an hour")
        self.sign_ins = Limiter(limits.sign_ins_per_minute, 60, "too-many-sign-ins", "too many sign-ins in a minute")


def get_hub(request: Request) -> Hub:
    """Return the hub that this application serves."""
    hub: Hub = request.app.state.hub
    return hub


def address_of(request: Request) -> str:
    """Return the address of whoever asks; behind a proxy that we trust, of whoever asked it."""
    settings: Settings = request.app.state.hub.settings
    peer = request.client.host if request.client else ""
    if peer in settings.trusted_proxies and (forwarded := request.headers.get("x-forwarded-for")):
        return forwarded.rpartition(",")[2].strip()[:60]
    return peer


def base_url(request: Request) -> str:
    """Return how the hub is called by whoever asks, without a slash at the end."""
    settings: Settings = request.app.state.hub.settings
    if settings.url:
        return settings.url.rstrip("/")
    scheme, host = request.url.scheme, request.headers.get("host", "")
    peer = request.client.host if request.client else ""
    if peer in settings.trusted_proxies:
        scheme = request.headers.get("x-forwarded-proto", scheme).partition(",")[0].strip()
        host = request.headers.get("x-forwarded-host", host).partition(",")[0].strip()
    if scheme not in ("http", "https"):
        scheme = "http"
    if not host or any(letter in host for letter in "/\\@?#\"'<> "):
        host = f"{settings.host}:{settings.port}"
    return f"{scheme}://{host}"


def who_asks(request: Request) -> Principal:
    """Return on whose behalf a request is made.

    A Bearer token, Basic with a token or password, or the cookie of a browser; changes by a browser need its CSRF
    secret in `X-CSRF-Token` (forms are checked where they are read).

    Raises:
        Unauthenticated: a secret was given and is not valid.
    """
    hub = get_hub(request)
    address = address_of(request)
    share = request.scope.get("share", "")
    kind, _, value = request.headers.get("authorization", "").partition(" ")
    if kind.lower() == "bearer" and value:
        return _by_token(hub, value.strip(), address, share)
    if kind.lower() == "basic" and value:
        return _by_basic(request, hub, value.strip(), address, share)
    if kind:
        raise Unauthenticated(
            "wrong-credentials", "use Authorization: Bearer TOKEN", headers={"WWW-Authenticate": "Bearer"}
        )
    cookie = request.cookies.get(COOKIE, "")
    if cookie:
        with hub.read() as session:
            found = find_sign_in(session, cookie)
        if found is not None:
            row, user = found
            if request.method not in SAFE and not _is_form(request):
                check_csrf(row, request.headers.get("x-csrf-token", ""))
            return Principal(user, ALL_SCOPES, None, share, "browser", row.csrf, address)
    return Principal(share=share, address=address)


def _is_form(request: Request) -> bool:
    """Return whether a request carries a form, whose handler checks the secret in its fields.

    Only handlers of pages read forms; those of the API take JSON, and refuse others.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    api = request.url.path.startswith(("/api/", "/v1/", "/v2/"))
    return kind in ("application/x-www-form-urlencoded", "multipart/form-data") and not api


def _wrong_token() -> Unauthenticated:
    return Unauthenticated(
        "wrong-token", "the token is unknown, expired or taken back", headers={"WWW-Authenticate": "Bearer"}
    )


def _by_pass(hub: Hub, secret: str, address: str, share: str) -> Principal:
    number = passes.read_pass(hub.settings.secret(), secret)
    if number is None:
        raise _wrong_token()
    if number == 0:
        return Principal(share=share, address=address)
    with hub.read() as session:
        user = session.get(User, number)
    if user is None or not user.active:
        raise _wrong_token()
    return Principal(user, ALL_SCOPES, None, share, "password", "", address)


def _by_token(hub: Hub, secret: str, address: str, share: str) -> Principal:
    if secret.startswith(passes.PREFIX):
        return _by_pass(hub, secret, address, share)
    with hub.read() as session:
        found = find_token(session, secret)
    if found is None:
        raise _wrong_token()
    token, user = found
    if token.used_at is None or now() - token.used_at > 300:
        with hub.write() as session:
            row = session.get(Token, token.id)
            if row is not None:
                row.used_at = now()
    return Principal(user, frozenset(token.scopes.split()), token.collection_id, share, "token", "", address)


def _by_basic(request: Request, hub: Hub, value: str, address: str, share: str) -> Principal:
    try:
        name, _, password = base64.b64decode(value, validate=True).decode().partition(":")
    except ValueError:
        raise Unauthenticated("wrong-credentials", "the Authorization header cannot be read")
    if password.startswith(PREFIX):
        return _by_token(hub, password, address, share)
    if not hub.settings.sign_in.passwords:
        raise Unauthenticated("wrong-credentials", "use a token in place of the password")
    limits: Limits = request.app.state.limits
    limits.sign_ins.take(address)
    with hub.read() as session:
        user = check_password(session, name, password)
    return Principal(user, ALL_SCOPES, None, share, "password", "", address)


def current_sign_in(request: Request) -> SignIn | None:
    """Return the row of the browser's cookie."""
    cookie = request.cookies.get(COOKIE, "")
    if not cookie:
        return None
    with get_hub(request).read() as session:
        found = find_sign_in(session, cookie)
    return found[0] if found else None


def limited(request: Request) -> None:
    """Count a request of the JSON doors."""
    limits: Limits = request.app.state.limits
    if limits.requests.count:
        limits.requests.take(address_of(request))


#: The number of a row in an address: what no database could hold is refused before one is asked.
Number = Annotated[int, PathParameter(ge=0, lt=1 << 63)]
TheHub = Annotated[Hub, Depends(get_hub)]
Who = Annotated[Principal, Depends(who_asks)]


def refusal(
    request: Request,
    status: int,
    id: str,  # noqa: A002
    message: str,
    *,
    hint: str = "",
    headers: Mapping[str, str] | None = None,
) -> Response:
    """Return an error as the door that was knocked at wants it."""
    shape = request.scope.get("refusal")
    if shape is not None:
        return shape(status, id, message, dict(headers or {}))  # type: ignore[no-any-return]
    body: dict[str, object] = {"code": status, "message": message, "id": id}
    if hint:
        body["hint"] = hint
    return JSONResponse({"error": body}, status, headers=dict(headers or {}))
