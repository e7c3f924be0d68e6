# SPDX-License-Identifier: Apache-2.0
"""What an OCI image wants of its container beyond environment and command: WORKDIR and USER, read when asked for.

SIF files that were made from OCI images keep the configuration; other images say nothing here. Loaded only for
--image-cwd, --image-user and --compat: it reads JSON, and files inside the image.
"""

from __future__ import annotations

import json

from pysingularity.errors import ImageError
from pysingularity.image.inside import source_of
from pysingularity.image.metadata import oci_config_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pysingularity.image.open import Image

MOST_ID = (1 << 32) - 2


class Wishes:
    """What an image asks for: `cwd` ("" for nothing) and `uid`, `gid`, `name` of its user (uid None for nobody)."""

    __slots__ = ("cwd", "gid", "name", "uid")

    def __init__(self, cwd: str = "", uid: int | None = None, gid: int = 0, name: str = "") -> None:
        self.cwd, self.uid, self.gid, self.name = cwd, uid, gid, name


def wishes_of(image: Image, *, cwd: bool, user: bool) -> Wishes:
    """Return what an image asks for of the two.

    Raises:
        ImageError: it names a user whom its own passwd file does not have.
    """
    found = Wishes()
    data = oci_config_of(image)
    try:
        config = json.loads(data or b"{}").get("config") or {}
        folder, who = config.get("WorkingDir") or "", config.get("User") or ""
    except (ValueError, AttributeError, RecursionError):
        return found
    if cwd and isinstance(folder, str) and folder.startswith("/") and "\0" not in folder:
        found.cwd = folder
    if user and isinstance(who, str) and who:
        with source_of(image) as source:
            passwd, group = source.read("etc/passwd") or b"", source.read("etc/group") or b""
        found.uid, found.gid, found.name = look_up(who, passwd, group, image.path)
    return found


def look_up(text: str, passwd: bytes, group: bytes, what: str) -> tuple[int, int, str]:
    """Return uid, gid and name of a user as images name them: USER, UID, USER:GROUP, UID:GID and so on.

    As Docker does: a name must be in the image's passwd file, a number need not; without a group it is the one of the
    passwd entry, else 0.

    Raises:
        ImageError: there is no such user or group, or a number is none.
    """
    user, _, wanted = text.partition(":")
    entry = _line(passwd, user, 4)
    if entry is None and not user.isdigit():
        raise ImageError(
            "no-such-user", f"{what}: the image wants to be user {user!r}, whom its /etc/passwd does not have"
        )
    name = entry[0] if entry is not None else user
    uid = _number(entry[2] if entry is not None else user, what)
    gid = _number(entry[3], what) if entry is not None else 0
    if wanted:
        line = _line(group, wanted, 3)
        if line is None and not wanted.isdigit():
            raise ImageError(
                "no-such-group", f"{what}: the image wants the group {wanted!r}, which its /etc/group does not have"
            )
        gid = _number(line[2] if line is not None else wanted, what)
    return uid, gid, name


def _line(data: bytes, wanted: str, least: int) -> list[str] | None:
    """Return the fields of the line of a name, or of a number."""
    lines = [line.split(":") for line in data.decode("utf-8", "surrogateescape").split("\n")]
    lines = [fields for fields in lines if len(fields) >= least]
    named = (fields for fields in lines if fields[0] == wanted)
    return next(named, None) or next((fields for fields in lines if wanted.isdigit() and fields[2] == wanted), None)


def _number(text: str, what: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) <= MOST_ID):
        raise ImageError("bad-user", f"{what}: the image wants a user or group of number {text[:20]!r}")
    return int(text)
