# SPDX-License-Identifier: Apache-2.0
"""Browsers that are signed in: a random cookie, a row that knows its digest, a CSRF secret per sign-in."""

from __future__ import annotations

import hmac
import secrets

import sqlalchemy as sa
from sqlalchemy.orm import Session

from pysingularity.hub.accounts.passwords import verify_password
from pysingularity.hub.accounts.tokens import digest_of
from pysingularity.hub.errors import Forbidden, Unauthenticated
from pysingularity.hub.models import SignIn, User, now

COOKIE = "hub_session"
DAY = 86400


def check_password(session: Session, name: str, password: str) -> User:
    """Return the user who has this name and password.

    Raises:
        Unauthenticated: no such user or another password; the answer does not tell which.
    """
    user = session.scalar(sa.select(User).where(User.name == name.lower()))
    good = verify_password(password, user.password if user is not None and user.kind == "person" else None)
    if user is None or not good or not user.active:
        raise Unauthenticated("wrong-password", "the name or the password is wrong")
    return user


def sign_in(session: Session, user: User, *, days: float, agent: str = "", address: str = "") -> tuple[str, SignIn]:
    """Remember a browser and return the value of its cookie."""
    cookie = secrets.token_urlsafe(32)
    row = SignIn(
        digest=digest_of(cookie),
        user_id=user.id,
        csrf=secrets.token_urlsafe(24),
        agent=agent[:200],
        address=address,
        expires_at=now() + days * DAY,
    )
    session.add(row)
    user.seen_at = now()
    session.flush()
    return cookie, row


def find_sign_in(session: Session, cookie: str) -> tuple[SignIn, User] | None:
    """Return the sign-in that a cookie names, with its user."""
    found = session.execute(
        sa.select(SignIn, User).join(User, User.id == SignIn.user_id).where(SignIn.digest == digest_of(cookie))
    ).first()
    if found is None or found[0].expires_at <= now() or not found[1].active:
        return None
    return found[0], found[1]


def sign_out(session: Session, cookie: str) -> None:
    """Forget a browser."""
    session.execute(sa.delete(SignIn).where(SignIn.digest == digest_of(cookie)))


def sign_out_everywhere(session: Session, user: User) -> None:
    """Forget all browsers of a user (a new password, a blocked account)."""
    session.execute(sa.delete(SignIn).where(SignIn.user_id == user.id))


def check_csrf(row: SignIn, given: str) -> None:
    """Refuse a change that did not come from one of our own pages.

    Raises:
        Forbidden: the secret of the form is missing or wrong.
    """
    if not hmac.compare_digest(row.csrf.encode(), given.encode("utf-8", "surrogatepass")):
        raise Forbidden("csrf", "this form has expired; go back, reload the page and try again")
