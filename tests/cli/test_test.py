# SPDX-License-Identifier: Apache-2.0
"""`singularity test`: the test's status, and images without one."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.rootless


def test_status_of_the_test(sing, box):
    path = box / ".singularity.d/test"
    path.write_text('#!/bin/sh\necho "testing $1"\nexit 3\n')
    path.chmod(0o755)
    result = sing("test", box, "x")
    assert (result.returncode, result.stdout) == (3, "testing x\n")


def test_image_without_a_test_passes(sing, box):
    result = sing("test", box)
    assert result.returncode == 0
    assert result.stdout == ""
    assert "No test found" in result.stderr
