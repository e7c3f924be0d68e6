# SPDX-License-Identifier: Apache-2.0
"""From a request to a plan: ordered steps, each with a title for people and a hash of what it depends on.

A step's hash takes in the hash of the step before it, so that equal hashes mean equal work from the beginning. Making a
plan reads files that the recipe names but changes nothing; `execute` carries it out.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
import stat
import time
from dataclasses import dataclass
from typing import BinaryIO

from pysingularity import messages
from pysingularity.build.bootstrap import AGENTS
from pysingularity.build.request import RECIPE, REFERENCE, SANDBOX, BuildRequest
from pysingularity.build.sections import app_entries, post_script
from pysingularity.recipe.model import Stage
from pysingularity.recipe.sections import FilePair, file_pairs

#: Kinds of step, in the order in which they may occur in a stage.
PRE, BOOTSTRAP, APPS, STAGE_FILES, SETUP, FILES, POST = (
    "pre",
    "bootstrap",
    "apps",
    "files-from",
    "setup",
    "files",
    "post",
)
#: Kinds of step at the end of the last stage, and of builds without a recipe.
METADATA, TEST, ASSEMBLE, REUSE, CONVERT = "metadata", "test", "assemble", "reuse", "convert"
#: Seconds after which people are told what is being read.
PATIENCE = 1.0
CHUNK = 1 << 20
_STEP = re.compile(r"\s*#\s*step\b[ \t:]*(.*)", re.IGNORECASE)
#: Sections that need a root file system on disk: without any of them an image's blocks are copied as they are.
NEED_ROOT = ("pre", "setup", "post", "appinstall")


@dataclass(frozen=True)
class Step:
    """One thing that will be done.

    Arguments:
        number: from 1, through all stages.
        kind: PRE … CONVERT.
        title: for people.
        stage: index of the stage in the recipe, -1 for builds without one.
        id: hash of everything the step depends on, in hexadecimal.
        text: for POST, the script of this part; otherwise "".
        keep: the root behind this step goes into the cache (`steps`).
        sources: numbers of the stages that this step takes files from.
    """

    number: int
    kind: str
    title: str
    stage: int = -1
    id: str = ""
    text: str = ""
    keep: bool = False
    sources: tuple[int, ...] = ()

    def describe(self, *, cached: bool = False) -> str:
        """Return the step as a line of `build --plan`."""
        return f"{self.number:>3}  {self.id[:12]}  {'cached' if cached else '':6}  {self.title}".rstrip()

    def value(self) -> dict[str, object]:
        """Return the step as a value for JSON."""
        return {"number": self.number, "kind": self.kind, "title": self.title, "id": self.id}


@dataclass(frozen=True)
class Plan:
    """All steps of a build, in order."""

    steps: list[Step]

    def of_stage(self, index: int) -> list[Step]:
        """Return the steps of one stage of the recipe."""
        return [step for step in self.steps if step.stage == index]

    def sources_of(self, index: int, *, after: int = 0) -> list[int]:
        """Return the stages that steps of a stage take files from, those behind step number `after`."""
        found = [number for step in self.of_stage(index) if step.number > after for number in step.sources]
        return list(dict.fromkeys(found))

    def has(self, kind: str) -> bool:
        """Return whether there is a step of this kind."""
        return any(step.kind == kind for step in self.steps)


class Maker:
    """Collects steps and chains their hashes."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self._before = ""

    def begin(self) -> None:
        """Start a chain of its own for a new stage."""
        self._before = ""

    def add(
        self,
        kind: str,
        title: str,
        stage: int,
        *parts: str,
        text: str = "",
        keep: bool = False,
        sources: tuple[int, ...] = (),
    ) -> Step:
        """Add a step that depends on the one before it and on `parts`."""
        digest = hashlib.sha256()
        for part in (self._before, kind, *parts):
            data = part.encode("utf-8", "surrogateescape")
            digest.update(b"%d:" % len(data) + data)
        self._before = digest.hexdigest()
        step = Step(len(self.steps) + 1, kind, title, stage, self._before, text, keep, sources)
        self.steps.append(step)
        return step


