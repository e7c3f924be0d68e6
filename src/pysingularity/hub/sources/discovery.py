# SPDX-License-Identifier: Apache-2.0
"""Which recipes a commit holds, and which of them a change concerns.

A recipe is a plain file in any folder called `Singularity` (tag `latest`) or `Singularity.TAG`. Of several recipes of
one tag the most recently changed one counts. Symlinked, oversized and unreadable recipes are listed with the reason
why they are not built.
"""

from __future__ import annotations

import fnmatch
import posixpath
from dataclasses import dataclass, field

from pysingularity.errors import SingularityError
from pysingularity.hub.catalog import LATEST, PART
from pysingularity.hub.sources.git import Entry, Mirror
from pysingularity.recipe.parser import parse
from pysingularity.recipe.sections import file_pairs

FILE = "Singularity"
#: More recipes than this in one commit are not looked at.
MOST = 10_000


@dataclass(frozen=True)
class Found:
    """A recipe of a commit.

    Arguments:
        copies: patterns of repository paths whose change concerns it; ["**"] for all.
        base: what `Bootstrap` and `From` name, as a reference where there is one.
        problem: why it cannot be built; "" when it can.
        shadowed: a more recently changed recipe has the same tag.
    """

    path: str
    tag: str
    sha: str
    commit: str = ""
    changed_at: float = 0.0
    copies: list[str] = field(default_factory=list)
    base: str = ""
    problem: str = ""
    shadowed: bool = False


def tag_of(path: str) -> str | None:
    """Return the tag that a path's name gives, or None when it is no recipe."""
    name = posixpath.basename(path)
    if name == FILE:
        return LATEST
    stem, dot, tag = name.partition(".")
    return tag if stem == FILE and dot and tag else None


def recipes_of(mirror: Mirror, commit: str, *, limit: int) -> list[Found]:
    """Return all recipes of a commit, each tag's newest first.

    Arguments:
        limit: bytes that a recipe may have.
    """
    candidates = [(entry, tag) for entry in mirror.entries(commit) if (tag := tag_of(entry.path)) is not None]
    candidates = candidates[:MOST]
    changes = mirror.last_changes(commit, {entry.path for entry, _ in candidates}, f"**/{FILE}*") if candidates else {}
    texts = mirror.blobs({entry.sha for entry, _ in candidates if entry.kind == "blob" and entry.size <= limit})
    head = (commit, mirror.time_of(commit)) if candidates else (commit, 0.0)
    found = [
        _look(entry, tag, limit, changes.get(entry.path) or head, texts.get(entry.sha)) for entry, tag in candidates
    ]
    return _newest_wins(found)


def _look(entry: Entry, tag: str, limit: int, change: tuple[str, float], text: bytes | None) -> Found:
    problem, base = "", ""
    copies: list[str] = []
    if entry.mode == "120000":
        problem = "a recipe must be a plain file, this is a symlink"
    elif entry.mode == "160000" or entry.kind != "blob":
        problem = "a recipe must be a plain file, this is a submodule"
    elif entry.size > limit:
        problem = f"a recipe has at most {limit} bytes, this has {entry.size}"
    elif not PART.match(tag) or tag[0] in ".-":
        problem = f"{tag[:80]!r} cannot be a tag: 1 to 64 letters, digits and -_., no dot or hyphen in front"
    elif _odd(entry.path):
        problem = "the path holds control characters or is no UTF-8"
    elif text is None:
        problem = "all recipes together are too large to be looked at"
    else:
        try:
            copies, base = inputs(text, entry.path)
        except SingularityError as error:
            problem = str(error).replace("\n", " ")
    return Found(_printable(entry.path), _printable(tag)[:200], entry.sha, *change, copies, base, problem)


def _odd(path: str) -> bool:
    return any(ord(letter) < 32 or ord(letter) == 127 or 0xD800 <= ord(letter) < 0xE000 for letter in path)


def _printable(path: str) -> str:
    return path.encode("utf-8", "backslashreplace").decode() if _odd(path) else path


def inputs(text: bytes, path: str) -> tuple[list[str], str]:
    """Return what a recipe depends on: patterns of repository paths, and its base.

    A recipe with `%setup` or `%pre` may read anything of the repository: ["**"]. Paths of `%files` are taken relative
    to the recipe's folder and to the repository's root, as the build does.

    Raises:
        RecipeError: it cannot be parsed.
    """
    recipe = parse(text, path)
    folder = posixpath.dirname(path)
    patterns: list[str] = []
    base = ""
    for stage in recipe.stages:
        if stage.has("setup") or stage.has("pre"):
            patterns.append("**")
        base = _base(stage.header) or base
        for app in ("", *stage.apps):
            for pair in file_pairs(stage, path, app):
                source = pair.source
                if source.startswith("/") or pair.stage:
                    continue  # of the sandbox or of another stage, not of the repository
                for top in dict.fromkeys((folder, "")):
                    full = posixpath.normpath(posixpath.join(top, source))
                    if full == ".":
                        patterns.append("**")
                    elif not full.startswith(".."):
                        patterns.append(full)
    return list(dict.fromkeys(patterns)), base


def _base(header: dict[str, str]) -> str:
    agent, source = header.get("bootstrap", "").lower(), header.get("from", "")
    if agent in ("docker", "library", "shub", "oras") and source:
        registry = header.get("registry", "")
        prefix = f"{registry.rstrip('/')}/" if registry and agent == "docker" else ""
        return f"{agent}://{prefix}{source}"
    return agent


def _newest_wins(found: list[Found]) -> list[Found]:
    best: dict[str, Found] = {}
    for one in found:
        if one.problem:
            continue
        other = best.get(one.tag)
        # Equal times (one commit made both) go to the shorter, then alphabetically first path: always the same one.
        if other is None or (-one.changed_at, len(one.path), one.path) < (
            -other.changed_at,
            len(other.path),
            other.path,
        ):
            best[one.tag] = one
    return [
        one if one.problem or best[one.tag] is one else Found(**{**one.__dict__, "shadowed": True}) for one in found
    ]


def concerned(recipes: list[Found], changed: set[str]) -> list[Found]:
    """Return the recipes that count and that a set of changed paths concerns: themselves or something they copy."""
    return [
        one
        for one in recipes
        if not one.shadowed and not one.problem and (one.path in changed or _copies(one.copies, changed))
    ]


def _copies(patterns: list[str], changed: set[str]) -> bool:
    return any(touches(patterns, path) for path in changed)


def touches(patterns: list[str], path: str) -> bool:
    """Return whether a path is one of those that patterns (see `inputs`) speak of, or lies below one."""
    for pattern in patterns:
        if pattern == "**" or path == pattern or path.startswith(pattern.rstrip("/") + "/"):
            return True
        if any(letter in pattern for letter in "*?[") and _glob(path, pattern):
            return True
    return False


def _glob(path: str, pattern: str) -> bool:
    """Return whether a path, or a folder above it, matches a shell pattern part by part."""
    parts, wanted = path.split("/"), pattern.split("/")
    return len(parts) >= len(wanted) and all(map(fnmatch.fnmatchcase, parts, wanted))
