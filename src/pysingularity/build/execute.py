# SPDX-License-Identifier: Apache-2.0
"""Carry out a plan: one method per kind of step, in a worker that is root in its own namespace.

The order is the plan's. Nothing appears at the target before everything has succeeded, and whatever happens the
temporary folder goes away: removed by the worker, by the watching process when the worker was killed, or by the next
build when both were.
"""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from pysingularity import events
from pysingularity.build import bootstrap, container, plan, space, worker
from pysingularity.build.files import Copier
from pysingularity.build.plan import Plan, Step
from pysingularity.build.request import IMAGE, RECIPE, SANDBOX, BuildRequest
from pysingularity.build.sections import app_entries, metadata_entries
from pysingularity.build.steps import StepStore, salt
from pysingularity.cache import Cache, cache_folder
from pysingularity.errors import InternalError, RecipeError, UserError
from pysingularity.image import metadata, output
from pysingularity.image.entries import Entry, put_into_folder
from pysingularity.image.inside import FolderSource, OverlaidSource, source_of
from pysingularity.image.open import open_image
from pysingularity.linux.ownership import RecordedOwners
from pysingularity.recipe.model import Recipe, Stage
from pysingularity.recipe.sections import file_pairs, shell_of

if TYPE_CHECKING:
    from pysingularity.build.bootstrap import BootstrapResult, Owners
    from pysingularity.image.assemble import Written
    from pysingularity.image.inside import Source
    from pysingularity.runtime.rootless import Way

#: Room that a build needs at least, besides what its base takes.
LEAST_ROOM = 64 << 20
#: How much larger than its compressed file an image is on disk, by experience.
UNPACKED = 3


def build(request: BuildRequest, steps: Plan, listen: events.Listener) -> events.Event:
    """Build an image and return the result event (path, size, seconds).

    Raises:
        SingularityError: the build failed; nothing was written.
        Terminated: a signal ended the build; nothing was written.
    """
    output.check_target(request.target, force=request.force or request.update, folder=request.sandbox)
    parent = space.choose(request.environ)
    space.need(parent, LEAST_ROOM, "the build")
    left = space.abandoned(parent)
    place = space.Workplace(parent)
    watcher = os.getpid()

    def work(channel: worker.Channel) -> None:
        _Builder(request, steps, channel, place.path, watcher).run(left)

    def clean() -> None:
        become(request)
        if request.cleanup:
            output.remove_tree(place.path)
        output.sweep(request.target)

    try:
        return worker.carry_out(work, listen, clean)
    finally:
        place.close()
        if request.cleanup and os.path.isdir(place.path):
            worker.in_child(clean)


def become(request: BuildRequest) -> Way:
    """Become root by the best way, and say how."""
    from pysingularity.runtime.rootless import become_root  # with the runtime

    return become_root(environ=request.environ)