def make(request: BuildRequest) -> Plan:
    """Return the plan of a build.

    Raises:
        RecipeError: a %files line that cannot be read.
    """
    if request.docker is not None:
        from pysingularity.build.dockerfile import plan as dockerfile

        return dockerfile.make(request, request.docker)
    maker = Maker()
    output = "sandbox" if request.sandbox else "SIF file"
    if request.kind != RECIPE or request.recipe is None:
        what = {SANDBOX: "folder", REFERENCE: "reference"}.get(request.kind, "image")
        maker.add(CONVERT, f"{what} {request.spec} → {output} {request.target}", -1, request.spec)
        return Plan(maker.steps)
    last = len(request.recipe.stages) - 1
    ids: dict[str, str] = {}
    reuse = reuses_blocks(request)
    for index, stage in enumerate(request.recipe.stages):
        maker.begin()
        _stage(maker, request, index, stage, ids, reuse)
        if stage.name and stage.name not in ids:  # of two stages of one name the first counts
            ids[stage.name] = maker.steps[-1].id
        if index == last:
            maker.add(METADATA, "labels, environment and scripts", index, request.recipe.text)
            if _tests(request, stage) and not reuse:
                maker.add(TEST, "%test", index, stage.body("test"), stage.arguments("test"))
            maker.add(REUSE if reuse else ASSEMBLE, f"{output} {request.target}", index, repr(request.writer))
    return Plan(maker.steps)


def _tests(request: BuildRequest, stage: Stage) -> bool:
    return stage.has("test") and not request.notest and "test" in request.wanted


def reuses_blocks(request: BuildRequest) -> bool:
    """Return whether the base image's compressed blocks can be copied: nothing runs, files and metadata are added."""
    recipe = request.recipe
    if recipe is None or len(recipe.stages) != 1 or request.sandbox or request.update or request.fix_perms:
        return False
    stage = recipe.stages[0]
    if AGENTS.get(stage.agent) not in ("localimage", "remote") or _tests(request, stage):
        return False  # only these start from an image
    return not any(section.name in NEED_ROOT and section.name in request.wanted for section in stage.sections)


def _stage(maker: Maker, request: BuildRequest, index: int, stage: Stage, ids: dict[str, str], reuse: bool) -> None:
    recipe, wanted = request.recipe, request.wanted
    if recipe is None:
        return
    name = f" ({stage.name})" if stage.name else ""
    if stage.has("pre") and "pre" in wanted:
        maker.add(PRE, f"%pre{name}", index, stage.body("pre"))
    if not request.update:
        source = stage.header.get("from") or stage.header.get("osversion") or ""
        title = " ".join(word for word in ("start from", stage.agent, source) if word)
        header = "\n".join(f"{key}: {stage.header[key]}" for key in sorted(stage.header) if key != "stage")
        if not reuse:
            maker.add(BOOTSTRAP, title + name, index, header, request.arch, base_mark(stage, request.directory))
    if stage.apps:
        entries = app_entries(stage)
        parts = [f"{entry.path}:{entry.mode:o}:{entry.data.decode('utf-8', 'surrogateescape')}" for entry in entries]
        pairs = [pair for app in stage.apps for pair in file_pairs(stage, recipe.file, app)]
        parts.append(content_hash(pairs, request.directory))
        maker.add(APPS, f"apps {', '.join(stage.apps)}", index, *parts)
    pairs = file_pairs(stage, recipe.file) if "files" in wanted else []
    inner, outer = [pair for pair in pairs if pair.stage], [pair for pair in pairs if not pair.stage]
    if inner:
        parts = [f"{pair.stage}:{ids.get(pair.stage, '')}:{pair.source}:{pair.target}" for pair in inner]
        names = list(dict.fromkeys(pair.stage for pair in inner))
        known = {stage.name: number for number, stage in reversed(list(enumerate(recipe.stages[:index])))}
        sources = tuple(known[one] for one in names if one in known)
        maker.add(STAGE_FILES, f"%files from {', '.join(names)}{name}", index, *parts, sources=sources)
    if stage.has("setup") and "setup" in wanted:
        maker.add(SETUP, f"%setup{name}", index, stage.body("setup"))
    if outer:
        count = f"{len(outer)} {'line' if len(outer) == 1 else 'lines'}"
        maker.add(FILES, f"%files{name}, {count}", index, content_hash(outer, request.directory))
    if "post" in wanted and (stage.has("post") or any(stage.has("appinstall", app) for app in stage.apps)):
        cuts = post_parts(post_script(stage))
        environment = "\n".join([stage.arguments("post"), *request.binds, *request.mounts, request.ca_bundle])
        for number, (what, text) in enumerate(cuts, 1):
            cut = len(cuts) > 1 or what is not None
            place = f", step {number}/{len(cuts)}" if cut else ""
            title = f"%post{name}{place}{': ' + what if what else ''}"
            maker.add(POST, title, index, text, environment, text=text, keep=cut and request.cache)


