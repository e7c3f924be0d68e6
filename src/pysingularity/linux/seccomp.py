# SPDX-License-Identifier: Apache-2.0
"""seccomp(2): filters of system calls as BPF bytes, and the kernel's questions to a supervisor (seccomp_unotify(2)).

A filter is a list of `Rule`s per architecture; `assemble` turns it into classic BPF with labels, so that no jump is
counted by hand. `install` puts it on this process for ever. With `listener=True` it returns a descriptor from which
another process, which must not be under the filter itself, receives each call that a rule hands over, and answers it.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
import sys

from pysingularity.linux.libc import NR_SECCOMP, syscall
from pysingularity.linux.syscalls import ARCHITECTURES, Architecture

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

#: Results of a filter (linux/seccomp.h). ERRNO carries the error number in its lower half; 0 pretends success.
ALLOW, NOTIFY, ERRNO = 0x7FFF0000, 0x7FC00000, 0x00050000

# Classic BPF (linux/filter.h, linux/bpf_common.h).
_LOAD, _AND, _RETURN, _JUMP, _EQUAL, _BITS = 0x20, 0x54, 0x06, 0x05, 0x15, 0x45
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data
_X32 = 0x40000000

_SET_FILTER, _GET_SIZES = 1, 3
_NEW_LISTENER, _WAIT_KILLABLE = 8, 32
_CONTINUE = 1
_ADDFD_SEND = 2
_NOTIFICATION = struct.Struct("=QIIiIQ6Q")
_RESPONSE = struct.Struct("=QqiI")
_ADDITION = struct.Struct("=QIIII")

_ENOENT, _EINTR, _EINVAL = 2, 4, 22

#: seccomp's own number where `linux.libc` does not know it.
_SECCOMP = {"ppc64le": 358, "s390x": 348}.get(os.uname().machine, NR_SECCOMP)


def _ioctl(number: int, size: int, *, read: bool = False, write: bool = False) -> int:
    """Return a request number (asm/ioctl.h); POWER has its direction bits elsewhere."""
    if os.uname().machine.startswith("ppc"):
        return (read << 30 | write << 31) | size << 16 | ord("!") << 8 | number
    return (write << 30 | read << 31) | size << 16 | ord("!") << 8 | number


_RECEIVE = _ioctl(0, _NOTIFICATION.size, read=True, write=True)
_SEND = _ioctl(1, _RESPONSE.size, read=True, write=True)
_VALID = _ioctl(2, 8, read=True)  # the direction is wrong, but the only one that Linux before 5.8 knows
_ADDFD = _ioctl(3, _ADDITION.size, write=True)
_SET_FLAGS = _ioctl(4, 8, write=True)


class Rule:
    """What happens to one system call.

    Arguments:
        call: its name; an architecture without it has no such rule.
        action: ALLOW, NOTIFY, or ERRNO | number.
        argument: number of the argument that must match, or -1 for none; only its lower 32 bits are seen.
        mask: bits of the argument that are compared.
        values: what they must be equal to; empty: any of the bits is set.
    """

    __slots__ = ("action", "argument", "call", "mask", "values")

    def __init__(
        self, call: str, action: int, argument: int = -1, mask: int = 0xFFFFFFFF, values: Sequence[int] = ()
    ) -> None:
        self.call, self.action, self.argument, self.mask, self.values = call, action, argument, mask, tuple(values)

    def __repr__(self) -> str:
        return f"Rule({self.call} → {self.action:#x})"


class _Program:
    """BPF instructions with labels."""

    def __init__(self) -> None:
        self._code: list[tuple[int, str, str, int | str]] = []
        self._labels: dict[str, int] = {}
        self._count = 0

    def fresh(self) -> str:
        """Return a name for a place that comes later."""
        self._count += 1
        return f"label {self._count}"

    def place(self, label: str) -> None:
        """Say that a label is here."""
        self._labels[label] = len(self._code)

    def add(self, code: int, value: int | str = 0, yes: str = "", no: str = "") -> None:
        """Append an instruction; `yes` and `no` are labels, empty for the next instruction."""
        self._code.append((code, yes, no, value))

    def bytes(self) -> bytes:
        """Return struct sock_filter[].

        Raises:
            ValueError: a conditional jump is longer than 255 instructions.
        """
        out = []
        for here, (code, yes, no, value) in enumerate(self._code):
            true, false = (self._labels[label] - here - 1 if label else 0 for label in (yes, no))
            number = self._labels[value] - here - 1 if isinstance(value, str) else value
            if not (0 <= true < 256 and 0 <= false < 256):
                raise ValueError("jump too long")
            out.append(struct.pack("=HBBI", code, true, false, number & 0xFFFFFFFF))
        return b"".join(out)


def _argument(number: int) -> int:
    """Return where the lower half of an argument lies in struct seccomp_data."""
    return _ARGUMENTS + 8 * number + (4 if sys.byteorder == "big" else 0)


def assemble(rules: Iterable[Rule], architectures: Sequence[Architecture]) -> bytes:
    """Return a filter as BPF. Calls without a rule, and programs of other architectures, are left alone."""
    program = _Program()
    chosen = list(rules)
    for architecture in architectures:
        other, known = program.fresh(), program.fresh()
        program.add(_LOAD, _ARCHITECTURE)
        program.add(_EQUAL, architecture.audit, yes=known)
        program.add(_JUMP, other)
        program.place(known)
        program.add(_LOAD, _NUMBER)
        if architecture.name == "x86_64":
            program.add(_AND, 0xFFFFFFFF & ~_X32)  # the calls watched have the same numbers in x32
        for rule in chosen:
            number = architecture.calls.get(rule.call)
            if number is not None:
                _rule(program, rule, number, architecture)
        program.add(_RETURN, ALLOW)
        program.place(other)
    program.add(_RETURN, ALLOW)
    return program.bytes()


def _rule(program: _Program, rule: Rule, number: int, architecture: Architecture) -> None:
    after = program.fresh()
    if rule.argument < 0:
        program.add(_EQUAL, number, no=after)
        program.add(_RETURN, rule.action)
    else:
        hit, restore = program.fresh(), program.fresh()
        program.add(_EQUAL, number, no=after)
        program.add(_LOAD, _argument(rule.argument))
        if rule.values:
            program.add(_AND, rule.mask)
            for value in rule.values:
                program.add(_EQUAL, value, yes=hit)
            program.add(_JUMP, restore)
        else:
            program.add(_BITS, rule.mask, no=restore)
        program.place(hit)
        program.add(_RETURN, rule.action)
        program.place(restore)
        program.add(_LOAD, _NUMBER)
        if architecture.name == "x86_64":
            program.add(_AND, 0xFFFFFFFF & ~_X32)
    program.place(after)


def architectures(machine: str = "") -> tuple[Architecture, ...]:
    """Return the architectures whose programs this machine runs; empty when its numbers are not known."""
    return ARCHITECTURES.get(machine or os.uname().machine, ())


def install(program: bytes, *, listener: bool = False) -> int:
    """Put a filter on this process and all that come from it; return the listener's descriptor, or 0.

    Needs CAP_SYS_ADMIN in the process's user namespace, or no_new_privs.

    Raises:
        OSError: EBUSY when a filter with a listener is there already (a process may have one), EACCES without rights,
            EINVAL or ENOSYS when the kernel is too old.
    """
    buffer = ctypes.create_string_buffer(program, len(program))
    argument = struct.pack("@HP", len(program) // 8, ctypes.addressof(buffer))
    if not listener:
        return syscall(_SECCOMP, _SET_FILTER, 0, argument, name="seccomp")
    try:
        # A signal between question and answer would repeat the call, and a folder made twice is an error (Linux 5.19).
        flags = _NEW_LISTENER | _WAIT_KILLABLE
        return syscall(_SECCOMP, _SET_FILTER, flags, argument, name="seccomp")
    except OSError as error:
        if error.errno != _EINVAL:
            raise
    return syscall(_SECCOMP, _SET_FILTER, _NEW_LISTENER, argument, name="seccomp")


def sizes() -> tuple[int, int]:
    """Return the kernel's sizes of a notification and a response: seccomp(2), Linux 5.0.

    Raises:
        OSError: the kernel knows no notifications.
    """
    buffer = ctypes.create_string_buffer(6)
    syscall(_SECCOMP, _GET_SIZES, 0, buffer, name="seccomp")  # type: ignore[arg-type]
    notification, response, _ = struct.unpack("=HHH", buffer.raw)
    return notification, response


def listener_possible() -> bool:
    """Say whether this process could install a listener, by doing so in a child.

    A container around us may have one already, or a filter that forbids seccomp(2); both only show when tried.
    """
    child = os.fork()
    if child == 0:
        status = 1
        try:
            sizes()
            install(assemble([], architectures()), listener=True)
            status = 0
        except OSError:
            pass
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1] == 0


class Notification:
    """A system call that waits for an answer.

    Arguments:
        id: the kernel's name for the question.
        pid: thread that asks, as seen from the supervisor; 0 when it cannot be seen.
        number: number of the call, without x32's bit.
        architecture: AUDIT_ARCH value.
        arguments: six numbers.
    """

    __slots__ = ("architecture", "arguments", "id", "number", "pid")

    def __init__(self, id: int, pid: int, number: int, architecture: int, arguments: tuple[int, ...]) -> None:  # noqa: A002
        self.id, self.pid, self.number, self.architecture, self.arguments = id, pid, number, architecture, arguments


class Listener:
    """The supervisor's end: questions come in, answers go out.

    Arguments:
        descriptor: what `install(listener=True)` returned, in whichever process.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        notification, response = sizes()
        self._empty = bytes(max(notification, _NOTIFICATION.size))
        self._rest = bytes(max(0, response - _RESPONSE.size))
        self._buffer = bytearray(len(self._empty))

    def stay_on_one_processor(self) -> bool:
        """Ask the kernel to wake us on the caller's processor: half the time of an answer (Linux 6.6)."""
        try:
            fcntl.ioctl(self.descriptor, _SET_FLAGS, 1)
        except OSError:
            return False
        return True

    def receive(self) -> Notification | None:
        """Wait for a question; None when the caller was killed before we looked.

        Raises:
            OSError: the listener is gone.
        """
        buffer = self._buffer
        buffer[:] = self._empty
        try:
            fcntl.ioctl(self.descriptor, _RECEIVE, buffer)
        except OSError as error:
            if error.errno in (_ENOENT, _EINTR):
                return None
            raise
        name, pid, _, number, architecture, _, *arguments = _NOTIFICATION.unpack_from(buffer)
        return Notification(name, pid, number & ~_X32, architecture, tuple(arguments))

    def valid(self, question: Notification) -> bool:
        """Say whether the caller still waits: then its pid is really its own, and not given out again."""
        try:
            fcntl.ioctl(self.descriptor, _VALID, struct.pack("=Q", question.id))
        except OSError:
            return False
        return True

    def let_pass(self, question: Notification) -> None:
        """Let the kernel do the call as if there were no filter. The caller may change its arguments until then."""
        self._send(_RESPONSE.pack(question.id, 0, 0, _CONTINUE))

    def answer(self, question: Notification, value: int) -> None:
        """Give the call's result: a number, or -errno."""
        if value < 0:
            self._send(_RESPONSE.pack(question.id, 0, value, 0))
        else:
            self._send(_RESPONSE.pack(question.id, value, 0, 0))

    def answer_with_file(self, question: Notification, descriptor: int, *, close_on_exec: bool) -> None:
        """Give the caller a copy of one of our descriptors, and its number as the call's result.

        Raises:
            OSError: the caller's table of descriptors is full.
        """
        flags = os.O_CLOEXEC if close_on_exec else 0
        try:
            addition = _ADDITION.pack(question.id, _ADDFD_SEND, descriptor, 0, flags)
            fcntl.ioctl(self.descriptor, _ADDFD, addition)
        except OSError as error:
            if error.errno == _ENOENT:  # the caller was killed
                return
            if error.errno != _EINVAL:
                raise
            # Linux 5.9 to 5.13: two steps.
            number = fcntl.ioctl(
                self.descriptor, _ADDFD, bytearray(_ADDITION.pack(question.id, 0, descriptor, 0, flags))
            )
            self.answer(question, number)

    def _send(self, response: bytes) -> None:
        try:
            fcntl.ioctl(self.descriptor, _SEND, response + self._rest)
        except OSError as error:
            if error.errno != _ENOENT:  # the caller was killed meanwhile: nobody waits
                raise
