# SPDX-License-Identifier: Apache-2.0
"""How many processors we take, under affinity and limits of control groups."""

from __future__ import annotations

import builtins
import io
import os

import pytest

from pysingularity.squashfs import workers


@pytest.fixture
def machine(monkeypatch):
    """A machine with 16 processors and these files."""

    def set_up(files):
        def fake(path, *rest, **options):
            if path in files:
                return io.StringIO(files[path])
            raise FileNotFoundError(2, "No such file", path)

        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
        monkeypatch.setattr(builtins, "open", fake)
        return workers.processors()

    return set_up


@pytest.mark.parametrize(
    ("files", "count"),
    [
        ({}, 16),
        ({"/proc/self/cgroup": "0::/\n"}, 16),
        ({"/proc/self/cgroup": "0::/job/step\n", "/sys/fs/cgroup/job/step/cpu.max": "max 100000\n"}, 16),
        ({"/proc/self/cgroup": "0::/job/step\n", "/sys/fs/cgroup/job/cpu.max": "250000 100000\n"}, 3),
        ({"/proc/self/cgroup": "0::/a\n", "/sys/fs/cgroup/a/cpu.max": "1000 100000\n"}, 1),
        ({"/proc/self/cgroup": "0::/a\n", "/sys/fs/cgroup/a/cpu.max": "nonsense\n"}, 16),
        (
            {
                "/proc/self/cgroup": "4:memory:/x\n3:cpu,cpuacct:/x\n",
                "/sys/fs/cgroup/cpu,cpuacct/x/cpu.cfs_quota_us": "400000\n",
                "/sys/fs/cgroup/cpu,cpuacct/x/cpu.cfs_period_us": "100000\n",
            },
            4,
        ),
    ],
)
def test_limits_of_control_groups_count(files, count, machine):
    assert machine(files) == count
