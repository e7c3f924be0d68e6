# SPDX-License-Identifier: Apache-2.0
"""Who the caller is, and the passwd and group files that tell the container so.

The host's files are read directly first: asking the name service loads its libraries, which costs more than the rest of
the start. Users whom only the name service knows (LDAP, sssd) are asked for there; a user without any entry gets one
made up. Start ring.
"""

from __future__ import annotations

import posix

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping


class User:
    """The caller: `name`, `uid`, `gid`, `groups` (numbers), `home`, `shell`, `gecos`."""

    __slots__ = ("gecos", "gid", "groups", "home", "name", "shell", "uid")

    def __init__(self, name: str, uid: int, gid: int, home: str, shell: str, gecos: str, groups: list[int]) -> None:
        self.name, self.uid, self.gid, self.home, self.shell = name, uid, gid, home, shell
        self.gecos, self.groups = gecos, groups

    def __repr__(self) -> str:
        return f"User({self.name} {self.uid}:{self.gid} {self.home})"


def current(environ: Mapping[str, str]) -> User:
    """Return the caller."""
    uid, gid = posix.getuid(), posix.getgid()
    groups = posix.getgroups()
    fields = _find("/etc/passwd", 2, uid)
    if fields is not None and len(fields) >= 7:
        return User(fields[0], uid, gid, fields[5] or "/", fields[6] or "/bin/sh", fields[4], groups)
    import pwd  # only for users of a name service

    try:
        entry = pwd.getpwuid(uid)
    except KeyError:
        home = environ.get("HOME", "")
        name = environ.get("USER") or environ.get("LOGNAME") or f"user{uid}"
        if ":" in name or "\n" in name:
            name = f"user{uid}"
        usable = home.startswith("/") and ":" not in home and "\n" not in home
        return User(name, uid, gid, home if usable else "/", "/bin/sh", "", groups)
    return User(entry.pw_name, uid, gid, entry.pw_dir or "/", entry.pw_shell or "/bin/sh", entry.pw_gecos, groups)


def passwd(image: bytes, user: User, home: str, *, uid: int | None = None) -> bytes:
    """Return the image's passwd file with a line for the caller.

    Arguments:
        image: the file as it is in the image.
        home: home directory in the container.
        uid: the caller's number in the container; 0 as (emulated) root keeps the image's root with this home.
    """
    number = user.uid if uid is None else uid
    mine = [
        user.name if number else "root",
        "x",
        str(number),
        str(user.gid if number else 0),
        user.gecos,
        home,
        user.shell,
    ]
    if not number:
        mine[4:] = ["root", home, "/bin/sh"]
    lines = []
    for line in image.decode("utf-8", "surrogateescape").split("\n"):
        fields = line.split(":")
        if not line or (len(fields) >= 7 and fields[2] == str(number)):
            if line and not number:
                mine[4], mine[6] = fields[4], fields[6] or "/bin/sh"
            continue
        # A name of the image's with another number would be found first and lead to the wrong home.
        if number and fields[0] == user.name:
            continue
        lines.append(line)
    entry = ":".join(mine).replace("\n", " ")
    lines = [entry, *lines] if not number else [*lines, entry]
    return ("\n".join(lines) + "\n").encode("utf-8", "surrogateescape")


def has(image: bytes, number: int) -> bool:
    """Return whether a passwd file has a user of this number."""
    lines = (line.split(b":") for line in image.split(b"\n"))
    return any(len(fields) >= 7 and fields[2] == b"%d" % number for fields in lines)


def group(image: bytes, user: User, *, gid: int | None = None) -> bytes:
    """Return the image's group file with lines for the caller's groups."""
    wanted = [user.gid if gid is None else gid]
    if gid is None:
        wanted += [number for number in user.groups if number not in wanted]
    text = image.decode("utf-8", "surrogateescape")
    lines = [line for line in text.split("\n") if line]
    present = {fields[2] for fields in (line.split(":") for line in lines) if len(fields) >= 3}
    lines += [f"{_group_name(number)}:x:{number}:{user.name}" for number in wanted if str(number) not in present]
    return ("\n".join(lines) + "\n").encode("utf-8", "surrogateescape")


def _group_name(number: int) -> str:
    fields = _find("/etc/group", 2, number)
    if fields is not None:
        return fields[0]
    import grp  # only for groups of a name service

    try:
        return grp.getgrgid(number).gr_name
    except KeyError:
        return f"group{number}"


def _find(path: str, column: int, number: int) -> list[str] | None:
    """Return the fields of the first line whose column holds the number."""
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError:
        return None
    wanted = str(number)
    if f":{wanted}:".encode() not in data:
        return None
    for line in data.decode("utf-8", "surrogateescape").split("\n"):
        fields = line.split(":")
        if len(fields) > column and fields[column] == wanted:
            return fields
    return None
