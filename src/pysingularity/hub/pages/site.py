# SPDX-License-Identifier: Apache-2.0
"""What all pages share: templates, headers, refusals for people, and who gets JSON instead.

Templates escape everything; only `text` and `pictures`, which escape by themselves, hand over finished markup. Nothing
on a page comes from another host, and no style or script stands in a page itself.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
from fastapi import Request, Response
from fastapi.responses import HTMLResponse
from markupsafe import Markup
from starlette.convertors import Convertor, register_url_convertor

from pysingularity.errors import UserError
from pysingularity.hub.accounts.people import RESERVED
from pysingularity.hub.accounts.rights import Principal
from pysingularity.hub.accounts.signin import check_csrf
from pysingularity.hub.doors import current_sign_in, get_hub, who_asks
from pysingularity.hub.errors import Forbidden, HubError, Invalid
from pysingularity.hub.pages.pictures import human_size
from pysingularity.hub.pages.text import definition, log_line


class _Owner(Convertor[str]):
    """The first part of a page's address: never one of the hub's own words, which other doors answer for."""

    regex = rf"(?!(?:{'|'.join(sorted(RESERVED))})(?:/|\Z))[^/]+"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("owner", _Owner())

HERE = Path(__file__).parent
#: Stricter than what every answer gets: our pages have no styles of their own.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
)


def human_time(at: float | None) -> Markup:
    """Return a time as an element that programs can read, too."""
    if at is None:
        return Markup("–")
    parts = time.gmtime(at)
    machine = time.strftime("%Y-%m-%dT%H:%M:%SZ", parts)
    return Markup('<time datetime="{}">{}</time>').format(machine, time.strftime("%Y-%m-%d %H:%M UTC", parts))


def human_seconds(value: float | None) -> str:
    """Return a duration: "2 min 5 s"."""
    if value is None:
        return "–"
    minutes, seconds = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{value:.1f} s"


def definition_lines(text: str) -> list[Markup]:
    """Return the lines of a definition as finished markup."""
    return [Markup(line) for line in definition(text)]


def log_markup(text: str) -> Markup:
    """Return part of a log as finished markup."""
    styles: tuple[str, ...] = ()
    out = []
    for line in text.split("\n"):
        markup, styles = log_line(line, styles)
        out.append(markup)
    return Markup("\n".join(out))


TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(HERE / "templates"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
TEMPLATES.filters |= {
    "size": human_size,
    "when": human_time,
    "seconds": human_seconds,
    "definition": definition_lines,
    "log": log_markup,
    "part": lambda text: quote(str(text), safe=""),
}


def wants_json(request: Request) -> bool:
    """Return whether somebody asks a page's address for its JSON twin."""
    accept = request.headers.get("accept", "")
    return "application/json" in accept and "text/html" not in accept


def prefix_of(who: Principal) -> str:
    """Return what stands before every address on a page: the short secret with which the page was opened."""
    return f"/t/{who.share}" if who.share else ""


def render(
    request: Request,
    who: Principal,
    template: str,
    /,
    *,
    status: int = 200,
    headers: Mapping[str, str] | None = None,
    **values: Any,
) -> Response:
    """Return a page made of a template."""
    hub = get_hub(request)
    page = TEMPLATES.get_template(template).render(
        site=hub.settings.name,
        notice=hub.settings.notice,
        who=who,
        root=prefix_of(who),
        here=prefix_of(who) + request.url.path,
        **values,
    )
    given = {"Content-Security-Policy": POLICY, "Cache-Control": "private, no-cache", "Vary": "Accept, Cookie"}
    return HTMLResponse(page, status, headers=given | dict(headers or {}))


def for_people(request: Request) -> None:
    """Let refusals of this request be pages, unless it asks for JSON."""
    if wants_json(request):
        return

    def shape(status: int, id: str, message: str, headers: dict[str, str]) -> Response:  # noqa: A002
        # Browsers would open a box of their own for a challenge; people sign in on our page.
        kept = {key: value for key, value in headers.items() if key.lower() != "www-authenticate"}
        try:
            who = who_asks(request)
        except HubError:
            who = Principal(share=request.scope.get("share", ""))
        return render(request, who, "refusal.html", status=status, headers=kept, code=status, id=id, message=message)

    request.scope["refusal"] = shape


def check_form(request: Request, who: Principal, csrf: str) -> None:
    """Refuse a form that does not come from one of our pages in a browser that is signed in.

    Raises:
        Forbidden: no such browser, or the secret in the form is not its own.
    """
    row = current_sign_in(request)
    if row is None or who.via != "browser":
        raise Forbidden("sign-in-first", "sign in with this browser first")
    check_csrf(row, csrf)


def no_deed(action: str) -> Invalid:
    """Return the error of a form whose button we do not have."""
    return Invalid("wrong-action", f"{action[:80]!r}: there is no such button here")


def sentence(error: UserError) -> str:
    """Return an error as people read it on a page."""
    return f"{error.message} ({error.hint})" if error.hint else error.message
