# SPDX-License-Identifier: Apache-2.0
"""The kernel's calls: errno becomes an OSError that names call and path, and paths stay inside their root."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from pysingularity.linux import capabilities, libc, loop, mounts, process


def test_errors_name_call_and_path():
    with pytest.raises(FileNotFoundError, match=r"openat2.*/no/such"):
        mounts.open_in_root(os.open("/", os.O_PATH), "/no/such")
    with pytest.raises(OSError, match="mount"):
        mounts.mount("nothing", "/no/such", "nofs")


def test_functions_that_do_not_exist_are_an_oserror():
    with pytest.raises(OSError, match="no_such_function"):
        libc.function("no_such_function")


@pytest.mark.parametrize("path", ["/etc", "../../../../etc", "up/etc", "abs"])
def test_paths_resolve_inside_the_root_only(tmp_path, path):
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/mine").touch()
    (tmp_path / "up").symlink_to("../../../..")
    (tmp_path / "abs").symlink_to("/etc")
    root = os.open(tmp_path, os.O_PATH)
    found = mounts.open_in_root(root, path, os.O_RDONLY)
    assert os.listdir(found) == ["mine"]
    os.close(found)
    os.close(root)


def test_start_time_names_a_process(tmp_path):
    assert process.start_time(os.getpid()) == process.start_time(os.getpid())
    with pytest.raises(OSError, match="999999999"):
        process.start_time(999999999)


def test_capability_names():
    assert capabilities.number("CAP_SYS_ADMIN") == capabilities.SYS_ADMIN == 21
    assert capabilities.number("checkpoint_restore") == 40
    with pytest.raises(ValueError, match="nonsense"):
        capabilities.number("nonsense")


def run(code):
    """Run code in a fresh interpreter: what it does to its process must not stay."""
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert result.stderr == ""
    return result


def test_descriptors_but_those_kept_are_closed():
    result = run("""
        import os
        from pysingularity.linux.process import close_others
        fds = [os.open("/dev/null", os.O_RDONLY) for _ in range(6)]
        close_others((0, 1, 2, fds[1], fds[4]))
        kept = [fd for fd in fds if os.path.exists(f"/proc/self/fd/{fd}")]
        print(kept == [fds[1], fds[4]])
        """)
    assert result.stdout == "True\n"


def test_leaving_like_a_child_that_was_killed():
    result = run("""
        import os, signal
        from pysingularity.linux.process import leave_like
        child = os.fork()
        if not child:
            os.kill(os.getpid(), signal.SIGUSR1)
        os._exit(leave_like(os.waitpid(child, 0)[1]))
        """)
    assert result.returncode == -10


def test_child_dies_with_its_parent():
    result = run("""
        import os, time
        from pysingularity.linux.process import die_with_parent
        r, w = os.pipe()
        parent = os.fork()
        if not parent:
            me = os.getpid()
            if not os.fork():
                die_with_parent(parent=me)
                os.write(w, str(os.getpid()).encode())
                time.sleep(60)
            time.sleep(0.2)
            os._exit(0)
        os.close(w)
        grandchild = int(os.read(r, 20))
        os.waitpid(parent, 0)
        print(os.read(r, 1))  # the end of the pipe: nobody is left
        """)
    assert result.stdout == "b''\n"


@pytest.mark.root
def test_loop_device_frees_itself(root_only, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(8192))
    file = os.open(path, os.O_RDONLY)
    try:
        device, descriptor = loop.attach(file, 4096, 4096)
    except OSError as error:
        pytest.skip(f"needs loop devices: {error}")
    assert os.lseek(descriptor, 0, os.SEEK_END) == 4096
    backing = f"/sys/block/{device.rpartition('/')[2]}/loop/backing_file"
    assert Path(backing).read_text().strip() == str(path)
    os.close(descriptor)
    os.close(file)
    assert not os.path.exists(backing)
