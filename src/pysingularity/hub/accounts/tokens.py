# SPDX-License-Identifier: Apache-2.0
"""Secrets for programs: made once, shown once, stored as SHA-256.

A token is longer than 200 characters, since `remote login` of the older clients refuses shorter ones; 160 random bytes
need no slow hash.
"""

from __future__ import annotations

import hashlib
import secrets

import sqlalchemy as sa
from sqlalchemy.orm import Session

from pysingularity.hub.errors import Invalid
from pysingularity.hub.models import Collection, ShareLink, Token, User, now

SCOPES = ("read", "push", "build", "admin")
PREFIX = "pyhub_"
DAY = 86400


def digest_of(secret: str) -> str:
    """Return what is stored for a secret."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


def check_scopes(text: str) -> list[str]:
    """Return scopes separated by commas or blanks, in their usual order.

    Raises:
        Invalid: one is unknown, or there are none.
    """
    words = text.replace(",", " ").split()
    wrong = [word for word in words if word not in SCOPES]
    if wrong or not words:
        raise Invalid("wrong-scope", f"{wrong[0] if wrong else 'nothing'}: scopes are {', '.join(SCOPES)}")
    return [scope for scope in SCOPES if scope in words]


def add_token(
    session: Session,
    user: User,
    *,
    scopes: str = "read",
    name: str = "",
    days: float | None = None,
    collection: Collection | None = None,
) -> tuple[str, Token]:
    """Make a token and return its secret, which nobody can read again, with its row."""
    if days is not None and not days > 0:
        raise Invalid("wrong-expiry", "a token is valid for more than 0 days")
    secret = PREFIX + secrets.token_urlsafe(160)
    row = Token(
        user_id=user.id,
        digest=digest_of(secret),
        name=name,
        scopes=" ".join(check_scopes(scopes)),
        collection_id=collection.id if collection else None,
        expires_at=now() + days * DAY if days is not None else None,
    )
    session.add(row)
    session.flush()
    return secret, row


def find_token(session: Session, secret: str) -> tuple[Token, User] | None:
    """Return the token that a secret opens, with its user; None when it is unknown, expired or taken back."""
    found = session.execute(
        sa.select(Token, User).join(User, User.id == Token.user_id).where(Token.digest == digest_of(secret))
    ).first()
    if found is None:
        return None
    token, user = found
    if token.revoked_at is not None or not user.active:
        return None
    if token.expires_at is not None and token.expires_at <= now():
        return None
    return token, user


def add_share(session: Session, collection: Collection, *, by: str, name: str = "", days: float | None = None) -> str:
    """Make a short secret for the path of a shub address and return it.

    Registry and prefix of a shub reference may have 64 characters in all, so it has 22 (88 bits).
    """
    secret = secrets.token_hex(11)
    session.add(
        ShareLink(
            collection_id=collection.id,
            digest=digest_of(secret),
            name=name,
            created_by=by,
            expires_at=now() + days * DAY if days is not None else None,
        )
    )
    session.flush()
    return secret


def share_opens(session: Session, secret: str, collection_id: int) -> bool:
    """Return whether a short secret opens a collection."""
    row = session.scalar(sa.select(ShareLink).where(ShareLink.digest == digest_of(secret)))
    return row is not None and row.collection_id == collection_id and (row.expires_at is None or row.expires_at > now())
