# SPDX-License-Identifier: Apache-2.0
"""What a mirror offers: `Packages` indexes, searched without parsing all of them.

A distribution's index has 60 000 paragraphs in 50 MB, of which a build reads 200. One regular expression finds names,
provided names, and the essential and required packages; a paragraph is parsed when somebody asks for it.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from pysingularity.build.deb import version as versions
from pysingularity.build.deb.control import Group, Relation, paragraph, relations, single_relations
from pysingularity.errors import UserError

_INTERESTING = re.compile(
    rb"^(?:Package: ?([^\n]+)|Provides: ?([^\n]*(?:\n[ \t][^\n]*)*)|(Essential: ?yes|Priority: ?required))[ \t\r]*$",
    re.MULTILINE,
)
_PROVIDED = re.compile(rb"[a-zA-Z0-9][a-zA-Z0-9+.-]*(?=[^,()]*(?:\([^)]*\))?[^,()]*(?:,|$))")
_NAME = re.compile(r"[a-z0-9A-Z][a-z0-9A-Z+.-]*")
_SHA256 = re.compile(r"[0-9a-f]{64}")
#: The largest .deb that we believe in (today's largest are 2 GB of game data).
MAX_PACKAGE = 16 << 30


class Archive(NamedTuple):
    """Where an index came from: base address of its mirror, its suite, and one line for people."""

    url: str
    suite: str
    what: str


class Package:
    """One version of a binary package, from a paragraph of an index.

    Attributes:
        name, version, architecture: as in the paragraph.
        fields: the whole paragraph.
        archive: where it can be fetched.

    Raises (when made):
        UserError: the paragraph lacks something, or names a file outside the mirror.
    """

    __slots__ = (
        "architecture",
        "archive",
        "breaks",
        "conflicts",
        "depends",
        "fields",
        "name",
        "pre_depends",
        "provides",
        "replaces",
        "version",
    )

    def __init__(self, fields: dict[str, str], archive: Archive) -> None:
        self.fields, self.archive = fields, archive
        name = fields.get("Package", "")
        if not _NAME.fullmatch(name):
            raise UserError("bad-index", f"{archive.what}: {name!r} is no name of a package")
        self.name = name
        try:
            self.version = fields["Version"]
            self.architecture = fields["Architecture"]
            versions.key(self.version)
            self.pre_depends: tuple[Group, ...] = relations(fields.get("Pre-Depends", ""))
            self.depends: tuple[Group, ...] = relations(fields.get("Depends", ""))
            self.provides: list[Relation] = single_relations(fields.get("Provides", ""))
            self.conflicts: list[Relation] = single_relations(fields.get("Conflicts", ""))
            self.breaks: list[Relation] = single_relations(fields.get("Breaks", ""))
            self.replaces: list[Relation] = single_relations(fields.get("Replaces", ""))
        except (KeyError, ValueError) as error:
            raise UserError("bad-index", f"{archive.what}: package {name}: {error}") from None

    def __repr__(self) -> str:
        return f"{self.name} {self.version} [{self.architecture}]"

    @property
    def filename(self) -> str:
        """Path of the .deb below the mirror.

        Raises:
            UserError: there is none, or it leaves the mirror.
        """
        path = self.fields.get("Filename", "")
        parts = path.removeprefix("./").split("/")
        if not path or path[0] == "/" or ".." in parts or "" in parts or not path.isprintable() or "\\" in path:
            raise UserError(
                "bad-index",
                f"{self.archive.what}: package {self.name}: {path!r} is no path of a package below the mirror: refused",
            )
        return "/".join(parts)

    @property
    def size(self) -> int:
        """Size of the .deb in bytes."""
        text = self.fields.get("Size", "")
        if not (text.isascii() and text.isdigit() and 0 < int(text) <= MAX_PACKAGE):
            raise UserError("bad-index", f"{self.archive.what}: package {self.name}: impossible size {text!r}")
        return int(text)

    @property
    def sha256(self) -> str:
        """Checksum of the .deb; weaker ones are not believed."""
        text = self.fields.get("SHA256", "").lower()
        if not _SHA256.fullmatch(text):
            raise UserError("bad-index", f"{self.archive.what}: package {self.name} has no SHA256 checksum")
        return text

    @property
    def installed_size(self) -> int:
        """Bytes that the unpacked package takes, as its maker counted them; 0 when unknown."""
        text = self.fields.get("Installed-Size", "")
        return int(text) * 1024 if text.isascii() and text.isdigit() and len(text) < 12 else 0

    @property
    def multi_arch(self) -> str:
        """The field Multi-Arch: "same", "foreign", "allowed" or "no"."""
        return self.fields.get("Multi-Arch", "no")

    @property
    def essential(self) -> bool:
        """Whether other packages may use this one without depending on it."""
        return self.fields.get("Essential") == "yes"

    @property
    def priority(self) -> str:
        """The field Priority: "required", "important", "standard", "optional" or "extra"."""
        return self.fields.get("Priority", "optional")


class PackageIndex:
    """All packages that the chosen sources offer for one architecture."""

    def __init__(self, architecture: str) -> None:
        self.architecture = architecture
        self._data: list[tuple[bytes, Archive]] = []
        self._names: dict[str, list[tuple[int, int]]] = {}
        self._provided: dict[str, set[tuple[int, int]]] = {}
        self._base: set[str] = set()
        self._packages: dict[tuple[int, int], Package] = {}
        self._candidates: dict[str, list[Package]] = {}

    def __len__(self) -> int:
        return len(self._names)

    def add(self, data: bytes, archive: Archive) -> None:
        """Take in the content of a Packages file."""
        number = len(self._data)
        self._data.append((data, archive))
        self._candidates.clear()
        names, provided, base = self._names, self._provided, self._base
        start, name = 0, ""
        for match in _INTERESTING.finditer(data):
            if match[1] is not None:
                at = match.start()
                # Everybody's indexes have Package first; deb822 does not promise it.
                start = at if at == 0 or data[at - 2 : at] == b"\n\n" else data.rfind(b"\n\n", 0, at) + 2
                if start == 1:
                    start = 0
                name = match[1].decode("ascii", "replace").strip()
                names.setdefault(name, []).append((number, start))
                continue
            at = match.start()
            here = data.rfind(b"\n\n", start, at)
            if here >= 0 or not name:  # a field that stands before its Package line
                start = here + 2 if here >= 0 else 0
                name = _name_of(data, start)
            if match[3] is not None:
                base.add(name)
            else:
                for word in _PROVIDED.findall(match[2]):
                    provided.setdefault(word.decode(), set()).add((number, start))

    def _package(self, place: tuple[int, int]) -> Package:
        found = self._packages.get(place)
        if found is None:
            data, archive = self._data[place[0]]
            end = data.find(b"\n\n", place[1])
            block = data[place[1] : end if end >= 0 else len(data)]
            fields = paragraph(block.decode("utf-8", "replace").replace("\r", ""), archive.what)
            found = self._packages[place] = Package(fields, archive)
        return found

    def candidates(self, name: str) -> list[Package]:
        """Return the versions of a package that fit the architecture, newest first (first source wins a tie)."""
        found = self._candidates.get(name)
        if found is None:
            found = [self._package(place) for place in self._names.get(name, ())]
            found = [package for package in found if package.architecture in (self.architecture, "all")]
            found.sort(key=lambda package: versions.key(package.version), reverse=True)
            self._candidates[name] = found
        return found

    def providers(self, name: str) -> list[tuple[Package, Relation]]:
        """Return packages that provide a name, only the newest version of each, with what they say about it."""
        found = []
        for place in sorted(self._provided.get(name, ())):
            package = self._package(place)
            newest = self.candidates(package.name)
            if newest and newest[0] is package:
                found += [(package, relation) for relation in package.provides if relation.name == name]
        return found

    def base(self) -> list[str]:
        """Return the names of the packages that every system has: essential ones and those of priority required."""
        found = []
        for name in sorted(self._base):
            newest = self.candidates(name)
            if newest and (newest[0].essential or newest[0].priority == "required"):
                found.append(name)
        return found

    def names(self) -> list[str]:
        """Return all names, also provided ones, for suggestions."""
        return [*self._names, *self._provided]


def _name_of(data: bytes, start: int) -> str:
    """Return the package's name of the paragraph at an offset."""
    match = re.compile(rb"^Package: ?([^\n]+)$", re.MULTILINE).search(data, start)
    return match[1].decode("ascii", "replace").strip() if match else ""
