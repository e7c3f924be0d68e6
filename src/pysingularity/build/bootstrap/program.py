# SPDX-License-Identifier: Apache-2.0
"""Package managers that fill a root from outside: dnf, yum, zypper, pacman. Shared by their agents.

The program is the host's own when it is there. Else a bootstrap container has it: the image that
SINGULARITY_BOOTSTRAP_CONTAINER names, or a small Debian from the host's apt sources, which is kept in the cache, or the
distribution's own image from a registry. The variable may also say "host" (never a container) or "debian" (the small
Debian even when the host has the program).

Either way the program runs as (emulated) root, and the new root has /dev and /proc: scripts of packages run inside it.
In a container all folders it works with have the names that they have on the host. What it prints goes to a file, whose
end is shown when it fails.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from pysingularity import messages
from pysingularity.build.bootstrap import BootstrapRequest
from pysingularity.errors import HostError, SingularityError, UserError
from pysingularity.linux import mounts
from pysingularity.linux.namespaces import NEWNS, unshare
from pysingularity.linux.process import die_with_parent, restore_signals

if TYPE_CHECKING:
    from pysingularity.build.container import BuildContainer
    from pysingularity.runtime import spec as launch

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
#: Where the program comes from: host, debian, or an image.
VARIABLE = "SINGULARITY_BOOTSTRAP_CONTAINER"
HOST, DEBIAN = "host", "debian"
_PASSED = ("http_proxy", "https_proxy", "ftp_proxy", "all_proxy", "no_proxy")
_CERTIFICATES = ("SSL_CERT_FILE", "SSL_CERT_DIR", "CURL_CA_BUNDLE")
#: Lines of a failed program's output that an error shows.
_SHOWN = 12
#: How long a bootstrap container is kept: the programs in it get their security fixes.
_WEEK = 7 * 24 * 3600


class Program:
    """A package manager, on this host or in a bootstrap container.

    Arguments:
        request: what the agent was asked.
        names: the program's names, best first.
        package: its package on Debian.
        image: reference of an image that has it, for hosts that are no Debian.

    Raises:
        HostError: it is nowhere to be had; the message says what was tried.
    """

    def __init__(self, request: BootstrapRequest, *names: str, package: str, image: str) -> None:
        self.request = request
        self._container: BuildContainer | None = None
        self._log = -1
        agent = request.header.get("bootstrap", "")
        wish = request.environ.get(VARIABLE) or request.environ.get(VARIABLE.replace("SINGULARITY", "APPTAINER")) or ""
        path = find(*names) if wish in ("", HOST) else ""
        if path:
            self.path = path
            return
        self.path = names[0]
        words = " or ".join(names)
        if wish == HOST:
            raise HostError(
                "program-missing",
                f"Bootstrap: {agent} needs {words} on this host, and it is not there",
                hint=f"install the package {package}, or unset {VARIABLE}",
            )
        messages.info(f"{names[0]} is {'not on this host' if not wish else 'taken from a container'}: bringing one in")
        self._log = os.open(os.path.join(request.tmp, "bootstrap-container.log"), _LOG, 0o600)
        root = os.path.join(request.tmp, "bootstrap-container")
        os.makedirs(root, exist_ok=True)
        os.chmod(root, 0o755)
        try:
            self._fill(root, package, wish, image)
        except SingularityError as error:
            raise HostError(
                "program-missing",
                f"Bootstrap: {agent} needs {words}, which is not on this host, and a container with it cannot be had "
                f"either: {error.message}",
                hint=f"install the package {package}, or name an image that has it: {VARIABLE}=IMAGE",
            ) from None
        path = next(filter(None, (_inside(root, name) for name in names)), "")
        if not path:
            raise HostError(
                "program-missing", f"{wish or image}: has no {words}", hint=f"name another image: {VARIABLE}=IMAGE"
            )
        self.path = path
        self._container = self._contain(root)

    def run(self, words: Sequence[str], what: str, env: Mapping[str, str] | None = None) -> None:
        """Run the program on the new root.

        Arguments:
            words: its arguments.
            what: what it does, for progress and errors ("installing packages").

        Raises:
            UserError: it fails; the message ends with what it said last.
        """
        request = self.request
        request.progress(what)
        name = os.path.basename(self.path)
        log = os.path.join(request.tmp, f"{name}.log")
        for folder in ("dev", "proc", "sys"):
            os.makedirs(os.path.join(request.root, folder), exist_ok=True)
        full = {"HOME": self.home(), "LC_ALL": "C.UTF-8", "LANG": "C.UTF-8", "TERM": "dumb", **(env or {})}
        if self._container is not None:
            descriptor = os.open(log, _LOG, 0o600)
            try:
                code = self._container.run([self.path, *words], env=full, with_environment=False, output=descriptor)
            finally:
                os.close(descriptor)
        else:
            code = _run_on_host(request, [self.path, *words], full, log)
        if code:
            ended = f"status {code}" if code < 128 else f"signal {code - 128}"
            raise UserError(
                "program-failed",
                f"{what}: {name} ended with {ended}\n{_tail(log)}",
                hint="is MirrorURL right for OSVersion, and does it have the packages of Include?",
            )

    def home(self) -> str:
        """Return the folder that is the program's home."""
        path = os.path.join(self.request.tmp, "home")
        os.makedirs(path, exist_ok=True)
        return path

    def _fill(self, root: str, package: str, wish: str, image: str) -> None:
        """Make the bootstrap container's root."""
        from pysingularity.build.deb.sources import codename, host_sources, of_distribution

        suite = codename()[1]
        if wish == DEBIAN or (not wish and of_distribution(host_sources(), suite)):
            self._fill_with_debian(root, package, suite)
            return
        from pysingularity.build.bootstrap.localimage import unpack
        from pysingularity.build.bootstrap.remote import fetch_text
        from pysingularity.reference import has_scheme

        request, name = self.request, wish or image
        path = os.path.join(request.directory, name)
        if has_scheme(name) and not os.path.exists(path):
            environ = {**request.environ, "SINGULARITY_TMPDIR": request.tmp}
            path = fetch_text(name, request.options, environ, request.progress)
        unpack(self._for(root, {}), path)

    def _fill_with_debian(self, root: str, package: str, suite: str) -> None:
        from pysingularity.build.bootstrap import debootstrap
        from pysingularity.build.plan import BOOTSTRAP, Step
        from pysingularity.build.request import Writer
        from pysingularity.build.steps import StepStore, salt
        from pysingularity.cache import Cache

        request = self.request
        mark = hashlib.sha256(f"{package} {suite} {request.arch} {int(time.time()) // _WEEK}".encode()).hexdigest()
        step = Step(0, BOOTSTRAP, f"{package} in a small Debian", id=mark)
        cache = Cache.open(request.environ, disabled="disable-cache" in request.options)
        writer = Writer("zstd", 1, 131072, None)
        store = StepStore(cache, salt("", request.way.emulation), writer, request.way.owners) if cache else None
        there = store.find(step) if store is not None else None
        if store is not None and there is not None:
            store.restore(there, root)
            return
        debootstrap.bootstrap(self._for(root, {"include": f"{package} ca-certificates"}))
        if store is not None:
            store.keep(step, root, "")

    def _for(self, root: str, header: dict[str, str]) -> BootstrapRequest:
        """Return the request for the bootstrap container itself."""
        request = self.request
        inside = self._bare(root)

        def run(
            argv: Sequence[str], *, env: Mapping[str, str] | None = None, binds: Sequence[str] = (), cwd: str = "/"
        ) -> int:
            return inside.run(argv, env=env, binds=binds, cwd=cwd, with_environment=False)

        tmp = os.path.join(request.tmp, "bootstrap-container-tmp")
        os.makedirs(tmp, exist_ok=True)
        return BootstrapRequest(
            header={"bootstrap": "debootstrap", **header},
            root=root,
            way=request.way,
            cache=request.cache,
            tmp=tmp,
            progress=request.progress,
            run=run,
            arch=request.arch,
            options={name: value for name, value in request.options.items() if name != "no-verify"},
            environ=request.environ,
            directory=request.directory,
        )

    def _bare(self, root: str, binds: Sequence[launch.Mount] = ()) -> BuildContainer:
        from pysingularity.build.container import BuildContainer  # brings in the runtime

        support = os.path.join(self.request.tmp, "bootstrap-container-support")
        os.makedirs(support, exist_ok=True)
        os.chmod(support, 0o755)
        return BuildContainer(
            root,
            way=self.request.way,
            support=support,
            environ=self.request.environ,
            binds=binds,
            roots=[self.request.root] if binds else [],
            output=self._log,
        )

    def _contain(self, root: str) -> BuildContainer:
        """Return the container in which the program sees what it works with where the host has it."""
        from pysingularity.runtime import spec as launch

        request = self.request
        shared = [request.root, request.tmp, request.cache, request.directory]
        for keyword, value in request.header.items():
            path = value.strip().removeprefix("file://")
            if (keyword.endswith("url") or keyword == "keyring") and path.startswith("/"):
                shared.append(path.split("$")[0])
        binds = [
            launch.Mount(launch.BIND, path, source=path, required=True)
            for path in dict.fromkeys(os.path.abspath(one) for one in shared)
            if path != "/" and os.path.exists(path)
        ]
        binds += [
            launch.Mount(launch.BIND, f"{request.root}/dev", source="/dev", trusted=True),
            launch.Mount(launch.BIND, f"{request.root}/sys", source="/sys"),
            launch.Mount(launch.PROC, f"{request.root}/proc"),
        ]
        return self._bare(root, binds)


