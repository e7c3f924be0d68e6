# SPDX-License-Identifier: Apache-2.0
"""Carry out the steps of a Dockerfile: RUN, COPY and ADD, WORKDIR, and the image's configuration at the end."""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pysingularity.build import container, worker
from pysingularity.build import plan as plans
from pysingularity.build.clone import clone
from pysingularity.build.dockerfile import plan as steps
from pysingularity.build.dockerfile.context import Files, Found
from pysingularity.build.dockerfile.copy import Mode, TreeCopier, is_archive, names_of, read_inside
from pysingularity.build.dockerfile.mounts import Mounts
from pysingularity.build.dockerfile.plan import DockerPlan, is_address, is_heredoc
from pysingularity.build.dockerfile.select import STAGE, Picked, mounts
from pysingularity.build.dockerfile.state import PROXIES, Reader, State
from pysingularity.build.execute import Builder
from pysingularity.build.plan import Plan, Step
from pysingularity.build.request import BuildRequest, DockerBuild
from pysingularity.errors import InternalError, RecipeError, UserError
from pysingularity.image import metadata, output
from pysingularity.image.entries import Entry, put_into_folder
from pysingularity.image.inside import FolderSource, source_of
from pysingularity.image.open import open_image
from pysingularity.recipe.dockerfile import Instruction, trigger
from pysingularity.recipe.dockerignore import Ignore, clean
from pysingularity.recipe.dockerwords import Lexer, raw_words

if TYPE_CHECKING:
    from pysingularity.image.inside import Source

#: The largest file that ADD fetches.
MOST = 64 << 30
#: What means something in words and nothing in a here-document.
_LITERAL = re.compile(r"['\"]|\\(?![$\\])")
#: Variables of other builds that programs of RUN do not see: what they are is the image's matter.
_OWN = ("PATH", "HOME", "USER", "LOGNAME", "LANG")


class _Identity:
    """Become somebody; called as root."""

    def __init__(self, uid: int, gid: int, groups: list[int]) -> None:
        self._ids = uid, gid, groups

    def __call__(self) -> None:
        uid, gid, groups = self._ids
        os.setgroups(groups)
        os.setgid(gid)
        os.setuid(uid)


