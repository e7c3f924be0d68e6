# SPDX-License-Identifier: Apache-2.0
"""Limits: what the options mean for a control group, and groups of the running kernel where root may make them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pysingularity.cli import shared
from pysingularity.cli.scan import scan
from pysingularity.errors import HostError, UserError
from pysingularity.runtime.limits import MOUNTS, Group, wanted


def options(*words):
    return scan([*words, "image"], shared.OPTIONS, {}, payload=True)


@pytest.mark.parametrize(
    ("words", "values"),
    [
        (("--memory", "512M"), [("memory.max", str(512 << 20))]),
        (("--memory=1.5g",), [("memory.max", str(3 << 29))]),
        (("--memory", "2GiB"), [("memory.max", str(2 << 30))]),
        (("--memory", "4096"), [("memory.max", "4096")]),
        (("--memory", "1G", "--memory-swap", "3G"), [("memory.max", str(1 << 30)), ("memory.swap.max", str(2 << 30))]),
        (("--memory-swap", "-1"), [("memory.swap.max", "max")]),
        (("--memory-reservation", "1k"), [("memory.low", "1024")]),
        (("--cpus", "1.5"), [("cpu.max", "150000 100000")]),
        (("--cpu-shares", "2"), [("cpu.weight", "1")]),
        (("--cpu-shares", "262144"), [("cpu.weight", "10000")]),
        (("--cpuset-cpus", "0-1", "--cpuset-mems", "0"), [("cpuset.cpus", "0-1"), ("cpuset.mems", "0")]),
        (("--pids-limit", "-1"), [("pids.max", "max")]),
        (("--blkio-weight", "1000"), [("io.weight", "default 10000")]),
        (("--blkio-weight-device", "/dev/null:10"), [("io.weight", "1:3 1")]),
    ],
)
def test_options_as_files_of_a_group(words, values):
    assert wanted(options(*words)) == values


@pytest.mark.parametrize(
    "words",
    [
        ("--memory", "much"),
        ("--memory", "-1"),
        ("--memory", "0"),
        ("--memory", "1gg"),
        ("--memory-swap", "1G"),
        ("--memory", "2G", "--memory-swap", "1G"),
        ("--cpus", "nan"),
        ("--cpu-shares", "1"),
        ("--blkio-weight", "1001"),
        ("--blkio-weight-device", "/nowhere:10"),
        ("--oom-kill-disable",),
        ("--apply-cgroups", "/nowhere"),
    ],
)
def test_values_that_mean_nothing_are_refused(words):
    with pytest.raises(UserError) as caught:
        wanted(options(*words))
    assert words[-2 if len(words) > 1 else 0].lstrip("-") in str(caught.value)


def test_limits_from_a_file(tmp_path):
    path = tmp_path / "limits.toml"
    path.write_text(
        '[memory]\nlimit = 1048576\nswap = 2097152\n[cpu]\nquota = 5000\nperiod = 10000\ncpus = "0"\n'
        '[pids]\nlimit = -1\n[unified]\n"memory.high" = "max"\n'
    )
    assert wanted(options("--apply-cgroups", str(path))) == [
        ("memory.max", "1048576"),
        ("memory.swap.max", "1048576"),
        ("cpu.max", "5000 10000"),
        ("cpuset.cpus", "0"),
        ("pids.max", "max"),
        ("memory.high", "max"),
    ]
    path.write_text("[memory]\nswappiness = 5\n")
    with pytest.raises(UserError, match=r"memory\.swappiness"):
        wanted(options("--apply-cgroups", str(path)))


def test_without_control_groups_there_is_a_clear_error(tmp_path):
    with pytest.raises(HostError, match="control groups of version 2"):
        Group([("memory.max", "1")], {}, [], mounts=(str(tmp_path),))()


def test_group_without_the_controller_is_named(tmp_path):
    (tmp_path / "cgroup.controllers").write_text("pids\n")
    with pytest.raises(HostError, match="no controller memory"):
        Group([("memory.max", "1")], {"PATH": ""}, [], mounts=(str(tmp_path),), own="/")()
    assert [path.name for path in tmp_path.iterdir()] == ["cgroup.controllers"]


def test_scope_of_systemd_starts_the_same_command_again(tmp_path, as_user):
    """Stands in for systemd, which asks for more than a test can bring: its answer is not tested."""
    mount = as_user.write("cgroup/cgroup.controllers", "memory\n").parent
    as_user.write("bin/systemd-run", '#!/bin/sh\necho "$*" "$SINGULARITY_LIMITS_SET"\n', 0o755)
    as_user.write("run/systemd/private")
    script = (
        "from pysingularity.runtime.limits import Group\n"
        f"environ = {{'PATH': '{as_user.tmp}/bin', 'XDG_RUNTIME_DIR': '{as_user.tmp}/run'}}\n"
        f"Group([('memory.max', '1')], environ, ['singularity', 'exec', 'x'], mounts=('{mount}',), own='/none')()\n"
    )
    mount.chmod(0o555)
    result = as_user(["python", "-c", script], check=True)
    assert result.stdout == "--user --scope --quiet --collect -p Delegate=yes -- singularity exec x 1\n"


@pytest.fixture
def controller(root_only) -> tuple[Path, str, str]:
    """A group mount of this kernel, a controller that can be handed on there, and a harmless value of its."""
    for mount in map(Path, MOUNTS):
        try:
            offered = (mount / "cgroup.controllers").read_text().split()
        except OSError:
            continue
        for name, file, value in (("pids", "pids.max", "1000"), ("hugetlb", "hugetlb.2MB.max", "0")):
            if name in offered and os.access(mount, os.W_OK):
                return mount, file, value
    pytest.skip("needs a writable cgroup2 mount with the controller pids or hugetlb")


@pytest.mark.root
def test_root_is_put_into_a_group_that_goes_with_the_container(controller, box, tmp_path):
    mount, file, value = controller
    (tmp_path / "limits.toml").write_text(f'[unified]\n"{file}" = "{value}"\n')
    command = [sys.executable, "-m", "pysingularity", "exec", "--apply-cgroups", tmp_path / "limits.toml", box]
    result = subprocess.run([*command, "cat", "/proc/self/cgroup"], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    (own,) = [line[3:] for line in result.stdout.splitlines() if line.startswith("0::")]
    assert own.rpartition("/")[2].startswith("singularity-")
    group = Path(f"{mount}{own}")
    for _ in range(100):
        if not group.exists():
            break
        time.sleep(0.05)
    assert not group.exists()


@pytest.mark.root
def test_user_limits_what_was_delegated_to_him(controller, as_user, box, tmp_path):
    mount, file, value = controller
    name = file.partition(".")[0]
    (mount / "cgroup.subtree_control").write_text(f"+{name}")
    given = mount / f"pysingularity-test-{os.getpid()}"
    given.mkdir()
    try:
        for one in (given, *(given / part for part in ("cgroup.procs", "cgroup.subtree_control", "cgroup.threads"))):
            os.chown(one, as_user.uid, as_user.gid)
        limits = as_user.write("limits.toml", f'[unified]\n"{file}" = "{value}"\n')
        inside = ["sh", "-c", "cat /proc/self/cgroup; exit 3"]
        command = ["singularity", "exec", "--apply-cgroups", limits, box, *inside]
        waiting = ["sh", "-c", 'read go; exec "$@"', "sh", *map(str, command)]
        with as_user.popen(waiting, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            (given / "cgroup.procs").write_text(str(process.pid))  # what a scope of the user's session has done
            output, _ = process.communicate("go\n", timeout=60)
        assert process.returncode == 3
        assert f"0::/{given.name}/singularity-" in output
    finally:
        for group in (*given.glob("singularity-*"), given):
            for _ in range(100):
                try:
                    group.rmdir()
                    break
                except OSError:
                    time.sleep(0.05)
