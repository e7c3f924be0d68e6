# SPDX-License-Identifier: Apache-2.0
"""Coming in and going out: passwords, providers (see `accounts.providers`), the first time, and signing out.

The form to sign in carries what a cookie of its own says, since there is no sign-in yet whose secret it could carry.
Who comes from a provider for the first time chooses a name here; what the provider said about him waits in a sealed
cookie meanwhile.
"""

from __future__ import annotations

import hmac
import secrets
from typing import Annotated

from fastapi import APIRouter, Depends, Form, Request, Response
from fastapi.responses import RedirectResponse
from sqlalchemy.orm import Session

from pysingularity.hub.accounts import people, providers
from pysingularity.hub.accounts.audit import record
from pysingularity.hub.accounts.rights import Principal
from pysingularity.hub.accounts.signin import COOKIE, DAY, check_password, sign_in, sign_out
from pysingularity.hub.context import Hub
from pysingularity.hub.doors import Limits, TheHub, Who, address_of, base_url, get_hub, limited
from pysingularity.hub.errors import Forbidden, HubError, Invalid, Unauthenticated
from pysingularity.hub.models import User
from pysingularity.hub.pages.site import check_form, for_people, render, sentence

router = APIRouter(include_in_schema=False, dependencies=[Depends(for_people), Depends(limited)])
#: Hold the secret of the sign-in form, what a provider has to prove, and whom it spoke of.
FORM, LEAVE, JOIN = "hub_form", "hub_leave", "hub_join"
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
    settings = get_hub(request).settings
    answer = render(
        request,
        who,
        "signin.html",
        status=status,
        form=form,
        next=local(to),
        name=name,
        problem=problem,
        passwords=settings.sign_in.passwords,
        registration=settings.sign_in.registration and settings.sign_in.passwords,
        ways=providers.providers(settings),
    )
    _put_cookie(request, answer, FORM, form, DAY)
    return answer


def _same_form(request: Request, form: str) -> bool:
    """Return whether a form was shown to this very browser."""
    known = request.cookies.get(FORM, "")
    return bool(known) and hmac.compare_digest(known.encode("utf-8", "surrogatepass"), form.encode("utf-8", "replace"))


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
    if not _same_form(request, form):
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
    return _come_in(request, hub, user, next)


def _come_in(request: Request, hub: Hub, user: User, following: str, *, by: str = "") -> Response:
    """Sign a browser in and send it on; the cookies of coming in have done their work."""
    days = hub.settings.sign_in.session_days
    with hub.write() as session:
        user = session.merge(user)
        if old := request.cookies.get(COOKIE):
            sign_out(session, old)
        agent = request.headers.get("user-agent", "")
        cookie, _ = sign_in(session, user, days=days, agent=agent, address=address_of(request))
        more = {"by": by} if by else {}
        record(session, Principal(user, address=address_of(request)), "sign-in", user.name, **more)
    answer = RedirectResponse(local(following), 303)
    _put_cookie(request, answer, COOKIE, cookie, days * DAY)
    for name in (FORM, LEAVE, JOIN):
        answer.delete_cookie(name, path="/")
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


# --- through a provider ----------------------------------------------------------------------------------------------


def _redirect_of(request: Request, name: str) -> str:
    return f"{base_url(request)}/sign-in/{name}/return"


@router.post("/sign-in/{name}")
def leave(
    name: str,
    request: Request,
    hub: TheHub,
    who: Who,
    form: Field = "",
    csrf: Field = "",
    next: Field = "/",  # noqa: A002
) -> Response:
    """Send a browser to a provider: to sign in, or to connect one's account with it."""
    if who.via == "browser":
        check_form(request, who, csrf)
    elif not _same_form(request, form):
        return _sign_in_page(request, who, next, problem="The form has expired; try again.", status=403)
    limits: Limits = request.app.state.limits
    limits.sign_ins.take(address_of(request))
    provider = providers.provider_of(hub.settings, name)
    url, memory = providers.leave(hub.settings, provider, _redirect_of(request, name), local(next))
    # Not a redirect: browsers hold the addresses that a form's answer redirects to against `form-action`, and which
    # host the provider sends people to is not known when the form is shown.
    answer = render(request, who, "leave.html", to=url, title=provider.title, headers={"Cache-Control": "no-store"})
    _put_cookie(request, answer, LEAVE, memory, providers.PATIENCE)
    return answer


