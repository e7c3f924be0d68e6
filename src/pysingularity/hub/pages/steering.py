# SPDX-License-Identifier: Apache-2.0
"""Pages that change things for longer: a collection's settings, exchanges with its forge, groups, administration, API.

Like all forms, they do what the API does, by calling it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated, Any

import sqlalchemy as sa
from fastapi import APIRouter, Depends, Form, Query, Request, Response
from fastapi.responses import JSONResponse, RedirectResponse
from pydantic import ValidationError

from pysingularity.hub.accounts.rights import Principal, need_admin, need_change, need_user, visible
from pysingularity.hub.api import administration as admin_api
from pysingularity.hub.api import collections as collection_api
from pysingularity.hub.api import deliveries as delivery_api
from pysingularity.hub.api import people as people_api
from pysingularity.hub.api.reference import operations
from pysingularity.hub.builds.states import FINAL
from pysingularity.hub.catalog import get_collection, parse_name
from pysingularity.hub.context import Hub
from pysingularity.hub.doors import Number, TheHub, Who, base_url, limited
from pysingularity.hub.errors import HubError
from pysingularity.hub.models import Build, Collection
from pysingularity.hub.pages.site import check_form, for_people, no_deed, render, sentence, wants_json
from pysingularity.hub.storage.quota import quota

router = APIRouter(include_in_schema=False, dependencies=[Depends(for_people), Depends(limited)])
Field = Annotated[str, Form(max_length=2000)]
TRIGGERS = (
    ("push", "a push that changes a recipe or what it copies"),
    ("tag", "a tag in the repository"),
    ("deployment", "a deployment at the forge"),
    ("schedule", "the scheduled check of the repository"),
    ("base", "a change of the base image"),
    ("pull-request", "a pull request (built, not published)"),
)
MOST = 100


def number_of(text: str) -> int:
    """Return a number from a form; 0, which no row has, for anything else."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 19 else 0


def attempt(deed: Callable[[], Any]) -> str:
    """Do something that a form asks for; return what is wrong with the form, or "" when it was done."""
    try:
        deed()
    except HubError as error:
        if error.status in (401, 404) and error.id != "wrong-password" and not error.id.startswith("no-such-u"):
            raise
        return sentence(error)
    except ValidationError as error:
        first = error.errors()[0]
        return f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"
    return ""


# --- settings of a collection ----------------------------------------------------------------------------------------


def _settings_page(
    request: Request, hub: Hub, who: Principal, owner: str, name: str, *, status: int = 200, **more: str
) -> Response:
    with hub.read() as session:
        one = get_collection(session, *parse_name(f"{owner}/{name}"))
        need_change(session, who, one, "admin")
        allowed, used = quota(hub, session, one)
    shares = collection_api.list_shares(one.owner, one.name, hub, who)["shares"]
    values = {"told": "", "problem": "", "secret": "", **more}
    return render(
        request,
        who,
        "settings.html",
        status=status,
        headers={"Cache-Control": "no-store"},
        one=one,
        allowed=allowed,
        used=used,
        shares=shares,
        triggers=TRIGGERS,
        keep=hub.settings.keep,
        base=base_url(request),
        **values,
    )


@router.get("/{owner:owner}/{name}/settings")
def settings_page(owner: str, name: str, request: Request, hub: TheHub, who: Who) -> Response:
    """Show the settings of a collection."""
    if wants_json(request):
        return JSONResponse(collection_api.show(owner, name, request, hub, who))
    return _settings_page(request, hub, who, owner, name)


