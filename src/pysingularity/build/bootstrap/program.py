# SPDX-License-Identifier: Apache-2.0
"""Package managers of the host that fill a root from outside: dnf, yum, zypper, pacman. Shared by their agents.

The program runs as (emulated) root in a mount namespace of its own, where the new root has the host's /dev and /proc:
scripts of packages run inside it. What it prints goes to a file, whose end is shown when it fails.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Mapping, Sequence

from pysingularity.build.bootstrap import BootstrapRequest
from pysingularity.errors import HostError, UserError
from pysingularity.linux import mounts
from pysingularity.linux.namespaces import NEWNS, unshare
from pysingularity.linux.process import die_with_parent, restore_signals

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_PASSED = ("http_proxy", "https_proxy", "ftp_proxy", "all_proxy", "no_proxy")
_CERTIFICATES = ("SSL_CERT_FILE", "SSL_CERT_DIR", "CURL_CA_BUNDLE")
#: Lines of a failed program's output that an error shows.
_SHOWN = 12


def find(*names: str, agent: str, package: str) -> str:
    """Return the path of the first of some programs that this host has.

    Raises:
        HostError: it has none.
    """
    for name in names:
        path = shutil.which(name, path=f"{os.environ.get('PATH', '')}:{PATH}")
        if path is not None:
            return path
    raise HostError(
        "program-missing",
        f"Bootstrap: {agent} needs {' or '.join(names)} on this host, and it is not there",
        hint=f"install the package {package}, or start from an image of that distribution with Bootstrap: docker",
    )


def run(request: BootstrapRequest, argv: Sequence[str], what: str, env: Mapping[str, str] | None = None) -> None:
    """Run a package manager on the new root.

    Arguments:
        what: what it does, for progress and errors ("installing packages").

    Raises:
        UserError: it fails; the message ends with what it said last.
    """
    from pysingularity.runtime import emulate  # the runtime is needed by no other part of an agent

    request.progress(what)
    home = os.path.join(request.tmp, "home")
    os.makedirs(home, exist_ok=True)
    full = {"PATH": PATH, "HOME": home, "LC_ALL": "C.UTF-8", "LANG": "C.UTF-8", "TERM": "dumb"}
    for name in _PASSED:
        for form in (name, name.upper()):
            if form in request.environ:
                full[form] = request.environ[form]
    full |= {name: request.environ[name] for name in _CERTIFICATES if name in request.environ}
    full |= env or {}
    log = os.path.join(request.tmp, f"{os.path.basename(argv[0])}.log")
    for name in ("dev", "proc", "sys"):
        os.makedirs(os.path.join(request.root, name), exist_ok=True)
    emulation = emulate.prepare(request.way)
    me = os.getpid()
    try:
        pid = os.fork()
        if pid == 0:
            _become(request.root, list(argv), full, log, emulation, me)
        _, status = os.waitpid(pid, 0)
    finally:
        if emulation is not None:
            emulation.finish()
    if status:
        code = os.waitstatus_to_exitcode(status)
        ended = f"status {code}" if code >= 0 else f"signal {-code}"
        raise UserError(
            "program-failed",
            f"{what}: {os.path.basename(argv[0])} ended with {ended}\n{_tail(log)}",
            hint="is MirrorURL right for OSVersion, and does it have the packages of Include?",
        )


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
