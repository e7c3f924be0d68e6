# SPDX-License-Identifier: Apache-2.0
"""Root emulation: what a program needs around it to be root where this process is only root of one id.

`prepare` chooses by the way this process became root, and starts a supervisor where one is needed:

- one id, with notification: every call that only root may make, and every call that tells about owners, is answered by
  `runtime.supervisor`; owners, devices and file capabilities are recorded for the image;
- one id, plain filter: the same calls are told to have succeeded, and nothing else happens;
- a range of ids: the kernel does everything but device nodes, which are recorded;
- real root: nothing.

In a tree that is thrown away when the build breaks off, fsync and its family do nothing: a quarter of the time of a
package installation.
"""

from __future__ import annotations

import _socket
import array
import os

from pysingularity import messages
from pysingularity.errors import InternalError
from pysingularity.linux import seccomp
from pysingularity.linux.ownership import RecordedOwners
from pysingularity.linux.process import close_others, set_name
from pysingularity.linux.seccomp import ERRNO, NOTIFY, Rule, assemble
from pysingularity.runtime import answers_files, answers_ids
from pysingularity.runtime.rootless import BPF, SINGLE, SUBUID, Way
from pysingularity.runtime.supervisor import GREETING, Supervisor

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from pysingularity.runtime.supervisor import Handler

_SYNC = ("fsync", "fdatasync", "sync", "msync", "sync_file_range", "syncfs")
_CHOWN = ("chown", "fchown", "lchown", "fchownat")
_SET_IDS = (
    *("setuid", "setgid", "setreuid", "setregid", "setresuid", "setresgid", "setfsuid", "setfsgid"),
    *("setgroups", "capset"),
)
_DEVICES = (0o020000, 0o060000)
_MAKE, _TMPFILE = 0o100, 0o20000000
#: Calls of which only some are handed over: argument, mask, values (see `Rule`).
_SOME: dict[str, tuple[int, int, tuple[int, ...]]] = {
    "open": (1, _MAKE | _TMPFILE, ()),
    "openat": (2, _MAKE | _TMPFILE, ()),
    "prctl": (0, 0xFFFFFFFF, (7, 8)),
    "getsockopt": (2, 0xFFFFFFFF, (17,)),
}
_TYPE_ARGUMENT = {"mknod": 1, "mknodat": 2}


class Emulation:
    """Root emulation for one program; call it in the program's process, inside the container, right before it starts.

    Arguments:
        rules: the filter.
        way: how this process is root; its owners take the records.
        handlers: answers of the supervisor; none is started when there are none.
        also: see `prepare`.
    """

    def __init__(self, rules: list[Rule], way: Way, handlers: dict[str, Handler], also: Sequence[str] = ()) -> None:
        self._program = assemble(rules, seccomp.architectures())
        self._way, self._handlers, self._also = way, handlers, also
        self._child: _socket.socket | None = None
        if handlers:
            self._start()

    def _start(self) -> None:
        """Start the supervisor: outside of the container's pid and mount namespaces, not waited for by anybody."""
        ours, self._child = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_STREAM)
        first = os.fork()
        if first:
            ours.close()
            os.waitpid(first, 0)
            return
        try:
            if os.fork():
                os._exit(0)
            self._child.close()
            self._supervise(ours)
        except BaseException as error:
            messages.error(f"root emulation: {type(error).__name__}: {error}")
        finally:
            os._exit(0)

    def _supervise(self, channel: _socket.socket) -> None:
        # A terminal's ^C is for the program; the supervisor ends when nobody is left to ask.
        os.setsid()
        set_name("singularity-su")
        owners = self._way.owners
        tables = (owners.table.descriptor,) if isinstance(owners, RecordedOwners) else ()
        close_others((2, channel.fileno(), *tables))
        for _ in (0, 1):
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
        room = _socket.CMSG_SPACE(8)
        _, messages_, _, _ = channel.recvmsg(16, room)
        if not messages_:
            return  # the program was never started
        listener, root = array.array("i", messages_[0][2][:8])
        supervisor = Supervisor(seccomp.Listener(listener), root, self._way.owners, self._handlers, self._also)
        os.close(root)
        channel.sendall(b"x")
        channel.close()
        supervisor.serve()
        total = sum(supervisor.asked.values())
        most = sorted(supervisor.asked.items(), key=lambda item: -item[1])
        words = ", ".join(f"{name} {count}" for name, count in most)
        messages.debug(f"root emulation: {total} calls answered: {words}")

    def in_child(self) -> None:
        """Put the filter on this process and hand the listener over. There must not be other threads.

        Raises:
            InternalError: the filter could not be installed, or the supervisor did not take it.
        """
        channel = self._child
        try:
            if channel is None:
                seccomp.install(self._program)
            else:
                root = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
                listener = seccomp.install(self._program, listener=True)
                both = array.array("i", (listener, root)).tobytes()
                channel.sendmsg([b"x"], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, both)])
                os.close(listener)
                os.close(root)
                if channel.recv(1) != b"x":
                    raise InternalError("no-supervisor", "root emulation did not start")
                channel.close()
            if self._handlers or self._way.needs_emulation:
                os.fchown(GREETING, 0, 0)  # no such descriptor: only filter and supervisor call that a success
        except OSError as error:
            raise InternalError("no-emulation", f"root emulation cannot be installed: {error}") from None

    def __call__(self) -> None:
        """As `in_child`."""
        self.in_child()

    def finish(self) -> None:
        """Let go of the supervisor, in the process that prepared it. It ends with the last process it serves."""
        if self._child is not None:
            self._child.close()


