# SPDX-License-Identifier: Apache-2.0
"""Carry out a plan: one method per kind of step, in a worker that is root in its own namespace.

The order is the plan's. Nothing appears at the target before everything has succeeded, and whatever happens the
temporary folder goes away: removed by the worker, by the watching process when the worker was killed, or by the next
build when both were.
"""

from __future__ import annotations

import contextlib
import glob
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

from pysingularity import events
from pysingularity.build import bootstrap, container, foreign, plan, space, worker
from pysingularity.build.finish import Finish
from pysingularity.build.frame import become
from pysingularity.build.plan import Plan, Step
from pysingularity.build.request import BuildRequest
from pysingularity.build.sections import app_entries
from pysingularity.errors import InternalError
from pysingularity.folders import cache_folder, temporary_folder
from pysingularity.image import metadata, output
from pysingularity.image.entries import Entry, put_into_folder
from pysingularity.image.inside import FolderSource
from pysingularity.recipe.sections import file_pairs, shell_of

#: Room that a build needs at least, besides what its base takes.
LEAST_ROOM = 64 << 20


def build(request: BuildRequest, steps: Plan, listen: events.Listener) -> events.Event:
    """Build an image and return the result event (path, size, seconds).

    Raises:
        SingularityError: the build failed; nothing was written.
        Terminated: a signal ended the build; nothing was written.
    """
    output.check_target(request.target, force=request.force or request.update, folder=request.sandbox)
    parent = temporary_folder(request.environ)
    space.tell_memory(parent)
    space.need(parent, LEAST_ROOM, "the build")
    left = space.abandoned(parent)
    place = space.Workplace(parent)
    watcher = os.getpid()

    def work(channel: worker.Channel) -> None:
        kind: type[Builder] = Builder
        if request.docker is not None:
            from pysingularity.build.dockerfile.execute import DockerBuilder as kind  # only for Dockerfiles
        kind(request, steps, channel, place.path, watcher).run(left)

    def clean() -> None:
        become(request, quiet=True)
        if request.cleanup:
            output.remove_tree(place.path)
        output.sweep(request.target)

    try:
        return worker.carry_out(work, listen, clean)
    finally:
        place.close()
        if request.cleanup and os.path.isdir(place.path):
            worker.in_child(clean)


class Builder(Finish):
    """The worker's work: the steps of a recipe's stages."""

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
            arch=foreign.DEBIAN.get(request.arch, request.arch),
            options=request.options,
            environ=request.environ,
            directory=request.directory,
        )
        self.results[step.stage] = bootstrap.agent(stage.agent)(asked)
        self._seed(step)
        if not os.listdir(root) and stage.agent != "scratch":
            raise InternalError("empty-root", f"Bootstrap: {stage.agent} left an empty root file system")
        put_into_folder(root, metadata.base_entries())
        if stage.name:
            self.names.setdefault(stage.name, step.stage)

    def _seed(self, step: Step) -> None:
        """Let the first kept step take over compressed blocks of the base image."""
        store, stage = self.stores.get(step.stage), self._stage(step)
        if store is not None and (stage.agent == "localimage" or bootstrap.AGENTS.get(stage.agent) == "remote"):
            path = self._base_path(stage)
            if os.path.isfile(path):
                store.begin(path, self.roots[step.stage])

    def _apps(self, step: Step) -> None:
        stage = self._stage(step)
        put_into_folder(self.roots[step.stage], app_entries(stage))
        for app in stage.apps:
            pairs = file_pairs(stage, self.recipe.file, app)
            with self._copier(self.roots[step.stage]) as copier:
                for pair in pairs:
                    copier.copy(pair, base=f"/scif/apps/{app}")

    def _files(self, step: Step) -> None:
        inner = step.kind == plan.STAGE_FILES
        remarks: list[str] = []
        pairs = file_pairs(self._stage(step), self.recipe.file, remarks=remarks)
        if not inner:
            patterns = [os.path.join(self.request.directory, pair.source) for pair in pairs if not pair.stage]
            names = [name for pattern in patterns for name in (glob.glob(pattern) or [pattern])]
            space.need(self.roots[step.stage], space.amount(names), "copying what %files names")
        with self._copier(self.roots[step.stage]) as copier:
            for pair in pairs:
                if bool(pair.stage) == inner:
                    copier.copy(pair, stage=self._root(self.names[pair.stage]) if inner else "")
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
            if status and self._again(step):
                inside.script("labels", "")
                status = inside.run(argv, env=env)
            if status and self.request.debug_shell:
                self._debug_shell(inside, status, "%post", env=env)
        finally:
            container.clear_scratch(root, before)
        self._check(status, step, "post")
        self.post_labels += inside.read("labels")
        with FolderSource(root) as source:
            text = source.read(metadata.POST_ENVIRONMENT)
        if text is not None:
            put_into_folder(root, [Entry.file(metadata.POST_ENVIRONMENT, text, 0o755)])
        self._keep(step, self.post_labels)

    def _debug_shell(
        self,
        inside: container.BuildContainer,
        status: int,
        what: str,
        **how: Any,
    ) -> None:
        """Let the person look at what failed, where a terminal is there; `how` is what the program was run with."""
        if not os.isatty(0):
            self._message("warning", "--debug-shell needs a terminal")
            return
        self._message("warning", f"{what} ended with status {status}; this is its container, leave it with: exit")
        before = signal.signal(signal.SIGTTOU, signal.SIG_IGN)
        group = os.tcgetpgrp(0)
        try:
            os.tcsetpgrp(0, os.getpgrp())
            inside.run(["/bin/sh", "-i"], stdin=0, output=2, **how)
        finally:
            os.tcsetpgrp(0, group)
            signal.signal(signal.SIGTTOU, before)


Builder.actions = {
    plan.PRE: Builder._host_script,
    plan.BOOTSTRAP: Builder._bootstrap,
    plan.APPS: Builder._apps,
    plan.STAGE_FILES: Builder._files,
    plan.SETUP: Builder._host_script,
    plan.FILES: Builder._files,
    plan.POST: Builder._post,
    plan.METADATA: Builder._metadata,
    plan.TEST: Builder._test,
    plan.ASSEMBLE: Builder._assemble,
    plan.REUSE: Builder._reuse,
    plan.CONVERT: Builder._convert,
}
