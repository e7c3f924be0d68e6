# SPDX-License-Identifier: Apache-2.0
"""Which stages of a Dockerfile a build needs, where each starts from, and the `Recipe` that stands for them.

A stage is needed when it is the target, what a needed stage starts from, or what one copies from or mounts. An image
that COPY --from or RUN --mount names becomes a stage without instructions.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field

from pysingularity.build.dockerfile.state import Reader, State, platform_values
from pysingularity.build.request import DockerBuild
from pysingularity.errors import UserError
from pysingularity.recipe.dockerfile import Dockerfile, DockerStage, Instruction, trigger
from pysingularity.recipe.model import Recipe, Stage
from pysingularity.reference import has_scheme

#: Word behind `Bootstrap:` for a stage that starts from another one.
STAGE = "stage"


@dataclass(frozen=True)
class Picked:
    """A stage of the build.

    Arguments:
        name: for people: behind AS, else the number; of an image, its reference.
        header: as of a definition file; `bootstrap` is an agent, "scratch" or STAGE.
        instructions: in order.
        start: the FROM (or the instruction that names the image), for messages.
        parent: number of the stage that it starts from, -1 for none.
        arch: architecture of its base.
        sources: what --from names → number of the stage.
    """

    name: str
    header: dict[str, str]
    instructions: tuple[Instruction, ...]
    start: Instruction
    parent: int = -1
    arch: str = ""
    sources: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Selection:
    """The stages of a build, those before others that others need; the last is the image.

    Arguments:
        stages: in the order in which they are built.
        reader: applies their instructions.
    """

    stages: list[Picked]
    reader: Reader

    def recipe(self, dockerfile: Dockerfile) -> Recipe:
        """Return the recipe that stands for them."""
        stages = [Stage(header=one.header, line=one.start.line) for one in self.stages]
        return Recipe(stages, dockerfile.file, dockerfile.text, remarks=dockerfile.remarks)


class _Selector:
    def __init__(self, docker: DockerBuild, arch: str) -> None:
        self.docker, self.arch = docker, arch
        self.file = docker.dockerfile
        self.outside = State()
        values = platform_values(arch)
        reader = Reader(self.file, docker.arguments, values)
        self.outside.args.update(values)
        for one in self.file.arguments:
            reader.apply(one, self.outside)
        self.reader = Reader(self.file, docker.arguments, self.outside.args)
        self.reader.used |= reader.used
        self.found: dict[int | str, Picked] = {}
        self.order: list[int | str] = []
        self._parents: dict[int | str, int] = {}
        #: stage → what --from names in it → key of that stage.
        self._keys: dict[int | str, dict[str, int | str]] = {}

    def select(self) -> Selection:
        self._pick(self._target())
        numbers = {key: number for number, key in enumerate(self.order)}
        stages = []
        for key in self.order:
            one = self.found[key]
            sources = {name: numbers[other] for name, other in self._keys[key].items()}
            parent = numbers[self._parents[key]] if key in self._parents else -1
            stages.append(Picked(one.name, one.header, one.instructions, one.start, parent, one.arch, sources))
        return Selection(stages, self.reader)

    def _target(self) -> int:
        wanted = self.docker.target
        if not wanted:
            return len(self.file.stages) - 1
        for number in reversed(range(len(self.file.stages))):
            if self.file.stages[number].name == wanted.lower() or str(number) == wanted:
                return number
        names = ", ".join(stage.name for stage in self.file.stages if stage.name)
        raise UserError(
            "unknown-stage",
            f"--target {wanted}: {self.file.file} has no such stage",
            hint=f"its stages: {names}" if names else "no stage of it has a name: FROM IMAGE AS NAME",
        )

    def _pick(self, number: int) -> None:
        """Take a stage, after all that it needs."""
        if number in self.found:
            return
        stage = self.file.stages[number]
        base = self.reader.word(stage.base, self.outside, stage.start)
        if not base:
            hint = "give the variable a value: ARG NAME=VALUE above FROM, or --build-arg NAME=VALUE"
            raise stage.start.wrong(
                f"FROM {stage.base}: this names nothing", self.file.file, word=stage.base, hint=hint
            )
        arch = self._platform(stage)
        parent = self._earlier(base.lower(), number)
        keys: dict[str, int | str] = {}
        if parent is not None:
            self._pick(parent)
            self._parents[number] = parent
        for one in self._all(stage, parent):
            for name in origins(one, self.file):
                keys[name] = self._source(name, one, number, arch)
        if parent is not None:
            header = {"bootstrap": STAGE, "from": base}
        else:
            header = header_of(base, self.docker.context)
            if arch != self.arch:
                header["platform"] = f"linux/{arch}"
        name = stage.name or str(number)
        self.found[number] = Picked(name, header, stage.instructions, stage.start, -1, arch)
        self._keys[number] = keys
        self.order.append(number)

    def _all(self, stage: DockerStage, parent: int | None) -> Iterator[Instruction]:
        if parent is not None:
            for one in self.file.stages[parent].instructions:
                if one.name == "ONBUILD":
                    yield trigger(one, self.file.file, self.file.escape)
        yield from stage.instructions

    def _earlier(self, name: str, before: int) -> int | None:
        for number in reversed(range(before)):
            if self.file.stages[number].name == name:
                return number
        return None

    def _source(self, name: str, one: Instruction, stage: int, arch: str) -> int | str:
        """Return the key of what --from names, and take it."""
        if "$" in name:
            hint = "write FROM with the variable as a stage of its own, and name that stage"
            raise one.wrong(f"--from={name}: no variables stand here", self.file.file, word=name, hint=hint)
        number = self._earlier(name.lower(), stage)
        if number is None and name.isdigit():
            number = int(name)
            if number >= stage:
                raise one.wrong(f"--from={name}: there is no stage of this number above", self.file.file, word=name)
        if number is not None:
            self._pick(number)
            return number
        if any(later.name == name.lower() for later in self.file.stages):
            hint = "a stage takes from stages above it"
            raise one.wrong(f"--from={name}: this stage stands below", self.file.file, word=name, hint=hint)
        key = f"image {name}"
        if key not in self.found:
            self.found[key] = Picked(name, header_of(name, self.docker.context), (), one, -1, arch)
            self._keys[key] = {}
            self.order.append(key)
        return key

    def _platform(self, stage: DockerStage) -> str:
        if not stage.platform:
            return self.arch
        text = self.reader.word(stage.platform, self.outside, stage.start)
        system, slash, arch = text.partition("/")
        if not slash:
            arch, system = system, "linux"
        if system != "linux" or not arch:
            raise stage.start.wrong(f"--platform={text}: images are of linux/ARCHITECTURE", self.file.file, word=text)
        return {"x86_64": "amd64", "aarch64": "arm64"}.get(arch, arch)


def select(docker: DockerBuild, arch: str) -> Selection:
    """Return the stages that a build needs.

    Raises:
        RecipeError: a FROM or --from that names nothing.
        UserError: --target names no stage.
    """
    return _Selector(docker, arch).select()


def origins(one: Instruction, file: Dockerfile) -> list[str]:
    """Return the stages and images that an instruction takes files from."""
    if one.name in ("COPY", "ADD"):
        return [one.flag("from")] if one.flag("from") else []
    if one.name == "RUN":
        return [options["from"] for options in mounts(one, file) if options.get("from")]
    return []


def mounts(one: Instruction, file: Dockerfile) -> list[dict[str, str]]:
    """Return the options of every --mount of a RUN.

    Raises:
        RecipeError: an unknown type or option.
    """
    known = {
        "bind": "from source target rw",
        "cache": "id target source from sharing mode uid gid ro",
        "tmpfs": "target size",
        "secret": "id target required mode uid gid env",
    }
    other = {"dst": "target", "destination": "target", "src": "source", "readwrite": "rw", "readonly": "ro"}
    found = []
    for text in one.all("mount"):
        options: dict[str, str] = {}
        for part in text.split(","):
            name, equals, value = part.partition("=")
            name = other.get(name.lower(), name.lower())
            options[name] = value if equals else "true"
        kind = options.setdefault("type", "bind")
        if kind == "ssh":
            raise one.wrong(
                "--mount=type=ssh: no agent is passed into builds",
                file.file,
                word=text,
                hint="give a key with --secret and type=secret, or copy the sources before",
                id="mount-missing",
            )
        if kind not in known:
            raise one.wrong(
                f"--mount=type={kind}: no such type", file.file, word=text, hint=f"types: {', '.join(known)}"
            )
        for name in options:
            if name not in ("type", *known[kind].split(), "ro"):
                hint = f"options of type={kind}: {', '.join(known[kind].split())}"
                raise one.wrong(f"--mount=type={kind} has no option {name}", file.file, word=name, hint=hint)
        if kind == "cache" and (options.get("from") or options.get("source")):
            hint = "copy the beginnings with COPY, and keep the cache for what is downloaded"
            raise one.wrong("--mount=type=cache: from and source are not there yet", file.file, word=text, hint=hint)
        if kind in ("cache", "tmpfs") and not options.get("target"):
            raise one.wrong(f"--mount=type={kind} needs target=FOLDER", file.file, word=text)
        if kind == "secret" and not (options.get("id") or options.get("target")):
            raise one.wrong("--mount=type=secret needs id=NAME", file.file, word=text)
        found.append(options)
    return found


def header_of(base: str, context: str) -> dict[str, str]:
    """Return the header of a definition file that starts where FROM says."""
    if base.lower() == "scratch":
        return {"bootstrap": "scratch"}
    if has_scheme(base):
        agent, _, rest = base.partition(":")
        if agent in ("docker-archive", "oci", "oci-archive") and not rest.startswith("/"):
            rest = os.path.join(context, rest)
        return {"bootstrap": agent, "from": rest.removeprefix("//")}
    if base.startswith((".", "/")):
        return {"bootstrap": "localimage", "from": os.path.join(context, base)}
    return {"bootstrap": "docker", "from": base}
