# SPDX-License-Identifier: Apache-2.0
"""What has changed in a sandbox since it was made: packages, and files that no package and no program made."""

from __future__ import annotations

import fnmatch
import hashlib
import os
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pysingularity.build.history import installed
from pysingularity.build.history.installed import Installed, Package
from pysingularity.build.history.record import Files, Record, walk
from pysingularity.image.inside import FolderSource
from pysingularity.image.metadata import META

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

#: What programs write by themselves; * also stands for slashes.
PASSING = (
    *(
        "tmp/*",
        "var/tmp/*",
        "var/cache/*",
        "var/log/*",
        "var/lib/apt/*",
        "var/lib/dpkg/*",
        "lib/apk/db/*",
        "var/lib/pam/*",
    ),
    *("*/__pycache__", "*/__pycache__/*", "*.pyc", "etc/ld.so.cache", "etc/mtab", "etc/.pwd.lock", "etc/apk/world"),
    *("*/.bash_history", "*/.python_history", "*/.lesshst", "*/.viminfo", "*/.wget-hsts", "*/.cache", "*/.cache/*"),
    *(
        "etc/resolv.conf",
        "etc/hosts",
        "etc/hostname",
        "*/conda-meta/*",
        "*/pkgs/*",
        "*/.npm/*",
        "*/.conda/*",
        f"{META}/*",
    ),
)
#: What scripts of packages make when they are installed.
OF_PACKAGES = (
    *("etc/passwd*", "etc/group*", "etc/shadow*", "etc/gshadow*", "etc/subuid*", "etc/subgid*", "etc/alternatives*"),
    *("etc/rc?.d*", "etc/systemd/*", "etc/ssl/certs*", "etc/ca-certificates.conf*", "etc/mailcap*", "etc/shells"),
    *("etc/pam.d/common-*", "etc/fonts/conf.d*", "etc/xml/*", "etc/sgml/*", "etc/init.d/.depend*", "etc/nsswitch.conf"),
    *("usr/share/info/dir*", "usr/share/mime/*", "usr/share/icons/*", "usr/share/fonts/*.uuid", "usr/share/*.cache"),
    *("usr/lib/*/gconv/gconv-modules.cache", "usr/lib/*.cache", "usr/lib/locale/*", "usr/share/glib-2.0/schemas/*"),
    *("usr/share/applications/mimeinfo.cache", "usr/lib/udev/hwdb.bin", "usr/share/perl5/XML/SAX/ParserDetails.ini"),
    *("var/lib/*", "var/spool/*", "var/mail*", "etc/machine-id", "etc/python3*/cert*", "usr/lib/jvm/*/lib/security/*"),
)


@dataclass
class Changes:
    """What has changed.

    Attributes:
        packages: manager → new or changed packages; of pip and conda the key is "pip PREFIX".
        lost: manager → packages that are gone.
        added, changed, removed: paths without leading slash; below an added folder nothing is named again.
        now: facts of everything that is there.
        skipped: number of files that belong to packages or pass.
        virtual: prefixes of pip that are virtual environments.
        fresh: prefixes of Python and conda that were not there before.
        texts: scripts as they are now.
        managed: pip refuses to install without being told twice (PEP 668).
        sparse: packages were installed without those that they recommend.
    """

    packages: dict[str, dict[str, Package]] = field(default_factory=dict)
    lost: dict[str, list[str]] = field(default_factory=dict)
    added: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    now: Files = field(default_factory=dict)
    skipped: int = 0
    virtual: set[str] = field(default_factory=set)
    texts: dict[str, str] = field(default_factory=dict)
    managed: bool = False
    fresh: set[str] = field(default_factory=set)
    sparse: bool = False


def compare(root: str, before: Record) -> Changes:
    """Return what has changed in a sandbox."""
    found = Changes(now=dict(walk(root)))
    with FolderSource(root) as source:
        now = installed.read(source)
        found.texts = {name: (source.read(name) or b"").decode("utf-8", "surrogateescape") for name in before.texts}
        found.virtual = {prefix for prefix in now.pip if source.read(f"{prefix}/pyvenv.cfg") is not None}
        found.managed = any(path.endswith("/EXTERNALLY-MANAGED") for path in found.now)
        found.fresh = {prefix for prefix in (*found.virtual, *now.conda) if prefix not in before.files}
    _packages(found, now, before.packages)
    _files(found, root, now, before.files)
    return found


