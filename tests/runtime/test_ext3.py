# SPDX-License-Identifier: Apache-2.0
"""ext3 overlays: made by `overlay create`, mounted by fuse2fs and fuse-overlayfs or by root's kernel, never lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = [pytest.mark.rootless, pytest.mark.fuse]


@pytest.fixture
def tools(tool, fuse):
    """Skip unless everything is there that ordinary users need for writable ext3 overlays."""
    for name in ("mkfs.ext3", "fuse2fs", "fuse-overlayfs"):
        tool(name)


@pytest.fixture
def overlay(tools, sing, as_user):
    """Make an overlay in a file: overlay("name", options...) -> path."""

    def make(name="changes.img", *options):
        path = as_user.tmp / name
        sing("overlay", "create", "--sparse", *options, path, check=True)
        return path

    return make


@pytest.fixture
def sif(sing, image, as_user):
    """The image as a SIF file of the user's."""
    path = as_user.tmp / "image.sif"
    sing("-q", "build", path, image, check=True)
    return path


def helpers(mark):
    """Return the command lines of helper programs that name a file, or serve for a container that does."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if (folder / "comm").read_text().strip() not in ("fuse2fs", "fuse-overlayfs"):
                continue
            files = [os.readlink(one) for one in (folder / "fd").iterdir()]
        except OSError:
            continue
        if any(str(mark) in one for one in files):
            found.append(folder.name)
    return found


def until(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("options", [[], ["--pid"]])
def test_changes_are_kept_in_the_file(sing, overlay, image, options):
    path = overlay()
    script = "echo hi > /opt/x; rm /bin/tty; mkdir /new; mv /opt /moved; id -u; exit 7"
    result = sing("exec", *options, "--overlay", path, image, "sh", "-c", script)
    assert (result.returncode, result.stderr) == (7, "")
    assert sing("exec", "--overlay", path, image, "cat", "/moved/x").stdout == "hi\n"
    assert sing("exec", *options, "--overlay", f"{path}:ro", image, "sh", "-c", "cat /moved/x; ls -d /new").stdout == (
        "hi\n/new\n"
    )
    assert sing("exec", "--overlay", f"{path}:ro", image, "touch", "/y").returncode == 1
    assert sing("exec", "--overlay", path, image, "ls", "/bin/tty").returncode == 1
    assert sing("exec", image, "ls", "/moved").returncode == 1
    assert helpers(path) == []


def test_file_system_is_sound_afterwards(sing, overlay, image, tool):
    path = overlay()
    script = "for n in $(seq 200); do echo $n > /opt/$n; done; rm /opt/1*; chmod 700 /opt/2"
    sing("exec", "--overlay", path, image, "sh", "-c", script, check=True)
    assert subprocess.run([tool("e2fsck"), "-fn", path], capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_death_by_signal_is_seen_and_changes_stay(sing, overlay, image, number):
    path = overlay()
    result = sing("exec", "--overlay", path, image, "sh", "-c", f"echo hi > /opt/x; kill -{int(number)} $$")
    assert result.returncode == -number
    assert sing("exec", "--overlay", path, image, "cat", "/opt/x").stdout == "hi\n"


@pytest.mark.parametrize("options", [[], ["--pid"]])
def test_kill_9_leaves_no_process_and_a_usable_file(as_user, sing, overlay, image, options):
    path = overlay()
    words = ["singularity", "exec", *options, "--overlay", path, image, "sh", "-c", "echo ready; exec sleep 1000"]
    child = as_user.popen(words, stdout=subprocess.PIPE)
    assert child.stdout.readline() == b"ready\n"
    assert helpers(path)
    child.kill()
    child.wait()
    child.stdout.close()
    until(lambda: not helpers(path))
    assert sing("exec", "--overlay", path, image, "touch", "/opt/after").returncode == 0


def test_one_writer_or_many_readers(as_user, sing, overlay, image):
    path = overlay()
    hold = ["sh", "-c", "echo ready; read x"]

    def held(option):
        words = ["singularity", "exec", "--overlay", option, image, *hold]
        child = as_user.popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert child.stdout.readline() == b"ready\n"
        return child

    with held(path) as writer:
        for option in (path, f"{path}:ro"):
            refused = sing("exec", "--overlay", option, image, "true")
            assert refused.returncode == 255
            assert f"{path}: another container" in refused.stderr
        writer.communicate(b"\n")
    with held(f"{path}:ro") as reader:
        assert sing("exec", "--overlay", f"{path}:ro", image, "echo", "both").stdout == "both\n"
        assert sing("exec", "--overlay", path, image, "true").returncode == 255
        reader.communicate(b"\n")


def test_emulated_root_gives_files_away_in_its_overlay(sing, as_subuid_user, overlay, image):
    path = overlay("root.img", "--fakeroot")
    script = "for n in $(seq 20); do touch /opt/$n; chown 33:44 /opt/$n; done"
    sing("exec", "--fakeroot", "--overlay", path, image, "sh", "-c", script, check=True)
    owners = sing("exec", "--fakeroot", "--overlay", path, image, "sh", "-c", "stat -c %u:%g /opt/*", check=True).stdout
    assert owners.split() == ["33:44"] * 20


def test_overlay_of_the_other_kind_of_container_is_named(as_plain_user, tools, box, squash):
    image = squash(box)
    for made, used in (("--fakeroot", "--pid"), ("--sparse", "--fakeroot")):
        path = as_plain_user.tmp / f"{used}.img"
        as_plain_user(["singularity", "overlay", "create", "-S", made, path], check=True)
        result = as_plain_user(["singularity", "exec", used, "--overlay", path, image, "true"])
        assert result.returncode == 255
        assert result.stderr.startswith(f"FATAL:   {path}: its files belong to a user"), result.stderr


def test_overlay_inside_a_sif_file(sing, tools, sif):
    assert "not-writable" not in sing("exec", "--writable", sif, "true").stdout
    assert sing("exec", "--writable", sif, "true").returncode == 255
    sing("overlay", "create", "--create-dir", "/data/deep", sif, check=True)
    assert "Ext3/Overlay" in sing("sif", "list", sif).stdout
    sing("exec", "-w", sif, "touch", "/opt/x", "/data/deep/y", check=True)
    assert sing("exec", sif, "ls", "/opt/x", "/data/deep/y").returncode == 0
    assert sing("exec", sif, "touch", "/opt/z").returncode == 1
    again = sing("overlay", "create", sif)
    assert again.returncode == 255
    assert "has an overlay already" in again.stderr


def test_ext3_image_of_old_days_runs(sing, tools, tool, box, as_user):
    path = as_user.write("old.img")
    owner = f"root_owner={as_user.uid}:{as_user.gid}"
    subprocess.run([tool("mkfs.ext3"), "-q", "-F", "-E", owner, "-d", box, path, "64M"], check=True)
    assert sing("exec", path, "sh", "-c", "cat /etc/group; exit 3").returncode == 3
    assert sing("exec", path, "touch", "/x").returncode == 1
    sing("exec", "--writable", path, "touch", "/x", check=True)
    assert sing("exec", path, "ls", "/x").stdout == "/x\n"


def test_damaged_overlay_is_one_line_that_names_it(sing, overlay, image):
    path = overlay()
    with open(path, "r+b") as file:
        file.seek(2048)
        file.write(b"\xff" * 8192)  # the group descriptors
    result = sing("exec", "--overlay", path, image, "true", timeout=60)
    assert result.returncode == 255
    assert result.stderr.startswith(f"FATAL:   {path}: cannot be mounted")
    assert result.stderr.count("\n") == 2


def test_instance_keeps_its_changes(sing, overlay, image, as_user):
    path = overlay()
    env = {"SINGULARITY_CONFIGDIR": str(as_user.tmp / "config")}
    sing("instance", "start", "--overlay", path, image, "ext", env=env, check=True)
    try:
        sing("exec", "instance://ext", "touch", "/opt/in", env=env, check=True)
    finally:
        sing("instance", "stop", "ext", env=env, check=True)
    until(lambda: not helpers(path))
    assert sing("exec", "--overlay", f"{path}:ro", image, "ls", "/opt/in").returncode == 0


def test_root_uses_the_kernel(root_only, overlay, image, tool):
    if not os.access("/dev/loop-control", os.R_OK):
        pytest.skip("needs loop devices")
    path = overlay()
    command = [sys.executable, "-m", "pysingularity", "exec", "--overlay", path, image]
    script = "touch /opt/x; grep -c '^overlay / ' /proc/mounts"
    result = subprocess.run([*command, "sh", "-c", script], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (0, "1\n"), result.stderr
    assert subprocess.run([*command, "ls", "/opt/x"], capture_output=True, check=False).returncode == 0
    assert str(path) not in subprocess.run([tool("losetup"), "-a"], capture_output=True, text=True, check=True).stdout


def test_size_and_place_are_checked(sing, tools, as_user):
    small = sing("overlay", "create", "--size", "10", as_user.tmp / "x.img")
    assert small.returncode == 255
    assert "at least 64 MiB" in small.stderr
    there = as_user.write("there", "content")
    assert sing("overlay", "create", there).returncode == 255
    assert there.read_text() == "content"
    assert sing("overlay", "create", "--create-dir", "../x", as_user.tmp / "x.img").returncode == 255
    assert not [one for one in as_user.tmp.iterdir() if "partial" in one.name]
    sing("overlay", "create", "--size", "65", as_user.tmp / "full.img", check=True)
    state = (as_user.tmp / "full.img").stat()
    assert state.st_size == 65 << 20
    assert state.st_blocks * 512 >= state.st_size  # not sparse unless asked for
