# SPDX-License-Identifier: Apache-2.0
"""Signing in through somebody else: OpenID Connect, and GitHub, which has a protocol of its own.

The authorization code flow with PKCE (RFC 6749, RFC 7636), state and nonce. What is remembered between the two halves
travels in a signed cookie of the browser, so that any web process can finish what another one began. An ID token is
believed when its signature, issuer, audience, time and nonce are right (OpenID Connect Core 1.0 §3.1.3.7); GitHub is
asked who it was. Accounts are found by provider and subject only: an e-mail address proves nothing here.
"""

from __future__ import annotations

import re
import secrets
import threading
import time
from dataclasses import asdict, dataclass
from typing import Any

import sqlalchemy as sa
from itsdangerous import BadSignature, URLSafeTimedSerializer
from sqlalchemy.orm import Session

from pysingularity.hub.errors import Conflict, HubError, Invalid, NotFound
from pysingularity.hub.models import Identity, User
from pysingularity.hub.settings import Settings

#: Seconds between leaving for the provider and coming back, and for which a provider's description is kept.
PATIENCE, FRESH = 900, 3600.0
TIMEOUT = 10.0
_ALGORITHMS = ["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA", "Ed25519"]
_WELL_KNOWN = "/.well-known/openid-configuration"


class ProviderFailed(HubError):
    """The other side did not answer as it should; the person can try again, the administrator can look."""

    status = 502


@dataclass(frozen=True)
class Provider:
    """One way to sign in.

    Arguments:
        name: as in the settings and in addresses; "github" is GitHub's.
        issuer: of OpenID Connect; for GitHub its web address.
    """

    name: str
    title: str
    kind: str
    issuer: str
    client_id: str
    client_secret: str


@dataclass(frozen=True)
class Stranger:
    """Somebody whom a provider knows.

    Arguments:
        subject: the provider's own, never changing name for him.
        wish: what he is called there, for a name here.
    """

    provider: str
    subject: str
    wish: str = ""
    display_name: str = ""
    email: str = ""


def providers(settings: Settings) -> list[Provider]:
    """Return the ways to sign in through others."""
    found = [
        Provider(
            name,
            one.get("title", name),
            "oidc",
            one.get("issuer", "").rstrip("/"),
            one.get("client_id", ""),
            one.get("client_secret", ""),
        )
        for name, one in settings.sign_in.oidc.items()
    ]
    if settings.sign_in.github.get("client_id"):
        one = settings.sign_in.github
        url = one.get("url", "https://github.com").rstrip("/")
        title = one.get("title", "GitHub")
        found.append(Provider("github", title, "github", url, one["client_id"], one.get("client_secret", "")))
    return found


def provider_of(settings: Settings, name: str) -> Provider:
    """Return a provider by name.

    Raises:
        NotFound: the settings have none of this name.
    """
    for one in providers(settings):
        if one.name == name:
            return one
    raise NotFound("no-such-provider", f"{name[:40]}: this hub has no such way to sign in")


# --- what the browser carries ----------------------------------------------------------------------------------------


def _serializer(settings: Settings, purpose: str) -> URLSafeTimedSerializer:
    return URLSafeTimedSerializer(settings.secret(), salt=f"hub {purpose}")


def seal(settings: Settings, purpose: str, value: dict[str, Any]) -> str:
    """Return a value as a signed text for a cookie."""
    return str(_serializer(settings, purpose).dumps(value))


def unseal(settings: Settings, purpose: str, text: str) -> dict[str, Any]:
    """Return the value of a signed text.

    Raises:
        Invalid: it was not sealed by us for this purpose, or too long ago.
    """
    try:
        value = _serializer(settings, purpose).loads(text, max_age=PATIENCE)
    except BadSignature:
        raise Invalid("sign-in-expired", "this sign-in took too long or was begun in another browser; begin again")
    return dict(value)


def stranger_of(settings: Settings, text: str) -> Stranger:
    """Return whom a sealed text speaks of."""
    return Stranger(**unseal(settings, "stranger", text))


def seal_stranger(settings: Settings, one: Stranger) -> str:
    """Return somebody as a signed text."""
    return seal(settings, "stranger", asdict(one))


# --- the two halves --------------------------------------------------------------------------------------------------

_descriptions: dict[str, tuple[float, dict[str, Any]]] = {}
_lock = threading.Lock()


def _client(provider: Provider, redirect: str) -> Any:
    from authlib.integrations.httpx_client import OAuth2Client  # 200 ms that a hub without providers does not spend

    return OAuth2Client(
        client_id=provider.client_id,
        client_secret=provider.client_secret,
        redirect_uri=redirect,
        scope="openid profile email" if provider.kind == "oidc" else "read:user",
        code_challenge_method="S256",
        timeout=TIMEOUT,
        trust_env=True,
    )


