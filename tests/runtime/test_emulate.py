# SPDX-License-Identifier: Apache-2.0
"""Root emulation as a real ordinary user: programs work as for root, and the image gets what root would have made."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pysingularity.runtime import emulate
from pysingularity.runtime.rootless import BPF, NOTIFY, ROOT, SINGLE, SUBUID, Way

SCRIPT = Path(__file__).with_name("emulated.py")
#: Programs of the host that the tiny tree borrows, with the libraries they need.
PROGRAMS = ("sh", "cp", "tar", "stat", "chown", "mknod", "ls", "mkdir", "ln", "rm", "touch", "id", "cat", "chmod")
MORE = ("setpriv", "unshare", "chroot", "mv", "install", "sleep", "sync", "env", "mkfifo", "setcap", "getcap", "find")


class Box:
    """A tiny tree and an ordinary user who runs programs in it as emulated root."""

    def __init__(self, user, root: Path) -> None:
        self.user, self.root = user, root
        self.scanned = user.tmp / "scan.json"

    def sh(self, script, *, way="notify", check=True, timeout=60, **env):
        """Run a shell script; return its output."""
        result = self.user(
            [sys.executable, SCRIPT, self.root, "sh", "-ec", script],
            env={"SINGULARITY_ROOTLESS": way, "SCAN": str(self.scanned), **env},
            timeout=timeout,
        )
        if check:
            assert result.returncode == 0, result.stdout + result.stderr
        lines = [line for line in result.stderr.splitlines() if not line.startswith("INFO:")]
        assert not check or lines == []
        return result.stdout if check else result

    def image(self, path):
        """Return mode, uid, gid, device and attributes that an image gets for a path."""
        mode, uid, gid, rdev, attributes = json.loads(self.scanned.read_text())[path]
        return int(mode, 8), uid, gid, rdev, attributes


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A folder with programs of the host, copied with their libraries."""
    root = tmp_path_factory.mktemp("tree")
    import _ctypes

    needed = set()
    for name in (*PROGRAMS, *MORE, sys.executable, _ctypes.__file__):
        path = name if os.path.isabs(name) else shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
        if path is None:
            continue
        found = os.path.realpath(path)
        if name != _ctypes.__file__:
            needed.add((found, "/bin/python3" if name == sys.executable else f"/bin/{name}"))
        for line in subprocess.run(["ldd", found], capture_output=True, text=True, check=False).stdout.splitlines():
            for word in line.split():
                if word.startswith("/"):
                    needed.add((os.path.realpath(word), word))
    for source, target in needed:
        place = root / target[1:]
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, place)
    for name in ("proc", "sys", "dev", "tmp", "etc", "root"):
        (root / name).mkdir()
    (root / "etc/passwd").write_text("root:x:0:0::/root:/bin/sh\nmail:x:8:8::/:/bin/sh\npg:x:101:102::/:/bin/sh\n")
    (root / "etc/group").write_text("root:x:0:\nmail:x:8:\npg:x:102:\nextra:x:55:pg\n")
    return root


@pytest.fixture
def box(as_user, tree):
    root = as_user.tmp / "box"
    shutil.copytree(tree, root, symlinks=True)
    for path in (root, *root.rglob("*")):
        as_user.own(path)
    return Box(as_user, root)


pytestmark = pytest.mark.rootless


@pytest.mark.parametrize("command", ["chown 101:102", "chown -h 101:102"])
def test_chown_is_seen_by_everybody_and_reaches_the_image(box, command):
    out = box.sh(f"touch /a; {command} /a; stat -c %u:%g /a; ln /a /b; mv /a /c; stat -c %u:%g /b /c; ls -ln /c")
    assert out.split()[:3] == ["101:102"] * 3
    assert out.split()[5:7] == ["101", "102"]
    assert box.image("/b")[1:3] == box.image("/c")[1:3] == (101, 102)


def test_symlinks_have_owners_of_their_own(box):
    out = box.sh("touch /f; ln -s f /l; chown -h 5:6 /l; chown 7:8 /l; stat -c %u:%g /l; stat -L -c %u:%g /l")
    assert out.split() == ["5:6", "7:8"]
    assert box.image("/l")[1:3] == (5, 6)
    assert box.image("/f")[1:3] == (7, 8)


def test_half_of_an_owner_stays(box):
    assert box.sh("touch /a; chown 5:6 /a; chown :9 /a; chown 4 /a; stat -c %u:%g /a") == "4:9\n"


def test_chown_takes_set_id_bits_and_chmod_gives_them(box):
    out = box.sh("touch /a; chmod 6755 /a; chown 5 /a; stat -c %a /a; chmod 4750 /a; stat -c %a:%u /a")
    assert out.split() == ["755", "4750:5"]
    assert box.image("/a")[0] == 0o104750


