# SPDX-License-Identifier: Apache-2.0
"""Running programs inside the root file system that is being built: %post, %test, and the commands of agents.

One way into a container: everything goes through `runtime.enter.run`. The worker that calls this is (emulated or
mapped) root already, so no further user namespace is made. Each program gets its own pid namespace: whatever it leaves
running ends with it. What a program needs and the image must not keep (the script itself, certificates, apt's settings)
lies in one folder that is bound to a private place and gone afterwards.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from pysingularity.build import trust
from pysingularity.errors import UserError
from pysingularity.image.entries import Entry, put_into_folder
from pysingularity.linux.mounts import open_in_root
from pysingularity.linux.namespaces import NEWNET
from pysingularity.runtime import spec as launch

if TYPE_CHECKING:
    from pysingularity.runtime.rootless import Way

#: Where the private folder appears inside the container.
PRIVATE = "/.singularity.d/build"
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
#: Variables of the caller that every program of a build may see.
PROXIES = ("http_proxy", "https_proxy", "ftp_proxy", "all_proxy", "no_proxy")
#: Sources the image's environment before the program: what an image sets holds for its build as well. Written so that a
#: script that fails or uses an unset variable does not end the build.
WITH_ENVIRONMENT = 'for one in /.singularity.d/env/*.sh; do if [ -f "$one" ]; then . "$one"; fi; done; exec "$@"'
#: Bound of /dev/shm in MiB.
SHARED_MEMORY = 1024
#: Folders whose content belongs to the build, not to the image.
SCRATCH = ("/tmp", "/var/tmp")


class BuildContainer:
    """A root file system in which programs are run.

    Arguments:
        root: path of the root file system.
        way: how this process is root.
        support: an empty folder of the host for what the image must not keep.
        environ: the caller's environment.
        binds: further mounts that the user asked for.
        ca_bundle: see `trust.find`.
        output: descriptor for what programs print; None leaves this process's own.
        nv: bring the GPU's libraries in.
        roots: places of binds that are root file systems too: what programs do to owners there is recorded.
    """

    def __init__(
        self,
        root: str,
        *,
        way: Way,
        support: str,
        environ: Mapping[str, str],
        binds: Sequence[launch.Mount] = (),
        ca_bundle: str = "auto",
        output: int | None = None,
        nv: bool = False,
        roots: Sequence[str] = (),
    ) -> None:
        self.root, self._way, self._support, self._environ = root, way, support, environ
        self._binds, self._ca_bundle, self._output, self._nv = list(binds), ca_bundle, output, nv
        self._roots = roots

    def run(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        binds: Sequence[str] = (),
        cwd: str = "/",
        writable: bool = True,
        with_environment: bool = True,
        stdin: int | None = None,
        output: int | None = None,
        mounts: Sequence[launch.Mount] = (),
        identity: Callable[[], None] | None = None,
        clean: Mapping[str, str] | None = None,
        network: bool = True,
        upper: str = "",
    ) -> int:
        """Run a program as root inside; return its exit status, or 128 + signal.

        Arguments:
            argv: program and arguments.
            env: variables on top of the clean ones.
            binds: further binds, SRC[:DST[:OPTS]].
            cwd: folder inside to start in; has to exist.
            writable: the program may change the root file system.
            with_environment: source the image's own environment first (needs a shell inside).
            stdin: descriptor to read from; None for nothing to read.
            output: descriptor to print to instead of the step's.
            mounts: further mounts.
            identity: called in the program's process, as root, right before it starts: becomes somebody else.
            clean: variables to start from instead of the usual ones.
            network: the program may use the host's network.
            upper: "tmpfs" lets it write into memory, which is dropped.
        """
        from pysingularity.runtime import emulate  # brings in the whole runtime
        from pysingularity.runtime.enter import run

        put_into_folder(self.root, [Entry.folder(PRIVATE[1:])])
        words = list(argv)
        if with_environment and self._has("/bin/sh"):
            words = ["/bin/sh", "-c", WITH_ENVIRONMENT, "sh", *words]
        nothing = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC) if stdin is None else -1
        target = self._output if output is None else output
        try:
            spec = self._spec(words, dict(env or {}), binds, cwd, writable)
            spec.mounts += mounts
            spec.upper = upper
            if clean is not None:
                spec.env = {**clean, **self._settings(), **(env or {})}
            if not network:
                spec.namespaces, spec.loopback = spec.namespaces | NEWNET, True
            emulation = emulate.prepare(self._way, also=self._roots)
            spec.emulate_root = emulation if identity is None else _both(emulation, identity)
            try:
                status = run(spec, stdin=nothing if stdin is None else stdin, stdout=target, stderr=target)
            finally:
                if emulation is not None:
                    emulation.finish()
        finally:
            if nothing >= 0:
                os.close(nothing)
            self.tidy()
        return os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status)

    def script(self, name: str, text: str) -> str:
        """Keep a script in the private folder; return its path inside the container."""
        path = os.path.join(self._support, name)
        with open(path, "w", encoding="utf-8", errors="surrogateescape") as stream:
            stream.write(text)
        os.chmod(path, 0o755)
        return f"{PRIVATE}/{name}"

    def outside(self, name: str) -> str:
        """Return the host's path of a file in the private folder."""
        return os.path.join(self._support, name)

    def read(self, name: str, limit: int = 1 << 20) -> str:
        """Return what a program wrote into a file of the private folder, "" when there is no plain file any more."""
        try:
            # Whatever the program put in its place: a link must not show us a file of the host, a pipe not stop us.
            fd = os.open(self.outside(name), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            return ""
        try:
            plain = stat.S_ISREG(os.fstat(fd).st_mode)
            return os.read(fd, limit).decode("utf-8", "surrogateescape") if plain else ""
        finally:
            os.close(fd)

    def tidy(self) -> None:
        """Take the place of the private folder out of the root file system."""
        root = self._root_fd()
        try:
            above = open_in_root(root, os.path.dirname(PRIVATE), os.O_RDONLY | os.O_DIRECTORY)
        except OSError:
            return
        finally:
            os.close(root)
        try:
            os.rmdir(os.path.basename(PRIVATE), dir_fd=above)
        except OSError:  # already gone, or somebody put something there
            pass
        finally:
            os.close(above)

    def _root_fd(self) -> int:
        return os.open(self.root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)

    def _has(self, path: str) -> bool:
        root = self._root_fd()
        try:
            os.close(open_in_root(root, path))
        except OSError:
            return False
        else:
            return True
        finally:
            os.close(root)

    def _spec(
        self, argv: list[str], env: dict[str, str], binds: Sequence[str], cwd: str, writable: bool
    ) -> launch.LaunchSpec:
        settings = self._settings()
        return launch.LaunchSpec(
            image=launch.Layer(launch.SANDBOX, self.root),
            argv=argv,
            env={**clean_environment(self._environ), **settings, **env},
            writable=writable,
            create=writable,
            mounts=self._mounts(binds, writable),
            cwd=[cwd],
            cwd_required=True,
            identity=launch.KEEP,
            pid_namespace=True,
            umask=0o022,
            # Package scripts use su and sudo; in a user namespace that gives no rights outside of it.
            no_new_privs=False,
            squash_owners=False,
            keep_descriptors=(),
            session_size=SHARED_MEMORY,
            name=os.path.basename(self.root),
        )

    def _settings(self) -> dict[str, str]:
        """Write certificates and apt's settings into the private folder; return the variables that name them."""
        from pysingularity.runtime import emulate

        own = any(self._has(path) for path in trust.BUNDLES)
        bundle = trust.find(self._ca_bundle, self._environ, own)
        found: dict[str, str] = {}
        apt = ""
        if bundle:
            shutil.copyfile(bundle, self.outside("ca-bundle.pem"))
            os.chmod(self.outside("ca-bundle.pem"), 0o644)
            inside = f"{PRIVATE}/ca-bundle.pem"
            found.update(trust.variables(inside))
            apt += trust.apt_settings(inside)
            with open(self.outside("wgetrc"), "w", encoding="utf-8") as stream:
                stream.write(trust.wget_settings(inside))
            found["WGETRC"] = f"{PRIVATE}/wgetrc"
        apt += emulate.apt_workaround(self._way)
        if apt:
            with open(self.outside("apt.conf"), "w", encoding="utf-8") as stream:
                stream.write(apt)
            os.chmod(self.outside("apt.conf"), 0o644)
            found["APT_CONFIG"] = f"{PRIVATE}/apt.conf"
        return found

    def _mounts(self, binds: Sequence[str], writable: bool) -> list[launch.Mount]:
        mounts = [
            launch.Mount(launch.PROC, "/proc"),
            # A %post that writes or removes whatever it finds must not reach the host's devices, even as real root.
            launch.Mount(launch.BIND, "/sys", source="/sys", readonly=True),
            launch.Mount(launch.DEV, "/dev"),
            launch.Mount(launch.BIND, PRIVATE, source=self._support, required=True),
        ]
        for name in ("/etc/resolv.conf", "/etc/hosts"):
            try:
                with open(name, "rb") as stream:
                    content = stream.read(1 << 20)
            except OSError:
                continue
            mounts.append(launch.Mount(launch.FILE, name, content=content, mode=0o644))
        if not writable:
            mounts += [launch.Mount(launch.TMPFS, path, mode=0o1777) for path in SCRATCH]
        if self._nv:
            mounts += gpu_mounts()
        return [*mounts, *self._binds, *user_mounts(binds, ())]


def _both(first: Callable[[], None] | None, second: Callable[[], None]) -> Callable[[], None]:
    """Return a function that calls both: emulation has to be there before ids are changed."""

    def act() -> None:
        if first is not None:
            first()
        second()

    return act


def clean_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that programs of a build start with: nothing of the caller but the proxies."""
    found = {"PATH": PATH, "HOME": "/root", "USER": "root", "LOGNAME": "root", "LANG": "C"}
    for name in PROXIES:
        for spelling in (name, name.upper()):
            if environ.get(spelling):
                found[spelling] = environ[spelling]
    for name in ("TERM", "SOURCE_DATE_EPOCH"):
        if environ.get(name):
            found[name] = environ[name]
    return found


def user_mounts(binds: Sequence[str], mounts: Sequence[str]) -> list[launch.Mount]:
    """Return the mounts of --bind and --mount values.

    Raises:
        UserError: a source is missing, or the text is no bind.
    """
    from pysingularity.runtime.binds import parse_bind, parse_mount  # with the runtime

    wishes = [one for text in binds for one in parse_bind(text)] + [parse_mount(text) for text in mounts]
    found = []
    for one in wishes:
        source = os.path.abspath(one.source)
        if one.part or one.id:
            raise UserError("bind-image", f"{one.source}: parts of images cannot be bound in a build")
        if not os.path.exists(source):
            raise UserError("bind-source", f"there is no {one.source} on this machine to be bound")
        if not one.target.startswith("/"):
            raise UserError("bind-target", f"{one.target}: a bind needs an absolute path in the container")
        found.append(launch.Mount(launch.BIND, one.target, source=source, readonly=one.readonly, required=True))
    return found


def gpu_mounts() -> list[launch.Mount]:
    """Return the mounts of the GPU's libraries and programs for --nv; a machine without them is said and no error."""
    from pysingularity import messages
    from pysingularity.runtime import gpu  # only for --nv

    found = gpu.nvidia()
    for line in found.missing:
        messages.warning(f"--nv: {line}")
    libraries = [
        launch.Mount(launch.BIND, f"/.singularity.d/libs/{name}", source=path, readonly=True)
        for name, path in found.libraries
    ]
    nodes = [launch.Mount(launch.BIND, path, source=path, trusted=True) for path in found.devices]
    return nodes + libraries + [launch.Mount(launch.BIND, path, source=path, readonly=True) for path, _ in found.files]


def scratch_names(root: str) -> dict[str, set[str]]:
    """Return what lies in the folders for temporary files of a root file system."""
    found: dict[str, set[str]] = {}
    top = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for path in SCRATCH:
            try:
                fd = open_in_root(top, path, os.O_RDONLY | os.O_DIRECTORY)
            except OSError:
                continue
            try:
                found[path] = set(os.listdir(fd))
            finally:
                os.close(fd)
    finally:
        os.close(top)
    return found


def clear_scratch(root: str, before: Mapping[str, set[str]]) -> None:
    """Remove what a program left in the folders for temporary files; what %files put there stays."""
    top = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for path in SCRATCH:
            try:
                fd = open_in_root(top, path, os.O_RDONLY | os.O_DIRECTORY)
            except OSError:
                continue
            try:
                for name in os.listdir(fd):
                    if name in before.get(path, set()):
                        continue
                    if stat.S_ISDIR(os.stat(name, dir_fd=fd, follow_symlinks=False).st_mode):
                        shutil.rmtree(name, dir_fd=fd, ignore_errors=True)
                    else:
                        os.unlink(name, dir_fd=fd)
            finally:
                os.close(fd)
    finally:
        os.close(top)
