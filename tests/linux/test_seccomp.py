# SPDX-License-Identifier: Apache-2.0
"""Filters: the numbers are those that libseccomp knows, and an installed filter does what its rules say."""

from __future__ import annotations

import ctypes
import os
import struct

import pytest

from pysingularity.linux import seccomp
from pysingularity.linux.seccomp import ALLOW, ERRNO, NOTIFY, Rule, assemble
from pysingularity.linux.syscalls import ARCHITECTURES

#: Calls that go through socketcall in the judge's table: it predates their own numbers.
OWN_NUMBERS = {"getsockopt", "socket"}
#: The generic name for a call that two architectures call differently.
OTHER_NAME = {("arm", "sync_file_range"): "arm_sync_file_range", ("ppc64le", "sync_file_range"): "sync_file_range2"}
EACH = [one for group in ARCHITECTURES.values() for one in group]


@pytest.fixture(scope="module")
def judge():
    try:
        library = ctypes.CDLL("libseccomp.so.2")
    except OSError:
        pytest.skip("needs libseccomp.so.2")
    library.seccomp_syscall_resolve_name_arch.argtypes = [ctypes.c_uint32, ctypes.c_char_p]
    return library.seccomp_syscall_resolve_name_arch


@pytest.mark.parametrize("architecture", EACH, ids=lambda one: one.name)
@pytest.mark.peer
def test_numbers_agree_with_libseccomp(judge, architecture):
    for name, number in architecture.calls.items():
        known = judge(architecture.audit, OTHER_NAME.get((architecture.name, name), name).encode())
        assert known == number or (known < 0 and name in OWN_NUMBERS), name


@pytest.mark.parametrize("architecture", EACH, ids=lambda one: one.name)
def test_no_number_is_used_twice(architecture):
    assert len(set(architecture.calls.values())) == len(architecture.calls)


@pytest.mark.parametrize(("name", "size"), [("x86_64", 144), ("i386", 96), ("aarch64", 128), ("arm", 104)])
def test_status_has_the_size_of_the_kernels_structure(name, size):
    architecture = next(one for one in EACH if one.name == name)
    status = os.stat("/")
    assert len(architecture.pack_stat(status, 1, 2, status.st_mode, 0)) == size


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="calls stat by its x86-64 number")
def test_status_is_what_the_kernel_writes(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(bytes(12345))
    os.utime(path, ns=(1_111_111_111, 2_222_222_222))
    buffer = ctypes.create_string_buffer(144)
    assert ctypes.CDLL(None).syscall(4, os.fsencode(path), buffer) == 0
    status = os.stat(path)
    packed = ARCHITECTURES["x86_64"][0].pack_stat(status, status.st_uid, status.st_gid, status.st_mode, status.st_rdev)
    assert packed == buffer.raw


def run_filter(program: bytes, audit: int, number: int, *arguments: int) -> int:
    """Interpret classic BPF as the kernel does."""
    data = struct.pack("=IIQ6Q", number, audit, 0, *(list(arguments) + [0] * 6)[:6])
    code = list(struct.iter_unpack("=HBBI", program))
    accumulator = here = 0
    while True:
        operation, true, false, value = code[here]
        here += 1
        if operation == 0x20:
            (accumulator,) = struct.unpack_from("=I", data, value)
        elif operation == 0x54:
            accumulator &= value
        elif operation == 0x05:
            here += value
        elif operation == 0x15:
            here += true if accumulator == value else false
        elif operation == 0x45:
            here += true if accumulator & value else false
        elif operation == 0x06:
            return value
        else:
            raise AssertionError(operation)


RULES = [
    Rule("chown", NOTIFY),
    Rule("mknodat", ERRNO, 2, 0o170000, (0o020000, 0o060000)),
    Rule("openat", NOTIFY, 2, 0o100),
    Rule("fsync", ERRNO | 5),
]


def test_filter_chooses_by_number_and_architecture():
    x86, i386 = ARCHITECTURES["x86_64"]
    program = assemble(RULES, (x86, i386))
    assert run_filter(program, x86.audit, 92) == NOTIFY
    assert run_filter(program, x86.audit, 92 | 0x40000000) == NOTIFY
    assert run_filter(program, x86.audit, 74) == ERRNO | 5
    assert run_filter(program, x86.audit, 0) == ALLOW
    assert run_filter(program, i386.audit, 182) == NOTIFY
    assert run_filter(program, i386.audit, 92) == ALLOW
    assert run_filter(program, 0xC00000B7, 92) == ALLOW


def test_filter_looks_at_arguments():
    (arm64, _) = ARCHITECTURES["aarch64"]
    program = assemble(RULES, (arm64,))
    assert run_filter(program, arm64.audit, 33, 0, 0, 0o020666) == ERRNO
    assert run_filter(program, arm64.audit, 33, 0, 0, 0o060600) == ERRNO
    assert run_filter(program, arm64.audit, 33, 0, 0, 0o010666) == ALLOW
    assert run_filter(program, arm64.audit, 56, 0, 0, 0o2) == ALLOW
    assert run_filter(program, arm64.audit, 56, 0, 0, 0o101) == NOTIFY
    assert run_filter(program, arm64.audit, 82) == ERRNO | 5  # a rule behind those with arguments


def in_child(act) -> int:
    child = os.fork()
    if child == 0:
        status = 99
        try:
            ctypes.CDLL(None).prctl(38, 1, 0, 0, 0)
            status = act()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.fixture
def native():
    found = seccomp.architectures()
    if not found:
        pytest.skip(f"no numbers for {os.uname().machine}")
    return found


def test_installed_filter_holds_here_and_in_children(native):
    def act():
        seccomp.install(assemble([Rule("sync", ERRNO | 38), Rule("fchown", ERRNO)], native))
        os.fchown(99, 1, 1)  # no such descriptor: only a filter calls that a success
        return in_child(lambda: 0 if os.fchown(99, 1, 1) is None else 1)

    assert in_child(act) == 0


def test_supervisor_answers(native):
    if not seccomp.listener_possible():
        pytest.skip("this kernel, or a container around us, allows no listener")

    def act():
        descriptor = seccomp.install(assemble([Rule("fchown", NOTIFY)], native), listener=True)
        asker = os.fork()
        if asker == 0:
            try:
                os.fchown(99, 1, 7)
            except OSError as error:
                os._exit(error.errno)
            os._exit(0)
        listener = seccomp.Listener(descriptor)
        question = listener.receive()
        assert question.pid == asker
        assert question.arguments[2] == 7
        assert listener.valid(question)
        listener.answer(question, -28)
        return os.waitstatus_to_exitcode(os.waitpid(asker, 0)[1])

    assert in_child(act) == 28