def test_devices_are_seen_and_reach_the_image(box):
    out = box.sh("mknod -m 640 /n c 1 3; chown 0:6 /n; mknod /b b 7 300; stat -c '%F %a %g %t %T' /n /b; mkfifo /p")
    assert out.splitlines() == ["character special file 640 6 1 3", "block special file 644 0 7 12c"]
    assert box.image("/n") == (0o020640, 0, 6, os.makedev(1, 3), {})
    assert box.image("/b")[0] == 0o060644
    assert box.image("/p")[0] == 0o010644
    assert box.sh("mknod /n c 1 3", check=False).returncode == 1


@pytest.mark.parametrize("copy", ["cp -a /s /t", "mkdir /t; tar -C /s -cf - . | tar -C /t -xpf - --same-owner"])
def test_copies_keep_owners(box, copy):
    box.sh(f"mkdir /s; touch /s/a; ln -s a /s/l; mknod /s/n c 1 3; chown -h 101:102 /s/a /s/l; chown 3:4 /s; {copy}")
    for name in ("", "/a", "/l", "/n"):
        assert box.image("/t" + name)[:4] == box.image("/s" + name)[:4]
    assert box.image("/t/a")[1:3] == (101, 102)


def test_capabilities_of_files_reach_the_image(box):
    if not (box.root / "bin/setcap").exists():
        pytest.skip("needs the program setcap")
    out = box.sh("cp /bin/true /t 2>/dev/null || cp /bin/cat /t; setcap cap_net_raw+ep /t; getcap /t")
    assert "cap_net_raw=ep" in out
    assert box.image("/t")[4] == {"security.capability": "0100000200200000000000000000000000000000"}


IDS = """
import os, sys
def look():
    return os.getresuid(), os.getresgid(), os.getgroups()
os.setgroups([55, 102])
os.setresgid(102, 102, 102)
os.setresuid(101, 101, 101)
assert look() == ((101,) * 3, (102,) * 3, [55, 102]), look()
for act in (lambda: os.setuid(0), lambda: os.setgid(0), lambda: os.seteuid(0), lambda: os.setgroups([])):
    try:
        act()
    except PermissionError:
        continue
    sys.exit("a right came back")
if os.fork() == 0:
    assert look() == ((101,) * 3, (102,) * 3, [55, 102]), look()
    os.execv("/bin/sh", ["sh", "-c", "id -u; id -g; id -G"])
os.wait()
"""


def write(box, name, text):
    (box.root / name).write_text(text)
    return name


def python(box, text):
    """Run Python in the box: its library is bound from the host by copying."""
    source = Path(os.__file__).parent
    target = box.root / str(source)[1:]
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(
            source,
            target,
            ignore=shutil.ignore_patterns("test", "dist-packages", "site-packages", "__pycache__", "idlelib"),
        )
    (box.root / "script.py").write_text(text)
    return f"PYTHONHOME={sys.base_prefix} python3 -S -B /script.py"


def test_changed_ids_are_kept_over_fork_and_exec_and_cannot_be_taken_back(box):
    assert box.sh(python(box, IDS)).split() == ["101", "102", "102", "55"]
    assert box.sh("id -u; id -G").split() == ["0", "0"]


def test_threads_have_ids_of_their_own(box):
    script = """
import ctypes, os, threading
call = ctypes.CDLL(None).syscall
seen = []
def other():
    call(117, 7, 7, 7)
    seen.append(call(102))
thread = threading.Thread(target=other)
thread.start(); thread.join()
assert seen == [7] and os.getuid() == 0, seen
"""
    if os.uname().machine != "x86_64":
        pytest.skip("makes system calls by their x86-64 numbers")
    box.sh(python(box, script))


def test_files_of_another_user_are_his(box):
    box.sh(
        "mkdir -m 777 /d; setpriv --reuid 101 --regid 102 --clear-groups sh -ec '"
        "umask 027; touch /d/f; mkdir /d/d; ln -s f /d/l; mkfifo /d/p; echo x >/d/e; echo y >>/d/e; stat -c %u:%g /d/f'"
    )
    for name, mode in (("f", 0o100640), ("d", 0o040750), ("l", 0o120777), ("p", 0o010640), ("e", 0o100640)):
        assert box.image(f"/d/{name}")[:3] == (mode, 101, 102), name
    assert (box.root / "d/e").read_text() == "x\ny\n"


def test_another_user_may_not_give_files_away(box):
    result = box.sh("touch /a; setpriv --reuid 101 --regid 102 --clear-groups chown 101 /a", check=False)
    assert result.returncode == 1
    assert "not permitted" in result.stderr