class _Builder:
    """The worker's work.

    Arguments:
        request, steps: what to do.
        tell: takes events, and has the descriptor that programs print to.
        place: temporary folder.
        watcher: pid of the watching process.
    """

    def __init__(self, request: BuildRequest, steps: Plan, tell: worker.Channel, place: str, watcher: int) -> None:
        self.request, self.steps, self.tell, self.place, self.watcher = request, steps, tell, place, watcher
        self.begun = time.monotonic()
        self.roots: dict[int, str] = {}
        self.results: dict[int, BootstrapResult] = {}
        self.names: dict[str, str] = {}
        self.post_labels = ""
        self.stores: dict[int, StepStore | None] = {}
        self.snapshots: dict[int, str] = {}
        #: stage → last step that the cache spares us.
        self.spared: dict[int, int] = {}
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
                for step in self.steps.steps:
                    if step.stage not in self.spared:
                        self._look_up(step.stage)
                    self._do(step)
                self._publish()
            failed = False
        finally:
            if request.cleanup or not failed:
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
        if self.written is not None and self.written.identity:
            fields.update({"id": self.written.identity, "partitionDigest": self.written.partition_digest})
        return fields

    # -- the frame around the steps

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
            self._folder.publish()

    def _do(self, step: Step) -> None:
        self.step = step
        begun = time.monotonic()
        self.tell(events.Event("start", {"step": step.number, "kind": step.kind, "title": step.title}))

        def end(status: str) -> None:
            took = round(time.monotonic() - begun, 3)
            self.tell(events.Event("end", {"step": step.number, "status": status, "seconds": took}))

        try:
            if step.number <= self.spared[step.stage]:
                status = "cached"
                if step.number == self.spared[step.stage]:
                    self._restore(step)
            else:
                status = ACTIONS[step.kind](self, step) or "done"
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

    # -- steps from the cache

    def _look_up(self, stage: int) -> None:
        """Find the last step of a stage whose result the cache has."""
        self.spared[stage] = 0
        kept = [step for step in self.steps.of_stage(stage) if step.keep]
        cache = Cache.open(self.request.environ, disabled="disable-cache" in self.request.options) if kept else None
        if cache is None:
            self.stores[stage] = None
            return
        one = self.recipe.stages[stage]
        base = self._base_path(one) if bootstrap.AGENTS.get(one.agent) == "remote" else ""
        mark = salt(base, self.way.emulation)
        store = StepStore(cache, mark, self.request.writer, self.way.owners, self._advance("keeping this step"))
        self.stores[stage] = store
        for step in reversed(kept):
            path = store.find(step)
            if path is not None:
                self.spared[stage] = step.number
                self.snapshots[stage] = path
                break

    def _restore(self, step: Step) -> None:
        """Bring the root behind a cached step to disk, unless nothing but the image's blocks will be needed of it."""
        store = self.stores[step.stage]
        if store is None:
            return
        stage = self._stage(step)
        self.post_labels = store.labels(step)
        if stage.name:
            self.names[stage.name] = self.roots[step.stage]
        rest = [one.kind for one in self.steps.of_stage(step.stage) if one.number > step.number]
        if not self.request.sandbox and rest and set(rest) <= {plan.METADATA, plan.TEST, plan.ASSEMBLE}:
            self.folded = True
            return
        store.restore(self.snapshots[step.stage], self.roots[step.stage])

    def _unfold(self, step: Step) -> None:
        """Bring the last stage to disk after all."""
        store = self.stores.get(step.stage)
        if not self.folded or store is None:
            return
        self.folded = False
        store.restore(self.snapshots[step.stage], self.roots[step.stage])
        with FolderSource(self.roots[step.stage]) as source:
            entries = self._entries(step, source)
        put_into_folder(self.roots[step.stage], entries)

    # -- steps of a stage

    def _host_script(self, step: Step) -> None:
        """%pre and %setup: on the host, as the root of our namespace, with the caller's environment."""
        stage, name = self._stage(step), step.kind
        script = os.path.join(self.place, f"{name}{step.stage}")
        with open(script, "w", encoding="utf-8", errors="surrogateescape") as stream:
            stream.write(stage.body(name))
        root = self.roots[step.stage]
        variables = {f"{prefix}_ROOTFS": root for prefix in ("SINGULARITY", "APPTAINER")}
        variables |= {
            f"{prefix}_ENVIRONMENT": f"{root}/{metadata.POST_ENVIRONMENT}" for prefix in ("SINGULARITY", "APPTAINER")
        }
        process = subprocess.Popen(
            ["/bin/sh", "-ex", script],
            env={**self.request.environ, **variables},
            cwd=self.request.directory,
            stdin=subprocess.DEVNULL,
            stdout=self.tell.output,
            stderr=self.tell.output,
            start_new_session=True,
        )
        try:
            status = process.wait()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self._check(status if status >= 0 else 128 - status, step, name)

    def _bootstrap(self, step: Step) -> None:
        request, stage, root = self.request, self._stage(step), self.roots[step.stage]
        self._room(stage)
        cache = os.path.join(cache_folder(request.environ), "packages")
        tmp = os.path.join(self.place, f"tmp{step.stage}")
        os.makedirs(tmp, exist_ok=True)
        with contextlib.suppress(OSError):  # without a cache everything is fetched again
            os.makedirs(cache, mode=0o700, exist_ok=True)
        inside = self._container(step)

        def run(
            argv: Sequence[str],
            *,
            env: Mapping[str, str] | None = None,
            binds: Sequence[str] = (),
            cwd: str = "/",
        ) -> int:
            return inside.run(argv, env=env, binds=binds, cwd=cwd, with_environment=False)

        usable = os.access(cache, os.W_OK) and "disable-cache" not in request.options
        asked = bootstrap.BootstrapRequest(
            header=dict(stage.header),
            root=root,
            way=self.way,
            cache=cache if usable else tmp,
            tmp=tmp,
            progress=self._progress(),
            run=run,
            arch=request.arch,
            options=request.options,
            environ=request.environ,
            directory=request.directory,
        )
        self.results[step.stage] = bootstrap.agent(stage.agent)(asked)
        if not os.listdir(root) and stage.agent != "scratch":
            raise InternalError("empty-root", f"Bootstrap: {stage.agent} left an empty root file system")
        put_into_folder(root, metadata.base_entries())
        if stage.name:
            self.names[stage.name] = root

    def _room(self, stage: Stage) -> None:
        """Refuse a base that will not fit before it is unpacked."""
        if stage.agent != "localimage":
            return
        path = os.path.join(self.request.directory, stage.header.get("from", ""))
        if os.path.isfile(path):
            place = os.path.dirname(self._partial()) or self.place
            space.need(place, UNPACKED * os.path.getsize(path), f"unpacking {path}")

    def _apps(self, step: Step) -> None:
        stage = self._stage(step)
        put_into_folder(self.roots[step.stage], app_entries(stage))
        for app in stage.apps:
            pairs = file_pairs(stage, self.recipe.file, app)
            with self._copier(self.roots[step.stage]) as copier:
                for pair in pairs:
                    copier.copy(pair, base=f"/scif/apps/{app}")

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

    def _files(self, step: Step) -> None:
        inner = step.kind == plan.STAGE_FILES
        remarks: list[str] = []
        pairs = file_pairs(self._stage(step), self.recipe.file, remarks=remarks)
        with self._copier(self.roots[step.stage]) as copier:
            for pair in pairs:
                if bool(pair.stage) == inner:
                    copier.copy(pair, stage=self.names[pair.stage] if inner else "")
        for remark in remarks:
            self._message("warning", remark)

    def _post(self, step: Step) -> None:
        stage, root = self._stage(step), self.roots[step.stage]
        inside = self._container(step)
        before = container.scratch_names(root)
        script = inside.script("post", step.text)
        inside.script("labels", "")
        shell = shell_of(stage.arguments("post"))
        argv = ["/bin/sh", "-ex", *(["-c", f"{shell} {script}"] if shell else [script])]
        env = {
            f"{prefix}_{name}": value
            for prefix in ("SINGULARITY", "APPTAINER")
            for name, value in (
                ("ENVIRONMENT", f"/{metadata.POST_ENVIRONMENT}"),
                ("LABELS", f"{container.PRIVATE}/labels"),
                ("CONTAINER", os.path.basename(self.request.target)),
                ("NAME", os.path.basename(self.request.target)),
            )
        }
        try:
            status = inside.run(argv, env=env)
            if status and self.request.debug_shell:
                self._debug_shell(inside, env, status)
        finally:
            container.clear_scratch(root, before)
        self._check(status, step, "post")
        with open(inside.outside("labels"), encoding="utf-8", errors="surrogateescape") as stream:
            self.post_labels += stream.read(1 << 20)
        with FolderSource(root) as source:
            text = source.read(metadata.POST_ENVIRONMENT)
        if text is not None:
            put_into_folder(root, [Entry.file(metadata.POST_ENVIRONMENT, text, 0o755)])
        store = self.stores.get(step.stage)
        if step.keep and store is not None:
            kept = store.keep(step, root, self.post_labels)
            self.snapshots.pop(step.stage, None)
            if kept is not None:
                self.snapshots[step.stage] = kept

    def _debug_shell(self, inside: container.BuildContainer, env: dict[str, str], status: int) -> None:
        """Let the person look at a failed %post, where a terminal is there."""
        if not os.isatty(0):
            self._message("warning", "--debug-shell needs a terminal")
            return
        self._message("warning", f"%post ended with status {status}; this is its container, leave it with: exit")
        before = signal.signal(signal.SIGTTOU, signal.SIG_IGN)
        group = os.tcgetpgrp(0)
        try:
            os.tcsetpgrp(0, os.getpgrp())
            inside.run(["/bin/sh", "-i"], env=env, stdin=0, output=2)
        finally:
            os.tcsetpgrp(0, group)
            signal.signal(signal.SIGTTOU, before)

    def _check(self, status: int, step: Step, section: str) -> None:
        if not status:
            return
        root = self.roots[step.stage]
        hint = "the last line of its output tells why; --debug-shell opens a shell there" if section == "post" else ""
        if space.free(root) < 1 << 20:
            hint = f"there is no space left in {os.path.dirname(root)}: set SINGULARITY_TMPDIR to another folder"
        what = f"was ended by signal {status - 128}" if status > 128 else f"ended with status {status}"
        line = self._stage(step).line_of(section)
        raise RecipeError("section-failed", f"%{section} {what}", file=self.recipe.file, line=line, hint=hint)

    # -- the end of the last stage

    def _entries(self, step: Step, source: Source) -> list[Entry]:
        request, stage = self.request, self._stage(step)
        when = output.epoch(request.environ)
        result = self.results.get(step.stage)
        entries, remarks = metadata_entries(
            self.recipe,
            stage,
            source,
            wanted=request.wanted,
            when=int(time.time()) if when is None else when,
            arch=request.arch,
            force=request.force,
            base_labels=result.labels if result is not None else None,
            post_labels=self.post_labels,
        )
        for remark in remarks:
            if remark not in self.told:
                self._message("warning", remark)
        self.told.update(remarks)
        return entries

    def _metadata(self, step: Step) -> None:
        if self.steps.has(plan.REUSE) or self.folded:
            return
        root = self.roots[step.stage]
        with FolderSource(root) as source:
            entries = self._entries(step, source)
        put_into_folder(root, entries)
        if self.request.fix_perms:
            fix_permissions(root)

    def _test(self, step: Step) -> str | None:
        store = self.stores.get(step.stage)
        if self.folded and store is not None and store.passed(step):
            return "cached"
        self._unfold(step)
        inside = self._container(step)
        status = inside.run([f"/{metadata.TEST}"], writable=self.request.writable_tmpfs)
        self._check(status, step, "test")
        if store is not None:
            store.remember_passed(step)
        return None

    def _assemble(self, step: Step) -> None:
        if self.request.sandbox:
            return
        snapshot = self.snapshots.get(step.stage)
        if snapshot is not None and not self.request.fix_perms:
            self._assemble_from(step, snapshot)
            return
        self._unfold(step)
        from pysingularity.image.convert import assemble_sif  # with the squashfs writer

        request, root = self.request, self.roots[step.stage]
        writer = request.writer
        self.written = assemble_sif(
            root,
            request.target,
            definition=self.recipe.text.encode("utf-8", "surrogateescape"),
            oci_config=self._oci_config(step),
            arch=request.arch,
            owners=self.way.owners,
            compression=writer.compression or "gzip",
            level=writer.level,
            block_size=writer.block_size,
            threads=writer.threads,
            force=request.force,
            progress=self._advance("compressing"),
            say=lambda text: self._message("warning", text),
        )

    def _oci_config(self, step: Step) -> bytes | None:
        """Return the OCI configuration of the base image, also when its unpacking was spared."""
        result, stage = self.results.get(step.stage), self._stage(step)
        if result is not None:
            return result.oci_config
        if stage.agent != "localimage" and bootstrap.AGENTS.get(stage.agent) != "remote":
            return None
        with open_image(self._base_path(stage)) as image:
            return metadata.oci_config_of(image)

    def _assemble_from(self, step: Step, snapshot: str) -> None:
        """Make the image of the snapshot behind the last step: its blocks are copied, only metadata is new."""
        from pysingularity.image.convert import with_changes  # with the squashfs writer

        request = self.request
        with open_image(snapshot) as image:
            with source_of(image) as source:
                entries = self._entries(step, source)
            image.arch = request.arch
            self.written = with_changes(
                image,
                request.target,
                entries=entries,
                definition=self.recipe.text.encode("utf-8", "surrogateescape"),
                oci_config=self._oci_config(step),
                compression=request.writer.compression,
                level=request.writer.level,
                threads=request.writer.threads,
                force=request.force,
                progress=self._advance("copying"),
            )

    def _reuse(self, step: Step) -> None:
        """Copy the base image's compressed blocks; only files and metadata are new."""
        from pysingularity.image.convert import with_changes  # with the squashfs writer

        request, stage = self.request, self._stage(step)
        path = self._base_path(stage)
        staged = self.roots[step.stage]
        with open_image(path) as image:
            if image.filesystem != "squashfs":
                raise UserError(
                    "not-squashfs",
                    f"{path}: nothing can be added to an image of this kind without unpacking it",
                    hint="give the recipe a %post section (it may be empty but for a comment), or convert the image",
                )
            with source_of(image) as below:
                with self._copier(staged, is_folder=lambda name: below.is_folder(name.lstrip("/"))) as copier:
                    if "files" in request.wanted:
                        for pair in file_pairs(stage, self.recipe.file):
                            copier.copy(pair)
                    for app in stage.apps:
                        for pair in file_pairs(stage, self.recipe.file, app):
                            copier.copy(pair, base=f"/scif/apps/{app}")
                apps = app_entries(stage)
                entries = [*apps, *self._entries(step, OverlaidSource([below], apps))]
            self.written = with_changes(
                image,
                request.target,
                entries=entries,
                staged=staged,
                definition=self.recipe.text.encode("utf-8", "surrogateescape"),
                compression=request.writer.compression,
                level=request.writer.level,
                threads=request.writer.threads,
                force=request.force,
                progress=self._advance("copying"),
            )

    def _base_path(self, stage: Stage) -> str:
        if stage.agent == "localimage":
            name = stage.header.get("from", "").strip()
            if not name:
                raise UserError("keyword-missing", "Bootstrap: localimage needs the keyword From")
            return os.path.join(self.request.directory, name)
        from pysingularity.build.bootstrap.remote import reference_text

        return self._fetch(reference_text(stage.header))

    def _fetch(self, text: str) -> str:
        from pysingularity.build.bootstrap.remote import fetch_text

        # Without a cache the image is made in the temporary folder, and goes with it.
        environ = {**self.request.environ, "SINGULARITY_TMPDIR": self.place}
        return fetch_text(text, self.request.options, environ, self._progress())

    # -- builds without a recipe

    def _convert(self, step: Step) -> None:  # noqa: ARG002
        from pysingularity.image import convert  # with the squashfs writer

        request = self.request
        source = request.spec if request.kind in (IMAGE, SANDBOX) else self._fetch(request.spec)
        advance = self._advance("reading")
        if not request.sandbox:
            self.written = convert.to_file(
                source,
                request.target,
                compression=request.writer.compression,
                level=request.writer.level,
                threads=request.writer.threads,
                force=request.force,
                owners=self._way.owners if self._way is not None else None,
                progress=advance,
                say=lambda text: self._message("warning", text),
            )
            return
        with output.OutputFolder(request.target, force=request.force) as folder:
            os.chmod(folder.partial, 0o755)
            with open_image(source) as image:
                if image.kind == "sandbox":
                    from pysingularity.build.clone import clone

                    clone(source, folder.partial, self.way.owners, advance)
                else:
                    owner = self._owners(folder.partial) if request.fakeroot else None
                    convert.unpack_into(image, folder.partial, owner=owner, progress=advance)
            if request.fix_perms:
                fix_permissions(folder.partial)
            folder.publish()


ACTIONS: dict[str, Callable[[_Builder, Step], str | None]] = {
    plan.PRE: _Builder._host_script,
    plan.BOOTSTRAP: _Builder._bootstrap,
    plan.APPS: _Builder._apps,
    plan.STAGE_FILES: _Builder._files,
    plan.SETUP: _Builder._host_script,
    plan.FILES: _Builder._files,
    plan.POST: _Builder._post,
    plan.METADATA: _Builder._metadata,
    plan.TEST: _Builder._test,
    plan.ASSEMBLE: _Builder._assemble,
    plan.REUSE: _Builder._reuse,
    plan.CONVERT: _Builder._convert,
}


def fix_permissions(root: str) -> None:
    """Give the owner of every file the right to read it, and of every folder to enter and change it."""
    for folder, names, files in os.walk(root):
        for name in [*names, *files]:
            path = os.path.join(folder, name)
            mode = os.lstat(path).st_mode
            wanted = 0o700 if stat.S_ISDIR(mode) else 0o600 if stat.S_ISREG(mode) else 0
            if wanted & ~mode:
                os.chmod(path, stat.S_IMODE(mode) | wanted)