@router.post("/{owner:owner}/{name}/settings")
def change_settings(
    owner: str,
    name: str,
    request: Request,
    hub: TheHub,
    who: Who,
    csrf: Field = "",
    action: Field = "",
    value: Field = "",
    description: Field = "",
    topics: Field = "",
    private: Field = "",
    git_url: Field = "",
    branches: Field = "",
    triggers: Annotated[list[str] | None, Form()] = None,
    poll: Field = "0",
    status_token: Annotated[str, Form(max_length=4096)] = "",
    building: Field = "",
    last: Field = "",
    pulled_days: Field = "",
    days: Field = "",
) -> Response:
    """Change one group of settings."""
    check_form(request, who, csrf)
    new: dict[str, Any] = {}
    if action == "general":
        words = [word.strip() for word in topics.split(",") if word.strip()]
        new = {"description": description, "topics": words, "private": bool(private)}
    elif action == "building":
        new = {
            "git_url": git_url.strip(),
            "branches": branches.split(),
            "triggers": list(triggers or []),
            "poll": poll or "0",
            "building": bool(building),
            **({"status_token": status_token} if status_token else {}),
        }
    elif action == "keeping":
        given = (("last", last), ("pulled_days", pulled_days))
        new = {"keep": {key: text for key, text in given if text}}
    elif action in ("rename", "transfer"):
        new = {"name" if action == "rename" else "owner": value.strip()}
    elif action == "delete":
        return _delete(request, hub, who, owner, name, value.strip())
    elif action == "share":
        return _share(request, hub, who, owner, name, value[:100], days)
    elif action == "unshare":
        collection_api.remove_share(owner, name, number_of(value), hub, who)
        return _settings_page(request, hub, who, owner, name, told="The share link was taken back.")
    else:
        raise no_deed(action)
    made: list[dict[str, Any]] = []

    def deed() -> None:
        made.append(collection_api.change(owner, name, collection_api.Changes(**new), request, hub, who))

    problem = attempt(deed)
    if problem:
        return _settings_page(request, hub, who, owner, name, status=422, problem=problem)
    if made[0]["name"] != f"{owner}/{name}":
        return RedirectResponse(f"/{made[0]['name']}", 303)
    return _settings_page(request, hub, who, owner, name, told="Saved.")


def _delete(request: Request, hub: Hub, who: Principal, owner: str, name: str, typed: str) -> Response:
    problem = (
        "" if typed == f"{owner}/{name}" else "What was written is not the collection's name; nothing was deleted."
    )
    problem = problem or attempt(lambda: collection_api.delete(owner, name, hub, who))
    if problem:
        return _settings_page(request, hub, who, owner, name, status=409, problem=problem)
    return RedirectResponse(f"/{owner}" if owner == who.name else "/", 303)


def _share(request: Request, hub: Hub, who: Principal, owner: str, name: str, title: str, days: str) -> Response:
    made: list[str] = []

    def deed() -> None:
        new = collection_api.NewShare(name=title, days=float(number_of(days)) if days else None)
        made.append(collection_api.share(owner, name, new, request, hub, who)["uri"])

    problem = attempt(deed)
    # The page with the secret is the answer itself, so that no address leads to it.
    return _settings_page(request, hub, who, owner, name, problem=problem, secret=made[0] if made else "")


@router.get("/{owner:owner}/{name}/deliveries/{number}")
def exchange(owner: str, name: str, number: Number, request: Request, hub: TheHub, who: Who) -> Response:
    """Show one exchange with a forge."""
    row = delivery_api.show(owner, name, number, hub, who)
    if wants_json(request):
        return JSONResponse(row)
    with hub.read() as session:
        one = get_collection(session, *parse_name(f"{owner}/{name}"))
    body = row["body"]
    try:
        body = json.dumps(json.loads(body), indent=2, ensure_ascii=False)[: 1 << 20]
    except (ValueError, RecursionError):
        pass  # shown as it came
    return render(request, who, "exchange.html", one=one, row=row, body=body or "(empty)")


# --- groups ----------------------------------------------------------------------------------------------------------


def _groups_page(request: Request, hub: Hub, who: Principal, *, problem: str = "", status: int = 200) -> Response:
    groups = people_api.list_groups(hub, who)["groups"]
    return render(request, who, "groups.html", status=status, groups=groups, problem=problem)


@router.get("/groups")
def groups_page(request: Request, hub: TheHub, who: Who) -> Response:
    """Show one's groups."""
    if wants_json(request):
        return JSONResponse(people_api.list_groups(hub, who))
    if who.user is None:
        return RedirectResponse("/sign-in?next=/groups", 303)
    return _groups_page(request, hub, who)


@router.post("/groups")
def add_group(
    request: Request, hub: TheHub, who: Who, csrf: Field = "", value: Field = "", description: Field = ""
) -> Response:
    """Make a group."""
    check_form(request, who, csrf)
    name = value.strip()
    problem = attempt(
        lambda: people_api.add_group(people_api.NewGroup(name=name, description=description[:500]), hub, who)
    )
    if problem:
        return _groups_page(request, hub, who, problem=problem, status=422)
    return RedirectResponse(f"/groups/{name.lower()}", 303)


def _group_page(
    request: Request, hub: Hub, who: Principal, name: str, *, problem: str = "", status: int = 200
) -> Response:
    user = need_user(who)
    group = people_api.show_group(name, hub, who)
    query = sa.select(Collection).where(visible(who), Collection.owner == group["name"]).order_by(Collection.name)
    with hub.read() as session:
        found = list(session.scalars(query.limit(500)))
    owner = who.admin or group["members"].get(user.name) == "owner"
    return render(request, who, "group.html", status=status, group=group, found=found, owner=owner, problem=problem)