def test_group_of_a_folder_is_inherited(box):
    box.sh("mkdir /d; chown 0:8 /d; chmod 2775 /d; touch /d/f; mkdir /d/s; ln -s x /d/l; touch /d/s/f")
    for name in ("f", "s", "l", "s/f"):
        assert box.image(f"/d/{name}")[1:3] == (0, 8), name
    assert box.image("/d/s")[0] & 0o2000


def test_set_user_id_program_gives_its_owner(box):
    out = box.sh(
        "cp /bin/id /suid; chown 8:0 /suid; chmod 4755 /suid; cp /bin/id /root-id; chmod 4755 /root-id; "
        "setpriv --reuid 101 --regid 102 --clear-groups sh -c '/suid -u; /root-id -u; id -u'"
    )
    assert out.split() == ["8", "0", "101"]


def test_chroot_inside_means_its_own_paths(box):
    out = box.sh(
        "mkdir /in /in/tmp; cp -a /bin /in/; cp -a /lib /in/ ; cp -a /lib64 /in/ 2>/dev/null || true;"
        "ln -s /x /in/link; touch /x;"
        "chroot /in /bin/sh -ec 'touch /x; chown 5:6 /link; cd /tmp; touch q; chown 7:8 q';"
        "stat -c %u:%g /x /in/x /in/tmp/q"
    )
    assert out.split() == ["0:0", "5:6", "7:8"]


def test_own_mounts_of_a_process_are_met(box):
    out = box.sh(
        "mkdir /m; touch /m/f; chown 3:3 /m/f; unshare -m sh -ec '"
        "chown 5:6 /m/f; sleep 0; stat -c %u:%g /m/f'; stat -c %u:%g /m/f"
    )
    assert out.split() == ["5:6", "5:6"]


def test_paths_through_proc_mean_the_caller(box):
    out = box.sh(
        "touch /a; exec 3</a; chown 5:6 /proc/self/fd/3; stat -c %u:%g /a; stat -L -c %u:%g /dev/fd/3 /proc/$$/fd/3"
    )
    assert out.split() == ["5:6"] * 3


def test_link_to_a_standard_descriptor_is_nobodys_file(box, as_user):
    """A log that is a link to /dev/stdout must not put a record on the file behind the supervisor's descriptors."""
    log = as_user.write("log")
    with log.open("w") as out:
        result = as_user(
            [
                sys.executable,
                SCRIPT,
                box.root,
                "sh",
                "-ec",
                "ln -s /dev/stderr /l; chown 5:6 /l; ln -s /proc/self/fd/2 /k; chown 5:6 /k",
            ],
            env={"SINGULARITY_ROOTLESS": "notify"},
            stdout=out,
            stderr=out,
        )
    assert result.returncode == 0, log.read_text()
    assert os.listxattr(log) == []


def test_files_of_the_host_are_not_marked(box):
    box.sh(
        "chown 5:6 /dev/null; stat -c %u:%g /dev/null; mkdir -p /dev/shm; touch /dev/shm/$$; chown 5:6 /dev/shm/$$; "
        "test $(stat -c %u:%g /dev/shm/$$) = 5:6; rm /dev/shm/$$"
    )
    assert not [name for name in os.listxattr("/dev/null") if name.startswith("user.")]


def test_errors_are_the_kernels(box):
    script = """
import errno, os, pathlib
def error(act, *words, **more):
    try:
        act(*words, **more)
    except OSError as problem:
        return errno.errorcode[problem.errno]
pathlib.Path("/f").touch()
os.symlink("loop", "/loop")
assert error(os.chown, "/none", 1, 1) == "ENOENT"
assert error(os.chown, "/f/x", 1, 1) == "ENOTDIR"
assert error(os.chown, "/loop", 1, 1) == "ELOOP"
assert error(os.chown, "", 1, 1) == "ENOENT"
assert error(os.chown, "/" + "x" * 5000, 1, 1) == "ENAMETOOLONG"
assert error(os.chown, "/proc/version", 1, 1) in (None, "EPERM")
assert error(os.mkdir, "/f") == "EEXIST"
assert error(os.open, "/f", os.O_CREAT | os.O_EXCL) == "EEXIST"
assert error(os.fchown, 77, 1, 1) == "EBADF"
"""
    box.sh(python(box, script))


def test_many_processes_at_once(box):
    box.sh(
        "mkdir /d; for n in 1 2 3 4 5 6 7 8; do (for m in 1 2 3 4 5 6 7 8 9 10; do "
        "touch /d/$n.$m; chown $n:$m /d/$n.$m; test $(stat -c %u:%g /d/$n.$m) = $n:$m || echo wrong; done) & done; wait"
    )
    for n in range(1, 9):
        for m in range(1, 11):
            assert box.image(f"/d/{n}.{m}")[1:3] == (n, m)


