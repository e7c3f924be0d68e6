# SPDX-License-Identifier: Apache-2.0
"""RUN --mount: caches, binds, memory and secrets that a program sees and the image does not keep.

Caches lie in `mounts` of the user's cache, one folder for an id and a way to be root (owners are kept differently).
Places made only to mount something on are taken away again afterwards. Secrets never touch a disk.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from typing import TYPE_CHECKING

from pysingularity.build.dockerfile.context import Files
from pysingularity.build.dockerfile.copy import TreeCopier
from pysingularity.errors import UserError
from pysingularity.folders import cache_folder, size_of
from pysingularity.image import output
from pysingularity.linux.mounts import open_in_root
from pysingularity.recipe.dockerfile import Instruction
from pysingularity.recipe.dockerignore import Ignore
from pysingularity.runtime import spec as launch

if TYPE_CHECKING:
    from pysingularity.build.dockerfile.execute import DockerBuilder
    from pysingularity.build.dockerfile.state import State
    from pysingularity.build.plan import Step


class Mounts:
    """The mounts of one RUN; a context manager that tidies up.

    Arguments:
        builder: whose step this is.
        ids: uid and gid that the program runs with.

    Attributes:
        environment: secrets that the program gets as variables.
    """

    def __init__(
        self, builder: DockerBuilder, step: Step, one: Instruction, state: State, ids: tuple[int, int]
    ) -> None:
        self._builder, self._step, self._one, self._state, self._ids = builder, step, one, state, ids
        self._root = builder.roots[step.stage]
        self.environment: dict[str, str] = {}
        self._missing: list[str] = []
        self._locks: list[int] = []
        self._folders: list[str] = []

    def __enter__(self) -> Mounts:
        return self

    def __exit__(self, *error: object) -> None:
        for fd in self._locks:
            os.close(fd)
        for path in self._folders:
            output.remove_tree(path)
        self._tidy()

    def prepare(self, wishes: list[dict[str, str]]) -> list[launch.Mount]:
        """Return the mounts.

        Raises:
            UserError, OSError: a source or secret is missing, or something cannot be made.
        """
        found = []
        for options in wishes:
            word = {key: self._builder.reader.word(value, self._state, self._one) for key, value in options.items()}
            mount = getattr(self, f"_{word['type']}")(word)
            if mount is not None:
                self._note_missing(mount.target)
                found.append(mount)
        return found

    def _target(self, options: dict[str, str]) -> str:
        return self._state.place(options["target"])

    def _tmpfs(self, options: dict[str, str]) -> launch.Mount:
        size = options.get("size", "")
        return launch.Mount(
            launch.TMPFS, self._target(options), mode=0o1777, size=max(1, size_of(size) >> 20) if size else 0
        )

    def _secret(self, options: dict[str, str]) -> launch.Mount | None:
        name = options.get("id") or os.path.basename(options["target"])
        content = self._builder.docker.secrets.get(name)
        if content is None:
            if options.get("required", "false").lower() in ("true", "1"):
                hint = f"give it: --secret id={name},src=FILE or --secret id={name},env=VARIABLE"
                raise UserError("no-secret", f"the secret {name} was not given", hint=hint)
            return None
        if options.get("env"):
            self.environment[options["env"]] = content.decode("utf-8", "surrogateescape")
            if not options.get("target"):
                return None
        target = self._state.place(options.get("target") or f"/run/secrets/{name}")
        mode = int(options.get("mode", "0400"), 8)
        if self._ids != (0, 0):
            mode |= 0o044  # the file is root's; nobody but this program sees it
        return launch.Mount(launch.FILE, target, content=content, mode=mode, readonly=True)

    def _cache(self, options: dict[str, str]) -> launch.Mount:
        target = self._target(options)
        sharing = options.get("sharing", "shared")
        if sharing not in ("shared", "private", "locked"):
            raise UserError("bad-mount", f"sharing={sharing}: say shared, private or locked")
        builder = self._builder
        mark = hashlib.sha256(f"{builder.way.name}\0{options.get('id') or target}".encode("utf-8", "surrogateescape"))
        folder = os.path.join(cache_folder(builder.request.environ), "mounts", mark.hexdigest()[:32])
        if builder.request.cache:
            try:
                os.makedirs(os.path.dirname(folder), mode=0o700, exist_ok=True)
                if not self._lock(f"{folder}.lock", sharing):
                    folder = ""
            except OSError:
                folder = ""
        else:
            folder = ""
        if not folder:  # for this program alone
            folder = os.path.join(builder.place, f"cache{builder.step.number}-{len(self._folders)}")
            self._folders.append(folder)
        if not os.path.isdir(folder):
            os.mkdir(folder, 0o755)
            uid, gid = int(options.get("uid", "0")), int(options.get("gid", "0"))
            builder.way.owners.set(folder, uid, gid)
            os.chmod(folder, int(options.get("mode", "0755"), 8))
        return launch.Mount(
            launch.BIND, target, source=folder, required=True, readonly=options.get("ro", "false") != "false"
        )

    def _lock(self, path: str, sharing: str) -> bool:
        """Keep others out of a cache; return False when somebody else has it and another folder will do."""
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._locks.append(fd)
        try:
            if sharing == "locked":
                fcntl.flock(fd, fcntl.LOCK_EX)
            else:
                kind = fcntl.LOCK_EX if sharing == "private" else fcntl.LOCK_SH
                fcntl.flock(fd, kind | fcntl.LOCK_NB)
        except OSError:
            return sharing == "shared"
        return True

    def _bind(self, options: dict[str, str]) -> launch.Mount:
        builder, origin = self._builder, options.get("from", "")
        source = options.get("source", "/")
        if origin:
            files = Files(builder.origin(self._step, origin, self._one), stage=True)
        else:
            files = Files(builder.docker.context, Ignore(builder.docker.ignore))
        with files:
            found = files.find(source)
            if len(found) != 1:
                raise UserError("bad-mount", f"there is no {source} to be mounted in {origin or 'the context'}")
            path = found[0].path
            writable = options.get("rw", "false") != "false"
            if found[0].is_folder and (writable or files.ignore):
                # What is written is dropped, and what .dockerignore hides is not there: a copy for this program.
                path = os.path.join(builder.place, f"bind{builder.step.number}-{len(self._folders)}")
                os.mkdir(path, 0o755)
                self._folders.append(path)
                with TreeCopier(path, builder.way.owners) as copier:
                    copier.take(files, found[0], "/", into=True, exclude=Ignore())
        target = self._state.place(options.get("target", "."))
        return launch.Mount(launch.BIND, target, source=path, readonly=not writable, required=True)

    def _note_missing(self, target: str) -> None:
        root = os.open(self._root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            done = ""
            for part in target.strip("/").split("/"):
                done = f"{done}/{part}"
                try:
                    os.close(open_in_root(root, done))
                except OSError:
                    self._missing.append(done)
        finally:
            os.close(root)

    def _tidy(self) -> None:
        """Take away places that were made only to mount on them, unless something else has been put there."""
        root = os.open(self._root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for path in sorted(set(self._missing), key=len, reverse=True):
                above, name = os.path.split(path)
                try:
                    fd = open_in_root(root, above or "/", os.O_RDONLY | os.O_DIRECTORY)
                except OSError:
                    continue
                try:
                    status = os.stat(name, dir_fd=fd, follow_symlinks=False)
                    if status.st_size == 0 and not os.path.isdir(f"/proc/self/fd/{fd}/{name}"):
                        os.unlink(name, dir_fd=fd)
                    else:
                        os.rmdir(name, dir_fd=fd)
                except OSError:
                    pass
                finally:
                    os.close(fd)
        finally:
            os.close(root)
