# SPDX-License-Identifier: Apache-2.0
"""Forms: signing in and out, tokens, new collections, and the buttons of collections, builds and images.

Every form carries the CSRF secret of its browser's sign-in; the form to sign in, where there is none yet, carries what
a cookie of its own says. Deeds are those of the API, so rights and the audit log are the same.
"""

from __future__ import annotations

import hmac
import secrets
from typing import Annotated

from fastapi import APIRouter, Depends, Form, Request, Response
from fastapi.responses import JSONResponse, RedirectResponse

from pysingularity.hub.accounts.audit import record
from pysingularity.hub.accounts.rights import Principal, need_user
from pysingularity.hub.accounts.signin import COOKIE, DAY, check_password, sign_in, sign_out
from pysingularity.hub.api import builds as build_api
from pysingularity.hub.api import collections as collection_api
from pysingularity.hub.api import images as image_api
from pysingularity.hub.api import people as people_api
from pysingularity.hub.catalog import search
from pysingularity.hub.context import Hub
from pysingularity.hub.doors import Limits, TheHub, Who, address_of, base_url, limited
from pysingularity.hub.errors import Forbidden, HubError, Invalid, NotFound, Unauthenticated
from pysingularity.hub.pages.site import check_form, for_people, render, sentence, wants_json

router = APIRouter(include_in_schema=False, dependencies=[Depends(for_people), Depends(limited)])
#: Holds the secret of the sign-in form until somebody is signed in.
FORM = "hub_form"
Field = Annotated[str, Form(max_length=2000)]


def local(target: str) -> str:
    """Return an address on this hub, or "/" for one that a browser would look for elsewhere."""
    good = target.startswith("/") and not target.startswith(("//", "/\\")) and target.isprintable()
    return target if good and "\\" not in target else "/"


def _put_cookie(request: Request, answer: Response, name: str, value: str, seconds: float) -> None:
    secure = base_url(request).startswith("https://")
    answer.set_cookie(name, value, max_age=int(seconds), path="/", httponly=True, samesite="lax", secure=secure)


def _sign_in_page(
    request: Request, who: Principal, to: str, *, name: str = "", problem: str = "", status: int = 200
) -> Response:
    form = secrets.token_urlsafe(24)
    answer = render(request, who, "signin.html", status=status, form=form, next=local(to), name=name, problem=problem)
    _put_cookie(request, answer, FORM, form, DAY)
    return answer


@router.get("/sign-in")
def sign_in_form(request: Request, who: Who, next: str = "/") -> Response:  # noqa: A002 (the name in the address)
    """Show the form to sign in."""
    return _sign_in_page(request, who, next)


@router.post("/sign-in")
def sign_in_now(
    request: Request,
    hub: TheHub,
    who: Who,
    name: Annotated[str, Form(max_length=100)] = "",
    password: Annotated[str, Form(max_length=1000)] = "",
    form: Field = "",
    next: Field = "/",  # noqa: A002
) -> Response:
    """Sign a browser in."""
    known = request.cookies.get(FORM, "")
    if not known or not hmac.compare_digest(known.encode("utf-8", "surrogatepass"), form.encode("utf-8", "replace")):
        return _sign_in_page(request, who, next, name=name, problem="The form has expired; try again.", status=403)
    if not hub.settings.sign_in.passwords:
        raise Forbidden("no-passwords", "passwords are not accepted here")
    limits: Limits = request.app.state.limits
    limits.sign_ins.take(address_of(request))
    try:
        with hub.read() as session:
            user = check_password(session, name, password)
    except Unauthenticated as error:
        return _sign_in_page(request, who, next, name=name, problem=f"{error.message}.", status=401)
    days = hub.settings.sign_in.session_days
    with hub.write() as session:
        user = session.merge(user)
        if old := request.cookies.get(COOKIE):
            sign_out(session, old)
        agent = request.headers.get("user-agent", "")
        cookie, _ = sign_in(session, user, days=days, agent=agent, address=address_of(request))
        record(session, Principal(user, address=address_of(request)), "sign-in", user.name)
    answer = RedirectResponse(local(next), 303)
    _put_cookie(request, answer, COOKIE, cookie, days * DAY)
    answer.delete_cookie(FORM, path="/")
    return answer


@router.post("/sign-out")
def sign_out_now(request: Request, hub: TheHub, who: Who, csrf: Field = "") -> Response:
    """Sign the browser out."""
    check_form(request, who, csrf)
    with hub.write() as session:
        sign_out(session, request.cookies.get(COOKIE, ""))
    answer = RedirectResponse("/", 303)
    answer.delete_cookie(COOKIE, path="/")
    return answer


def _account_page(request: Request, hub: Hub, who: Principal, *, secret: str = "") -> Response:
    user = need_user(who)
    with hub.read() as session:
        found = [one for one in search(session, who, user.name, limit=500) if one.user_id == user.id]
    tokens = people_api.list_tokens(hub, who)["tokens"]
    headers = {"Cache-Control": "no-store"}
    person = people_api.me(hub, who)
    return render(
        request, who, "account.html", headers=headers, person=person, tokens=tokens, found=found, secret=secret
    )


