# SPDX-License-Identifier: Apache-2.0
"""Flags of the peers: those that hold anyway pass, the others are refused with what to do instead."""

from __future__ import annotations

import pytest

from pysingularity.cli.options import FLAG
from pysingularity.cli.shared import HOLDS, REFUSED


@pytest.mark.parametrize("name", HOLDS)
def test_what_holds_anyway_is_accepted(sing, box, name):
    result = sing("exec", f"--{name}", box, "true")
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name, kind, _, _ in REFUSED])
def test_what_cannot_be_had_is_refused_in_one_line_and_a_hint(sing, box, name, kind):
    result = sing("exec", f"--{name}", *(() if kind == FLAG else ("x",)), box, "true")
    assert result.returncode == 255
    assert result.stderr.startswith(f"FATAL:   --{name} is not available")
    assert result.stderr.count("\n") == 2


def test_own_processes_can_be_declined(sing, box):
    command = ("sh", "-c", "echo $$")
    assert sing("exec", "--pid", "--no-init", box, *command).stdout == "1\n"
    assert sing("exec", "--pid", "--no-init", "--no-pid", box, *command).stdout != "1\n"


def test_chosen_variables_stay_outside(sing, box):
    result = sing("exec", "--no-env", "ONE,TWO", box, "env", env={"ONE": "1", "TWO": "2", "THREE": "3"})
    names = {line.partition("=")[0] for line in result.stdout.splitlines()}
    assert "THREE" in names
    assert not names & {"ONE", "TWO"}


def test_unpacked_image_is_no_mount(sing, image):
    kinds = "grep ' / ' /proc/self/mounts"
    assert "squash" not in sing("exec", "--unsquash", image, "sh", "-c", kinds, check=True).stdout