def _every_name(handler: str) -> list[str]:
    """Return the names under which a call exists on some architecture."""
    return [handler, f"{handler}32"]


def _notify_rules(handlers: dict[str, Handler]) -> list[Rule]:
    names = [(one, _SOME.get(name, ())) for name in handlers for one in _every_name(name)]
    return [Rule(name, NOTIFY, *some) for name, some in names]


def _sync_rules(throwaway: bool) -> list[Rule]:
    return [Rule(name, ERRNO) for name in _SYNC] if throwaway else []


def prepare(way: Way, *, throwaway: bool = True, also: Sequence[str] = ()) -> Emulation | None:
    """Return the emulation that a program of a build needs, or None. One is good for one program.

    Starts the supervisor at once: call it right before the program is started, and `finish` afterwards.

    Arguments:
        way: how this process is root (`runtime.rootless.become_root`).
        throwaway: the tree is of no use when the build breaks off, so nothing has to reach the disk in between.
        also: paths of the container where other trees are bound whose owners are to be recorded as well.

    Raises:
        OSError: no process could be started.
    """
    sync = _sync_rules(throwaway)
    if not seccomp.architectures():
        return None
    if way.name == SINGLE and way.emulation != BPF:
        handlers = {**answers_files.HANDLERS, **answers_ids.HANDLERS}
        return Emulation(sync + _notify_rules(handlers), way, handlers, also)
    if way.name == SINGLE:
        pretend = [Rule(one, ERRNO) for name in (*_CHOWN, *_SET_IDS) for one in _every_name(name)]
        pretend += [Rule(name, ERRNO, at, 0o170000, _DEVICES) for name, at in _TYPE_ARGUMENT.items()]
        return Emulation(sync + pretend, way, {})
    if way.name == SUBUID:
        nodes = {name: answers_files.HANDLERS[name] for name in (*_TYPE_ARGUMENT, "fchown")}
        rules = [Rule(name, NOTIFY, at, 0o170000, _DEVICES) for name, at in _TYPE_ARGUMENT.items()]
        rules.append(Rule("fchown", NOTIFY, 0, 0xFFFFFFFF, (GREETING,)))
        if seccomp.listener_possible():
            return Emulation(sync + rules, way, nodes, also)
        return Emulation(sync, way, {}) if sync else None
    return Emulation(sync, way, {}) if sync else None


def apt_workaround(way: Way) -> str:
    """Return lines for apt.conf that apt needs under this way, or "".

    apt gives up its rights by changing its ids, and then looks whether it did: plain pretending is found out.
    """
    return 'APT::Sandbox::User "root";\n' if way.emulation == BPF else ""
