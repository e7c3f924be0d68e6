# SPDX-License-Identifier: Apache-2.0
"""Changes of a sandbox → the text of a definition file that makes them again.

Packages become commands of %post, files lines of %files (from the sandbox, or from a folder that they are copied to),
links, modes, owners and what is gone further commands. Trees that lines of %files cannot carry (links in them, many
modes) go into one tar, which needs that folder. What cannot be made again is said in a comment.
"""

from __future__ import annotations

import os
import shlex
import shutil
import tarfile
from collections.abc import Iterable
from typing import TYPE_CHECKING

from pysingularity.build.history.compare import Changes
from pysingularity.build.history.record import Record
from pysingularity.image import metadata
from pysingularity.recipe.dockerfile import looks_like

if TYPE_CHECKING:
    from pysingularity.build.bootstrap import Owners
    from pysingularity.build.history.installed import Package

#: A folder with links in it is written line by line up to so many entries, and so many below it.
FEW, MANY = 24, 240
TAR = "history.tar"
_PACKED = f"/var/tmp/{TAR}"
_STAGED = "/var/tmp/history"
#: Packages that come with every Python environment.
_OWN_TOOLS = ("pip", "setuptools", "wheel")


class Writer:
    """Writes one definition file.

    Arguments:
        changes: what has changed.
        before: what the sandbox was.
        root: path of the sandbox.
        name: the same as a person would name it in the definition file.
        owners: tells owners of files.
        base: image named as the base, or "".
        folder: folder that files are copied to; "" leaves them in the sandbox.
        pin: ask for the very versions.

    Attributes:
        remarks: what a person has to look at, one line each.
    """

    def __init__(
        self,
        changes: Changes,
        before: Record,
        root: str,
        name: str,
        owners: Owners,
        *,
        base: str = "",
        folder: str = "",
        pin: bool = False,
    ) -> None:
        self._changes, self._before, self._root, self._name = changes, before, root, name.rstrip("/") or "/"
        self._owners, self._base, self._folder, self._pin = owners, base, folder, pin
        self.remarks: list[str] = []
        self._packed: list[str] = []
        # %files comes before %post: what an own %post of the definition wrote has to be replaced behind it.
        self._late = self._staged = False
        self._lines: list[str] = []
        self._after: list[str] = []

    def text(self) -> str:
        """Return the definition file; copies files out when there is a folder for them."""
        start = self._start()
        self._late = "%post" in start
        packages = self._packages()
        self._files()
        moved = [f"cp -a {_STAGED}/. / && rm -rf {_STAGED}"] if self._staged else []
        post = [*packages, *self._unpack(), *moved, *self._after, *self._removed()]
        parts = [start]
        if self._lines:
            parts.append("%files\n" + "".join(f"    {line}\n" for line in self._lines))
        if post:
            parts.append("%post\n" + "".join(f"    {line}\n" if line else "\n" for line in post))
        parts += self._scripts()
        head = "".join(f"# {line}\n" for line in self.remarks)
        return head + "\n".join(parts)

    # -- where to start ----------------------------------------------------------------------------------------

    def _start(self) -> str:
        before = self._before
        definition = before.texts.get(metadata.DEFINITION, "").strip("\n")
        image = self._base or (before.source if os.path.exists(before.source) else "")
        if image and not os.path.isdir(image):
            return f"Bootstrap: localimage\nFrom: {image}\n"
        if definition and not looks_like(definition):
            return definition + "\n"
        if definition:
            self.remarks.append("the sandbox was made of a Dockerfile: build that first, as base.sif")
        else:
            self.remarks.append("nothing tells what the sandbox was made of: name its base behind From")
        return "Bootstrap: localimage\nFrom: base.sif\n"

    # -- packages ----------------------------------------------------------------------------------------------

    def _packages(self) -> list[str]:
        changes = self._changes
        lines: list[str] = []
        for key, found in sorted(changes.packages.items(), key=lambda item: "apt apk conda pip npm".find(item[0][:3])):
            manager, _, prefix = key.partition(" ")
            lines += getattr(self, f"_{manager}")(found, prefix)
        for key, names in sorted(changes.lost.items()):
            manager, _, prefix = key.partition(" ")
            words = " ".join(map(shlex.quote, sorted(names)))
            command = {
                "apt": f"apt-get purge -y {words}",
                "apk": f"apk del {words}",
                "npm": f"npm uninstall -g {words}",
                "pip": f"{self._python(prefix)} -m pip uninstall -y {words}",
                "conda": f"/{prefix}/bin/conda remove -y -p /{prefix} {words}",
            }[manager]
            lines.append(command)
        return lines

    def _asked(self, found: dict[str, Package]) -> dict[str, Package]:
        """Return what a person asked for; everything when nobody seems to have."""
        return {name: one for name, one in found.items() if one.asked} or found

    def _list(self, names: Iterable[str], start: str) -> list[str]:
        """Return a command with many words, a few on a line."""
        lines, line = [start], ""
        for word in sorted(names):
            if len(line) + len(word) > 96:
                lines.append(line)
                line = ""
            line = f"{line} {word}" if line else f"    {word}"
        lines.append(line)
        return [one + " \\" for one in lines[:-1]] + lines[-1:]

    def _note(self, found: dict[str, Package], what: str) -> list[str]:
        known = ", ".join(f"{name} {one.version}" for name, one in sorted(found.items()))
        return [f"# {what}: {known}"]

    def _apt(self, found: dict[str, Package], prefix: str) -> list[str]:  # noqa: ARG002
        asked = self._asked(found)
        words = [f"{name}={one.version}" if self._pin else name for name, one in asked.items()]
        options = "--no-install-recommends " if self._changes.sparse else ""
        if any(path.startswith("etc/") for path in (*self._changes.added, *self._changes.changed)):
            options += "-o Dpkg::Options::=--force-confold "
        return [
            "#step packages of Debian",
            *self._note(asked, "versions in the sandbox"),
            "export DEBIAN_FRONTEND=noninteractive",
            "apt-get update",
            *self._list(words, f"apt-get install -y {options}".rstrip()),
            "apt-get clean",
        ]

    def _apk(self, found: dict[str, Package], prefix: str) -> list[str]:  # noqa: ARG002
        asked = self._asked(found)
        words = [f"{name}={one.version}" if self._pin else name for name, one in asked.items()]
        return [
            "#step packages of Alpine",
            *self._note(asked, "versions in the sandbox"),
            *self._list(words, "apk add --no-cache"),
        ]

    def _conda(self, found: dict[str, Package], prefix: str) -> list[str]:
        lines = [f"#step packages of conda in /{prefix}"]
        if prefix in self._changes.fresh:
            self.remarks.append(f"/{prefix} is a conda that was installed by hand: add its installation to %post")
            lines.append(f"# here /{prefix} has to be made, by the installer that was used")
        asked = self._asked(found)
        words = [shlex.quote(f"{name}={one.version}") for name, one in asked.items()]
        channels = sorted({one.source for one in asked.values() if one.source})
        named = "".join(f" -c {shlex.quote(one)}" for one in channels)
        return [*lines, *self._list(words, f"/{prefix}/bin/conda install -y -p /{prefix}{named}")]

    def _python(self, prefix: str) -> str:
        own = prefix in self._changes.virtual or f"{prefix}/conda-meta" in self._changes.now
        return f"/{prefix}/bin/python" if own else "python3"

    def _pip(self, found: dict[str, Package], prefix: str) -> list[str]:
        lines = [f"#step packages of Python in /{prefix}"]
        if prefix in self._changes.fresh and prefix in self._changes.virtual:
            lines.append(f"python3 -m venv /{prefix}")
            found = {name: one for name, one in found.items() if name not in _OWN_TOOLS}
        if not found:
            return lines
        asked = self._asked(found)
        local = {name for name, one in asked.items() if one.source.startswith("file:")}
        for name in sorted(local):
            self.remarks.append(f"pip installed {name} from {asked[name].source}: bring that in with %files")
        words = [
            shlex.quote(f"{name} @ {one.source}" if one.source else f"{name}=={one.version}")
            for name, one in asked.items()
            if name not in local
        ]
        python = self._python(prefix)
        twice = " --break-system-packages" if python == "python3" and self._changes.managed else ""
        return [*lines, *self._list(words, f"{python} -m pip install --no-cache-dir{twice}")] if words else lines

    def _npm(self, found: dict[str, Package], prefix: str) -> list[str]:  # noqa: ARG002
        words = [shlex.quote(f"{name}@{one.version}") for name, one in found.items()]
        return ["#step packages of npm", *self._list(words, "npm install -g")]

    # -- files -------------------------------------------------------------------------------------------------

    def _files(self) -> None:
        changes = self._changes
        added = set(changes.added)
        tops = [path for path in changes.added if os.path.dirname(path) not in added]
        for path in tops:
            if changes.now[path][0] == "d":
                self._tree(path, added)
            else:
                self._one(path)
        for path in changes.changed:
            if changes.now[path][0] == "d":
                self._after.append(f"chmod {changes.now[path][1]:o} {shlex.quote('/' + path)}")
            else:
                self._one(path, late=self._late)

    def _below(self, path: str) -> list[str]:
        return [one for one in self._changes.now if one.startswith(f"{path}/")]

    def _tree(self, path: str, added: set[str]) -> None:
        """Write a folder that was not there before."""
        now = self._changes.now
        inside = sorted(one for one in self._below(path) if one in added)
        everything = [path, *inside]
        whole = len(inside) == len(self._below(path))
        simple = all(now[one][0] in "df" and self._plain(one) for one in everything)
        children = [one for one in inside if os.path.dirname(one) == path]
        if whole and simple and inside:
            self._lines.append(self._line(path))
        elif len(children) > FEW or len(inside) > MANY:
            self._packed += everything
        else:
            if not self._plain(path) or not any(now[one][0] == "f" for one in children):
                self._after.append(f"mkdir -p {shlex.quote('/' + path)}")
            if not self._plain(path):
                self._rights(path)
            for one in children:
                if now[one][0] == "d":
                    self._tree(one, added)
                else:
                    self._one(one)

    def _plain(self, path: str) -> bool:
        """Return whether %files carries an entry as it is: root's, and writable by nobody else."""
        _, mode, *_ = self._changes.now[path]
        return not mode & 0o7022 and self._owner(path) == (0, 0) and _writable_name(path)

    def _owner(self, path: str) -> tuple[int, int]:
        full = os.path.join(self._root, path)
        uid, gid, *_ = self._owners.get(full, os.lstat(full))
        return uid, gid

    def _one(self, path: str, *, late: bool = False) -> None:
        kind, _, _, _, target = self._changes.now[path]
        if not _writable_name(path):
            self._packed.append(path)
        elif kind == "l":
            place = shlex.quote("/" + path)
            above = shlex.quote("/" + os.path.dirname(path))
            self._after.append(f"mkdir -p {above} && ln -sfn {shlex.quote(target)} {place}")
        else:
            self._staged |= late
            self._lines.append(self._line(path, _STAGED if late else ""))
            if not self._plain(path):
                self._rights(path)

    def _rights(self, path: str) -> None:
        uid, gid = self._owner(path)
        place = shlex.quote("/" + path)
        if (uid, gid) != (0, 0):
            self._after.append(f"chown {uid}:{gid} {place}")
        self._after.append(f"chmod {self._changes.now[path][1]:o} {place}")

    def _line(self, path: str, where: str = "") -> str:
        source = os.path.join(self._folder or self._name, path)
        if self._folder:
            copy = os.path.join(self._folder, path)
            os.makedirs(os.path.dirname(copy), exist_ok=True)
            original = os.path.join(self._root, path)
            if os.path.isdir(original):
                shutil.copytree(original, copy, symlinks=True, dirs_exist_ok=True)
            else:
                shutil.copy2(original, copy, follow_symlinks=False)
        words = [source, f"{where}/{path}"]
        return " ".join(f'"{word}"' if " " in word else word for word in words)

    def _unpack(self) -> list[str]:
        if not self._packed:
            return []
        if not self._folder:
            tops = sorted({"/" + "/".join(path.split("/")[:2]) for path in self._packed})
            self.remarks.append(
                f"{len(self._packed)} files with links or owners of their own are left out: {', '.join(tops[:8])};"
                " --files DIR brings them along"
            )
            return []
        os.makedirs(self._folder, exist_ok=True)
        with tarfile.open(os.path.join(self._folder, TAR), "w", format=tarfile.PAX_FORMAT) as tar:
            for path in sorted(self._packed):
                full = os.path.join(self._root, path)
                info = tar.gettarinfo(full, path)
                info.uid, info.gid = self._owner(path)
                info.uname = info.gname = ""
                if info.isreg():
                    with open(full, "rb") as stream:
                        tar.addfile(info, stream)
                else:
                    tar.addfile(info)
        self._lines.append(f"{os.path.join(self._folder, TAR)} {_PACKED}")
        return [f"tar -xpf {_PACKED} -C / && rm {_PACKED}"]

    def _removed(self) -> list[str]:
        return [f"rm -rf {shlex.quote('/' + path)}" for path in self._changes.removed]

    # -- scripts -----------------------------------------------------------------------------------------------

    def _scripts(self) -> list[str]:
        """Return sections for scripts of the image that were edited."""
        found = []
        before, now = self._before.texts, self._changes.texts
        old, new = before.get(metadata.CUSTOM_ENVIRONMENT, ""), now.get(metadata.CUSTOM_ENVIRONMENT, "")
        if new != old:
            if not new.startswith(old.rstrip("\n")):
                self.remarks.append("lines of the base's environment were changed; %environment only adds some")
            known = set(old.splitlines())
            lines = [line for line in new.splitlines() if line not in known]
            found.append(_section("environment", lines))
        for name, path in (
            ("runscript", metadata.RUNSCRIPT),
            ("startscript", metadata.STARTSCRIPT),
            ("test", metadata.TEST),
        ):
            text = now.get(path, "")
            if text and text != before.get(path, ""):
                lines = text.splitlines()
                found.append(_section(name, lines[1:] if lines[0] == "#!/bin/sh" else lines))
        return found


def _section(name: str, lines: list[str]) -> str:
    """Return a section; a line that would start another one is made harmless."""
    body = "".join(f"    {line}\n" if line.lstrip()[:1] != "%" else f"    : {line}\n" for line in lines)
    return f"%{name}\n{body}"


def _writable_name(path: str) -> bool:
    """Return whether a name can stand in a line of %files."""
    return not any(sign in path for sign in "\"'\n\t*?[\\#") and path.isprintable()
