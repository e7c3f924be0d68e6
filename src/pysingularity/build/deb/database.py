# SPDX-License-Identifier: Apache-2.0
"""dpkg's database in a root file system, written as if dpkg had unpacked the packages: ready for `dpkg --configure`.

What dpkg keeps (dpkg(1), deb-triggers(5)): `status` with a paragraph for each package, `info/` with lists and scripts
(written by `unpack`), `triggers/` with the interests that packages have in names and paths, `diversions`.
"""

from __future__ import annotations

import re

from pysingularity.build.deb.control import paragraph, paragraphs
from pysingularity.build.deb.tree import Tree
from pysingularity.build.deb.unpack import INFO, Opened

BASE = b"var/lib/dpkg/"
_INTEREST = re.compile(r"\s*interest(-await|-noawait)?\s+(\S+)\s*")
_FIELD = re.compile(r"^(Status|Conffiles|Config-Version|Triggers-Pending|Triggers-Awaited):")


class Database:
    """The database of one tree.

    Arguments:
        tree: the root file system.
    """

    def __init__(self, tree: Tree) -> None:
        self.tree = tree

    def create(self) -> None:
        """Lay out an empty database."""
        tree = self.tree
        for name in (b"info", b"updates", b"triggers", b"alternatives", b"parts"):
            tree.folder(BASE + name)
        tree.write(BASE + b"status", b"")
        tree.write(BASE + b"available", b"")
        tree.write(INFO + b"format", b"1\n")

    def states(self) -> dict[str, str]:
        """Return the state of each package ("install ok installed"), by name or name:arch."""
        found = {}
        for fields in paragraphs(self.tree.read(BASE + b"status").decode("utf-8", "replace"), "dpkg's status"):
            found[key_of(fields)] = fields.get("Status", "")
        return found

    def add(self, opened: list[Opened]) -> None:
        """Enter packages as unpacked, and their interests in triggers."""
        tree = self.tree
        text = tree.read(BASE + b"status").decode("utf-8", "replace").rstrip("\n")
        blocks = [text] if text else []
        files: list[str] = tree.read(BASE + b"triggers/File").decode().splitlines()
        names: dict[str, list[str]] = {}
        for package in opened:
            blocks.append(_status(package))
            for suffix, trigger in interests(package.triggers):
                owner = package.name + ("/noawait" if suffix == "-noawait" else "")
                if trigger.startswith("/"):
                    files.append(f"{trigger} {owner}")
                else:
                    names.setdefault(trigger, []).append(owner)
        tree.write(BASE + b"status", ("\n\n".join(blocks) + "\n").encode())
        if files:
            tree.write(BASE + b"triggers/File", ("\n".join(dict.fromkeys(files)) + "\n").encode())
        for trigger, owners in names.items():
            path = BASE + b"triggers/" + trigger.encode()
            lines = [*tree.read(path).decode().splitlines(), *owners]
            tree.write(path, ("\n".join(dict.fromkeys(lines)) + "\n").encode())

    def activate(self, opened: list[Opened], configured: set[str]) -> None:
        """Note for dpkg which triggers of configured packages the new files have set off.

        Packages that are still to be configured do all their work then; only the others have to be woken.
        """
        wanted: list[bytes] = []
        for line in self.tree.read(BASE + b"triggers/File").splitlines():
            path, _, owner = line.partition(b" ")
            if owner.partition(b"/noawait")[0].decode() in configured:
                wanted.append(path)
        if not wanted:
            return
        hit = [
            path
            for path in dict.fromkeys(wanted)
            if any(name == path or name.startswith(path + b"/") for package in opened for name in package.paths)
        ]
        if hit:
            # "-" stands for the package that waits: nobody (dpkg's libdpkg-defined format of triggers/Unincorp).
            known = self.tree.read(BASE + b"triggers/Unincorp")
            self.tree.write(BASE + b"triggers/Unincorp", known + b"".join(path + b" -\n" for path in hit))

    def diversions(self) -> dict[str, dict[bytes, bytes]]:
        """Return who has diverted which paths: package → {path: where other packages' file goes}; ":" is the host."""
        lines = self.tree.read(BASE + b"diversions").split(b"\n")
        found: dict[str, dict[bytes, bytes]] = {}
        for path, other, owner in zip(lines[::3], lines[1::3], lines[2::3], strict=False):
            found.setdefault(owner.decode(), {})[path] = other
        return found

    def without(self, name: str, paths: frozenset[bytes]) -> None:
        """Take paths off a package's list: another package has replaced these files."""
        path = INFO + name.encode() + b".list"
        lines = [line for line in self.tree.read(path).split(b"\n") if line not in paths]
        self.tree.write(path, b"\n".join(lines))


def key_of(fields: dict[str, str]) -> str:
    """Return the name of a package in the database: with its architecture when others may stand beside it."""
    name = fields["Package"]
    return f"{name}:{fields['Architecture']}" if fields.get("Multi-Arch") == "same" else name


def interests(triggers: str) -> list[tuple[str, str]]:
    """Return (suffix, trigger) of the interest lines of a triggers file; suffix is "", "-await" or "-noawait"."""
    found = []
    for line in triggers.splitlines():
        match = _INTEREST.fullmatch(line.partition("#")[0])
        if match is not None:
            found.append((match[1] or "", match[2].rstrip("/") or "/"))
    return found


def _status(package: Opened) -> str:
    """Return a package's paragraph: its own fields, the state, and its configuration files as new."""
    lines: list[str] = []
    skipping = False
    for line in package.control.strip("\n").split("\n"):
        if line[:1] not in (" ", "\t"):
            skipping = bool(_FIELD.match(line)) or not line.strip()
        if not skipping:
            lines.append(line.rstrip())
    lines.insert(1, "Status: install ok unpacked")
    if package.conffiles:
        lines.append("Conffiles:")
        lines += [f" {path.decode('utf-8', 'surrogateescape')} newconffile" for path in package.conffiles]
    return "\n".join(lines)


def control_fields(package: Opened) -> dict[str, str]:
    """Return the fields of a package's control file."""
    return paragraph(package.control.strip("\n"), f"package {package.name}")
