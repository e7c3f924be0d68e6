# SPDX-License-Identifier: Apache-2.0
"""Who may do what: one `Principal` per request, one question per deed.

Strangers get 404 for what they may not see, so that names of private collections cannot be guessed; 401 or 403 is for
people who may know that the thing exists.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import sqlalchemy as sa
from sqlalchemy.orm import Session

from pysingularity.hub.accounts.people import role_in
from pysingularity.hub.accounts.tokens import share_opens
from pysingularity.hub.errors import Forbidden, NotFound, Unauthenticated
from pysingularity.hub.models import Collection, Membership, User

ALL_SCOPES = frozenset(("read", "push", "build", "admin"))


@dataclass(frozen=True)
class Principal:
    """On whose behalf a request is made.

    Arguments:
        user: who it is; None for a stranger.
        scopes: what the token allows; everything for a browser.
        collection_id: the only collection that the token is for.
        share: short secret of the address.
        via: "anonymous", "token", "browser" or "password".
        csrf: secret that forms of this browser must carry.
        address: where the request came from, for limits and the audit log.
    """

    user: User | None = None
    scopes: frozenset[str] = frozenset()
    collection_id: int | None = None
    share: str = ""
    via: str = "anonymous"
    csrf: str = ""
    address: str = field(default="", compare=False)

    @property
    def name(self) -> str:
        """The user's name, "" for a stranger."""
        return self.user.name if self.user else ""

    @property
    def admin(self) -> bool:
        """Whether this is an administrator who may use that power here."""
        return self.user is not None and self.user.admin and "admin" in self.scopes

    def key(self) -> str:
        """Return what limits count by."""
        return f"user:{self.user.id}" if self.user else f"address:{self.address}"


STRANGER = Principal()


def _role(session: Session, who: Principal, collection: Collection) -> str:
    """Return the best of owner, maintainer, member or "" that a person is for a collection, whatever the scopes."""
    if who.user is None:
        return ""
    if who.collection_id is not None and who.collection_id != collection.id:
        return ""
    if collection.user_id is not None and collection.user_id in (who.user.id, who.user.owner_id):
        return "owner"
    if who.user.admin and "admin" in who.scopes:
        return "owner"
    if collection.group_id is not None:
        role = role_in(session, collection.group_id, who.user.id)
        if role is None and who.user.owner_id is not None:
            role = role_in(session, collection.group_id, who.user.owner_id)
        return role or ""
    return ""


def may_see(session: Session, who: Principal, collection: Collection) -> bool:
    """Return whether somebody may see a collection and pull from it."""
    if not collection.private:
        return True
    if who.share and share_opens(session, who.share, collection.id):
        return True
    return "read" in who.scopes and bool(_role(session, who, collection))


def need_see(session: Session, who: Principal, collection: Collection) -> None:
    """Refuse with 404 when `may_see` says no."""
    if not may_see(session, who, collection):
        raise NotFound("no-such-collection", f"{collection.full_name}: there is no such collection")


def may_change(session: Session, who: Principal, collection: Collection, scope: str) -> bool:
    """Return whether somebody may `push`, `build` or `admin` (settings, freeze, delete) in a collection.

    Members push and build, maintainers and owners change settings too.
    """
    if scope not in who.scopes:
        return False
    role = _role(session, who, collection)
    return role in ("owner", "maintainer") or (role == "member" and scope in ("push", "build"))


def need_change(session: Session, who: Principal, collection: Collection, scope: str) -> None:
    """Refuse what `may_change` does not allow: 404, 401 or 403, by what the person may know."""
    if may_change(session, who, collection, scope):
        return
    need_see(session, who, collection)
    if who.user is None:
        raise Unauthenticated("sign-in-first", "this needs a token or somebody signed in", headers=_challenge())
    if scope not in who.scopes:
        raise Forbidden("missing-scope", f"the token lacks the scope {scope}")
    raise Forbidden("not-yours", f"{collection.full_name}: you may not do this here")


def need_user(who: Principal, scope: str = "read") -> User:
    """Return the user, or refuse a stranger or a token without a scope."""
    if who.user is None:
        raise Unauthenticated("sign-in-first", "this needs a token or somebody signed in", headers=_challenge())
    if scope not in who.scopes:
        raise Forbidden("missing-scope", f"the token lacks the scope {scope}")
    return who.user


def need_admin(who: Principal) -> User:
    """Return the administrator, or refuse."""
    user = need_user(who, "admin")
    if not user.admin:
        raise Forbidden("admins-only", "this is for administrators")
    return user


def _challenge() -> dict[str, str]:
    return {"WWW-Authenticate": 'Bearer realm="hub"'}


def visible(who: Principal) -> sa.ColumnElement[bool]:
    """Return the condition for lists of collections: public ones, and those of the person."""
    if who.admin and who.collection_id is None:
        return sa.true()
    if who.user is None or "read" not in who.scopes:
        return Collection.private.is_(False)
    people = [number for number in (who.user.id, who.user.owner_id) if number is not None]
    groups = sa.select(Membership.group_id).where(Membership.user_id.in_(people))
    mine = sa.or_(Collection.user_id.in_(people), Collection.group_id.in_(groups))
    if who.collection_id is not None:
        mine = sa.and_(mine, Collection.id == who.collection_id)
    return sa.or_(Collection.private.is_(False), mine)
