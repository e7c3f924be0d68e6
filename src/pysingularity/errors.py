# SPDX-License-Identifier: Apache-2.0
"""Errors: whose turn it is decides the class, a stable id names the case, a hint says what to try.

The tree (class → exit status):

    SingularityError            255
    ├── UsageError                1   the command line cannot be understood
    ├── UserError               255   the user's input or files; the user can mend it
    │   ├── ImageError                an image is missing, damaged or of the wrong kind
    │   ├── RecipeError               a definition file, with file, line and column
    │   ├── ReferenceError_           a text that is no reference to an image
    │   └── RegistryError             a registry, library or hub said no, or could not be reached
    ├── HostError               255   the machine lacks something; the administrator can mend it
    └── InternalError           255   we are at fault

Errors are raised anywhere and printed only by `cli.main`. An error whose message is complete never needs a traceback.
This module belongs to the start ring: it imports nothing.
"""

from __future__ import annotations


class SingularityError(Exception):
    """Base of everything that is reported to a person in one line.

    Arguments:
        id: stable name of the case in kebab-case, for scripts and logs ("no-partition").
        message: what happened to what, and why; one line, without a full stop at the end.
        hint: what to try, as a second line; empty when there is nothing to try.
    """

    exit_code = 255

    def __init__(self, id: str, message: str, *, hint: str = "") -> None:  # noqa: A002
        super().__init__(message)
        self.id = id
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n    hint: {self.hint}" if self.hint else self.message


class UsageError(SingularityError):
    """The command line cannot be understood: unknown option or command, wrong number of arguments."""

    exit_code = 1


class UserError(SingularityError):
    """Something the user gave is wrong or missing."""


class ImageError(UserError):
    """An image is missing, damaged, hostile or of a kind that cannot be used here."""


class RecipeError(UserError):
    """A definition file is wrong at a place.

    Arguments:
        file, line, column: the place; line and column count from 1, and 0 means "the file as a whole".
        text: the offending line, quoted below the message.
    """

    def __init__(
        self,
        id: str,  # noqa: A002
        message: str,
        *,
        file: str = "",
        line: int = 0,
        column: int = 0,
        text: str = "",
        hint: str = "",
    ) -> None:
        super().__init__(id, message, hint=hint)
        self.file, self.line, self.column, self.text = file, line, column, text

    def __str__(self) -> str:
        place = ":".join(str(part) for part in (self.file, self.line, self.column) if part)
        lines = [f"{place}: {self.message}" if place else self.message]
        if self.text:
            lines.append(f"    {self.text.strip()}")
        if self.hint:
            lines.append(f"    hint: {self.hint}")
        return "\n".join(lines)


class ReferenceError_(UserError):  # the plain name is Python's own
    """A text is no reference to an image that we understand."""


class RegistryError(UserError):
    """A registry, library or hub refused, answered nonsense, or could not be reached."""


class HostError(SingularityError):
    """This machine lacks something (a kernel feature, a device, space) that its administrator can give."""


class InternalError(SingularityError):
    """We are at fault: an invariant of ours does not hold."""