_LOG = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC


def find(*names: str) -> str:
    """Return the path of the first of some programs that this host has, or ""."""
    for name in names:
        path = shutil.which(name, path=f"{os.environ.get('PATH', '')}:{PATH}")
        if path is not None:
            return path
    return ""


def _inside(root: str, name: str) -> str:
    """Return the path of a program inside a root, or ""."""
    top = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for folder in PATH.split(":"):
            try:
                os.close(mounts.open_in_root(top, f"{folder}/{name}"))
            except OSError:
                continue
            return f"{folder}/{name}"
    finally:
        os.close(top)
    return ""


def _run_on_host(request: BootstrapRequest, argv: list[str], env: dict[str, str], log: str) -> int:
    """Run a program of the host; return its status, or 128 + signal."""
    from pysingularity.runtime import emulate  # the runtime is needed by no other part of an agent

    full = {"PATH": PATH}
    for name in _PASSED:
        for form in (name, name.upper()):
            if form in request.environ:
                full[form] = request.environ[form]
    full |= {name: request.environ[name] for name in _CERTIFICATES if name in request.environ}
    full |= env
    emulation = emulate.prepare(request.way)
    me = os.getpid()
    try:
        pid = os.fork()
        if pid == 0:
            _become(request.root, argv, full, log, emulation, me)
        _, status = os.waitpid(pid, 0)
    finally:
        if emulation is not None:
            emulation.finish()
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def _become(root: str, argv: list[str], env: dict[str, str], log: str, emulation: object, parent: int) -> None:
    """Be the program; never returns."""
    try:
        die_with_parent(parent=parent)
        unshare(NEWNS)
        mounts.mount(None, "/", None, mounts.MS_REC | mounts.MS_SLAVE)
        for name in ("dev", "proc", "sys"):
            mounts.mount(f"/{name}", os.path.join(root, name), None, mounts.MS_BIND | mounts.MS_REC)
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.umask(0o022)
        restore_signals()
        if callable(emulation):
            emulation()
        os.execve(argv[0], argv, env)
    except OSError as error:
        os.write(2, f"{argv[0]}: {error}\n".encode())
    finally:
        os._exit(127)


