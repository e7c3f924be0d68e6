# SPDX-License-Identifier: Apache-2.0
"""Rules for changing ids, with the kernel as judge: random sequences of calls end the same way here and there."""

from __future__ import annotations

import ctypes
import os
import pickle

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pysingularity.linux.syscalls import ARCHITECTURES
from pysingularity.runtime.credentials import ALL, FIRST, Credentials

IDS = st.sampled_from([-1, 0, 0, 1, 2, 7])
CALLS = {
    "setuid": 1,
    "setgid": 1,
    "setreuid": 2,
    "setregid": 2,
    "setresuid": 3,
    "setresgid": 3,
    "setfsuid": 1,
    "setfsgid": 1,
}
STEP = st.one_of(
    st.sampled_from(sorted(CALLS)).flatmap(lambda name: st.tuples(st.just(name), st.tuples(*[IDS] * CALLS[name]))),
    st.tuples(st.just("keepcaps"), st.tuples(st.booleans())),
    st.tuples(st.just("setgroups"), st.tuples(st.sampled_from([(), (5,), (0, 7)]))),
)


def kernel(steps):
    """Make the calls for real in a child; return errors and the final state."""
    library = ctypes.CDLL(None, use_errno=True)
    numbers = ARCHITECTURES[os.uname().machine][0].calls
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            errors = []
            for name, words in steps:
                ctypes.set_errno(0)
                if name == "keepcaps":
                    library.prctl(8, int(words[0]), 0, 0, 0)
                elif name == "setgroups":
                    array = (ctypes.c_uint32 * len(words[0]))(*words[0])
                    library.syscall(numbers[name], len(words[0]), array)
                else:
                    library.syscall(numbers[name], *words)
                errors.append(ctypes.get_errno())
            state = {}
            with open("/proc/thread-self/status") as file:
                lines = file.readlines()
            for line in lines:
                key, _, value = line.partition(":")
                state[key] = value.split()
            wanted = ("Uid", "Gid", "CapEff", "CapPrm", "Groups")
            os.write(write, pickle.dumps((errors, {key: state[key] for key in wanted})))
        finally:
            os._exit(0)
    os.close(write)
    data = b""
    while piece := os.read(read, 65536):
        data += piece
    os.close(read)
    os.waitpid(child, 0)
    return pickle.loads(data)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(STEP, min_size=1, max_size=6))
def test_sequences_end_as_in_the_kernel(root_only, steps):
    errors, state = kernel(steps)
    now, mine = FIRST, []
    for name, words in steps:
        try:
            now = getattr(now, name)(*words)
            mine.append(0)
        except OSError as error:
            mine.append(error.errno)
    assert mine == errors
    assert [str(number) for number in now.user] == state["Uid"]
    assert [str(number) for number in now.group] == state["Gid"]
    assert [str(number) for number in now.groups] == state["Groups"]
    everything = int(kernel([])[1]["CapPrm"][0], 16)
    assert now.effective & everything == int(state["CapEff"][0], 16)
    assert now.permitted & everything == int(state["CapPrm"][0], 16)


def test_program_of_root_gives_rights_back():
    user = FIRST.setresuid(7, 7, 7)
    assert user.effective == 0
    assert user.execute().effective == 0
    assert user.execute(owner=0).effective == ALL
    assert user.execute(owner=0).user == (7, 0, 0, 0)


def test_owner_without_rights_gives_files_only_to_own_groups():
    user = FIRST.setgroups((5,)).setresgid(6, 6, 6).setresuid(7, 7, 7)
    assert user.may_chown((7, 6), -1, 5)
    assert user.may_chown((7, 6), 7, 6)
    assert not user.may_chown((7, 6), 0, -1)
    assert not user.may_chown((7, 6), -1, 0)
    assert not user.may_chown((0, 0), -1, 5)
    assert FIRST.may_chown((7, 6), 0, 0)


def test_credentials_are_values():
    assert FIRST.setuid(3) == FIRST.setresuid(3, 3, 3) == Credentials((3, 3, 3, 3), effective=0, permitted=0)
    assert len({FIRST.setuid(3), FIRST.setresuid(3, 3, 3)}) == 1
