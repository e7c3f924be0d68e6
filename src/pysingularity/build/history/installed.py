# SPDX-License-Identifier: Apache-2.0
"""Packages in a root file system, by the records of their managers: dpkg, apk, pip and uv, conda, npm.

Everything is read, nothing is run, and what cannot be read is taken for not there. Sources: dpkg(1) status and
apt's extended_states; apk-world(5); PEP 376, 610 and 668; conda-meta; npm's package.json.
"""

from __future__ import annotations

import csv
import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pysingularity.recipe.dockerignore import clean

if TYPE_CHECKING:
    from pysingularity.image.inside import Source

#: Where Python programs keep packages: a prefix and what is below it.
_PREFIXES = ("usr/local", "usr", "opt/*", "opt/*/envs/*", "srv/*", "root/*", "home/*/*", "*")
_MERGED = ("bin", "lib", "lib32", "lib64", "libo32", "libx32", "sbin")
_STATUS, _APK = "var/lib/dpkg/status", "lib/apk/db/installed"
_MOST = 64 << 20
_DIST = re.compile(r"(.+)-([^-]+)\.(?:dist-info|egg-info)\Z")


@dataclass
class Package:
    """One installed package.

    Arguments:
        version: as its manager writes it.
        asked: a person asked for it, as far as its manager knows; others came along.
        source: where it came from when that is not the usual index.
    """

    version: str
    asked: bool = True
    source: str = ""


@dataclass
class Installed:
    """Packages by manager: name → package; of pip and conda by prefix (without leading slash).

    Attributes:
        files: paths (without leading slash) that belong to packages, and the managers' own.
        owners: path → package of dpkg.
        wishes: package of dpkg → what it recommends, as in its field.
        conffiles: path → MD5 of configuration files as dpkg's packages brought them.
    """

    apt: dict[str, Package] = field(default_factory=dict)
    apk: dict[str, Package] = field(default_factory=dict)
    pip: dict[str, dict[str, Package]] = field(default_factory=dict)
    conda: dict[str, dict[str, Package]] = field(default_factory=dict)
    npm: dict[str, Package] = field(default_factory=dict)
    files: set[str] = field(default_factory=set)
    owners: dict[str, str] = field(default_factory=dict)
    wishes: dict[str, str] = field(default_factory=dict)
    conffiles: dict[str, str] = field(default_factory=dict)

    def value(self) -> dict[str, Any]:
        """Return names and versions as a value for JSON."""

        def plain(found: dict[str, Package]) -> dict[str, str]:
            return {name: one.version for name, one in found.items()}

        return {
            "apt": plain(self.apt),
            "apk": plain(self.apk),
            "npm": plain(self.npm),
            "pip": {prefix: plain(found) for prefix, found in self.pip.items()},
            "conda": {prefix: plain(found) for prefix, found in self.conda.items()},
        }


def read(source: Source) -> Installed:
    """Return what is installed in a root file system."""
    found = Installed()
    _dpkg(source, found)
    _apk(source, found)
    for prefix in _prefixes(source):
        _conda(source, prefix, found)
        _python(source, prefix, found)
    for folder in ("usr/local/lib/node_modules", "usr/lib/node_modules"):
        _npm(source, folder, found)
    return found


def _text(source: Source, path: str) -> str:
    from pysingularity.errors import ImageError

    try:
        return (source.read(path, _MOST) or b"").decode("utf-8", "replace")
    except ImageError:  # too large or not ours to read: as if it were not there
        return ""