def test_killed_program_leaves_no_supervisor(box):
    child = box.user.popen(
        [sys.executable, SCRIPT, box.root, "sleep", "50"],
        env={"SINGULARITY_ROOTLESS": "notify"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    assert wait_for(lambda: supervisors(box), 30)
    child.kill()
    child.wait()
    assert wait_for(lambda: not supervisors(box))


def test_killed_supervisor_ends_the_work_with_an_error(box):
    with box.user.popen(
        [sys.executable, SCRIPT, box.root, "sh", "-c", "while chown 5:6 /tmp; do sleep 0.1; done; exit 7"],
        env={"SINGULARITY_ROOTLESS": "notify"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as child:
        assert wait_for(lambda: supervisors(box))
        time.sleep(0.3)
        for pid in supervisors(box):
            os.kill(pid, 9)
        assert child.wait(20) != 0


def supervisors(box):
    """Return the pids of supervisors of this test's box: other sessions have some, too."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            ours = os.fsencode(box.root) in (folder / "cmdline").read_bytes().split(b"\0")
            if ours and (folder / "comm").read_text() == "singularity-su\n":
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def wait_for(condition, seconds=10):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return False


def test_plain_pretending_succeeds_and_records_nothing(box):
    out = box.sh("touch /a; chown 5:6 /a; mknod /n c 1 3; stat -c %u:%g /a; sync", way="bpf")
    assert out == "0:0\n"
    assert box.image("/a")[1:3] == (0, 0)


def test_inside_an_emulation_that_one_is_used(as_user):
    """A kernel lets a process have one listener: inside of another emulation there cannot be a second one."""
    script = """
import os, sys
from pysingularity.runtime import emulate
from pysingularity.runtime.rootless import become_root
way = become_root("notify")
emulation = emulate.prepare(way)
emulation()
inner = become_root(environ={})
print(inner.name, repr(inner.emulation), become_root("bpf", environ={}).emulation)
for name in ("file", "device"):
    if name == "file":
        open(name, "w").close()
        inner.owners.set(name, 77, 88)
    else:
        inner.owners.mknod(name, 0o20640, os.makedev(1, 3))
        inner.owners.set(name, 0, 6)
    uid, gid, mode, rdev = inner.owners.get(name, os.lstat(name))
    print(uid, gid, oct(mode), rdev == os.makedev(1, 3))
emulation.finish()
"""
    result = as_user([sys.executable, "-c", script])
    assert result.stdout == "outer '' bpf\n77 88 0o100644 False\n0 6 0o20640 True\n", result.stderr


def test_inside_plain_pretending_there_is_no_more_than_that(as_user):
    script = """
from pysingularity.runtime import emulate
from pysingularity.runtime.rootless import become_root
emulation = emulate.prepare(become_root("bpf"))
emulation()
inner = become_root(environ={})
print(inner.name, inner.emulation)
"""
    assert as_user([sys.executable, "-c", script]).stdout == "single bpf\n"


def test_a_kernel_that_refuses_a_listener_leaves_pretending(as_user):
    """As inside a container that has a listener of its own, whatever for."""
    script = """
from pysingularity.linux import seccomp
from pysingularity.runtime.rootless import become_root
from pysingularity.runtime.emulate import prepare
import os
way = become_root("notify")
seccomp.install(seccomp.assemble([], seccomp.architectures()), listener=True)
inner = become_root(environ={})
print(inner.name, inner.emulation)
emulation = prepare(inner)
emulation()
open("file", "w").close()
os.chown("file", 5, 6)
print(os.stat("file").st_uid)
"""
    result = as_user([sys.executable, "-c", script])
    assert result.stdout == "single bpf\n0\n", result.stderr


def test_range_of_ids_only_lacks_devices(as_subuid_user, tree):
    root = as_subuid_user.tmp / "box"
    shutil.copytree(tree, root, symlinks=True)
    for path in (root, *root.rglob("*")):
        as_subuid_user.own(path)
    box = Box(as_subuid_user, root)
    box.sh("touch /a; chown 101:102 /a; mknod -m 600 /n c 1 3; chown 0:6 /n", way="subuid")
    assert box.image("/a")[1:3] == (101, 102)
    assert box.image("/n")[:4] == (0o020600, 0, 6, os.makedev(1, 3))


def test_each_way_gets_its_filter():
    real = Way(ROOT, uid=0, gid=0, real=True)
    assert emulate.prepare(real, throwaway=False) is None
    assert emulate.prepare(real) is not None
    assert emulate.apt_workaround(Way(SINGLE, emulation=BPF, uid=1, gid=1))
    assert not emulate.apt_workaround(Way(SINGLE, emulation=NOTIFY, uid=1, gid=1))
    assert not emulate.apt_workaround(Way(SUBUID, uid=1, gid=1))
