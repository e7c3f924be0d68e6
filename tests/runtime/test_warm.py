# SPDX-License-Identifier: Apache-2.0
"""Warm images: the next container of the same image shares server and mount, and nothing is left after a while."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from containers import while_mounts_stay

pytestmark = [pytest.mark.rootless, pytest.mark.fuse]


def processes(name, user, image):
    """Return the pids of a user's processes of this name that are alive and were started for an image.

    Another run of the tests may go on beside this one as the same user; its images are others.
    """
    found = set()
    for number in os.listdir("/proc"):
        try:
            status = Path(f"/proc/{number}/status").read_text()
            if os.fsencode(image) not in Path(f"/proc/{number}/cmdline").read_bytes():
                continue
        except OSError:
            continue
        if status.startswith(f"Name:\t{name}\n") and f"\nUid:\t{user.uid}\t" in status and "\nState:\tZ" not in status:
            found.add(int(number))
    return found


def until(condition, seconds=8.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def as_user(as_plain_user):
    """Another user than most tests have: this one's processes are counted."""
    return as_plain_user


@pytest.fixture
def warm(as_user, sing, image):
    """Start containers of one image that is kept for two seconds."""

    def start(*words):
        return sing("exec", *words[:-3], image, *words[-3:], env={"SINGULARITY_IMAGE_KEEP": "2"})

    start.servers = lambda: processes("singularity-fs", as_user, image)
    start.mine = lambda: start.servers() | processes("singularity-kp", as_user, image)
    start.image = image
    return start


@while_mounts_stay
def test_containers_of_one_image_share_their_user_namespace(warm):
    # Ranks of an MPI job may then read each other's memory (--sharens of the peers).
    spaces = {warm("sh", "-c", "readlink /proc/self/ns/user").stdout for _ in range(3)}
    assert len(spaces) == 1


@while_mounts_stay
def test_second_start_shares_server_and_mount(warm):
    first = warm("sh", "-c", "ls / /bin")
    assert first.returncode == 0
    servers = warm.servers()
    assert servers
    second = warm("sh", "-c", "ls / /bin")
    assert second.stdout == first.stdout
    assert warm.servers() == servers


def test_warm_container_is_like_a_cold_one(warm):
    script = (
        "id; pwd; ls /mnt 2>&1; touch /x 2>&1; grep -c . /proc/self/mountinfo; grep -E 'Cap|NoNew' /proc/self/status"
    )
    cold, hot = warm("sh", "-c", script), warm("sh", "-c", script)
    assert hot.stdout == cold.stdout
    assert hot.stderr == cold.stderr == ""


@pytest.mark.parametrize("options", [["--pid"], ["--writable-tmpfs"], ["-C"], ["--net", "--network", "none"]])
@while_mounts_stay
def test_other_namespaces_join_a_warm_image_too(warm, options):
    assert warm("sh", "-c", "true").returncode == 0
    servers = warm.servers()
    assert warm(*options, "sh", "-c", "exit 7").returncode == 7
    assert warm.servers() == servers


def test_nothing_is_left_after_the_time(warm, as_user):
    warm("sh", "-c", "true")
    assert warm.mine()
    until(lambda: not warm.mine())
    identity = warm.image.stat()
    left = [path.name for path in Path(f"/dev/shm/singularity-{as_user.uid}").iterdir()]
    assert not [name for name in left if name.startswith(f"{identity.st_dev:x}-{identity.st_ino:x}-")]


def test_changed_image_is_mounted_anew(warm, as_user, box, squash):
    assert warm("sh", "-c", "cat /etc/new").returncode == 1
    (box / "etc/new").write_text("new\n")
    squash(box)
    assert warm("sh", "-c", "cat /etc/new").stdout == "new\n"


def test_killed_server_is_replaced(warm):
    warm("sh", "-c", "true")
    for pid in warm.servers():
        os.kill(pid, signal.SIGKILL)
    result = warm("sh", "-c", "echo ok")
    assert (result.stdout, result.stderr) == ("ok\n", "")


def test_killed_keeper_is_replaced(warm, as_user):
    warm("sh", "-c", "true")
    for pid in warm.mine() - warm.servers():
        os.kill(pid, signal.SIGKILL)
    assert warm("sh", "-c", "echo ok").stdout == "ok\n"


def test_what_killed_keepers_have_left_is_swept_up(warm, as_user):
    script = (
        "import fcntl, time; from pysingularity.runtime.warm import _folder; at = _folder() + '/'\n"
        "open(at + 'dead', 'w').write('4194305 1 /nowhere\\n')\n"
        "open(at + 'dead.lock', 'w'); open(at + 'free.lock', 'w')\n"
        "held = open(at + 'held.lock', 'w'); fcntl.lockf(held, fcntl.LOCK_EX); print(at, flush=True); time.sleep(60)\n"
    )
    with as_user.popen(["python", "-c", script], stdout=subprocess.PIPE, text=True) as process:
        folder = Path(process.stdout.readline().strip())
        try:
            assert warm("sh", "-c", "true").returncode == 0
            until(lambda: not any((folder / name).exists() for name in ("dead", "dead.lock", "free.lock")))
            assert (folder / "held.lock").exists()
        finally:
            process.kill()
            (folder / "held.lock").unlink()


def test_containers_outlive_the_keeper(warm, as_user):
    result = warm("sh", "-c", "sleep 3.5; ls /bin | head -1; cat /bin/busybox | wc -c")
    assert result.returncode == 0
    assert len(result.stdout.split()) == 2


@while_mounts_stay
def test_image_stays_warm_while_a_container_of_it_runs(warm, as_user):
    environ = {"SINGULARITY_IMAGE_KEEP": "1"}
    words = ["singularity", "exec", warm.image, "sh", "-c", "echo ready; read x"]
    with as_user.popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environ) as child:
        assert child.stdout.readline() == b"ready\n"
        servers = warm.servers()
        time.sleep(2.5)
        assert warm("sh", "-c", "true").returncode == 0
        assert warm.servers() == servers
        child.communicate(b"\n")
    until(lambda: not warm.mine())


def test_many_first_starts_at_once_share_one_server(as_user, image):
    script = f"for i in $(seq 64); do singularity exec {image} echo ok & done; wait"
    result = as_user(["bash", "-c", script], env={"SINGULARITY_IMAGE_KEEP": "4"}, timeout=120)
    assert result.stdout.split() == ["ok"] * 64
    assert len(processes("singularity-fs", as_user, image)) <= 4  # one server, perhaps with its workers