def _json(source: Source, path: str) -> dict[str, Any]:
    try:
        found = json.loads(_text(source, path) or "{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _paragraphs(text: str) -> list[dict[str, str]]:
    found = []
    for block in text.split("\n\n"):
        fields: dict[str, str] = {}
        name = ""
        for line in block.splitlines():
            if line[:1] in (" ", "\t"):
                fields[name] = fields.get(name, "") + "\n" + line.strip()
            else:
                name, _, value = line.partition(":")
                fields[name] = value.strip()
        if "Package" in fields:
            found.append(fields)
    return found


def _dpkg(source: Source, found: Installed) -> None:
    came_along = {
        one["Package"]
        for one in _paragraphs(_text(source, "var/lib/apt/extended_states"))
        if one.get("Auto-Installed") == "1"
    }
    for one in _paragraphs(_text(source, _STATUS)):
        if not one.get("Status", "").endswith(" installed"):
            continue
        name = one["Package"]
        found.apt[name] = Package(one.get("Version", ""), name not in came_along)
        if one.get("Recommends"):
            found.wishes[name] = one["Recommends"]
        for line in one.get("Conffiles", "").split("\n"):
            words = line.split()
            if len(words) >= 2:
                found.conffiles[words[0].lstrip("/")] = words[1]
    for name in source.names("var/lib/dpkg/info"):
        if name.endswith(".list"):
            for line in _text(source, f"var/lib/dpkg/info/{name}").split("\n"):
                path = line.strip("/")
                # dpkg still calls it /bin/x where /bin has become a link to /usr/bin.
                merged = path.partition("/")[0] in _MERGED
                for place in (path, f"usr/{path}") if merged else (path,):
                    if place:
                        found.files.add(place)
                        found.owners[place] = name[:-5].partition(":")[0]


def _apk(source: Source, found: Installed) -> None:
    world = {re.split(r"[<>=~@]", word)[0] for word in _text(source, "etc/apk/world").split()}
    folder = name = ""
    for line in _text(source, _APK).split("\n"):
        key, value = line[:2], line[2:]
        if key == "P:":
            name = value
            found.apk[name] = Package("", name in world)
        elif key == "V:" and name in found.apk:
            found.apk[name].version = value
        elif key == "F:":
            folder = value
            found.files.add(folder)
        elif key == "R:":
            found.files.add(f"{folder}/{value}" if folder else value)


def _prefixes(source: Source) -> list[str]:
    """Return folders that may hold a Python: patterns with * stand for every folder there."""
    found: list[str] = []
    for pattern in _PREFIXES:
        level = [""]
        for part in pattern.split("/"):
            names = [(above, source.names(above) if part == "*" else [part]) for above in level]
            level = [f"{above}/{name}".lstrip("/") for above, some in names for name in some]
        for path in level:
            if path not in found and source.is_folder(f"{path}/lib"):
                found.append(path)
    return found


def _python(source: Source, prefix: str, found: Installed) -> None:
    for name in source.names(f"{prefix}/lib"):
        if not name.startswith("python3"):
            continue
        for kind in ("site-packages", "dist-packages"):
            folder = f"{prefix}/lib/{name}/{kind}"
            for entry in source.names(folder):
                match = _DIST.match(entry)
                if match is not None and f"{folder}/{entry}" not in found.files:
                    _distribution(source, prefix, folder, entry, found)


def _distribution(source: Source, prefix: str, folder: str, entry: str, found: Installed) -> None:
    info = f"{folder}/{entry}"
    installer = _text(source, f"{info}/INSTALLER").strip()
    if installer not in ("pip", "uv"):  # dpkg's and conda's are counted there
        return
    fields = _text(source, f"{info}/METADATA").split("\n\n", 1)[0]
    names = dict(line.split(": ", 1) for line in fields.split("\n") if line.startswith(("Name: ", "Version: ")))
    if len(names) < 2:
        return
    direct = _json(source, f"{info}/direct_url.json")
    address = str(direct.get("url") or "")
    version = direct.get("vcs_info")
    if address and isinstance(version, dict):
        address = f"{version.get('vcs', 'git')}+{address}@{version.get('commit_id', '')}"
    own = source.names(info)
    # uv keeps no mark of what was asked for.
    asked = "REQUESTED" in own or installer == "uv"
    found.pip.setdefault(prefix, {})[names["Name"]] = Package(names["Version"], asked, address)
    found.files |= {info, *(f"{info}/{one}" for one in own)}
    for row in csv.reader(_text(source, f"{info}/RECORD").splitlines()):
        if row:
            path = clean(f"{folder}/{row[0]}") if not row[0].startswith("/") else row[0].lstrip("/")
            found.files.add(path)
            while "/" in path and path != folder and path.startswith(folder):
                path = path.rpartition("/")[0]
                found.files.add(path)


def _conda(source: Source, prefix: str, found: Installed) -> None:
    folder = f"{prefix}/conda-meta"
    names = [name for name in source.names(folder) if name.endswith(".json")]
    if not names:
        return
    asked: set[str] = set()
    for line in _text(source, f"{folder}/history").split("\n"):
        if line.startswith(("# update specs:", "# specs:")):
            asked |= {
                re.split(r"[ =<>!~\[]", word)[0].rpartition("::")[2]
                for word in re.findall(r"['\"]([^'\"]+)['\"]", line)
            }
    own = found.conda.setdefault(prefix, {})
    for name in names:
        one = _json(source, f"{folder}/{name}")
        if not one.get("name"):
            continue
        channel = str(one.get("channel") or "").rstrip("/")
        channel = re.sub(r"/(noarch|linux-\w+)$", "", channel)
        own[str(one["name"])] = Package(str(one.get("version", "")), str(one["name"]) in asked, channel)
        for path in one.get("files") or []:
            path = f"{prefix}/{path}"
            while path != prefix and path not in found.files:
                found.files.add(path)
                path = path.rpartition("/")[0]
    found.files.add(folder)
    found.files |= {f"{folder}/{name}" for name in source.names(folder)}


def _npm(source: Source, folder: str, found: Installed) -> None:
    for name in source.names(folder):
        inner = [f"{name}/{one}" for one in source.names(f"{folder}/{name}")] if name.startswith("@") else [name]
        for one in inner:
            if f"{folder}/{one}" in found.files:  # Debian's
                continue
            about = _json(source, f"{folder}/{one}/package.json")
            if about.get("name") and about["name"] != "npm":
                found.npm[str(about["name"])] = Package(str(about.get("version", "")))
