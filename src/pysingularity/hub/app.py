# SPDX-License-Identifier: Apache-2.0
"""The web application: every door of the hub on one ASGI app, the same errors for all, and nothing else.

The doors are routers of their own (`api`, `protocols`, `pages`); this file only puts them together.
"""

from __future__ import annotations

import tempfile
from typing import Any

import sqlalchemy as sa
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from pysingularity.errors import SingularityError
from pysingularity.hub import doors
from pysingularity.hub.api import administration, builds, collections, deliveries, images, inside, people, service
from pysingularity.hub.context import Hub
from pysingularity.hub.errors import HubError, Refusal
from pysingularity.hub.front import Front
from pysingularity.hub.pages import people as forms
from pysingularity.hub.pages import signing, steering, views
from pysingularity.hub.protocols import https, library, library_push, oci, shub
from pysingularity.hub.settings import load_settings, make_data_folder
from pysingularity.version import __version__

REFUSALS = {
    400: "A value cannot be understood.",
    401: "Nobody is signed in, or the token is not valid.",
    403: "You may not do this.",
    404: "There is no such thing, or you may not know that there is.",
    409: "The thing's present state does not allow it.",
    413: "Too many bytes.",
    422: "A field is missing or wrong.",
    429: "Too many requests; the answer says when to come back.",
}


class _Hub(FastAPI):
    """Tells in its description how one shows who one is."""

    def openapi(self) -> dict[str, Any]:
        """Return the OpenAPI description."""
        if self.openapi_schema is None:
            value = super().openapi()
            value["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
            # Public things are shown to everybody, so a token is welcome everywhere and asked for by need.
            value["security"] = [{}, {"token": []}]
            for kind in ("HTTPValidationError", "ValidationError"):
                value["components"]["schemas"].pop(kind, None)
        assert self.openapi_schema is not None
        return self.openapi_schema


def make_app(hub: Hub) -> FastAPI:
    """Return the application of a hub."""
    app = _Hub(
        title=hub.settings.name,
        version=__version__,
        openapi_url="/api/v1/openapi.json",
        # Every refusal of the API looks alike (see `doors.refusal`).
        responses={code: {"model": Refusal, "description": text} for code, text in REFUSALS.items()},
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.hub = hub
    app.state.limits = doors.Limits(hub.settings)
    app.include_router(https.router)  # before `images`, whose OWNER/NAME would match it
    for router in (service.router, collections.router, builds.router, images.router, deliveries.router, people.router):
        app.include_router(router)
    for router in (inside.router, administration.router):
        app.include_router(router)
    app.include_router(shub.router)
    # The library's addresses below /v2 come first: a name in a registry has two parts, theirs have one.
    for router in (library.router, library_push.router, oci.router):
        app.include_router(router)
    # The pages come last: OWNER/NAME would match much.
    for router in (signing.router, steering.router, forms.router, views.router):
        app.include_router(router)
    app.add_exception_handler(SingularityError, _our_error)
    app.add_exception_handler(sa.exc.DataError, _data_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_middleware(Front)
    return app


def describe() -> dict[str, Any]:
    """Return the OpenAPI description without a hub: nothing in it depends on one."""
    with tempfile.TemporaryDirectory() as folder:
        hub = Hub(load_settings(make_data_folder(folder)))
        try:
            return make_app(hub).openapi()
        finally:
            hub.close()


def _our_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, SingularityError)
    if isinstance(error, HubError):
        return doors.refusal(request, error.status, error.id, error.message, hint=error.hint, headers=error.headers)
    return doors.refusal(request, 422, error.id, str(error))


def _data_error(request: Request, error: Exception) -> Response:
    # What PostgreSQL cannot hold (a NUL in a text) SQLite can, and finds nothing of that name.
    assert isinstance(error, sa.exc.DataError)
    return doors.refusal(request, 400, "wrong-value", "a value holds characters that no name or text here can have")


def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    ids = {404: "no-such-page", 405: "wrong-method"}
    return doors.refusal(
        request, error.status_code, ids.get(error.status_code, "http-error"), str(error.detail), headers=error.headers
    )


# No coroutines: a refusal for people asks the database who they are.
def _validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0] if error.errors() else {"loc": (), "msg": "wrong request"}
    where = ".".join(str(part) for part in first["loc"])
    return doors.refusal(request, 422, "wrong-request", f"{where}: {first['msg']}" if where else str(first["msg"]))
