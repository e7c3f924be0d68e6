# SPDX-License-Identifier: Apache-2.0
"""What the supervisor answers to calls about ids: a program that changes its ids and looks again sees what it set.

Only processes that have changed theirs are answered; everybody else gets the kernel's own answer, which is root. A
process in a user namespace of its own (a sandbox in the container) is left to the kernel altogether.
"""

from __future__ import annotations

import os
import struct

from pysingularity.linux import remote
from pysingularity.runtime.credentials import FIRST, Credentials

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pysingularity.runtime.supervisor import Handler, Question, Supervisor

_EINVAL, _EPERM, _ESRCH = 22, 1, 3
_MOST_GROUPS = 65536
_PR_GET_KEEPCAPS, _PR_SET_KEEPCAPS = 7, 8
_CAPABILITY_VERSION_3 = 0x20080522
_SOL_SOCKET, _SO_PEERCRED = 1, 17


def _set(change: Callable[[Credentials, Question], Credentials]) -> Handler:
    """Return a handler that changes the caller's credentials."""

    def handle(supervisor: Supervisor, question: Question) -> int | None:
        if supervisor.foreign(question):
            return None
        old = supervisor.credentials(question)
        new = change(old, question)
        if new != old:
            supervisor.become(question, new)
        return 0

    return handle


def _set_file_id(change: Callable[[Credentials, Question], Credentials], user: bool) -> Handler:
    """Return a handler of setfsuid and setfsgid, whose result is the former id whatever happens."""

    def handle(supervisor: Supervisor, question: Question) -> int | None:
        if supervisor.foreign(question):
            return None
        old = supervisor.credentials(question)
        new = change(old, question)
        if new != old:
            supervisor.become(question, new)
        return (old.user if user else old.group)[3]

    return handle


def _get(value: Callable[[Credentials], int]) -> Handler:
    """Return a handler that tells one id."""

    def handle(supervisor: Supervisor, question: Question) -> int | None:
        if not supervisor.anybody_changed:
            return None
        now = supervisor.credentials(question)
        return None if now is FIRST or supervisor.foreign(question) else value(now)

    return handle


def _get_three(values: Callable[[Credentials], tuple[int, int, int, int]]) -> Handler:
    """Return a handler that writes real, effective and saved id."""

    def handle(supervisor: Supervisor, question: Question) -> int | None:
        now = supervisor.credentials(question)
        if now is FIRST or supervisor.foreign(question):
            return None
        ids = zip(question.arguments[:3], values(now)[:3], strict=True)
        supervisor.write(question, *[(address, question.ids(one)) for address, one in ids])
        return 0

    return handle


def getgroups(supervisor: Supervisor, question: Question) -> int | None:
    """Tell the groups: the user's own ones, which the kernel would show as nobody's, are not the container's."""
    if supervisor.foreign(question):
        return None
    groups = supervisor.credentials(question).groups
    room = question.signed(0)
    if room < 0 or 0 < room < len(groups):
        return -_EINVAL
    if room and groups:
        supervisor.write(question, (question.arguments[1], question.ids(*groups)))
    return len(groups)


def setgroups(supervisor: Supervisor, question: Question) -> int | None:
    """Set the groups."""
    if supervisor.foreign(question):
        return None
    count = question.signed(0)
    if not 0 <= count <= _MOST_GROUPS:
        return -_EINVAL
    size = 4 if question.wide else 2
    data = bytearray()
    while len(data) < count * size:
        piece = min(remote.PATH_MAX, count * size - len(data))
        data += remote.read(question.pid, question.arguments[1] + len(data), piece)
    letter = "I" if question.wide else "H"
    groups = struct.unpack(f"{question.architecture.order}{count}{letter}", data)
    old = supervisor.credentials(question)
    new = old.setgroups(groups)
    if new != old:
        supervisor.become(question, new)
    return 0


def _capability_target(question: Question) -> int | None:
    """Return the pid that a capability header names, 0 for the caller; None for versions we leave to the kernel."""
    header = remote.read(question.pid, question.arguments[0], 8)
    version, pid = struct.unpack(question.architecture.order + "Ii", header)
    return None if version != _CAPABILITY_VERSION_3 else pid


def capget(supervisor: Supervisor, question: Question) -> int | None:
    """Tell the capabilities of a caller that has changed its ids or given some up."""
    if not question.arguments[1]:
        return None
    now = supervisor.credentials(question)
    # Another process's pid may be a number of another namespace: only the caller itself is answered.
    if now is FIRST or supervisor.foreign(question) or _capability_target(question) != 0:
        return None
    words = []
    for shift in (0, 32):
        words += [mask >> shift & 0xFFFFFFFF for mask in (now.effective, now.permitted, now.inheritable)]
    supervisor.write(question, (question.arguments[1], struct.pack(question.architecture.order + "6I", *words)))
    return 0


