# SPDX-License-Identifier: Apache-2.0
"""Binds: the texts of --bind and --mount as values, and mounting them on targets resolved inside the container only.

Start ring.
"""

from __future__ import annotations

import posix

from pysingularity import messages
from pysingularity.errors import UserError
from pysingularity.linux.mounts import (
    MS_NODEV,
    MS_NOEXEC,
    MS_NOSUID,
    mount,
    move_mount,
    open_in_root,
    open_tree,
    set_attributes,
)
from pysingularity.runtime.overlay import Session, below, ensure
from pysingularity.runtime.spec import BIND, DEV, DEVPTS, FILE, LINK, MQUEUE, PROC, TMPFS, LaunchSpec, Mount

_ENOENT, _EPERM = 2, 1
#: What a minimal /dev holds.
NODES = ("null", "zero", "full", "random", "urandom", "tty")
LINKS = (("fd", "/proc/self/fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2"), ("ptmx", "pts/ptmx"))


class Bind:
    """One wish of the user: `source`, `target`, `readonly`, `part` (image-src) and `id` (partition of an image)."""

    __slots__ = ("id", "part", "readonly", "source", "target")

    def __init__(self, source: str, target: str, readonly: bool = False, part: str = "", id: int = 0) -> None:  # noqa: A002
        self.source, self.target, self.readonly, self.part, self.id = source, target, readonly, part, id

    def __repr__(self) -> str:
        return f"Bind({self.source}:{self.target}{':ro' if self.readonly else ''})"


def absolute(path: str) -> str:
    """Return the absolute path of a file.

    Raises:
        UserError: it is relative to a folder that is gone.
    """
    if not path.startswith("/"):
        try:
            path = f"{posix.getcwd()}/{path}"
        except OSError:
            raise UserError(
                "no-folder", f"{path}: the current folder does not exist any more", hint="give an absolute path"
            ) from None
    return normal(path)


def normal(path: str) -> str:
    """Return an absolute path without empty parts, `.` and `..`."""
    parts: list[str] = []
    for part in path.split("/"):
        if part == "..":
            parts = parts[:-1]
        elif part not in ("", "."):
            parts.append(part)
    return "/" + "/".join(parts)


def parse_bind(text: str) -> list[Bind]:
    r"""Return the binds of one --bind: SRC[:DST[:OPTS]], several with commas, `\,` and `\:` stand for themselves.

    Raises:
        UserError: more than three parts, an empty source, an unknown option.
    """
    # Options may be several with commas ("a:/b:ro,image-src=/x"): a piece without a slash or colon belongs to them.
    found: list[Bind] = []
    for piece in split(text, ","):
        if not piece:
            continue
        if found and _is_option(piece) and "/" not in piece.partition("=")[0]:
            _option(found[-1], piece, text)
            continue
        parts = split(piece, ":")
        if len(parts) > 3 or not parts[0]:
            raise UserError("bad-bind", f"--bind {text}: not of the form SRC[:DST[:OPTS]]")
        source, target = _plain(parts[0]), _plain(parts[1]) if len(parts) > 1 and parts[1] else _plain(parts[0])
        one = Bind(source, target)
        if len(parts) > 2:
            _option(one, parts[2], text)
        found.append(one)
    return found


def _is_option(text: str) -> bool:
    return text in ("ro", "rw", "nonested") or text.startswith(("image-src=", "id="))


def _option(one: Bind, text: str, whole: str) -> None:
    name, _, value = text.partition("=")
    if text in ("ro", "rw"):
        one.readonly = text == "ro"
    elif name == "image-src" and value:
        one.part = _plain(value)
    elif name == "id" and value.isdigit():
        one.id = int(value)
    elif text != "nonested":
        raise UserError("bad-bind", f"--bind {whole}: {text} is not a valid bind option", hint="ro or rw")


def split(text: str, sign: str) -> list[str]:
    """Split at a sign that has no backslash in front."""
    parts, start, at = [], 0, 0
    while at < len(text):
        if text[at] == "\\":
            at += 2
            continue
        if text[at] == sign:
            parts.append(text[start:at])
            start = at + 1
        at += 1
    parts.append(text[start:])
    return parts


def _plain(text: str) -> str:
    return text.replace("\\,", ",").replace("\\:", ":")


