# SPDX-License-Identifier: Apache-2.0
"""The frame of a build: the folders of its stages, the events around its steps, and what the cache spares.

What the steps do is `finish` (the end of the last stage, and builds without a recipe) and `execute` (all before).
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, ClassVar

from pysingularity import events
from pysingularity.build import bootstrap, container, overlaid, plan, space, worker
from pysingularity.build.files import Copier
from pysingularity.build.history import record
from pysingularity.build.plan import Plan, Step
from pysingularity.build.request import IMAGE, RECIPE, BuildRequest
from pysingularity.build.steps import Snapshot, StepStore, salt
from pysingularity.cache import Cache
from pysingularity.errors import InternalError, RecipeError, UserError
from pysingularity.image import output
from pysingularity.linux.ownership import RecordedOwners
from pysingularity.recipe.model import Recipe, Stage

if TYPE_CHECKING:
    from pysingularity.build.bootstrap import BootstrapResult, Owners
    from pysingularity.image.assemble import Written
    from pysingularity.runtime.rootless import Way


def become(request: BuildRequest, *, quiet: bool = False) -> Way:
    """Become root by the best way, and say how unless that has been said."""
    from pysingularity.runtime.rootless import become_root  # with the runtime

    return become_root(environ=request.environ, quiet=quiet)


class Frame:
    """The worker's work.

    Arguments:
        request, steps: what to do.
        tell: takes events, and has the descriptor that programs print to.
        place: temporary folder.
        watcher: pid of the watching process.
    """

    #: Kind of step → what does it; returns the step's status, None for done.
    actions: ClassVar[dict[str, Callable[..., str | None]]] = {}

    def __init__(self, request: BuildRequest, steps: Plan, tell: worker.Channel, place: str, watcher: int) -> None:
        self.request, self.steps, self.tell, self.place, self.watcher = request, steps, tell, place, watcher
        self.begun = time.monotonic()
        self.roots: dict[int, str] = {}
        self.results: dict[int, BootstrapResult] = {}
        self.names: dict[str, int] = {}
        self.post_labels = ""
        self.stores: dict[int, StepStore | None] = {}
        self.snapshots: dict[int, Snapshot] = {}
        #: stage → last step that the cache spares us.
        self.spared: dict[int, int] = {}
        #: Stages that nobody takes anything from, because the cache spares the steps that would.
        self.unneeded: set[int] = set()
        #: Stages whose last snapshot is still to be unpacked, when somebody takes something from them.
        self.packed: set[int] = set()
        #: Stages with a step that ran while the network failed.
        self.doubtful: set[int] = set()
        self._marks: dict[int, str] = {}
        self._fetched: dict[str, str] = {}
        #: The last stage came from the cache and nothing has needed it on disk yet.
        self.folded = False
        self.told: set[str] = set()
        self.written: Written | None = None
        self.step = steps.steps[0]
        self._way: Way | None = None

    def run(self, left: list[str]) -> None:
        """Do everything, and tell how it ended."""
        request = self.request
        failed = True
        try:
            if request.kind != IMAGE or not request.sandbox or request.fakeroot:
                self._way = become(request)
                worker.still_watched(self.watcher)
            for path in left:
                output.remove_tree(path)
            self.tell(events.Event("plan", {"steps": [step.value() for step in self.steps.steps]}))
            with contextlib.ExitStack() as stack:
                self._prepare(stack)
                self._decide()
                self._check_signatures()
                for step in self.steps.steps:
                    self._do(step)
                self._publish()
            failed = False
        finally:
            if request.cleanup or not failed:
                overlaid.take_off_below(self.place)
                output.remove_tree(self.place)
            else:
                self._message("warning", f"temporary files are kept in {self.place}")
        self.tell(events.Event("result", self._result()))

    @property
    def way(self) -> Way:
        """How this process is root."""
        if self._way is None:
            raise InternalError("no-way", "a step needs root and nobody became it")
        return self._way

    @property
    def recipe(self) -> Recipe:
        """The definition file."""
        if self.request.recipe is None:
            raise InternalError("no-recipe", "a step of a recipe without a recipe")
        return self.request.recipe

    def _result(self) -> dict[str, object]:
        target = self.request.target
        size = os.path.getsize(target) if os.path.isfile(target) else 0
        fields: dict[str, object] = {"path": target, "size": size}
        fields["seconds"] = round(time.monotonic() - self.begun, 2)
        known = [one for _, one in sorted(self.results.items()) if one.digest and "://" in one.source]
        if known:
            fields["bases"] = [{"uri": one.source, "digest": one.digest} for one in known]
        if self.written is not None and self.written.identity:
            fields.update({"id": self.written.identity, "partitionDigest": self.written.partition_digest})
        return fields

    def _prepare(self, stack: contextlib.ExitStack) -> None:
        """Make the root folders of all stages; the last one's is the target itself for a sandbox."""
        request = self.request
        self._folder: output.OutputFolder | None = None
        if request.kind != RECIPE:
            return
        last = len(self.recipe.stages) - 1
        for index in range(last + 1):
            path = os.path.join(self.place, f"stage{index}")
            if index == last and request.update:
                path = request.target
            elif index == last and request.sandbox:
                self._folder = stack.enter_context(output.OutputFolder(request.target, force=request.force))
                path = self._folder.partial
            else:
                os.mkdir(path)
            if path != request.target:
                # Other users of the container (apt's own) have to get through the root folder.
                os.chmod(path, 0o755)
            self.roots[index] = path

    def _publish(self) -> None:
        if self._folder is not None:
            record.keep(self._folder.partial, "")
            self._folder.publish()

    def _do(self, step: Step) -> None:
        self.step = step
        begun, used = time.monotonic(), sum(os.times()[:4])

        def end(status: str) -> None:
            fields: dict[str, object] = {"step": step.number, "status": status}
            fields["seconds"] = round(time.monotonic() - begun, 3)
            fields["cpu"] = round(sum(os.times()[:4]) - used, 3)
            self.tell(events.Event("end", fields))

        try:
            self.tell(events.Event("start", {"step": step.number, "kind": step.kind, "title": step.title}))
            if step.stage in self.unneeded:
                status = "cached"
            elif step.number <= self.spared[step.stage]:
                status = "cached"
                if step.number == self.spared[step.stage]:
                    self._restore(step)
            else:
                status = self.actions[step.kind](self, step) or "done"
        except BaseException:
            end("failed")
            raise
        end(status)

    def _message(self, level: str, text: str) -> None:
        self.tell(events.Event("message", {"step": self.step.number, "level": level, "text": text}))

    def _progress(self) -> events.Progress:
        return events.Progress(self.tell, self.step.number)

    def _advance(self, text: str) -> Callable[[int], None]:
        """Return a function that takes numbers of bytes and tells their sum."""
        progress, done = self._progress(), 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            progress.step = self.step.number  # a store of steps lives longer than the step it was made in
            progress(text, done)

        return advance

    def _stage(self, step: Step) -> Stage:
        return self.recipe.stages[step.stage]

    def _owners(self, root: str) -> Owners:
        """Return what keeps owners in a root: records of a sandbox stay with it."""
        owners = self.way.owners
        if isinstance(owners, RecordedOwners) and root in (self.request.target, self._partial()):
            return owners.at(root)
        return owners

    def _partial(self) -> str:
        return self._folder.partial if self._folder is not None else ""

    def _container(self, step: Step) -> container.BuildContainer:
        request = self.request
        support = os.path.join(self.place, f"support{step.number}")
        os.makedirs(support, exist_ok=True)
        os.chmod(support, 0o755)
        return container.BuildContainer(
            self.roots[step.stage],
            way=self.way,
            support=support,
            environ=request.environ,
            binds=container.user_mounts(request.binds, request.mounts),
            ca_bundle=request.ca_bundle,
            output=self.tell.output,
            nv=request.nv,
        )

    def _decide(self) -> None:
        """Find out what the cache spares: steps from the beginning of a stage, and whole stages."""
        count = len(self.recipe.stages) if self.request.kind == RECIPE else 0
        self.spared = dict.fromkeys(range(-1, count), 0)
        self.stores = dict.fromkeys(range(-1, count))
        if not any(step.keep for step in self.steps.steps):
            return
        cache = Cache.open(self.request.environ, disabled="disable-cache" in self.request.options)
        if cache is None:
            return
        taken = {number for index in range(count) for number in self.steps.sources_of(index)}
        wanted = [index for index in range(count) if index not in taken]
        needed: set[int] = set()
        while wanted:
            index = wanted.pop()
            if index not in needed:
                needed.add(index)
                self._look_up(index, cache)
                wanted += self.steps.sources_of(index, after=self.spared[index])
        self.unneeded = set(range(count)) - needed

    def _check_signatures(self) -> None:
        """Make sure that bases are signed by those whom their headers name, before anything is made of them.

        Raises:
            UserError: the agent's images carry no signatures. ImageError: one is missing or wrong.
        """
        if self.request.kind != RECIPE or self.request.update:
            return
        for index, stage in enumerate(self.recipe.stages):
            text = stage.header.get("fingerprints", "")
            if not text.strip() or index in self.unneeded:
                continue
            from pysingularity.trust.signatures import fingerprints, require  # only when somebody asks for it

            path = self._base_path(stage) if stage.agent in ("localimage", "library", "oras", "shub") else ""
            if not path or os.path.isdir(path):
                raise UserError(
                    "no-signatures",
                    f"Fingerprints: {path or 'an image of ' + stage.agent} carries no signatures, as a SIF file does",
                    hint="start from a SIF file; an image of a registry can be named by its digest: NAME@sha256:...",
                )
            require(path, fingerprints(text), self.request.environ, self.place)

    def _mark(self, stage: int) -> str:
        """Return what the steps of a stage depend on beyond the plan."""
        if stage not in self._marks:
            one = self.recipe.stages[stage]
            base = self._base_path(one) if bootstrap.AGENTS.get(one.agent) == "remote" else ""
            others = [self._mark(number) for number in self.steps.sources_of(stage)]
            self._marks[stage] = salt(base, self.way.emulation, others)
        return self._marks[stage]

    def _look_up(self, stage: int, cache: Cache) -> None:
        """Find the last step of a stage whose result the cache has."""
        kept = [step for step in self.steps.of_stage(stage) if step.keep]
        if not kept:
            return
        advance = self._advance("keeping this step")
        store = StepStore(cache, self._mark(stage), self.request.writer, self.way.owners, advance)
        self.stores[stage] = store
        for step in reversed(kept):
            found = store.find(step)
            if found is not None:
                self.spared[stage] = step.number
                self.snapshots[stage] = found
                break

    def _restore(self, step: Step) -> None:
        """Bring the root behind a cached step to disk, unless nothing but the image's blocks will be needed of it."""
        store = self.stores[step.stage]
        if store is None:
            return
        stage = self._stage(step)
        self.post_labels = store.labels(step)
        if stage.name:
            self.names.setdefault(stage.name, step.stage)
        rest = [one.kind for one in self.steps.of_stage(step.stage) if one.number > step.number]
        if not rest:
            self.packed.add(step.stage)
            return
        if not self.request.sandbox and set(rest) <= {plan.METADATA, plan.TEST, plan.ASSEMBLE}:
            self.folded = True
            return
        self._bring_back(step.stage)

    def _bring_back(self, stage: int) -> None:
        """Bring the last snapshot of a stage to disk."""
        store = self.stores[stage]
        if store is not None:
            store.restore(self.snapshots[stage], self.roots[stage], plain=self._stays(self.roots[stage]))

    def _stays(self, root: str) -> bool:
        """Return whether somebody may want to see a root when this process has ended."""
        return root in (self.request.target, self._partial()) or not self.request.cleanup

    def _again(self, step: Step) -> bool:
        """Prepare for running a failed program once more, where a plain folder may be what it misses.

        A folder of a mounted snapshot cannot be renamed, and not every program copies it then.
        """
        store, snapshot = self.stores.get(step.stage), self.snapshots.get(step.stage)
        if store is None or snapshot is None or not store.laid_over or not self.tell.rename_failed():
            return False
        self._message("warning", "a folder of an earlier step could not be renamed: this step begins anew, unpacked")
        store.unpack_after_all(snapshot, self.roots[step.stage])
        return True

    def _root(self, stage: int) -> str:
        """Return the root of another stage, unpacked."""
        store = self.stores.get(stage)
        if stage in self.packed and store is not None:
            self.packed.discard(stage)
            self._bring_back(stage)
        return self.roots[stage]

    def _keep(self, step: Step, labels: str) -> None:
        """Put the root behind a step into the cache, when it is to be kept and nothing speaks against it."""
        store = self.stores.get(step.stage)
        self.snapshots.pop(step.stage, None)
        if not self.doubtful.isdisjoint(self.steps.sources_of(step.stage)):
            self.doubtful.add(step.stage)
        if not step.keep or store is None or step.stage in self.doubtful:
            return
        if self.tell.network_failed():
            # Neither this step nor what is built on it: it may be different tomorrow.
            self.doubtful.add(step.stage)
            self._message("warning", "this step is not kept in the cache: a program of it spoke of a failed network")
            return
        kept = store.keep(step, self.roots[step.stage], labels)
        if kept is not None:
            self.snapshots[step.stage] = kept

    def _hint(self, hint: str, root: str) -> str:
        """Return a hint for a program that failed in a root, or the one reason that explains everything."""
        if overlaid.server_ended(root):
            return "the process that reads the kept step has ended: was it killed, or is memory short? See: dmesg"
        if space.free(root) < 1 << 20:
            return f"there is no space left in {os.path.dirname(root)}: set SINGULARITY_TMPDIR to another folder"
        return hint

    def _check(self, status: int, step: Step, section: str) -> None:
        if not status:
            return
        root = self.roots[step.stage]
        hint = "the last line of its output tells why"
        if section == "post":
            hint += "; --debug-shell opens a shell there"
        elif section == "test":
            hint += "; --notest builds without it"
        hint = self._hint(hint, root)
        what = f"was ended by signal {status - 128}" if status > 128 else f"ended with status {status}"
        line = self._stage(step).line_of(section)
        raise RecipeError("section-failed", f"%{section} {what}", file=self.recipe.file, line=line, hint=hint)

    @contextlib.contextmanager
    def _copier(self, root: str, is_folder: Callable[[str], bool] | None = None) -> Iterator[Copier]:
        progress = self._progress()

        def advance(name: str, done: int) -> None:
            progress(name, done)

        with Copier(
            root,
            directory=self.request.directory,
            is_folder=is_folder,
            progress=advance,
            file=self.recipe.file,
        ) as copier:
            yield copier

    def _base_path(self, stage: Stage) -> str:
        if stage.agent == "localimage":
            name = stage.header.get("from", "").strip()
            if not name:
                raise UserError("keyword-missing", "Bootstrap: localimage needs the keyword From")
            return os.path.join(self.request.directory, name)
        from pysingularity.build.bootstrap.remote import options_of, reference_text

        return self._fetch(reference_text(stage.header), options_of(stage.header, self.request.options))

    def _fetch(self, text: str, options: Mapping[str, object] | None = None) -> str:
        from pysingularity.build.bootstrap.remote import fetch_text

        options = self.request.options if options is None else options
        key = f"{text} {options.get('arch', '')}"
        if key not in self._fetched:
            # Without a cache the image is made in the temporary folder, and goes with it.
            environ = {**self.request.environ, "SINGULARITY_TMPDIR": self.place}
            self._fetched[key] = fetch_text(text, options, environ, self._progress())
        return self._fetched[key]