def post_parts(text: str) -> list[tuple[str | None, str]]:
    """Cut a script before every line `#step TITLE`; return (title, text) of each part.

    What stands above the first such line is a part of its own when it does anything; its title is "", and None when
    the script is not cut at all. Every part starts in / with a shell of its own: variables do not pass on.
    """
    parts: list[tuple[str | None, str]] = []
    title: str | None = None
    lines: list[str] = []
    for line in text.splitlines(keepends=True):
        match = _STEP.match(line)
        if match is None:
            lines.append(line)
            continue
        if title is not None or _does_something(lines):
            parts.append((title or "", "".join(lines)))
        title, lines = match[1].strip(), []
    parts.append((title, "".join(lines)))
    return parts


def _does_something(lines: list[str]) -> bool:
    return any(line.strip() and not line.lstrip().startswith("#") for line in lines)


def base_mark(stage: Stage, directory: str) -> str:
    """Return what tells one base of this machine from another; images by size and time, without reading them."""
    if stage.agent == "debootstrap" and not stage.header.get("mirrorurl"):
        return _apt_sources()
    if stage.agent != "localimage":
        return ""
    path = os.path.join(directory, stage.header.get("from", ""))
    try:
        status = os.stat(path)
    except OSError:
        return ""
    if stat.S_ISDIR(status.st_mode):
        content = _Content()
        content.add(path)
        return content.digest.hexdigest()
    return f"{status.st_dev}:{status.st_ino}:{status.st_size}:{status.st_mtime_ns}"


def _apt_sources() -> str:
    """Return the host's apt sources and release, which a recipe without MirrorURL takes."""
    texts = []
    for pattern in ("/etc/os-release", "/etc/apt/sources.list", "/etc/apt/sources.list.d/*"):
        for path in sorted(glob.glob(pattern)):
            try:
                with open(path, encoding="utf-8", errors="surrogateescape") as stream:
                    texts.append(stream.read(1 << 20))
            except OSError:
                continue
    return "\n".join(texts)


def content_hash(pairs: list[FilePair], directory: str) -> str:
    """Return a hash of what lines of %files would copy: names, modes and contents, links followed.

    What is missing or unreadable counts as missing; copying reports it. When it takes long, one line says what for.
    """
    content = _Content()
    for pair in pairs:
        content.digest.update(f"\0{pair.source}\0{pair.target}".encode("utf-8", "surrogateescape"))
        pattern = os.path.join(directory, pair.source)
        names = sorted(glob.glob(pattern)) if glob.has_magic(pair.source) else [pattern]
        for name in names:
            content.add(name)
    return content.digest.hexdigest()


class _Content:
    """The hash of files and folders."""

    def __init__(self) -> None:
        self.digest = hashlib.sha256()
        self._until = time.monotonic() + PATIENCE

    def add(self, path: str, seen: tuple[tuple[int, int], ...] = ()) -> None:
        """Take a path in; `seen` are the folders that it was reached through, against links in circles."""
        digest = self.digest
        digest.update(os.path.basename(path).encode("utf-8", "surrogateescape") + b"\0")
        try:
            status = os.stat(path)
            digest.update(b"%o" % status.st_mode)
            if stat.S_ISDIR(status.st_mode):
                mark = (status.st_dev, status.st_ino)
                if mark in seen or len(seen) > 200:
                    return
                for name in sorted(os.listdir(path)):
                    self.add(os.path.join(path, name), (*seen, mark))
            elif stat.S_ISREG(status.st_mode):
                with open(path, "rb") as stream:
                    self._file(stream)
        except OSError:
            digest.update(b"missing")

    def _file(self, stream: BinaryIO) -> None:
        made = hashlib.sha256()
        while data := stream.read(CHUNK):
            made.update(data)
            if self._until and time.monotonic() > self._until:
                self._until = 0.0
                messages.info("reading what %files copies, to know whether it has changed since the last build")
        self.digest.update(made.digest())