def _packages(found: Changes, now: Installed, before: Mapping[str, Mapping[str, object]]) -> None:
    groups: dict[str, tuple[dict[str, Package], Mapping[str, object]]] = {}
    for manager in ("apt", "apk", "npm"):
        groups[manager] = getattr(now, manager), before.get(manager) or {}
    for manager in ("conda", "pip"):
        old = before.get(manager) or {}
        for prefix, packages in getattr(now, manager).items():
            known = old.get(prefix)
            groups[f"{manager} {prefix}"] = packages, known if isinstance(known, dict) else {}
    found.sparse = any(
        not any(_name(one) in now.apt for one in group.split("|"))
        for name, wished in now.wishes.items()
        if name not in groups["apt"][1]
        for group in wished.split(",")
    )
    for key, (packages, known) in groups.items():
        new = {name: one for name, one in packages.items() if known.get(name) != one.version}
        gone = [name for name in known if name not in packages]
        if new:
            found.packages[key] = new
        if gone:
            found.lost[key] = gone


def _name(relation: str) -> str:
    return relation.replace(":", " ").split()[0] if relation.split() else ""


def _files(found: Changes, root: str, now: Installed, before: Files) -> None:
    passing = PASSING + (OF_PACKAGES if found.packages or found.lost else ())
    owned = now.files
    # Modules of npm: everything below belongs to them.
    modules = tuple(
        f"{folder}/{name}/" for folder in ("usr/local/lib/node_modules", "usr/lib/node_modules") for name in now.npm
    )

    for prefix in found.fresh:  # what making it made
        passing += tuple(f"{prefix}/{name}" for name in ("bin*", "lib*", "include*", "share*", "pyvenv.cfg"))
    patterns = [re.compile(fnmatch.translate(pattern)).match for pattern in passing]

    def passes(path: str) -> bool:
        return any(fits(path) for fits in patterns) or f"{path}/".startswith(modules)

    added: list[str] = []
    for path in sorted(found.now):
        facts, old = found.now[path], before.get(path)
        if facts[0] == "o" or same(facts, old):
            continue
        if passes(path) or path in found.fresh or (path in owned and not _edited(found, root, path, now, old)):
            found.skipped += 1
        elif old is None:
            added.append(path)
        else:
            found.changed.append(path)
    found.added = _without_frames(added, found.now)
    seen: set[str] = set()
    for path in sorted(before):
        if path in found.now or path.rpartition("/")[0] in seen or passes(path):
            seen |= {path} if path not in found.now else set()
            continue
        seen.add(path)
        # What a package of the base brought goes with it, or was replaced by its new version.
        if not (found.lost or found.packages) or path.startswith(("etc/", "opt/", "root/", "home/", "srv/")):
            found.removed.append(path)


def _without_frames(added: list[str], now: Files) -> list[str]:
    """Leave out new folders that hold nothing new but what belongs to packages; an empty one was made by hand."""
    holding = _above(path for path in added if now[path][0] != "d")
    full = _above(now)
    return [path for path in added if now[path][0] != "d" or path in holding or path not in full]


def _above(paths: Iterable[str]) -> set[str]:
    """Return all folders above some paths."""
    found: set[str] = set()
    for path in paths:
        above = os.path.dirname(path)
        while above and above not in found:
            found.add(above)
            above = os.path.dirname(above)
    return found


def same(facts: tuple[str, int, int, int, str], old: tuple[str, int, int, int, str] | None) -> bool:
    """Return whether an entry is as it was; of folders only the permissions count."""
    if old is None or facts[:2] != old[:2]:
        return False
    if facts[0] == "d":
        return True
    if facts[0] == "l":
        return facts[4] == old[4]
    # Images know whole seconds.
    time = facts[3] if old[3] % 10**9 else facts[3] - facts[3] % 10**9
    return (facts[2], time) == (old[2], old[3])


def _edited(found: Changes, root: str, path: str, now: Installed, old: object) -> bool:
    """Return whether a file of a package was changed by hand."""
    wanted = now.conffiles.get(path)
    if wanted is None:
        # Of a package that is the one that was there before, and not what it was.
        package = now.owners.get(path)
        return old is not None and package is not None and package not in found.packages.get("apt", {})
    try:
        with open(os.path.join(root, path), "rb") as stream:
            return hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest() != wanted
    except OSError:
        return False
