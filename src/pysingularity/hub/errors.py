# SPDX-License-Identifier: Apache-2.0
"""Refusals of the hub: like every error of ours, with the HTTP status that tells a client the same.

The JSON doors answer `{"error": {"code": status, "message": ..., "id": ...}}`; pages show the message.
"""

from __future__ import annotations

from pydantic import BaseModel, Field

from pysingularity.errors import UserError


class RefusalError(BaseModel):
    """What is wrong."""

    code: int = Field(description="the status of HTTP")
    message: str = Field(description="for people")
    id: str = Field(description="the stable name of the case, for programs")
    hint: str = Field("", description="what to try")


class Refusal(BaseModel):
    """How every refusal of the API looks."""

    error: RefusalError


class HubError(UserError):
    """Something a client asked for cannot be done.

    Arguments:
        id, message, hint: as in every SingularityError.
        headers: sent with the answer (`Retry-After`, `WWW-Authenticate`).
    """

    status = 400

    def __init__(
        self,
        id: str,  # noqa: A002
        message: str,
        *,
        hint: str = "",
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(id, message, hint=hint)
        self.headers = headers or {}


class Invalid(HubError):
    """A value cannot be understood or is out of bounds."""


class Unauthenticated(HubError):
    """The request needs somebody to be signed in."""

    status = 401


class Forbidden(HubError):
    """The person is known and may see the thing, but may not do this to it."""

    status = 403


class NotFound(HubError):
    """There is no such thing, or the person may not know that there is."""

    status = 404


class Conflict(HubError):
    """The thing's present state does not allow it: taken name, frozen image, finished build."""

    status = 409


class TooLarge(HubError):
    """A body, an image or a quota is over its limit in bytes."""

    status = 413


class TooMany(HubError):
    """A limit per time is used up; the answer says when to come back."""

    status = 429

    def __init__(self, id: str, message: str, *, seconds: int) -> None:  # noqa: A002
        super().__init__(id, message, headers={"Retry-After": str(max(1, seconds))})


class NoSpace(HubError):
    """The hub's disk is full."""

    status = 507