def describe(provider: Provider) -> dict[str, Any]:
    """Return the addresses of a provider; those of OpenID Connect are asked for, and remembered for an hour.

    Raises:
        ProviderFailed: it does not say, or speaks for somebody else.
    """
    if provider.kind == "github":
        web = provider.issuer
        api = "https://api.github.com" if web == "https://github.com" else f"{web}/api/v3"
        return {
            "authorization_endpoint": f"{web}/login/oauth/authorize",
            "token_endpoint": f"{web}/login/oauth/access_token",
            "userinfo_endpoint": f"{api}/user",
        }
    with _lock:
        known = _descriptions.get(provider.issuer)
    if known is not None and time.monotonic() - known[0] < FRESH:
        return known[1]
    with _client(provider, "") as client:
        value = _json(client.request("GET", provider.issuer + _WELL_KNOWN, withhold_token=True), provider)
        if str(value.get("issuer", "")).rstrip("/") != provider.issuer:
            raise ProviderFailed("wrong-provider", f"{provider.title} calls itself {str(value.get('issuer'))[:200]}")
        for key in ("authorization_endpoint", "token_endpoint", "jwks_uri"):
            if not isinstance(value.get(key), str):
                raise ProviderFailed("wrong-provider", f"{provider.title} does not name its {key}")
        value["jwks"] = _json(client.request("GET", value["jwks_uri"], withhold_token=True), provider)
    with _lock:
        _descriptions[provider.issuer] = (time.monotonic(), value)
    return value


def _json(answer: Any, provider: Provider) -> dict[str, Any]:
    if answer.status_code != 200:
        raise ProviderFailed("provider-failed", f"{provider.title} answered {answer.status_code}")
    try:
        value = answer.json()
    except ValueError:
        raise ProviderFailed("provider-failed", f"{provider.title} answered with something that is no JSON")
    if not isinstance(value, dict):
        raise ProviderFailed("provider-failed", f"{provider.title} answered with something unexpected")
    return value


def _guard(provider: Provider, error: Exception) -> ProviderFailed:
    return ProviderFailed("provider-failed", f"{provider.title} cannot be asked: {type(error).__name__}")


def leave(settings: Settings, provider: Provider, redirect: str, following: str) -> tuple[str, str]:
    """Begin a sign-in: return the provider's address for the browser, and what its cookie has to remember.

    Arguments:
        redirect: our address that the provider sends the browser back to.
        following: where the browser goes afterwards.
    """
    import httpx2

    try:
        known = describe(provider)
    except httpx2.HTTPError as error:
        raise _guard(provider, error)
    verifier, nonce, state = secrets.token_urlsafe(48), secrets.token_urlsafe(24), secrets.token_urlsafe(24)
    more = {"nonce": nonce} if provider.kind == "oidc" else {}
    with _client(provider, redirect) as client:
        url, _ = client.create_authorization_url(
            known["authorization_endpoint"], state=state, code_verifier=verifier, **more
        )
    memory = {
        "provider": provider.name,
        "state": state,
        "nonce": nonce,
        "verifier": verifier,
        "redirect": redirect,
        "next": following,
    }
    return url, seal(settings, "leave", memory)


def come_back(settings: Settings, provider: Provider, cookie: str, answer: dict[str, str]) -> tuple[Stranger, str]:
    """Finish a sign-in: return who it was, and where the browser goes now.

    Arguments:
        cookie: what `leave` asked to be remembered.
        answer: the query with which the provider sent the browser back.

    Raises:
        Invalid: this browser did not begin it, or the person said no.
        ProviderFailed: the provider cannot be asked or proves nothing.
    """
    import httpx2
    from authlib.common.errors import AuthlibBaseError
    from joserfc.errors import JoseError

    memory = unseal(settings, "leave", cookie)
    given = answer.get("state", "")
    right = secrets.compare_digest(str(memory["state"]).encode(), given.encode("utf-8", "surrogatepass"))
    if not right or memory["provider"] != provider.name:
        raise Invalid("sign-in-expired", "this sign-in was begun in another browser or twice; begin again")
    if "error" in answer:
        raise Invalid("sign-in-refused", f"{provider.title} says: {answer['error'][:100]}")
    # RFC 9207: who answers says who he is, so that one provider's answer is not taken for another's.
    if answer.get("iss", provider.issuer).rstrip("/") != provider.issuer:
        raise Invalid("wrong-provider", "the answer came from another provider than was asked")
    try:
        known = describe(provider)
        with _client(provider, str(memory["redirect"])) as client:
            token = client.fetch_token(
                known["token_endpoint"],
                code=answer.get("code", ""),
                code_verifier=memory["verifier"],
                headers={"Accept": "application/json"},
            )
            if provider.kind == "github":
                value = _json(client.get(known["userinfo_endpoint"]), provider)
                return _of_github(provider, value), str(memory["next"])
            proof = str(token.get("id_token", ""))
            try:
                claims = read_id_token(provider, known, proof, str(memory["nonce"]))
            except ProviderFailed:
                # Providers change their keys now and then; those that we remember may be old.
                with _lock:
                    _descriptions.pop(provider.issuer, None)
                known = describe(provider)
                claims = read_id_token(provider, known, proof, str(memory["nonce"]))
            if "preferred_username" not in claims and known.get("userinfo_endpoint"):
                more = _json(client.get(known["userinfo_endpoint"]), provider)
                if more.get("sub") == claims["sub"]:
                    claims = {**more, **claims}
    except (httpx2.HTTPError, AuthlibBaseError, JoseError) as error:
        raise _guard(provider, error)
    return (
        Stranger(
            provider.name,
            str(claims["sub"]),
            wish=_wish(claims.get("preferred_username"), claims.get("nickname"), claims.get("email")),
            display_name=str(claims.get("name") or "")[:200],
            email=str(claims.get("email") or "")[:200],
        ),
        str(memory["next"]),
    )