@router.get("/account")
def account(request: Request, hub: TheHub, who: Who) -> Response:
    """Show one's own account and tokens."""
    if who.user is None and not wants_json(request):
        return RedirectResponse("/sign-in?next=/account", 303)
    if wants_json(request):
        return JSONResponse(people_api.me(hub, who))
    return _account_page(request, hub, who)


@router.post("/account")
def change_account(
    request: Request,
    hub: TheHub,
    who: Who,
    csrf: Field = "",
    action: Field = "",
    value: Field = "",
    scopes: Annotated[list[str] | None, Form()] = None,
) -> Response:
    """Make a token or take one back.

    The page with a new secret is the answer itself, so that no address leads to it.
    """
    check_form(request, who, csrf)
    if action == "token":
        new = people_api.NewToken(name=value[:100], scopes=" ".join(scopes or [])[:100], days=None, robot="")
        return _account_page(request, hub, who, secret=people_api.add_token(new, hub, who)["token"])
    if action == "revoke" and value.isascii() and value.isdigit() and len(value) < 19:
        people_api.revoke(int(value), hub, who)
        return RedirectResponse("/account", 303)
    raise _no_deed(action)


@router.get("/new")
def new_collection(request: Request, who: Who) -> Response:
    """Show the form for a collection."""
    if who.user is None:
        return RedirectResponse("/sign-in?next=/new", 303)
    return render(request, who, "new.html", name=f"{who.name}/", git_url="", private=False, problem="")


@router.post("/new")
def make_collection(
    request: Request,
    hub: TheHub,
    who: Who,
    csrf: Field = "",
    name: Annotated[str, Form(max_length=200)] = "",
    git_url: Field = "",
    private: Field = "",
) -> Response:
    """Make a collection."""
    check_form(request, who, csrf)
    new = collection_api.NewCollection(name=name, git_url=git_url.strip(), private=bool(private), description="")
    try:
        made = collection_api.create(new, request, hub, who)
    except HubError as error:
        return render(
            request,
            who,
            "new.html",
            status=error.status,
            name=name,
            git_url=git_url,
            private=bool(private),
            problem=sentence(error),
        )
    return RedirectResponse(f"/{made['name']}", 303)


def _no_deed(action: str) -> Invalid:
    return Invalid("wrong-action", f"{action[:80]!r}: there is no such button here")


@router.post("/{owner:owner}/{name}")
def change_collection(
    owner: str,
    name: str,
    request: Request,
    hub: TheHub,
    who: Who,
    csrf: Field = "",
    action: Field = "",
    value: Field = "",
) -> Response:
    """Press a button of a collection."""
    check_form(request, who, csrf)
    if action == "star":
        collection_api.star(owner, name, hub, who)
    elif action == "unstar":
        collection_api.unstar(owner, name, hub, who)
    elif action == "resync":
        collection_api.sync(owner, name, hub, who)
    elif action == "build":
        new = build_api.NewBuild(
            collection=f"{owner}/{name}"[:200], recipe=value[:1000], tag="", ref="", branch="", commit=""
        )
        build = build_api.create(new, request, hub, who)
        return RedirectResponse(f"/{build['collection']}/builds/{build['id']}", 303)
    else:
        raise _no_deed(action)
    return RedirectResponse(request.url.path, 303)


@router.post("/{owner:owner}/{name}/builds/{number}")
def change_build(
    owner: str, name: str, number: int, request: Request, hub: TheHub, who: Who, csrf: Field = "", action: Field = ""
) -> Response:
    """Cancel a build, or build again."""
    check_form(request, who, csrf)
    if action not in ("cancel", "retry"):
        raise _no_deed(action)
    if build_api.get_build(hub, who, number).collection.full_name != f"{owner}/{name}":
        raise NotFound("no-such-build", f"build {number}: there is no such build")
    deed = build_api.cancel if action == "cancel" else build_api.retry
    build = deed(number, request, hub, who)
    return RedirectResponse(f"/{build['collection']}/builds/{build['id']}", 303)


@router.post("/{owner:owner}/{name}/images/{number}")
def change_image(
    owner: str, name: str, number: int, request: Request, hub: TheHub, who: Who, csrf: Field = "", action: Field = ""
) -> Response:
    """Freeze an image, or take the padlock off."""
    check_form(request, who, csrf)
    if action not in ("freeze", "unfreeze"):
        raise _no_deed(action)
    with hub.read() as session:
        if image_api.seen_image(session, who, number).container.collection.full_name != f"{owner}/{name}":
            raise NotFound("no-such-image", f"image {number}: there is no such image")
    deed = image_api.put_padlock if action == "freeze" else image_api.take_padlock
    image = deed(number, request, hub, who)
    return RedirectResponse(f"/{image['collection']}/images/{image['id']}", 303)
