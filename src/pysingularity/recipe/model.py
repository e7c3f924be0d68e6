# SPDX-License-Identifier: Apache-2.0
"""A definition file as values: recipe → stages → header and sections, each with the line it came from.

What a section's lines mean is `recipe.sections`; reading text is `recipe.parser`, writing it `recipe.writer`. The
values keep what was written: sections stay in the order of the file, repeated ones are not merged until asked for.
"""

from __future__ import annotations

from dataclasses import dataclass, field

#: Keywords of a header, in lower case. A keyword that ends in "#" takes a number there (OtherURL1).
KEYWORDS: dict[str, str] = {
    "bootstrap": "Bootstrap",
    "from": "From",
    "stage": "Stage",
    "mirrorurl": "MirrorURL",
    "updateurl": "UpdateURL",
    "osversion": "OSVersion",
    "include": "Include",
    "includecmd": "IncludeCmd",
    "library": "Library",
    "registry": "Registry",
    "namespace": "Namespace",
    "fingerprints": "Fingerprints",
    "setopt": "Setopt",
    "checksum": "Checksum",
    "components": "Components",
    "keyring": "Keyring",
    "verify": "Verify",
    "confurl": "ConfURL",
    "product": "Product",
    "user": "User",
    "regcode": "Regcode",
    "productpgp": "ProductPGP",
    "registerurl": "RegisterURL",
    "modules": "Modules",
    "otherurl#": "OtherURL#",
    "target": "Target",
    "frontend": "Frontend",
    "filename": "Filename",
    "buildargs": "BuildArgs",
}
#: Sections of a stage.
SECTIONS = (
    "help",
    "setup",
    "files",
    "labels",
    "environment",
    "pre",
    "post",
    "runscript",
    "test",
    "startscript",
    "arguments",
)
#: Sections that belong to a SCIF app: their first argument is its name.
APP_SECTIONS = ("appinstall", "applabels", "appfiles", "appenv", "apptest", "apphelp", "apprun", "appstart")


@dataclass(frozen=True)
class Section:
    """One section as it stands in the file.

    Arguments:
        name: in lower case, without the percent sign ("post").
        arguments: the rest of the line behind the name and one blank, as written ("-c /bin/bash").
        body: the lines below, verbatim, each ended by a line feed; "" when there are none.
        line: number of the line that starts the section, from 1; 0 when it does not come from a file.
    """

    name: str
    arguments: str = ""
    body: str = ""
    line: int = field(default=0, compare=False)

    @property
    def app(self) -> str:
        """The SCIF app this section belongs to, or ""."""
        return self.arguments.split()[0] if self.name in APP_SECTIONS else ""


@dataclass(frozen=True)
class Stage:
    """A header and its sections.

    Arguments:
        header: keyword in lower case → value; an unset keyword is absent.
        sections: in the order of the file.
        line: first line of the stage, from 1.
        lines: keyword → its line.
    """

    header: dict[str, str] = field(default_factory=dict)
    sections: list[Section] = field(default_factory=list)
    line: int = field(default=1, compare=False)
    lines: dict[str, int] = field(default_factory=dict, compare=False)

    @property
    def agent(self) -> str:
        """The bootstrap agent in lower case, or ""."""
        return self.header.get("bootstrap", "").lower()

    @property
    def name(self) -> str:
        """What later stages call this one, or ""."""
        return self.header.get("stage", "")

    @property
    def apps(self) -> list[str]:
        """The SCIF apps in the order in which the file first names them."""
        return list(dict.fromkeys(section.app for section in self.sections if section.app))

    def all(self, name: str, app: str = "") -> list[Section]:
        """Return the sections called `name` (of one app), in the order of the file."""
        return [section for section in self.sections if section.name == name and section.app == app]

    def has(self, name: str, app: str = "") -> bool:
        """Return whether there is a section called `name`."""
        return any(section.name == name and section.app == app for section in self.sections)

    def body(self, name: str, app: str = "") -> str:
        """Return the joined text of all sections called `name`; "" when there is none."""
        return "".join(section.body for section in self.all(name, app))

    def arguments(self, name: str) -> str:
        """Return the arguments of the section called `name`; of repeated ones, the last that has any."""
        for section in reversed(self.all(name)):
            if section.arguments:
                return section.arguments
        return ""

    def line_of(self, name: str, app: str = "") -> int:
        """Return the line of the first section called `name`, or 0."""
        found = self.all(name, app)
        return found[0].line if found else 0


@dataclass(frozen=True)
class Recipe:
    """A definition file.

    Arguments:
        stages: in order; the last one becomes the image.
        file: its name for messages, "" when it has none.
        text: the definition with all template values put in, as it is stored in an image.
        unused: names of given build arguments that no stage asked for.
        remarks: what the person may want to mend, as whole lines.
    """

    stages: list[Stage]
    file: str = field(default="", compare=False)
    text: str = field(default="", compare=False)
    unused: tuple[str, ...] = field(default=(), compare=False)
    remarks: tuple[str, ...] = field(default=(), compare=False)
