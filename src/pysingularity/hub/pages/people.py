# SPDX-License-Identifier: Apache-2.0
"""Forms: one's account and tokens, new collections, and the buttons of collections, builds and images.

Every form carries the CSRF secret of its browser's sign-in. Deeds are those of the API, so rights and the audit log
are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import sqlalchemy as sa
from fastapi import APIRouter, Depends, Form, Request, Response
from fastapi.responses import JSONResponse, RedirectResponse

from pysingularity.hub.accounts import providers
from pysingularity.hub.accounts.audit import record
from pysingularity.hub.accounts.rights import Principal, need_user
from pysingularity.hub.api import builds as build_api
from pysingularity.hub.api import collections as collection_api
from pysingularity.hub.api import images as image_api
from pysingularity.hub.api import people as people_api
from pysingularity.hub.context import Hub
from pysingularity.hub.doors import Number, TheHub, Who, base_url, limited
from pysingularity.hub.errors import HubError, NotFound
from pysingularity.hub.models import Collection, SignIn, User, now
from pysingularity.hub.pages.site import check_form, for_people, no_deed, render, sentence, wants_json
from pysingularity.hub.pages.steering import attempt, number_of
from pysingularity.hub.storage.quota import room_of

router = APIRouter(include_in_schema=False, dependencies=[Depends(for_people), Depends(limited)])
Field = Annotated[str, Form(max_length=2000)]


def _account_page(
    request: Request, hub: Hub, who: Principal, *, secret: str = "", status: int = 200, **more: str
) -> Response:
    user = need_user(who, "admin")
    with hub.read() as session:
        query = sa.select(Collection).where(Collection.user_id == user.id).order_by(Collection.name)
        found = list(session.scalars(query.limit(500)))
        allowed, used = room_of(hub, session, session.get_one(User, user.id))
        rows = sa.select(SignIn).where(SignIn.user_id == user.id, SignIn.expires_at > now())
        browsers = list(session.scalars(rows.order_by(SignIn.created_at.desc()).limit(50)))
    values = {"told": "", "problem": "", **more}
    return render(
        request,
        who,
        "account.html",
        status=status,
        headers={"Cache-Control": "no-store"},
        person=people_api.me(hub, who),
        tokens=people_api.list_tokens(hub, who)["tokens"],
        robots=people_api.list_robots(hub, who)["robots"],
        found=found,
        browsers=browsers,
        allowed=allowed,
        used=used,
        secret=secret,
        passwords=hub.settings.sign_in.passwords,
        ways=providers.providers(hub.settings),
        host=base_url(request).partition("://")[2],
        **values,
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
    days: Field = "",
    robot: Field = "",
    display_name: Field = "",
    email: Field = "",
    old: Field = "",
) -> Response:
    """Make a token, a robot or a change of one's own account, or take something back.

    The page with a new secret is the answer itself, so that no address leads to it.
    """
    check_form(request, who, csrf)
    made: list[str] = []

    def token() -> None:
        new = people_api.NewToken(
            name=value[:100],
            scopes=" ".join(scopes or [])[:100],
            days=float(number_of(days)) if days else None,
            robot=robot[:40],
        )
        made.append(people_api.add_token(new, hub, who)["token"])

    deeds: dict[str, Callable[[], Any]] = {
        "token": token,
        "revoke": lambda: people_api.revoke(number_of(value), hub, who),
        "robot": lambda: people_api.add_robot(people_api.NewName(name=value.strip(), description=""), hub, who),
        "robot-remove": lambda: people_api.remove_robot(value, hub, who),
        "profile": lambda: people_api.change_me(
            people_api.Person(display_name=display_name, email=email, password=None, old_password=""), hub, who
        ),
        "password": lambda: people_api.change_me(
            people_api.Person(display_name=None, email=None, password=value, old_password=old), hub, who
        ),
        "disconnect": lambda: _disconnect(hub, who, value),
        "sign-out": lambda: people_api.sign_out_all(hub, who),
    }
    if action not in deeds:
        raise no_deed(action)
    problem = attempt(deeds[action])
    if problem:
        return _account_page(request, hub, who, problem=problem, status=422)
    if made:
        return _account_page(request, hub, who, secret=made[0])
    return RedirectResponse("/sign-in?next=/account" if action in ("password", "sign-out") else "/account", 303)


def _disconnect(hub: Hub, who: Principal, provider: str) -> None:
    user = need_user(who, "admin")
    with hub.write() as session:
        providers.disconnect(session, session.get_one(User, user.id), provider)
        record(session, who, "identity.remove", user.name, provider=provider)


@router.get("/new")
def new_collection(request: Request, who: Who) -> Response:
    """Show the form for a collection."""
    if who.user is None:
        return RedirectResponse("/sign-in?next=/new", 303)
    return render(request, who, "new.html", name=f"{who.name}/", git_url="", branches="", private=False, problem="")


@router.post("/new")
def make_collection(
    request: Request,
    hub: TheHub,
    who: Who,
    csrf: Field = "",
    name: Annotated[str, Form(max_length=200)] = "",
    git_url: Field = "",
    branches: Field = "",
    private: Field = "",
) -> Response:
    """Make a collection."""
    check_form(request, who, csrf)
    new = collection_api.NewCollection(
        name=name, git_url=git_url.strip(), branches=branches.split()[:100], private=bool(private), description=""
    )
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
            branches=branches,
            private=bool(private),
            problem=sentence(error),
        )
    return RedirectResponse(f"/{made['name']}", 303)


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
        raise no_deed(action)
    return RedirectResponse(request.url.path, 303)


@router.post("/{owner:owner}/{name}/builds/{number}")
def change_build(
    owner: str, name: str, number: Number, request: Request, hub: TheHub, who: Who, csrf: Field = "", action: Field = ""
) -> Response:
    """Cancel a build, or build again."""
    check_form(request, who, csrf)
    if action not in ("cancel", "retry"):
        raise no_deed(action)
    if build_api.get_build(hub, who, number).collection.full_name != f"{owner}/{name}":
        raise NotFound("no-such-build", f"build {number}: there is no such build")
    deed = build_api.cancel if action == "cancel" else build_api.retry
    build = deed(number, request, hub, who)
    return RedirectResponse(f"/{build['collection']}/builds/{build['id']}", 303)


@router.post("/{owner:owner}/{name}/images/{number}")
def change_image(
    owner: str, name: str, number: Number, request: Request, hub: TheHub, who: Who, csrf: Field = "", action: Field = ""
) -> Response:
    """Freeze an image, take the padlock off, or delete it."""
    check_form(request, who, csrf)
    if action not in ("freeze", "unfreeze", "delete"):
        raise no_deed(action)
    with hub.read() as session:
        if image_api.seen_image(session, who, number).container.collection.full_name != f"{owner}/{name}":
            raise NotFound("no-such-image", f"image {number}: there is no such image")
    if action == "delete":
        image_api.delete(number, hub, who)
        return RedirectResponse(f"/{owner}/{name}", 303)
    deed = image_api.put_padlock if action == "freeze" else image_api.take_padlock
    image = deed(number, request, hub, who)
    return RedirectResponse(f"/{image['collection']}/images/{image['id']}", 303)