@router.get("/sign-in/{name}/return")
def come_back(name: str, request: Request, hub: TheHub, who: Who) -> Response:
    """Take a browser back from a provider."""
    provider = providers.provider_of(hub.settings, name)
    limits: Limits = request.app.state.limits
    limits.sign_ins.take(address_of(request))
    one, following = providers.come_back(
        hub.settings, provider, request.cookies.get(LEAVE, ""), dict(request.query_params)
    )
    with hub.write() as session:
        user = providers.known_user(session, one)
        if who.user is not None and who.via == "browser":
            providers.connect(session, session.get_one(User, who.user.id), one)
            record(session, who, "identity.add", who.name, provider=name)
            answer = RedirectResponse(following, 303)
            answer.delete_cookie(LEAVE, path="/")
            return answer
    if user is not None:
        if not user.active:
            raise Forbidden("blocked", f"the account {user.name} is blocked here")
        return _come_in(request, hub, user, following, by=name)
    if not hub.settings.sign_in.join:
        raise Forbidden("no-account", "you have no account here; the administrator makes them")
    answer = RedirectResponse("/join", 303)
    _put_cookie(request, answer, JOIN, providers.seal_stranger(hub.settings, one), providers.PATIENCE)
    answer.delete_cookie(LEAVE, path="/")
    return answer


# --- for the first time ----------------------------------------------------------------------------------------------


def _join_page(
    request: Request, who: Principal, one: providers.Stranger | None, *, name: str, problem: str = "", status: int = 200
) -> Response:
    form = secrets.token_urlsafe(24)
    title = providers.provider_of(get_hub(request).settings, one.provider).title if one is not None else ""
    answer = render(
        request, who, "join.html", status=status, form=form, one=one, title=title, name=name, problem=problem
    )
    _put_cookie(request, answer, FORM, form, DAY)
    return answer


def _stranger(request: Request, hub: Hub) -> providers.Stranger | None:
    """Return whom a provider spoke of, or None for somebody who makes a local account.

    Raises:
        Forbidden: local accounts are made by the administrator here.
    """
    if sealed := request.cookies.get(JOIN, ""):
        return providers.stranger_of(hub.settings, sealed)
    if not (hub.settings.sign_in.registration and hub.settings.sign_in.passwords):
        raise Forbidden("no-registration", "accounts are made by the administrator here")
    return None


@router.get("/join")
def join_form(request: Request, hub: TheHub, who: Who) -> Response:
    """Show the form for a new account."""
    one = _stranger(request, hub)
    return _join_page(request, who, one, name=one.wish if one is not None else "")


@router.post("/join")
def join(
    request: Request,
    hub: TheHub,
    who: Who,
    form: Field = "",
    name: Annotated[str, Form(max_length=100)] = "",
    password: Annotated[str, Form(max_length=1024)] = "",
    email: Annotated[str, Form(max_length=200)] = "",
) -> Response:
    """Make an account."""
    one = _stranger(request, hub)
    if not _same_form(request, form):
        return _join_page(request, who, one, name=name, problem="The form has expired; try again.", status=403)
    limits: Limits = request.app.state.limits
    limits.sign_ins.take(address_of(request))
    try:
        with hub.write() as session:
            user = _new_account(session, one, name, password, email)
            record(session, Principal(user, address=address_of(request)), "user.join", user.name)
    except HubError as error:
        return _join_page(request, who, one, name=name, problem=sentence(error), status=error.status)
    return _come_in(request, hub, user, "/", by=one.provider if one is not None else "")


def _new_account(session: Session, one: providers.Stranger | None, name: str, password: str, email: str) -> User:
    if one is None:
        return people.add_user(session, name, password=password, email=email)
    if providers.known_user(session, one) is not None:
        raise Invalid("sign-in-expired", "you have an account already; sign in")
    user = people.add_user(session, name, email=one.email, display_name=one.display_name)
    providers.connect(session, user, one)
    return user