def parse_mount(text: str) -> Bind:
    """Return the bind of one --mount: type=bind,source=S,destination=D[,ro][,image-src=][,id=], a line of CSV.

    Raises:
        UserError: an unknown key, a missing source or destination, a type other than bind.
    """
    values: dict[str, str] = {}
    for field in _csv(text):
        name, equals, value = field.partition("=")
        name = {"src": "source", "dst": "destination", "target": "destination", "readonly": "ro"}.get(name, name)
        if name not in ("type", "source", "destination", "ro", "image-src", "id"):
            raise UserError("bad-mount", f"--mount {text}: unknown key {name!r}")
        if name == "ro" and equals:
            value = "" if value.lower() in ("true", "1", "yes") else "no"
        values[name] = value
    if values.get("type", "bind") != "bind":
        raise UserError("bad-mount", f"--mount {text}: type {values['type']!r} is not known", hint="type=bind")
    for name in ("source", "destination"):
        if not values.get(name):
            raise UserError("bad-mount", f"--mount {text}: {name} is missing")
    number = values.get("id", "0")
    if not number.isdigit():
        raise UserError("bad-mount", f"--mount {text}: id={number} is no number")
    readonly = "ro" in values and values["ro"] != "no"
    return Bind(values["source"], values["destination"], readonly, values.get("image-src", ""), int(number))


def _csv(text: str) -> list[str]:
    """Return the fields of a line of CSV; a field may be quoted as a whole or in its value, quotes doubled inside."""
    fields, field, quoted, at = [], "", False, 0
    while at < len(text):
        letter = text[at]
        if quoted:
            if letter == '"' and text[at + 1 : at + 2] == '"':
                field += '"'
                at += 1
            elif letter == '"':
                quoted = False
            else:
                field += letter
        elif letter == '"':
            quoted = True
        elif letter == ",":
            fields.append(field)
            field = ""
        else:
            field += letter
        at += 1
    if quoted:
        raise UserError("bad-mount", f"--mount {text}: a quote is not closed")
    return [one for one in [*fields, field] if one]


def ordered(mounts: list[Mount]) -> list[Mount]:
    """Return the mounts so that outer ones come before inner ones, and of equal targets only the last is left."""
    last: dict[str, Mount] = {}
    for one in mounts:
        last.pop(one.target, None)
        last[one.target] = one
    return sorted(last.values(), key=lambda one: one.target.count("/") if one.target != "/" else 0)


def attach(spec: LaunchSpec, session: Session, root: int, wanted: list[Mount]) -> None:
    """Mount everything on its target inside `root`.

    Raises:
        UserError: a required mount is not possible.
    """
    done: list[Mount] = []
    for one in wanted:
        lost = session.failed.get(id(one))
        if lost is not None:
            messages.verbose(f"{one.source} is left out: {lost.strerror}")
            continue
        cover = None
        for other in done:
            if below(one.target, other.target):
                cover = other
        own = cover is not None and cover.kind in (TMPFS, DEV) and not cover.readonly
        # In a bind the mount point is made on the host, with the user's own rights, as the peers do: somebody who binds
        # one folder into another one, or into the home directory, has asked for it to be there.
        shared = cover is not None and cover.kind == BIND and not (cover.trusted or cover.readonly or cover.image)
        makes = own or (shared and one.required) or (cover is None and (spec.create or bool(spec.upper)))
        try:
            if one.kind == LINK:
                if own:
                    _link(root, one)
                continue
            target = ensure(root, one.target, session.is_folder(one)) if makes else open_in_root(root, one.target)
            try:
                if one.complete is not None:
                    one.content = one.complete(_content(root, one.target))
                _attach(session, one, target)
            finally:
                posix.close(target)
        except OSError as error:
            if one.required:
                raise _refused(spec, one, cover, error) from None
            messages.verbose(f"{one.target} is left out: {error.strerror}")
            continue
        done.append(one)


def _refused(spec: LaunchSpec, one: Mount, cover: Mount | None, error: OSError) -> UserError:
    what = f"cannot mount {one.source or one.kind} on {one.target}"
    if error.errno == _ENOENT and spec.writable and cover is None:
        return UserError(
            "no-bind-target",
            f"{what}: there is no {one.target} in the container",
            hint=f"make it in the sandbox first: mkdir -p {spec.image.path.rstrip('/')}{one.target}",
        )
    if error.errno == _ENOENT and cover is not None:
        return UserError("no-bind-target", f"{what}: there is no such file or folder in {cover.source or cover.target}")
    if error.errno == 20:
        return UserError("bind-kinds", f"{what}: one is a folder and the other is not")
    return UserError("bind-refused", f"{what}: {error.strerror}")


