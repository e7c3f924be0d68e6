# SPDX-License-Identifier: Apache-2.0
"""Private networks: connected by pasta or slirp4netns, with ports of the host forwarded, gone with the container."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time

import pytest

from pysingularity.errors import UserError
from pysingularity.runtime.network import Connection

pytestmark = pytest.mark.rootless


@pytest.fixture
def tun(as_user):
    """Skip unless an ordinary user may open /dev/net/tun."""
    if as_user(["sh", "-c", "exec 3<>/dev/net/tun"]).returncode:
        pytest.skip("/dev/net/tun may not be opened by ordinary users (chmod 666 /dev/net/tun)")


@pytest.fixture
def only(as_user, tool, tun):
    """Let only one of the helpers be found: only("pasta") -> environment."""

    def choose(name):
        folder = as_user.tmp / "helpers"
        folder.mkdir()
        (folder / name).symlink_to(tool(name))
        for needed in ("sh", "grep", "sleep"):
            (folder / needed).symlink_to(shutil.which(needed))
        program = as_user(["sh", "-c", "command -v singularity"]).stdout.strip()
        return program, {"PATH": str(folder)}

    return choose


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def interfaces(text):
    return sorted(line.split(":")[0].strip() for line in text.splitlines() if ":" in line)


@pytest.mark.parametrize("helper", ["pasta", "slirp4netns"])
@pytest.mark.parametrize("options", [[], ["--pid"]])
def test_container_has_its_own_connected_network(as_user, only, box, helper, options):
    program, environ = only(helper)
    words = [program, "exec", *options, "--net", box, "/bin/cat", "/proc/self/net/dev"]
    result = as_user(words, env=environ)
    assert result.returncode == 0, result.stderr
    found = interfaces(result.stdout)
    assert "lo" in found
    assert len(found) == 2


@pytest.mark.parametrize("spelling", [["--publish", "PORT:7777"], ["--network-args", "portmap=PORT:7777/tcp"]])
def test_port_of_the_host_is_forwarded(as_user, box, tool, tun, spelling):
    tool("pasta")
    (box / "bin/nc").symlink_to("busybox")
    if as_user([box / "bin/nc", "--help"]).returncode not in (0, 1):
        pytest.skip("needs a busybox with nc")
    port = free_port()
    words = [word.replace("PORT", str(port)) for word in spelling]
    command = ["singularity", "exec", "--net", "--network", "pasta", *words, box, "sh", "-c"]
    with as_user.popen([*command, "echo ready; echo hello | nc -l -p 7777"], stdout=subprocess.PIPE) as child:
        try:
            assert child.stdout.readline() == b"ready\n"
            deadline, answer = time.monotonic() + 20, b""
            while not answer and time.monotonic() < deadline:
                try:
                    with socket.create_connection(("127.0.0.1", port), timeout=5) as one:
                        answer = one.recv(100)
                except OSError:
                    time.sleep(0.1)
            assert answer == b"hello\n"
        finally:
            child.kill()


def test_nothing_is_left_of_the_helper(as_user, box, tool, tun):
    tool("pasta")
    port = free_port()
    command = ["singularity", "exec", "--net", "--network", "pasta", "--publish", f"{port}:1", box, "true"]
    assert as_user(command).returncode == 0
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        left = subprocess.run(["pgrep", "-f", "--", f"-t {port}:1"], capture_output=True, text=True, check=False).stdout
        if not left:
            break
        time.sleep(0.1)
    assert left == ""


def test_without_a_helper_there_is_a_clear_error(as_user, box):
    program = as_user(["sh", "-c", "command -v singularity"]).stdout.strip()
    folder = as_user.tmp / "none"
    folder.mkdir()
    for needed in ("sh", "python3"):
        (folder / needed).symlink_to(shutil.which(needed))
    result = as_user([program, "exec", "--net", box, "/bin/true"], env={"PATH": str(folder)})
    assert result.returncode == 255
    assert "--network none" in result.stderr
    assert len(result.stderr.splitlines()) == 2


@pytest.mark.parametrize("text", ["x", "0:1", "1:70000", "1:2/sctp", ":1", "1:2:3"])
def test_port_maps_that_mean_nothing_are_refused(text, tmp_path):
    (tmp_path / "pasta").symlink_to("/bin/true")
    with pytest.raises(UserError):
        Connection([text], str(tmp_path))


def test_names_are_looked_for_in_absolute_folders_only(tmp_path):
    os.symlink("/bin/true", tmp_path / "pasta")
    assert Connection(["80"], f":relative:{tmp_path}").forwards == [("tcp", 80, 80)]