def capset(supervisor: Supervisor, question: Question) -> int | None:
    """Let the caller believe that it gave capabilities up."""
    if supervisor.foreign(question) or _capability_target(question) is None:
        return None
    words = struct.unpack(question.architecture.order + "6I", remote.read(question.pid, question.arguments[1], 24))
    effective, permitted, inheritable = (words[at] | words[at + 3] << 32 for at in range(3))
    old = supervisor.credentials(question)
    new = old.capset(effective, permitted, inheritable)
    if new != old:
        supervisor.become(question, new)
    return 0


def prctl(supervisor: Supervisor, question: Question) -> int | None:
    """Keep capabilities over a change of ids (PR_SET_KEEPCAPS)."""
    if supervisor.foreign(question):
        return None
    old = supervisor.credentials(question)
    if question.signed(0) == _PR_GET_KEEPCAPS:
        return int(old.keep)
    if question.signed(0) == _PR_SET_KEEPCAPS and question.arguments[1] in (0, 1):
        new = old.keepcaps(bool(question.arguments[1]))
        if new != old:
            supervisor.become(question, new)
        return 0
    return None


def getsockopt(supervisor: Supervisor, question: Question) -> int | None:
    """Tell whom a socket's other end believes to be (SO_PEERCRED): a server that trusts its own user only."""
    if not supervisor.anybody_changed or (question.signed(1), question.signed(2)) != (_SOL_SOCKET, _SO_PEERCRED):
        return None
    import _socket  # imported by `runtime.emulate` before the root changed

    order = question.architecture.order
    (room,) = struct.unpack(order + "i", remote.read(question.pid, question.arguments[4], 4))
    if room < 12:
        return None
    descriptor = remote.copy_descriptor(question.pid, question.signed(0))
    connection = _socket.socket(fileno=descriptor)
    try:
        peer, uid, _ = struct.unpack("=iII", connection.getsockopt(_SOL_SOCKET, _SO_PEERCRED, 12))
    finally:
        connection.close()
    if peer <= 0 or uid != 0:
        return None
    try:
        now = supervisor.credentials_of(peer)
    except OSError:  # the peer has ended
        return None
    if now is FIRST:
        return None
    # The kernel knows the peer's pid as the caller sees it; only the ids are ours to tell.
    with_pid = _pid_in_callers_namespace(question.pid, peer)
    data = struct.pack(order + "iII", with_pid, now.user[1], now.group[1])
    supervisor.write(question, (question.arguments[3], data), (question.arguments[4], struct.pack(order + "i", 12)))
    return 0


def _pid_in_callers_namespace(caller: int, peer: int) -> int:
    """Return a process's pid as another one sees it, 0 when it does not."""
    own, other = _pids(caller), _pids(peer)
    depth = len(own)
    return other[depth - 1] if 0 < depth <= len(other) else 0


def _pids(pid: int) -> list[int]:
    """Return a process's pids, from our namespace inwards (proc(5), NSpid)."""
    descriptor = os.open(b"%d/status" % pid, os.O_RDONLY | os.O_CLOEXEC)
    try:
        data = os.read(descriptor, 8192)
    finally:
        os.close(descriptor)
    for line in data.splitlines():
        if line.startswith(b"NSpid:"):
            return [int(word) for word in line.split()[1:]]
    return []


HANDLERS: dict[str, Handler] = {
    "setuid": _set(lambda now, question: now.setuid(question.id(0))),
    "setgid": _set(lambda now, question: now.setgid(question.id(0))),
    "setreuid": _set(lambda now, question: now.setreuid(question.id(0), question.id(1))),
    "setregid": _set(lambda now, question: now.setregid(question.id(0), question.id(1))),
    "setresuid": _set(lambda now, question: now.setresuid(question.id(0), question.id(1), question.id(2))),
    "setresgid": _set(lambda now, question: now.setresgid(question.id(0), question.id(1), question.id(2))),
    "setfsuid": _set_file_id(lambda now, question: now.setfsuid(question.id(0)), True),
    "setfsgid": _set_file_id(lambda now, question: now.setfsgid(question.id(0)), False),
    "setgroups": setgroups,
    "getuid": _get(lambda now: now.user[0]),
    "geteuid": _get(lambda now: now.user[1]),
    "getgid": _get(lambda now: now.group[0]),
    "getegid": _get(lambda now: now.group[1]),
    "getresuid": _get_three(lambda now: now.user),
    "getresgid": _get_three(lambda now: now.group),
    "getgroups": getgroups,
    "capget": capget,
    "capset": capset,
    "prctl": prctl,
    "getsockopt": getsockopt,
}
