# SPDX-License-Identifier: Apache-2.0
"""`singularity shell`: commands on standard input, the choice of shell, and a real terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import termios
import time

import pytest

pytestmark = pytest.mark.rootless


def test_commands_on_standard_input(sing, box):
    result = sing("shell", box, input="echo hello\nexit 3\n")
    assert (result.stdout, result.returncode) == ("hello\n", 3)


def test_chosen_shell(sing, box):
    (box / "bin/myshell").write_text("#!/bin/sh\necho mine\n")
    (box / "bin/myshell").chmod(0o755)
    assert sing("shell", "--shell", "/bin/myshell", box).stdout == "mine\n"
    assert sing("shell", "-s", "/no/shell", box).returncode == 255


def test_words_behind_the_image_are_left_out_with_a_warning(sing, box):
    result = sing("shell", box, "extra", input="echo hi\n")
    assert result.stdout == "hi\n"
    assert "extra" in result.stderr


def test_writable_shell_with_a_home_elsewhere(sing, as_user, box):
    home = as_user.write("home/file").parent
    result = sing("shell", "--writable", "-H", f"{home}:/home", box, input="cd; pwd; ls; mkdir /dataset\n")
    assert result.stdout == "/home\nfile\n"
    assert (box / "dataset").is_dir()


def test_missing_shell_is_named(sing, box):
    (box / "bin/sh").unlink()
    result = sing("shell", box)
    assert result.returncode == 255
    assert "/bin/sh" in result.stderr


def _read_until(master, words, seconds=10):
    data = b""
    deadline = time.monotonic() + seconds
    while words not in data and time.monotonic() < deadline:
        if select.select([master], [], [], 0.1)[0]:
            try:
                data += os.read(master, 4096)
            except OSError:
                break
    assert words in data, data
    return data


@pytest.mark.parametrize("options", [[], ["--pid"]])
def test_shell_on_a_terminal_has_prompt_interrupt_and_job_control(as_user, box, options):
    master, slave = pty.openpty()
    os.set_inheritable(slave, True)
    # setsid -c makes the terminal the controlling one, as a login does.
    words = ["setsid", "-c", "-w", "singularity", "shell", *options, str(box)]
    child = as_user.popen(words, stdin=slave, stdout=slave, stderr=slave, env={"TERM": "dumb"})
    os.close(slave)
    try:
        _read_until(master, b"Singularity> ")
        os.write(master, b"tty; echo rea$((1))dy\n")
        assert b"/dev/pts/" in _read_until(master, b"rea1dy\r\n")
        fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", 33, 77, 0, 0))
        os.write(master, b"stty size; echo siz$((1))e\n")
        assert b"33 77" in _read_until(master, b"siz1e\r\n")
        os.write(master, b"echo beg$((1))in; sleep 100; echo $?\n")
        _read_until(master, b"beg1in\r\n")
        time.sleep(0.3)
        os.write(master, b"\x03")
        _read_until(master, b"Singularity> ")
        os.write(master, b"sleep 100 & jobs; kill %1; echo end$((1+1))\n")
        assert b"sleep 100" in _read_until(master, b"end2")
        os.write(master, b"exit 5\n")
        assert child.wait(10) == 5
    finally:
        child.kill()
        child.wait()
        os.close(master)
