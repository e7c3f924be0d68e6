# SPDX-License-Identifier: Apache-2.0
"""Flags of the peers: those that hold anyway pass, the others are refused with what to do instead."""

from __future__ import annotations

import os
import subprocess
import sys

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


def test_missing_home_is_a_warning_and_names_the_place_anyway(sing, box):
    result = sing("exec", "-H", "/nosuch/home", box, "sh", "-c", "echo $HOME; grep -c :/nosuch/home: /etc/passwd")
    assert (result.returncode, result.stdout) == (0, "/nosuch/home\n1\n")
    assert result.stderr.startswith("WARNING: --home /nosuch/home")


def test_inner_containers_are_told_where_binds_are(sing, box):
    result = sing("exec", "-B", "/etc:/x:ro,/opt", box, "sh", "-c", "echo $SINGULARITY_BIND $APPTAINER_BIND")
    assert result.stdout == "/x,/opt /x,/opt\n"


def test_contained_dev_without_terminals(sing, box):
    names = sing("exec", "-c", "--no-mount", "devpts", box, "ls", "/dev").stdout.split()
    assert "null" in names
    assert not {"pts", "ptmx"} & set(names)


def test_port_maps_of_the_peers_are_understood(sing, box):
    refused = sing("exec", "--net", "--network-args", "IP=10.0.0.1", box, "true")
    assert refused.returncode == 255
    assert "portmap" in refused.stderr
    wrong = sing("exec", "--net", "--network", "none", "--network-args", "portmap=1:2", box, "true")
    assert wrong.returncode == 1


def test_root_joins_a_named_network(root_only, box, tmp_path):
    command = [sys.executable, "-m", "pysingularity", "exec", "--netns-path"]
    with subprocess.Popen(["unshare", "-n", "sh", "-c", "echo ready; read x"], stdin=-1, stdout=-1, text=True) as other:
        assert other.stdout.readline() == "ready\n"
        path = f"/proc/{other.pid}/ns/net"
        words = [*command, path, box, "readlink", "/proc/self/ns/net"]
        found = subprocess.run(words, capture_output=True, text=True, check=False)
        assert found.stdout.strip() == os.readlink(path), found.stderr
        assert found.stdout.strip() != os.readlink("/proc/self/ns/net")
        other.communicate("\n")
    missing = subprocess.run([*command, tmp_path / "no", box, "true"], capture_output=True, text=True, check=False)
    assert missing.returncode == 255


def test_ordinary_users_join_no_network(sing, box):
    assert sing("exec", "--netns-path", "/proc/self/ns/net", box, "true").returncode == 255


def test_subordinate_ids_can_be_declined(as_subuid_user, box):
    command = ["singularity", "exec", "--fakeroot", "--ignore-subuid", box, "sh", "-c", "id -u; cat /proc/self/uid_map"]
    result = as_subuid_user(command, check=True)
    assert result.stdout.split() == ["0", "0", str(as_subuid_user.uid), "1"]


@pytest.mark.parametrize("which", ["box", "image"])
def test_mount_points_without_an_overlay(sing, as_user, request, which):
    image = request.getfixturevalue(which)
    data = as_user.write("data/file", "content")
    binds = f"{data.parent}:/usr/bin/new/deep,{data}:/newfile,{data.parent}:/a/b/c"
    script = (
        "cat /usr/bin/new/deep/file /newfile /a/b/c/file; touch /x 2>&1 | grep -c Read-only; "
        "touch /usr/x 2>&1 | grep -c Read-only; ls /bin | wc -l; readlink /bin/sh; grep -c '^overlay / ' /proc/mounts"
    )
    result = sing("exec", "--underlay", "-B", binds, image, "sh", "-c", script)
    plain = sing("exec", "-B", binds, image, "sh", "-c", script)
    assert result.stdout.splitlines()[-1] == "0"
    assert result.stdout.splitlines()[:-1] == plain.stdout.splitlines()[:-1]
    assert plain.stdout.splitlines()[-1] == "1"
    assert result.stdout.startswith("content" * 3 + "1\n1\n")
    assert not (image / "a").exists()


def test_squashfuse_serves_when_it_is_set(as_user, sing, image, tool):
    tool("squashfuse_ll")
    path = as_user.write("my.conf", "image driver = squashfuse\n")
    script = "head -1 /etc/group; touch /x 2>&1 | grep -c Read-only; exit 4"
    result = sing("-c", path, "exec", image, "sh", "-c", script)
    assert (result.returncode, result.stdout) == (4, "root:x:0:\n1\n"), result.stderr
    names = "cat /proc/[0-9]*/comm 2>/dev/null | sort -u"
    assert "squashfuse_ll" in sing("-c", path, "exec", image, "sh", "-c", names).stdout.split()
