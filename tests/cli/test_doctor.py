# SPDX-License-Identifier: Apache-2.0
"""`singularity doctor` tells the truth about this machine, with remedies."""

from __future__ import annotations

import errno
import json
import os

import pytest

from pysingularity.runtime import checks


@pytest.mark.rootless
def test_doctor_prints_json_with_a_remedy_for_everything_that_is_not_well(as_user):
    result = as_user(["singularity", "doctor", "--json"])
    found = {check["id"]: check for check in json.loads(result.stdout)["checks"]}
    assert {"kernel", "user-namespaces", "fuse", "overlay", "subordinate-ids", "nvidia", "space-builds"} <= set(found)
    assert all(check["remedy"] for check in found.values() if check["state"] != "ok")
    assert result.returncode == (1 if found["user-namespaces"]["state"] == "failed" else 0)


@pytest.mark.rootless
def test_doctor_knows_whether_a_user_has_subordinate_ids(as_subuid_user, as_plain_user):
    if as_subuid_user.name == as_plain_user.name:
        pytest.skip("needs two users: one with and one without subordinate ids")
    states = []
    for user in (as_subuid_user, as_plain_user):
        found = json.loads(user(["singularity", "doctor", "--json"]).stdout)["checks"]
        states.append(next(check["state"] for check in found if check["id"] == "subordinate-ids"))
    assert states == ["ok", "warning"]


@pytest.mark.rootless
def test_doctor_fits_a_screen_for_people(as_user):
    lines = as_user(["singularity", "doctor"], check=False).stdout.splitlines()
    assert lines[0].startswith("ok  Linux")
    assert len(lines) < 40


def test_attempt_reports_the_error_of_the_child():
    def refuse():
        raise PermissionError(errno.EPERM, "no")

    assert checks.attempt(refuse).errno == errno.EPERM
    assert checks.attempt(lambda: None) is None


def test_attempt_that_crashes_is_an_error_too():
    assert checks.attempt(lambda: 1 / 0) is not None


def test_folder_in_memory_is_a_warning():
    if checks._file_system("/dev/shm")[0] != "tmpfs":
        pytest.skip("/dev/shm is no tmpfs here")
    found = checks.space("builds", "/dev/shm/not/yet/there")
    assert found.state == checks.WARNING
    assert "memory" in found.remedy or "cannot be written" in found.detail


def test_folder_that_cannot_be_written_names_the_variable(tmp_path):
    if os.getuid() == 0:
        pytest.skip("root writes everywhere")
    tmp_path.chmod(0o500)
    assert "SINGULARITY_CACHEDIR" in checks.space("the cache", str(tmp_path / "cache")).remedy
