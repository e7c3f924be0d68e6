# SPDX-License-Identifier: Apache-2.0
"""--security: what was asked for is in force when the program starts, or the program does not start."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.rootless

DENY = {
    "defaultAction": "SCMP_ACT_ALLOW",
    "syscalls": [
        {"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 13},
        {"name": "rmdir", "action": "SCMP_ACT_KILL_PROCESS"},
        {"names": ["unlink", "unlinkat"], "action": "SCMP_ACT_KILL_PROCESS", "excludes": {"caps": ["CAP_CHOWN"]}},
        {
            "names": ["fchmodat"],
            "action": "SCMP_ACT_ERRNO",
            "args": [{"index": 2, "value": 0o7000, "valueTwo": 0o4000, "op": "SCMP_CMP_MASKED_EQ"}],
        },
        {"names": ["chmod"], "action": "SCMP_ACT_ERRNO", "args": [{"index": 1, "value": 0o4755, "op": "SCMP_CMP_EQ"}]},
    ],
}


@pytest.fixture
def profile(as_user):
    """Write a profile and return the option's value."""

    def write(value, name="profile.json"):
        return f"seccomp:{as_user.write(name, value if isinstance(value, str) else json.dumps(value))}"

    return write


@pytest.mark.parametrize("options", [[], ["--pid"], ["--fakeroot"]])
def test_profile_is_in_force(sing, box, profile, options):
    script = "mkdir /tmp/denied-$$ 2>&1 | grep -o 'Permission denied'; grep Seccomp: /proc/self/status"
    result = sing("exec", *options, "--security", profile(DENY), box, "sh", "-c", script)
    assert result.stdout == "Permission denied\nSeccomp:\t2\n", result.stderr


def test_conditions_on_arguments_and_rights(sing, as_user, box, profile):
    option = profile(DENY)
    path = as_user.write("file")
    change = ["sh", "-c", f"chmod 755 {path} && ! chmod 4755 {path} 2>/dev/null && echo right"]
    assert sing("exec", "--security", option, box, *change).stdout == "right\n"
    # Root (of the container) has CAP_CHOWN, an ordinary user has not.
    assert sing("exec", "--security", option, box, "rm", path).returncode == -31
    assert sing("exec", "--fakeroot", "--security", option, box, "rm", path).returncode == 0


def test_list_of_what_is_allowed(sing, box, profile):
    names = (
        "execve brk mmap munmap mprotect read write exit exit_group arch_prctl set_tid_address set_robust_list rseq "
        "prlimit64 getrandom getuid geteuid getgid getegid readlink readlinkat fstat newfstatat no_such_call"
    )
    allowed = {"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [{"names": names.split(), "action": "SCMP_ACT_ALLOW"}]}
    result = sing("exec", "--security", profile(allowed), box, "echo", "hi")
    assert (result.stdout, result.returncode) == ("hi\n", 0), result.stderr
    assert sing("exec", "--security", profile(allowed), box, "ls", "/").returncode != 0


def test_joined_instances_are_confined_too(sing, as_user, box, profile):
    env = {"SINGULARITY_CONFIGDIR": str(as_user.tmp / "config")}
    sing("instance", "start", box, "confined", env=env, check=True)
    try:
        words = ["exec", "--security", profile(DENY), "instance://confined", "grep", "Seccomp:", "/proc/self/status"]
        assert sing(*words, env=env).stdout == "Seccomp:\t2\n"
    finally:
        sing("instance", "stop", "confined", env=env)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("{", "no JSON"),
        ([], "is no object"),
        ({}, "defaultAction"),
        ({"defaultAction": "SCMP_ACT_NOTIFY"}, "defaultAction"),
        ({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": {"a": 1}}, "no list"),
        ({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"action": "SCMP_ACT_KILL"}]}, "names no system call"),
        (
            {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["no_such_call"], "action": "SCMP_ACT_KILL"}]},
            "no_such_call",
        ),
        (
            {
                "defaultAction": "SCMP_ACT_ALLOW",
                "syscalls": [{"names": ["read"], "action": "SCMP_ACT_KILL", "args": [{"index": 0, "op": "LIKE"}]}],
            },
            "is no condition",
        ),
        (
            {
                "defaultAction": "SCMP_ACT_ALLOW",
                "syscalls": [{"names": ["read"], "action": "SCMP_ACT_KILL", "includes": {"moon": 1}}],
            },
            "moon",
        ),
        ({"defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_S390"]}, "is not made for"),
        ({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": 7, "action": "SCMP_ACT_KILL"}]}, "profile.json"),
    ],
)
def test_profiles_that_are_not_understood_start_nothing(sing, box, profile, value, says):
    result = sing("exec", "--security", profile(value), box, "echo", "started")
    assert (result.returncode, result.stdout) == (255, "")
    assert says in result.stderr
    assert "Traceback" not in result.stderr
    assert len(result.stderr.splitlines()) <= 2


@pytest.mark.parametrize("option", ["seccomp:/nosuch", "seccomp:", "nonsense:x", "uid:0", "gid:0", "uid:x", "plain"])
def test_what_cannot_be_had_starts_nothing(sing, box, option):
    result = sing("exec", "--security", option, box, "echo", "started")
    assert (result.returncode, result.stdout) == (255, "")


@pytest.mark.parametrize(
    ("kind", "mark"), [("apparmor", "/sys/module/apparmor/parameters/enabled"), ("selinux", "/sys/fs/selinux/enforce")]
)
def test_label_of_a_module_that_is_not_there_starts_nothing(sing, box, kind, mark):
    if os.path.exists(mark):
        pytest.skip(f"{kind} is active on this machine")
    result = sing("exec", "--security", f"{kind}:anything", box, "echo", "started")
    assert (result.returncode, result.stdout) == (255, "")
    assert "is not active" in result.stderr


def test_root_becomes_another_user(root_only, box):
    command = [sys.executable, "-m", "pysingularity", "exec", "--security", "uid:5", "--security", "gid:6:7", box]
    script = "id -u; id -g; id -G; grep CapEff /proc/self/status"
    result = subprocess.run([*command, "sh", "-c", script], capture_output=True, text=True, check=False)
    assert result.stdout.split() == ["5", "6", "6", "7", "CapEff:", "0" * 16], result.stderr
