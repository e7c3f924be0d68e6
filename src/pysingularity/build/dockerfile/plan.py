# SPDX-License-Identifier: Apache-2.0
"""The steps of a Dockerfile, each with a hash of what it depends on; what each does is decided when it is due.

A step is what changes files: FROM, RUN, COPY, ADD, WORKDIR. Its hash takes in the step before it, what ENV, ARG, USER
and SHELL said since, its own text, and the content of what it copies from the context; what only describes the image
(LABEL, CMD, EXPOSE …) makes nothing run again. Secrets and proxies are in no hash. What a plan cannot know without the
base image (its environment, its triggers) is covered by the base's digest, which `steps` adds.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from pysingularity.build import plan as plans
from pysingularity.build.dockerfile.context import Files
from pysingularity.build.dockerfile.select import Picked, Selection, mounts, origins, select
from pysingularity.build.dockerfile.state import ACTING, FELT, PROXIES, State
from pysingularity.build.plan import ASSEMBLE, BOOTSTRAP, METADATA, REUSE, Maker, Plan, Step
from pysingularity.build.request import BuildRequest, DockerBuild
from pysingularity.recipe.dockerfile import Instruction
from pysingularity.recipe.dockerignore import Ignore
from pysingularity.recipe.dockerwords import raw_words

#: Kinds of step besides those of definition files.
RUN, COPY, WORKDIR = "run", "copy", "workdir"
#: Room for an instruction in a title.
_TITLE = 60


@dataclass(frozen=True)
class DockerPlan(Plan):
    """A plan for a Dockerfile.

    Arguments:
        selection: the stages.
        positions: number of a step → place of its instruction in its stage.
    """

    selection: Selection = field(default_factory=lambda: Selection([], None))  # type: ignore[arg-type]
    positions: dict[int, int] = field(default_factory=dict)


def make(request: BuildRequest, docker: DockerBuild) -> DockerPlan:
    """Return the plan of a Dockerfile's build.

    Raises:
        RecipeError: an instruction that cannot be followed.
    """
    selection = select(docker, request.arch)
    maker = Maker()
    positions: dict[int, int] = {}
    states: list[State] = []
    with Files(docker.context, Ignore(docker.ignore)) as context:
        for index, stage in enumerate(selection.stages):
            states.append(_Stage(maker, request, docker, selection, index, positions, context).plan(states))
            if index == len(selection.stages) - 1:
                _end(maker, request, stage, index)
    return DockerPlan(maker.steps, selection, positions)


def _end(maker: Maker, request: BuildRequest, stage: Picked, index: int) -> None:
    output = "sandbox" if request.sandbox else "SIF file"
    text = request.recipe.text if request.recipe is not None else ""
    maker.add(METADATA, "configuration, environment and scripts", index, text)
    kind = REUSE if reuses_blocks(request, stage) else ASSEMBLE
    maker.add(kind, f"{output} {request.target}", index, repr(request.writer))


def reuses_blocks(request: BuildRequest, stage: Picked) -> bool:
    """Return whether the last stage only describes the image that it starts from."""
    if request.sandbox or request.fix_perms or stage.header["bootstrap"] in ("scratch", "stage"):
        return False
    return not any(one.name in ACTING for one in stage.instructions)


class _Stage:
    """Steps of one stage."""

    def __init__(
        self,
        maker: Maker,
        request: BuildRequest,
        docker: DockerBuild,
        selection: Selection,
        index: int,
        positions: dict[int, int],
        context: Files,
    ) -> None:
        self.maker, self.request, self.selection, self.index = maker, request, selection, index
        self.stage = selection.stages[index]
        self.positions, self.context = positions, context
        self.docker = docker
        self.felt: list[str] = []

    def plan(self, states: list[State]) -> State:
        """Add the steps; return what the stage says of its image as far as that is known."""
        maker, stage, request = self.maker, self.stage, self.request
        last = self.index == len(self.selection.stages) - 1
        state = states[stage.parent].copy() if stage.parent >= 0 else State({})
        maker.begin()
        if not (last and reuses_blocks(request, stage)):
            header = "\n".join(f"{key}: {stage.header[key]}" for key in sorted(stage.header))
            before = self._last(stage.parent).id if stage.parent >= 0 else ""
            recipe = request.recipe
            base = plans.base_mark(recipe.stages[self.index], request.directory) if recipe is not None else ""
            maker.add(
                BOOTSTRAP,
                self._title(_from(stage)),
                self.index,
                header,
                stage.arch,
                base,
                before,
                sources=self._taken_by(stage),
            )
        first = len(maker.steps)
        for place, one in enumerate(stage.instructions):
            args = dict(state.args)
            self.selection.reader.apply(one, state)
            if one.name in FELT:
                new = {name: value for name, value in state.args.items() if args.get(name) != value}
                self.felt += [one.written(), repr(sorted((n, v) for n, v in new.items() if n not in PROXIES))]
            if one.name in ACTING:
                self._act(place, one, state)
        if request.cache and len(maker.steps) > first:
            # The root behind a stage is kept whatever made it: the image is then made of its blocks.
            maker.steps[-1] = replace(maker.steps[-1], keep=True)
        return state

    def _taken_by(self, stage: Picked) -> tuple[int, ...]:
        """Return the stages that a FROM needs: the one it names, and those that its triggers take files from."""
        if stage.parent < 0:
            return ()
        own = {name for one in stage.instructions for name in origins(one, self.docker.dockerfile)}
        return (stage.parent, *(number for name, number in stage.sources.items() if name not in own))

    def _last(self, index: int) -> Step:
        return next(step for step in reversed(self.maker.steps) if step.stage == index)

    def _title(self, text: str) -> str:
        title = " ".join(text.split())
        title = title if len(title) <= _TITLE else title[: _TITLE - 1] + "…"
        return f"[{self.stage.name}] {title}" if len(self.selection.stages) > 1 else title

    def _act(self, place: int, one: Instruction, state: State) -> None:
        parts = [*self.felt, one.written()]
        self.felt = []
        kind, keep = one.name.lower(), False
        if one.name == "RUN":
            keep = True
            parts += [self.request.ca_bundle, *self.request.binds, *self.request.mounts]
            for options in mounts(one, self.docker.dockerfile):
                if options["type"] == "bind":
                    parts.append(self._taken(options.get("from", ""), [options.get("source", "/")], None))
        elif one.name in ("COPY", "ADD"):
            kind = COPY
            words = one.listed or raw_words(one.text, self.selection.reader.escape)
            sources = [word for word in words[:-1] if not is_heredoc(word) and not is_address(word)]
            keep = any(is_address(word) for word in words[:-1])
            exclude = Ignore(one.all("exclude"))
            if sources:
                parts.append(self._taken(one.flag("from"), self._names(sources, state, one), exclude))
        text = one.source.strip() if one.name != "RUN" or not one.heredocs else f"RUN {_inside(one)}"
        title = self._title(text.removesuffix("\\"))
        others = tuple(self.stage.sources[name] for name in origins(one, self.docker.dockerfile))
        keep = keep and self.request.cache
        step = self.maker.add(kind, title, self.index, *parts, keep=keep, sources=others)
        self.positions[step.number] = place

    def _names(self, words: list[str], state: State, one: Instruction) -> list[str]:
        reader = self.selection.reader
        before = set(reader.missing)
        reader.missing.clear()
        names = [reader.word(word, state, one) for word in words]
        unknown = bool(reader.missing) and self.stage.header["bootstrap"] != "scratch"
        reader.missing |= before
        # A variable that only the base image may set: then whatever could be meant counts.
        return ["/"] if unknown else names

    def _taken(self, origin: str, names: list[str], exclude: Ignore | None) -> str:
        """Return a hash of what is taken: of content for the context, of the last step for a stage."""
        if origin:
            number = self.stage.sources.get(origin, -1)
            return f"{origin}:{self._last(number).id}:{names}" if number >= 0 else origin
        return self.context.digest(names, exclude)


def is_heredoc(word: str) -> bool:
    """Return whether a word of COPY stands for a here-document."""
    return word.lstrip("0123456789").startswith("<<")


def is_address(word: str) -> bool:
    """Return whether a word of ADD is an address."""
    return word.startswith(("http://", "https://", "git@", "git://", "ssh://"))


def _inside(one: Instruction) -> str:
    """Return the first line of a script that says something."""
    lines = [line.strip() for doc in one.heredocs for line in doc.content.splitlines()]
    said = next((line for line in lines if line and not line.startswith("#") and not line.startswith("set ")), "")
    return f"{one.text} {said}".strip()


def _from(stage: Picked) -> str:
    header = stage.header
    if header["bootstrap"] == "scratch":
        return "FROM scratch"
    agent = header["bootstrap"]
    return f"FROM {header['from']}" if agent in ("docker", "stage", "localimage") else f"FROM {agent}:{header['from']}"
