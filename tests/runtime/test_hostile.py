# SPDX-License-Identifier: Apache-2.0
"""Images that mean harm, and files that vanish: the host is never touched outside the binds, and nothing hangs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pysingularity.squashfs.reader import SquashfsImage

pytestmark = pytest.mark.rootless


@pytest.fixture
def victim(as_user):
    """A folder of the host that an image tries to reach, outside every default mount."""
    folder = Path(f"/srv/pysingularity-victim-{os.getpid()}")
    if os.getuid() != 0:
        pytest.skip("needs root to make a folder outside the default mounts")
    folder.mkdir()
    os.chown(folder, as_user.uid, as_user.gid)
    (folder / "secret").write_text("secret")
    yield folder
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


def servers():
    """Return the processes that serve images."""
    found = set()
    for name in os.listdir("/proc"):
        try:
            if Path(f"/proc/{name}/comm").read_text() == "singularity-fs\n":
                found.add(int(name))
        except (OSError, ValueError):
            continue
    return found


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("place", ["etc", "proc", "dev", "tmp", "var", "sys", "home"])
@pytest.mark.parametrize("packed", [False, True])
def test_top_folders_that_are_links_to_the_host_lead_nowhere(sing, box, squash, fuse, victim, place, packed):
    subprocess.run(["rm", "-rf", box / place], check=True)
    (box / place).symlink_to(victim)
    path = squash(box) if packed else box
    result = sing("exec", path, "cat", "/bin/../etc/secret", f"/{place}/secret", timeout=30)
    assert "secret" not in result.stdout
    assert names(victim) == ["secret"]
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("target", ["/srv/VICTIM", "../../../../srv/VICTIM", "/../srv/VICTIM"])
def test_bind_targets_that_are_links_stay_inside(sing, as_user, box, squash, fuse, victim, target):
    (box / "evil").symlink_to(target.replace("VICTIM", victim.name))
    data = as_user.write("data/mine").parent
    for path in (box, squash(box)):
        result = sing("exec", "-B", f"{data}:/evil", path, "sh", "-c", "ls /evil/; touch /evil/new")
        assert result.stdout == "mine\n", result.stderr
        (data / "new").unlink()
        # The bind landed at the link's end inside the container, and only there.
        assert sing("exec", "-B", f"{data}:/evil", path, "ls", f"/srv/{victim.name}").stdout == "mine\n"
    assert names(victim) == ["secret"]


def test_writable_sandbox_makes_no_mount_points_through_links(sing, as_user, box, victim):
    (box / "evil").symlink_to(victim)
    data = as_user.write("data/mine").parent
    result = sing("exec", "--writable", "-B", f"{data}:/evil/new", box, "true")
    assert result.returncode == 255
    assert names(victim) == ["secret"]
    assert not (box / "srv").exists()


def test_passwd_that_is_a_link_to_the_host_shows_nothing(sing, box, victim):
    for name in ("passwd", "group"):
        (box / f"etc/{name}").unlink()
        (box / f"etc/{name}").symlink_to(victim / "secret")
    result = sing("exec", box, "cat", "/etc/passwd")
    assert "secret" not in result.stdout
    assert (victim / "secret").read_text() == "secret"


def test_passwd_that_is_a_fifo_or_folder_does_not_hang(sing, box):
    (box / "etc/passwd").unlink()
    os.mkfifo(box / "etc/passwd")
    (box / "etc/group").unlink()
    (box / "etc/group").mkdir()
    assert sing("exec", box, "echo", "ok", timeout=20).stdout == "ok\n"


def test_environment_scripts_that_are_links_fifos_or_endless(sing, box, victim):
    folder = box / ".singularity.d/env"
    (folder / "10-link.sh").symlink_to(victim / "secret")
    os.mkfifo(folder / "20-fifo.sh")
    (folder / "30-zero.sh").symlink_to("/dev/zero")
    (folder / "40-loop.sh").symlink_to("40-loop.sh")
    (folder / "50-folder.sh").mkdir()
    (folder / "60-last.sh").write_text("export LAST=1\n")
    assert sing("exec", box, "sh", "-c", "echo $LAST", timeout=20).stdout == "1\n"


def test_links_in_circles_end(sing, as_user, box):
    (box / "a").symlink_to("b")
    (box / "b").symlink_to("a")
    data = as_user.write("data/mine").parent
    result = sing("exec", "-B", f"{data}:/a/x", box, "true", timeout=20)
    assert result.returncode == 255
    assert len(result.stderr.splitlines()) <= 2


def test_set_user_id_programs_have_no_effect(sing, as_user, box):
    if os.getuid() != 0:
        pytest.skip("needs root to make a set-user-id program")
    os.chown(box / "bin/busybox", 0, 0)
    (box / "bin/busybox").chmod(0o4755)
    assert sing("exec", box, "id", "-u").stdout.strip() == str(as_user.uid)


@pytest.mark.parametrize("size", [0, 10, 96, 4096])
def test_truncated_image_is_named(sing, as_user, image, size):
    path = as_user.write("cut.squashfs", image.read_bytes()[:size])
    result = sing("exec", path, "true", timeout=20)
    assert result.returncode == 255
    assert "cut.squashfs" in result.stderr
    assert "Traceback" not in result.stderr


def test_image_truncated_while_it_runs_gives_errors_and_no_hang(as_user, image, box):
    words = ["singularity", "exec", str(image), "sh", "-c", "echo ready; read x; cat /bin/busybox | wc -c; echo end"]
    child = as_user.popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert child.stdout.readline() == b"ready\n"
    os.truncate(image, 4096)
    output, _ = child.communicate(b"\n", timeout=20)
    assert b"end" in output or child.returncode != 0


def test_image_replaced_while_it_runs_goes_on_with_the_old_one(as_user, image, box):
    words = ["singularity", "exec", str(image), "sh", "-c", "echo ready; read x; ls /bin | wc -l"]
    child = as_user.popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout.readline() == b"ready\n"
    image.unlink()
    image.write_bytes(b"something else")
    output, _ = child.communicate(b"\n", timeout=20)
    assert int(output) > 20


def test_killed_server_ends_the_program_instead_of_hanging_it(as_user, image):
    before = servers()
    # A new name each time: what has been read once comes out of the kernel's cache, server or not.
    script = "echo $$; n=0; while ls /bin/no$n 2>&1 | grep -q 'No such'; do n=$((n + 1)); done"
    words = ["singularity", "exec", str(image), "sh", "-c", script]
    child = as_user.popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    child.stdout.readline()
    mine = servers() - before
    assert mine
    for number in mine:
        os.kill(number, signal.SIGKILL)
    child.wait(timeout=20)
    child.stdout.close()


def test_vanished_bind_source_is_one_line(sing, as_user, box):
    gone = as_user.tmp / "gone"
    gone.symlink_to("/nowhere")
    result = sing("exec", "-B", gone, box, "true")
    assert result.returncode == 255
    assert str(gone) in result.stderr


@pytest.mark.parametrize("delay", [0.002, 0.006, 0.010, 0.014, 0.018, 0.022, 0.026, 0.030, 0.040])
@pytest.mark.parametrize("options", [[], ["--pid"]])
def test_interrupt_at_every_stage_ends_everything(as_user, image, delay, options):
    words = ["singularity", "exec", *options, str(image), "sleep", "30"]
    child = as_user.popen(words, stderr=subprocess.PIPE, start_new_session=True)
    time.sleep(delay)
    os.killpg(child.pid, signal.SIGINT)
    _, complaint = child.communicate(timeout=20)
    # Before our first line has run, the interpreter complains in its own way; nothing of ours can be silent then.
    if b"Python" not in complaint and complaint.count(b"File ") != 1:
        assert child.returncode in (-signal.SIGINT, 130, 255), complaint
        assert b"Traceback" not in complaint
    deadline = time.monotonic() + 10  # the server notices the end of its mount
    while mine := _session(child.pid):
        assert time.monotonic() < deadline, mine
        time.sleep(0.05)


def _session(number):
    """Return what still runs of a session."""
    left = subprocess.run(["ps", "-eo", "sid=,stat=,args="], capture_output=True, text=True, check=True).stdout
    return [line for line in left.splitlines() if line.split()[0] == str(number) and "Z" not in line.split()[1]]


def test_a_program_in_a_damaged_place_is_told_as_damage(sing, box, squash, fuse):
    path = squash(box)
    data = bytearray(path.read_bytes())
    tables = int.from_bytes(data[64:72], "little")  # files lie before the table of inodes
    data[96:tables] = bytes(tables - 96)
    path.write_bytes(data)
    result = sing("exec", path, "true", timeout=30)
    assert result.returncode == 255
    assert "Input/output error" in result.stderr and "the image is damaged there" in result.stderr


def test_damage_met_by_a_running_program_is_one_line(sing, as_user, box, squash, fuse):
    """The program only sees an input/output error, or dies of SIGBUS; the server says what is wrong with what."""
    (box / "text").write_text("".join(f"{number}\n" for number in range(100000)))
    path = squash(box)
    with open(path, "r+b") as file:
        image = SquashfsImage(file.fileno())
        file.seek(image.lookup("text").start + 10)
        file.write(bytes(100))
    words = ["singularity", "exec", str(path), "md5sum", "/text"]
    result = as_user([sys.executable, "-c", f"import pty; print('status', pty.spawn({words}) >> 8)"])
    lines = result.stdout.splitlines()
    assert "status 1" in lines, lines
    told = [line for line in lines if "ERROR:" in line]
    assert len(told) == 1
    assert f"{path}: damaged squashfs image" in told[0]