class DockerBuilder(Builder):
    """The worker's work for a Dockerfile."""

    def __init__(self, request: BuildRequest, steps: Plan, tell: worker.Channel, place: str, watcher: int) -> None:
        super().__init__(request, steps, tell, place, watcher)
        self._documents: dict[int, dict[str, Any]] = {}
        self._known: dict[int, tuple[list[State], list[tuple[Instruction, State]]]] = {}
        self._when = int(time.time())

    @property
    def docker(self) -> DockerBuild:
        """What belongs to Dockerfiles alone."""
        if self.request.docker is None:
            raise InternalError("no-dockerfile", "a step of a Dockerfile without one")
        return self.request.docker

    @property
    def _plan(self) -> DockerPlan:
        if not isinstance(self.steps, DockerPlan):
            raise InternalError("no-dockerfile", "a plan of another kind")
        return self.steps

    def _picked(self, index: int) -> Picked:
        return self._plan.selection.stages[index]

    # -- what instructions say, now that the base image is known ------------------------------------------------

    def _document(self, index: int) -> dict[str, Any]:
        """Return the OCI configuration that a stage starts from."""
        if index not in self._documents:
            stage = self._picked(index)
            found: dict[str, Any] = {}
            if stage.parent >= 0:
                raise InternalError("no-document", "a stage that starts from a stage has no base of its own")
            if stage.header["bootstrap"] != "scratch":
                with self._placed(stage.start), open_image(self._base_path(self.recipe.stages[index])) as image:
                    data = metadata.oci_config_of(image) if image.kind != "sandbox" else None
                found = json.loads(data) if data else {}
            self._documents[index] = found
        return self._documents[index]

    def _top(self, index: int) -> int:
        """Return the first of the stages that one is built on."""
        stage = self._picked(index)
        return self._top(stage.parent) if stage.parent >= 0 else index

    def _states(self, index: int) -> tuple[list[State], list[tuple[Instruction, State]]]:
        """Return the state that each instruction of a stage sees (the last is the result), and triggers with theirs."""
        if index not in self._known:
            stage = self._picked(index)
            parent = stage.parent
            state = self._states(parent)[0][-1].copy() if parent >= 0 else State(self._document(index))
            reader = self._plan.selection.reader
            triggers = []
            texts = state.triggers
            state.config.pop("OnBuild", None)
            for text in texts:
                one = trigger(
                    Instruction("ONBUILD", text, line=stage.start.line, source=stage.start.source), reader.file
                )
                triggers.append((one, state.snapshot()))
                reader.apply(one, state)
            found = []
            for one in stage.instructions:
                found.append(state.snapshot())
                reader.apply(one, state)
            self._known[index] = [*found, state], triggers
        return self._known[index]

    def _instruction(self, step: Step) -> tuple[Instruction, State]:
        place = self._plan.positions[step.number]
        return self._picked(step.stage).instructions[place], self._states(step.stage)[0][place]

    def _mark(self, stage: int) -> str:
        with self._placed(self._picked(stage).start):
            mark = super()._mark(stage)
        found = []
        for one, state in self._states(stage)[1]:  # triggers of the base: no plan could know what they copy
            found.append(one.written())
            if one.name in ("COPY", "ADD") and not one.flag("from"):
                with self._context() as files:
                    found.append(files.digest(self._sources(one, state)[0]))
        return " ".join([mark, *found]) if found else mark

    @contextlib.contextmanager
    def _context(self) -> Iterator[Files]:
        with Files(self.docker.context, Ignore(self.docker.ignore)) as files:
            yield files

    # -- steps -------------------------------------------------------------------------------------------------

    def _bootstrap(self, step: Step) -> None:
        stage, root = self._picked(step.stage), self.roots[step.stage]
        own = self.stores.get(step.stage)
        if stage.header["bootstrap"] != STAGE:
            with self._placed(stage.start):
                super()._bootstrap(step)
        elif own is not None and stage.parent in self.packed:
            own.restore(self.snapshots[stage.parent], root, plain=self._stays(root))
        else:
            clone(self._root(stage.parent), root, self._owners(root), self._advance("copying"))
            if own is not None and stage.parent in self.snapshots:
                own.follow(self.snapshots[stage.parent], root)
        for one, state in self._states(step.stage)[1]:
            self._act(step, one, state)

    def _step(self, step: Step) -> None:
        one, state = self._instruction(step)
        self._act(step, one, state)
        self._keep(step, "")

    def _act(self, step: Step, one: Instruction, state: State) -> None:
        if one.name == "RUN":
            self._run(step, one, state)
        elif one.name in ("COPY", "ADD"):
            self._copy(step, one, state)
        elif one.name == "WORKDIR":
            after = state.snapshot()
            self.reader.apply(one, after)
            root = self.roots[step.stage]
            with self._placed(one):
                # What is made belongs to the user of the moment, as with BuildKit.
                owner = self._ids(state.user, root) if state.user else None
                with TreeCopier(root, self._owners(root), owner=owner) as copier:
                    copier.folder(after.workdir)

    @property
    def reader(self) -> Reader:
        """Applies instructions to states."""
        return self._plan.selection.reader

    @contextlib.contextmanager
    def _placed(self, one: Instruction) -> Iterator[None]:
        """Give errors the place of the instruction."""
        try:
            yield
        except RecipeError:
            raise
        except UserError as error:
            raise one.wrong(error.message, self.reader.file, hint=error.hint, id=error.id) from None
        except OSError as error:
            if error.errno in (28, 122):
                raise
            where = f"{error.filename}: " if isinstance(error.filename, str) else ""
            raise one.wrong(f"{where}{(error.strerror or str(error)).lower()}", self.reader.file) from None

    # -- RUN ---------------------------------------------------------------------------------------------------

    def _run(self, step: Step, one: Instruction, state: State) -> None:
        root = self.roots[step.stage]
        inside = self._container(step)
        network = one.flag("network") or "default"
        if network not in ("default", "host", "none"):
            raise one.wrong(f"--network={network}: say default, none or host", self.reader.file, word=network)
        if one.flag("security") not in ("", "sandbox"):
            hint = "a build without root has no more rights to give"
            raise one.wrong(f"--security={one.flag('security')} cannot be had", self.reader.file, hint=hint)
        with self._placed(one):
            people, groups_ = read_inside(root, "etc/passwd"), read_inside(root, "etc/group")
            uid, gid, groups, home = names_of(state.user or "0", people, groups_)
        argv = self._command(inside, one, state)
        given = {key: value for key, value in self.docker.arguments.items() if key in PROXIES}
        env = {**given, **state.environment()}
        env.setdefault("HOME", home)
        usual = container.clean_environment(self.request.environ)
        basic = {key: value for key, value in usual.items() if key not in _OWN}
        with Mounts(self, step, one, state, (uid, gid or 0)) as more:
            with self._placed(one):
                wishes = more.prepare(mounts(one, self.docker.dockerfile))
            more_env = {**env, **more.environment}
            how: dict[str, Any] = {
                "env": more_env,
                "cwd": state.workdir,
                "mounts": wishes,
                "clean": basic,
                "with_environment": False,
                "network": network != "none",
            }
            who = None if not uid and not gid else _Identity(uid, gid or 0, groups)
            status = inside.run(argv, identity=who, **how)
            if status and self._again(step):
                status = inside.run(argv, identity=who, **how)
            if status and self.request.debug_shell:
                self._debug_shell(inside, status, "RUN", identity=who, **how)
        if status:
            raise self._failed(one, status, root)

    def _command(self, inside: container.BuildContainer, one: Instruction, state: State) -> list[str]:
        """Return the program and words of a RUN."""
        listed = one.listed
        if listed is not None:
            return listed
        if not one.heredocs:
            return [*state.shell, one.text]
        first = one.heredocs[0]
        if len(one.heredocs) == 1 and is_heredoc(one.text) and len(raw_words(one.text, self.reader.escape)) == 1:
            if first.content.startswith("#!"):
                return [inside.script("heredoc", first.content)]
            return [*state.shell, first.content]
        return [*state.shell, one.text + "".join(f"\n{doc.content}{doc.name}" for doc in one.heredocs) + "\n"]

    def _failed(self, one: Instruction, status: int, root: str) -> RecipeError:
        what = f"was ended by signal {status - 128}" if status > 128 else f"ended with status {status}"
        hint = "the last line of its output tells why; --debug-shell opens a shell there"
        return one.wrong(f"RUN {what}", self.reader.file, hint=self._hint(hint, root), id="section-failed")

    # -- COPY and ADD ------------------------------------------------------------------------------------------

    def _sources(self, one: Instruction, state: State) -> tuple[list[str], str]:
        """Return sources and target, variables put in."""
        words = one.listed or raw_words(one.text, self.reader.escape)
        read = [word if is_heredoc(word) else self.reader.word(word, state, one) for word in words]
        return read[:-1], read[-1]

    def _copy(self, step: Step, one: Instruction, state: State) -> None:
        root = self.roots[step.stage]
        sources, target = self._sources(one, state)
        folder = target.endswith("/") or os.path.basename(target) in (".", "..")
        if len(sources) > 1 and not folder:
            hint = f"end it with a slash: {target}/"
            raise one.wrong(f"{one.name} of several sources needs a folder as its target", self.reader.file, hint=hint)
        if one.flag("keep-git-dir") or any(word.startswith(("git@", "git://", "ssh://")) for word in sources):
            hint = "clone it before, and COPY the folder"
            raise one.wrong("ADD of git repositories is not there", self.reader.file, hint=hint)
        place = state.place(target) + ("/" if folder else "")
        with self._placed(one):
            owner = self._chown(one, state, root)
            mode = Mode(self.reader.word(one.flag("chmod"), state, one))
            advance = self._progress()
            copier = TreeCopier(root, self._owners(root), owner=owner, mode=mode, progress=lambda *said: advance(*said))
            with copier, self._taken(step, one) as files:
                found = self._find(
                    files, [word for word in sources if not is_heredoc(word) and not is_address(word)], one
                )
                there, into = copier.target_of(place, len(found) + sum(map(is_address, sources)) + len(one.heredocs))
                exclude = Ignore(one.all("exclude"))
                for source, base in found:
                    if one.name == "ADD" and not source.is_folder and self._unpacks(source.path, one):
                        self._unpack(copier, source.path, there, step)
                        continue
                    parents = _parents(source, base) if one.has("parents") else ""
                    copier.take(files, source, there, into=into or bool(parents), exclude=exclude, parents=parents)
                for doc in one.heredocs:
                    text = _filled(doc.content, state) if doc.expand else doc.content
                    data = text.encode("utf-8", "surrogateescape")
                    copier.write(data, f"{there.rstrip('/')}/{doc.name}" if into else there)
                for address in filter(is_address, sources):
                    self._download(copier, address, there, into, one, step)

    @contextlib.contextmanager
    def _taken(self, step: Step, one: Instruction) -> Iterator[Files]:
        origin = one.flag("from")
        if not origin:
            with self._context() as files:
                yield files
            return
        with Files(self.origin(step, origin, one), stage=True) as files:
            yield files

    def origin(self, step: Step, name: str, one: Instruction) -> str:
        """Return the root of the stage or image that --from names."""
        number = self._picked(step.stage).sources.get(name)
        if number is None:
            raise one.wrong(f"--from={name}: a trigger of the base image names what is not here", self.reader.file)
        return self._root(number)

    def _find(self, files: Files, names: list[str], one: Instruction) -> list[tuple[Found, str]]:
        found = []
        for name in names:
            there = files.find(name)
            if not there:
                raise self._not_found(files, name, one)
            found += [(source, name) for source in there]
        return found

    def _not_found(self, files: Files, name: str, one: Instruction) -> RecipeError:
        from difflib import get_close_matches  # only when something is wrong

        if files.stage:
            return one.wrong(f"there is no {name} in {one.flag('from')}", self.reader.file, word=name, id="copy")
        full = os.path.join(files.root, name.lstrip("/"))
        if os.path.lexists(full) and files.ignore:
            hint = "a line of .dockerignore leaves it out"
        elif os.path.isabs(name) and os.path.exists(name):
            hint = f"names start from the context, {files.root}: nothing outside of it can be copied"
        else:
            folder, base = os.path.split(full)
            near = get_close_matches(base, os.listdir(folder), n=1) if os.path.isdir(folder) else []
            hint = f"did you mean {near[0]}?" if near else f"names start from the context, {files.root}"
        return one.wrong(f"there is no {name} in the context", self.reader.file, word=name, hint=hint, id="copy")

    def _chown(self, one: Instruction, state: State, root: str) -> tuple[int, int] | None:
        text = self.reader.word(one.flag("chown"), state, one)
        return self._ids(text, root, alone=True) if text else None

    def _ids(self, text: str, root: str, *, alone: bool = False) -> tuple[int, int]:
        """Return uid and gid of USER or --chown; `alone`: a number that is nobody's is its own group."""
        uid, gid, *_ = names_of(text, read_inside(root, "etc/passwd"), read_inside(root, "etc/group"))
        return uid, gid if gid is not None else uid if alone else 0

    def _unpacks(self, path: str, one: Instruction) -> bool:
        return (not one.flag("unpack") or one.has("unpack")) and is_archive(path)

    def _unpack(self, copier: TreeCopier, path: str, target: str, step: Step) -> None:
        from pysingularity.build.deb.tree import Tree
        from pysingularity.build.deb.unpack import open_tar, settle_owners

        copier.folder(target)
        with Files(self.roots[step.stage], stage=True) as files:
            where = files.find(target)[0].path
        with Tree(where) as tree:
            owned = open_tar(path, tree, path)
            settle_owners(tree, self._owners(self.roots[step.stage]), owned)

    def _download(
        self, copier: TreeCopier, address: str, target: str, into: bool, one: Instruction, step: Step
    ) -> None:
        from urllib.parse import unquote, urlsplit

        from pysingularity.build.deb.fetch import Fetcher

        wanted = one.flag("checksum").lower()
        if wanted and (not wanted.startswith("sha256:") or len(wanted) != 71):
            raise one.wrong("--checksum is sha256: and 64 digits", self.reader.file, word="--checksum")
        name = os.path.basename(unquote(urlsplit(address).path))
        if into and not name:
            hint = "write the file's name as the target"
            raise one.wrong(f"{address} has no name for a file", self.reader.file, hint=hint)
        fetcher = Fetcher(os.path.join(self.place, f"fetch{step.number}"), self.request.environ, self._progress())
        try:
            path, digest = fetcher.stream(address, MOST, f"fetching {address}")
        finally:
            fetcher.close()
        try:
            if wanted and wanted != f"sha256:{digest}":
                raise UserError("wrong-content", f"{address}: has the checksum sha256:{digest}, not {wanted}: refused")
            if one.has("unpack") and is_archive(path):
                self._unpack(copier, path, target, step)
            else:
                copier.place_file(path, f"{target.rstrip('/')}/{name}" if into else target, 0o600)
        finally:
            os.unlink(path)

    # -- the end -----------------------------------------------------------------------------------------------

    def _entries(self, step: Step, source: Source) -> list[Entry]:
        state = self._states(step.stage)[0][-1]
        config = self._config(step)
        written = metadata.oci_entries(config)
        if not self._document(self._top(step.stage)) and not (
            state.config.get("Cmd") or state.config.get("Entrypoint")
        ):
            # The base is no image of OCI: its own runscript stays.
            written = [entry for entry in written if entry.path != metadata.RUNSCRIPT]
        when = output.epoch(self.request.environ)
        automatic = metadata.automatic_labels(
            when=self._when if when is None else when,
            arch=self.request.arch,
            header=self._picked(self._top(step.stage)).header,
        )
        old = metadata.parse_labels(source.read(metadata.LABELS))
        labels, _ = metadata.merge_labels(old, metadata.oci_labels(config), force=True)
        labels.update(automatic)
        return [
            *metadata.history_entry(source),
            *written,
            Entry.file(metadata.DEFINITION, self.recipe.text),
            Entry.file(metadata.LABELS, metadata.labels_file(labels)),
        ]

    def _config(self, step: Step) -> dict[str, Any]:
        when = output.epoch(self.request.environ)
        created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self._when if when is None else when))
        lines = [one.written() for one in self._picked(step.stage).instructions]
        state = self._states(step.stage)[0][-1]
        base = self._document(self._top(step.stage))
        return state.document(base, arch=self.request.arch, created=created, history=lines)

    def _oci_config(self, step: Step) -> bytes | None:
        return metadata.json_bytes(self._config(step))

    def _reuse(self, step: Step) -> None:
        """Copy the base image's blocks, unless its triggers have to be followed first."""
        if self._states(step.stage)[1]:
            self._bootstrap(step)
        else:
            with open_image(self._base_path(self.recipe.stages[step.stage])) as image:
                if image.kind != "sandbox" and image.filesystem == "squashfs":
                    with source_of(image) as below:
                        entries = self._entries(step, below)
                    self.written = self._copy_blocks(image, entries, oci_config=self._oci_config(step))
                    return
                super()._bootstrap(step)
        with FolderSource(self.roots[step.stage]) as source:
            put_into_folder(self.roots[step.stage], self._entries(step, source))
        self._assemble(step)


def _filled(text: str, state: State) -> str:
    """Put variables into a here-document: as in a shell, quotes mean nothing, and \\ only before $ and itself."""
    return Lexer(state.variables()).word(_LITERAL.sub(lambda found: "\\" + found[0], text))


def _parents(source: Found, pattern: str) -> str:
    """Return what --parents repeats of a source's name: all folders, or those behind a `/./`."""
    name = source.name
    before, pivot, _ = pattern.partition("/./")
    if pivot:
        start = clean(before)
        name = name[len(start) :].lstrip("/") if name.startswith(start) else name
    return name if source.is_folder else os.path.dirname(name)


DockerBuilder.actions = {
    **Builder.actions,
    plans.BOOTSTRAP: DockerBuilder._bootstrap,
    plans.METADATA: DockerBuilder._metadata,
    plans.ASSEMBLE: DockerBuilder._assemble,
    plans.REUSE: DockerBuilder._reuse,
    steps.RUN: DockerBuilder._step,
    steps.COPY: DockerBuilder._step,
    steps.WORKDIR: DockerBuilder._step,
}