def read_id_token(provider: Provider, known: dict[str, Any], text: str, nonce: str) -> dict[str, Any]:
    """Return what an ID token says, after believing it.

    Raises:
        ProviderFailed: it is not for us, not of this sign-in, or not signed by this provider's keys.
    """
    from joserfc import jwt
    from joserfc.errors import JoseError
    from joserfc.jwk import KeySet

    try:
        keys = KeySet.import_key_set(known["jwks"])
        claims = dict(jwt.decode(text, keys, algorithms=_ALGORITHMS).claims)
        rules = jwt.JWTClaimsRegistry(
            leeway=60,
            iss={"essential": True},
            sub={"essential": True},
            aud={"essential": True, "value": provider.client_id},
            exp={"essential": True},
            nonce={"essential": True, "value": nonce},
        )
        rules.validate(claims)
    except (JoseError, ValueError, TypeError) as error:
        raise ProviderFailed("wrong-proof", f"the proof of {provider.title} is not valid: {type(error).__name__}")
    others = isinstance(claims["aud"], list) and len(claims["aud"]) > 1
    if str(claims["iss"]).rstrip("/") != provider.issuer or (others and claims.get("azp") != provider.client_id):
        raise ProviderFailed("wrong-proof", f"the proof of {provider.title} was made for somebody else")
    return claims


def _of_github(provider: Provider, value: dict[str, Any]) -> Stranger:
    if not isinstance(value.get("id"), int):
        raise ProviderFailed("provider-failed", f"{provider.title} does not say who it was")
    return Stranger(
        provider.name,
        str(value["id"]),
        wish=_wish(value.get("login")),
        display_name=str(value.get("name") or "")[:200],
        email=str(value.get("email") or "")[:200],
    )


def _wish(*names: object) -> str:
    """Return the first of some names in the letters that names have here."""
    for name in names:
        if isinstance(name, str) and name:
            text = re.sub(r"[^a-z0-9]+", "-", name.partition("@")[0].lower()).strip("-")[:39].strip("-")
            if text:
                return text
    return ""


# --- accounts --------------------------------------------------------------------------------------------------------


def known_user(session: Session, one: Stranger) -> User | None:
    """Return the account of somebody, or None when there is none yet."""
    return session.scalar(
        sa.select(User)
        .join(Identity, Identity.user_id == User.id)
        .where(Identity.provider == one.provider, Identity.subject == one.subject)
    )


def connect(session: Session, user: User, one: Stranger) -> None:
    """Let somebody sign in to an account from now on.

    Raises:
        Conflict: he has another account already.
    """
    other = known_user(session, one)
    if other is not None and other.id != user.id:
        raise Conflict("identity-taken", f"this {one.provider} account belongs to another account here")
    if other is None:
        session.add(Identity(user_id=user.id, provider=one.provider, subject=one.subject))
        session.flush()


def disconnect(session: Session, user: User, provider: str) -> None:
    """Take a way to sign in away.

    Raises:
        Conflict: it is the last one.
    """
    rows = list(session.scalars(sa.select(Identity).where(Identity.user_id == user.id)))
    gone = [row for row in rows if row.provider == provider]
    if gone and len(gone) == len(rows) and user.password is None:
        raise Conflict("last-way", "this is the only way into the account; set a password first")
    for row in gone:
        session.delete(row)
