# SPDX-License-Identifier: Apache-2.0
"""Becoming root without root, as real ordinary users."""

from __future__ import annotations

import sys

import pytest

from pysingularity.errors import UsageError
from pysingularity.runtime import rootless
from pysingularity.runtime.rootless import map_words, no_user_namespaces, parse_ranges

SCRIPT = """
import os, sys
from pysingularity.errors import SingularityError
from pysingularity.runtime.rootless import become_root
try:
    way = become_root()
except SingularityError as error:
    sys.exit(str(error))
os.chdir("/")
print(way.name, way.emulation, os.getuid(), os.getgid(), sum(1 for _ in open("/proc/self/uid_map")))
"""


def run(user, way="", path=""):
    env = {"SINGULARITY_ROOTLESS": way, **({"PATH": path} if path else {})}
    return user([sys.executable, "-c", SCRIPT], env=env)


@pytest.mark.rootless
def test_user_with_a_range_gets_it(as_subuid_user):
    result = run(as_subuid_user)
    assert result.stdout.split() == ["subuid", "0", "0", "2"], result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.rootless
@pytest.mark.parametrize("way", ["notify", "bpf"])
def test_setting_forces_a_way(as_user, way):
    result = run(as_user, way)
    assert result.stdout.split() == ["single", way, "0", "0", "1"], result.stderr
    assert result.stderr.startswith("INFO:")
    assert result.stderr.count("\n") == 1


@pytest.mark.rootless
def test_user_without_a_range_gets_a_supervisor(as_plain_user):
    if not as_plain_user.other:
        pytest.skip("needs to be started as root")
    assert run(as_plain_user).stdout.split()[:2] == ["single", "notify"]
    result = run(as_plain_user, "subuid")
    assert result.returncode == 1
    assert "/etc/subuid has none for" in result.stderr
    assert "usermod --add-subuids" in result.stderr


@pytest.mark.rootless
def test_root_of_a_one_id_namespace_is_emulated_further(as_user):
    words = ["unshare", "--user", "--map-root-user", sys.executable, "-c", SCRIPT]
    assert as_user(words).stdout.split()[:4] == ["single", "notify", "0", "0"]


def test_root_stays_root(root_only):
    assert rootless.become_root(environ={}).name == "root"


def test_unknown_way_is_refused():
    with pytest.raises(UsageError, match="not a way"):
        rootless.become_root("magic")


def test_ranges_are_found_by_name_and_number():
    text = "other:1:2\nme:100000:65536\n# comment\nme:x:5\nme:5\n1000:300000:10\nme:400000:0\n"
    assert parse_ranges(text.splitlines(), "me", 1000) == [(100000, 65536), (300000, 10)]
    assert parse_ranges([], "me", 1000) == []


def test_several_ranges_follow_each_other():
    assert map_words(1000, [(100000, 10), (500000, 20)]) == [
        *("0", "1000", "1"),
        *("1", "100000", "10"),
        *("11", "500000", "20"),
    ]


def test_short_range_is_told_with_its_size(monkeypatch):
    monkeypatch.setattr(rootless, "ranges", lambda kind, name, number: [(100000, 1000)])
    with pytest.raises(rootless._NoRangeError, match="only 1000 ids") as caught:
        rootless._map_range(12345, 12345)
    assert caught.value.said


@pytest.mark.parametrize(
    ("setting", "number", "word"),
    [
        ({"user/max_user_namespaces": "0"}, 28, "user.max_user_namespaces"),
        ({"kernel/unprivileged_userns_clone": "0"}, 1, "unprivileged_userns_clone=1"),
        ({"kernel/apparmor_restrict_unprivileged_userns": "1"}, 1, "apparmor_restrict_unprivileged_userns=0"),
    ],
)
def test_missing_user_namespaces_come_with_their_remedy(monkeypatch, setting, number, word):
    monkeypatch.setattr(rootless, "_setting", lambda name: setting.get(name, ""))
    assert word in no_user_namespaces(OSError(number, "refused")).hint
