# SPDX-License-Identifier: Apache-2.0
"""Logging in to a registry, without any input or output: challenges are parsed, tokens asked for by a generator.

Whoever has the connection drives `log_in`: it yields a request to be sent and is sent its answer, and finally returns
the header that opens the door. Sources: RFC 7235 (challenges), the distribution's token specification, RFC 6749.
"""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Generator
from typing import NamedTuple
from urllib.parse import urlencode, urlsplit, urlunsplit

from pysingularity.errors import RegistryError

#: Seconds that a token lives when its server does not say; and how much earlier we ask for a new one.
LIFETIME, MARGIN = 60, 10
CLIENT = "singularity"


class Credentials(NamedTuple):
    """Who we are: a name with a password, or an identity token (`docker login` keeps one for some registries)."""

    user: str = ""
    password: str = ""
    identity: str = ""

    def __repr__(self) -> str:
        return f"Credentials({self.user!r}, …)"

    def basic(self) -> str:
        """Return the header of basic authentication."""
        return "Basic " + base64.b64encode(f"{self.user}:{self.password}".encode()).decode()


class Challenge(NamedTuple):
    """One way in that a server offers: scheme in lower case, parameters with lower-case names."""

    scheme: str
    parameters: dict[str, str]


class Ask(NamedTuple):
    """A request to be sent on the way to a token."""

    method: str
    url: str
    headers: dict[str, str]
    body: bytes | None = None


class Pass(NamedTuple):
    """What opens the door: the value of the Authorization header, and until when (time.monotonic seconds)."""

    header: str
    until: float


def parse_challenges(text: str) -> list[Challenge]:
    """Return the challenges of a WWW-Authenticate header: "Bearer realm="…",service="…", Basic realm="…"".

    Nonsense ends the list; it never raises.
    """
    found: list[Challenge] = []
    at, end = 0, len(text)
    while at < end:
        while at < end and text[at] in " \t,":
            at += 1
        start = at
        while at < end and text[at] not in " \t,=":
            at += 1
        word = text[start:at]
        if not word:
            break
        while at < end and text[at] in " \t":
            at += 1
        if at < end and text[at] == "=" and found:
            at += 1
            while at < end and text[at] in " \t":
                at += 1
            if at < end and text[at] == '"':
                at += 1
                value = ""
                while at < end and text[at] != '"':
                    if text[at] == "\\" and at + 1 < end:
                        at += 1
                    value += text[at]
                    at += 1
                at += 1
            else:
                start = at
                while at < end and text[at] not in " \t,":
                    at += 1
                value = text[start:at]
            found[-1].parameters.setdefault(word.lower(), value)
        else:
            found.append(Challenge(word.lower(), {}))
    return found


def log_in(
    challenges: list[Challenge], credentials: Credentials | None, scopes: list[str], *, secure: bool = True
) -> Generator[Ask, tuple[int, bytes], Pass | None]:
    """Return what opens the door, or None when none of the challenges can be met.

    Yields requests and must be sent (status, body) of each.

    Arguments:
        scopes: what we want to do ("repository:a/b:pull").
        secure: the registry was asked over TLS; then a token server must be, too, before it gets a password.

    Raises:
        RegistryError: the token server refuses, or is nonsense.
    """
    for challenge in challenges:
        if challenge.scheme == "bearer" and challenge.parameters.get("realm"):
            return (yield from _bearer(challenge.parameters, credentials, scopes, secure))
    for challenge in challenges:
        if challenge.scheme == "basic" and credentials is not None and credentials.user:
            return Pass(credentials.basic(), float("inf"))
    return None


def _bearer(
    parameters: dict[str, str], credentials: Credentials | None, scopes: list[str], secure: bool
) -> Generator[Ask, tuple[int, bytes], Pass | None]:
    realm = parameters["realm"]
    parts = urlsplit(realm)
    if parts.scheme not in ("http", "https"):
        raise RegistryError("bad-challenge", f"the registry names a token server that is no address: {realm[:80]!r}")
    if secure and parts.scheme == "http" and credentials is not None:
        raise RegistryError(
            "insecure-realm", f"the registry wants our password sent in the clear to {parts.netloc}: refused"
        )
    wanted = list(dict.fromkeys([*scopes, *parameters.get("scope", "").split()]))
    service = parameters.get("service", "")
    if credentials is not None and credentials.identity:
        form = {
            "grant_type": "refresh_token",
            "service": service,
            "client_id": CLIENT,
            "scope": " ".join(wanted),
            "refresh_token": credentials.identity,
        }
        headers = {"Content-Type": "application/x-www-form-urlencoded"}
        status, body = yield Ask("POST", realm, headers, urlencode(form).encode())
    else:
        query = [*([("service", service)] if service else []), *(("scope", scope) for scope in wanted)]
        headers = {}
        if credentials is not None and credentials.user:
            query.append(("account", credentials.user))
            headers["Authorization"] = credentials.basic()
        address = urlunsplit(parts._replace(query="&".join(part for part in (parts.query, urlencode(query)) if part)))
        status, body = yield Ask("GET", address, headers)
    if status in (401, 403):
        raise RegistryError(
            "login-refused",
            f"{parts.netloc} refuses {'user ' + credentials.user if credentials else 'anonymous access'}",
            hint="log in with: singularity registry login",
        )
    if status != 200:
        raise RegistryError("no-token", f"{parts.netloc}: the token server answers {status}")
    try:
        value = json.loads(body)
        token = value.get("token") or value.get("access_token")
        lifetime = int(value.get("expires_in") or LIFETIME)
    except (ValueError, AttributeError, TypeError):
        token, lifetime = None, 0
    if not isinstance(token, str) or not token or not token.isascii() or not token.isprintable():
        raise RegistryError("no-token", f"{parts.netloc}: the token server gives no token")
    return Pass(f"Bearer {token}", time.monotonic() + max(lifetime - MARGIN, MARGIN))