@router.get("/groups/{name}")
def group_page(name: str, request: Request, hub: TheHub, who: Who) -> Response:
    """Show a group."""
    if wants_json(request):
        return JSONResponse(people_api.show_group(name, hub, who))
    if who.user is None:
        return RedirectResponse("/sign-in?next=/groups", 303)
    return _group_page(request, hub, who, name)


@router.post("/groups/{name}")
def change_group(
    name: str,
    request: Request,
    hub: TheHub,
    who: Who,
    csrf: Field = "",
    action: Field = "",
    value: Field = "",
    role: Field = "",
) -> Response:
    """Change a group."""
    check_form(request, who, csrf)
    member = value.strip()
    deeds: dict[str, Callable[[], Any]] = {
        "member": lambda: people_api.put_member(name, member, people_api.Role(role=role[:20]), hub, who),
        "remove": lambda: people_api.remove_member(name, member, hub, who),
        "describe": lambda: people_api.change_group(
            name, people_api.GroupChanges(description=value[:500], quota=None), hub, who
        ),
        "delete": lambda: people_api.remove_group(name, hub, who),
    }
    if action not in deeds:
        raise no_deed(action)
    problem = attempt(deeds[action])
    if problem:
        return _group_page(request, hub, who, name, problem=problem, status=422)
    gone = action == "delete" or (action == "remove" and member.lower() == who.name and not who.admin)
    return RedirectResponse("/groups" if gone else request.url.path, 303)


# --- administration --------------------------------------------------------------------------------------------------


def _admin_page(
    request: Request, hub: Hub, who: Principal, *, q: str = "", before: int = 0, status: int = 200, **more: str
) -> Response:
    state = admin_api.status(hub, who)
    users = admin_api.list_users(hub, who, q, MOST, 0)["users"]
    audit = admin_api.audit(hub, who, "", "", MOST, before)["audit"]
    with hub.read() as session:
        query = sa.select(Build).where(Build.state.not_in(FINAL)).order_by(Build.id).limit(MOST)
        running = list(session.scalars(query))
    values: dict[str, Any] = {"told": "", "problem": "", **more}
    return render(
        request,
        who,
        "admin.html",
        status=status,
        state=state,
        users=users,
        audit=audit,
        running=running,
        q=q,
        most=MOST,
        **values,
    )


@router.get("/admin")
def admin_page(
    request: Request,
    hub: TheHub,
    who: Who,
    q: Annotated[str, Query(max_length=100)] = "",
    before: Annotated[int, Query(ge=0, le=1 << 62)] = 0,
) -> Response:
    """Show administrators how the hub is doing, its people, and the audit log."""
    if who.user is None and not wants_json(request):
        return RedirectResponse("/sign-in?next=/admin", 303)
    need_admin(who)
    if wants_json(request):
        return JSONResponse(admin_api.status(hub, who))
    return _admin_page(request, hub, who, q=q, before=before)


@router.post("/admin")
def change_people(
    request: Request,
    hub: TheHub,
    who: Who,
    csrf: Field = "",
    action: Field = "",
    value: Field = "",
    email: Annotated[str, Form(max_length=200)] = "",
    password: Annotated[str, Form(max_length=1024)] = "",
    admin: Field = "",
    active: Field = "",
    quota: Field = "",
) -> Response:
    """Add an account or change one."""
    check_form(request, who, csrf)
    need_admin(who)
    name = value.strip()

    def add() -> None:
        new = admin_api.NewUser(name=name, display_name="", email=email, password=password or None, admin=bool(admin))
        admin_api.add_user(new, hub, who)

    def change() -> None:
        size = round(float(quota) * (1 << 30)) if quota else -1
        new = admin_api.UserChanges(active=bool(active), admin=bool(admin), password=password or None, quota=size)
        admin_api.change_user(name, new, hub, who)

    if action not in ("add", "user"):
        raise no_deed(action)
    try:
        problem = attempt(add if action == "add" else change)
    except (ValueError, OverflowError):
        problem = "The quota is no number."
    if problem:
        return _admin_page(request, hub, who, problem=problem, status=422)
    return _admin_page(request, hub, who, told=f"{name} was {'added' if action == 'add' else 'changed'}.")


# --- the API's own page ----------------------------------------------------------------------------------------------


@router.get("/api")
@router.get("/api/v1")
def api_page(request: Request, who: Who) -> Response:
    """Show the API for people; programs read its OpenAPI description."""
    openapi: dict[str, Any] = request.app.openapi()
    if wants_json(request):
        return JSONResponse(openapi)
    return render(request, who, "api.html", openapi=openapi, tags=operations(openapi), base=base_url(request))