def _tail(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="backslashreplace") as file:
            lines = [line.rstrip() for line in file if line.strip()]
    except OSError as error:
        return "" if error.errno == errno.ENOENT else str(error)
    return "\n".join(f"    {line}" for line in lines[-_SHOWN:])


def words(text: str) -> list[str]:
    """Return the names of a list with blanks or commas."""
    return text.replace(",", " ").split()


def verify(request: BootstrapRequest) -> bool:
    """Return whether the header (Verify) and the options want signatures of packages checked.

    Raises:
        UserError: the header says something else than yes or no.
    """
    word = request.header.get("verify", "yes").strip().lower()
    if word not in ("yes", "no"):
        raise UserError("bad-keyword", f"Verify: {word}: it is yes or no")
    return word == "yes" and not request.options.get("no-verify")


def remove(request: BootstrapRequest, *paths: str) -> None:
    """Take caches and logs of a package manager out of the root, without following links."""
    for path in paths:
        full = os.path.join(request.root, path)
        # Only plain folders on the way: nothing outside of the root can be meant.
        parts = path.split("/")
        if any(os.path.islink(os.path.join(request.root, *parts[: end + 1])) for end in range(len(parts))):
            continue
        if os.path.isdir(full):
            for name in os.listdir(full):
                inner = os.path.join(full, name)
                if os.path.isdir(inner) and not os.path.islink(inner):
                    shutil.rmtree(inner)
                else:
                    os.unlink(inner)
        elif os.path.exists(full):
            os.unlink(full)