def _attach(session: Session, one: Mount, target: int) -> None:
    place = f"/proc/self/fd/{target}"
    if one.kind == BIND:
        if one.image is not None:
            _attach_part(session, one, target)
        else:
            session.attach_tree(one, target)
    elif one.kind == FILE:
        tree = open_tree(session.file(one.content, one.mode))
        move_mount(tree, target)
        posix.close(tree)
    elif one.kind == TMPFS:
        size = one.size or session.spec.session_size
        mount("tmpfs", place, "tmpfs", MS_NOSUID | MS_NODEV, f"mode={one.mode:o},size={size}m")
    elif one.kind == PROC:
        try:
            mount("proc", place, "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
        except OSError as error:
            if error.errno != _EPERM:
                raise
            # Inside another container parts of /proc are covered, and the kernel refuses a fresh one (Linux 4.6).
            tree = open_tree("/proc")
            move_mount(tree, target)
            posix.close(tree)
    elif one.kind == DEVPTS:
        mount("devpts", place, "devpts", MS_NOSUID | MS_NOEXEC, "newinstance,ptmxmode=0666,mode=0620")
    elif one.kind == MQUEUE:
        mount("mqueue", place, "mqueue", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    elif one.kind == DEV:
        tree = open_tree(_minimal_dev(session, terminals=not one.part))
        move_mount(tree, target)
        posix.close(tree)


def _content(root: int, path: str) -> bytes:
    """Return the first megabyte of a regular file in the container; nothing when it is none."""
    try:
        descriptor = open_in_root(root, path, posix.O_RDONLY | posix.O_NONBLOCK | posix.O_NOCTTY)
    except OSError:
        return b""
    try:
        if posix.fstat(descriptor).st_mode & 0o170000 != 0o100000:
            return b""
        return posix.read(descriptor, 1 << 20)
    except OSError:
        return b""
    finally:
        posix.close(descriptor)


def _attach_part(session: Session, one: Mount, target: int) -> None:
    """Bind a folder or file out of another image, resolved inside that image."""
    assert one.image is not None
    base = posix.open(session.parts[id(one.image)], posix.O_PATH | posix.O_CLOEXEC)
    inside = open_in_root(base, one.part or "/")
    tree = open_tree("", directory=inside)
    if one.readonly:
        set_attributes(tree, 1)
    move_mount(tree, target)
    for descriptor in (base, inside, tree):
        posix.close(descriptor)


def _link(root: int, one: Mount) -> None:
    parent, _, name = one.target.rpartition("/")
    folder = open_in_root(root, parent or "/", posix.O_PATH | posix.O_DIRECTORY)
    try:
        posix.symlink(one.source, name, dir_fd=folder)
    except FileExistsError:
        pass
    finally:
        posix.close(folder)


def _minimal_dev(session: Session, *, terminals: bool) -> str:
    """Make a /dev with the harmless nodes, shared memory and (terminals) its own pseudo terminals; return its path."""
    path = session.folder("dev")
    mount("tmpfs", path, "tmpfs", MS_NOSUID, "mode=0755,size=4m")
    for name in NODES:
        try:
            tree = open_tree(f"/dev/{name}", recursive=False)
        except OSError:  # the host (itself a container) has no such node
            continue
        descriptor = posix.open(
            f"{path}/{name}", posix.O_WRONLY | posix.O_CREAT | posix.O_EXCL | posix.O_CLOEXEC, 0o666
        )
        move_mount(tree, descriptor)
        posix.close(descriptor)
        posix.close(tree)
    for name, source in LINKS:
        if terminals or name != "ptmx":
            posix.symlink(source, f"{path}/{name}")
    if terminals:
        posix.mkdir(f"{path}/pts", 0o755)
        try:
            mount("devpts", f"{path}/pts", "devpts", MS_NOSUID | MS_NOEXEC, "newinstance,ptmxmode=0666,mode=0620")
        except OSError as error:
            messages.verbose(f"/dev/pts is left out: {error.strerror}")
    posix.mkdir(f"{path}/shm", 0o1777)
    size = session.spec.session_size
    mount("tmpfs", f"{path}/shm", "tmpfs", MS_NOSUID | MS_NODEV, f"mode=1777,size={size}m")
    return path
