# SPDX-License-Identifier: Apache-2.0
"""Steps that run over a mounted snapshot: they find and leave what they would in an unpacked one, and nothing stays."""

from __future__ import annotations

import json
import os
import pwd
import signal
import subprocess
import time
from pathlib import Path

import pytest

from containers import tree_of
from traces import leftovers, nap, sleeping
from users import User

pytestmark = pytest.mark.rootless

#: Tells what the root is, and what it says then.
TELL, OVERLAID = "cat /proc/self/mounts", "overlay / overlay "


@pytest.fixture
def real_root(root_only, user_space):
    """Root of this machine, who needs no namespace for ids."""
    found = User(pwd.getpwnam("root"), user_space)
    found.environ["SINGULARITY_TMPDIR"] = str(found.tmp)
    return found


@pytest.fixture
def user(as_subuid_user, fuse):
    """A user whose kept steps are mounted."""
    as_subuid_user.environ["SINGULARITY_TMPDIR"] = str(as_subuid_user.tmp / "scratch")
    (as_subuid_user.tmp / "scratch").mkdir()
    as_subuid_user.own(as_subuid_user.tmp / "scratch")
    return as_subuid_user


def recipe(base: Path, *parts: str) -> str:
    steps = "".join(f"    #step {number}\n    {part}\n" for number, part in enumerate(parts))
    return f"Bootstrap: localimage\nFrom: {base}\n%post\n{steps}"


def build(user, image: str, text: str, *words: str, **environ: str) -> tuple[list[str], str]:
    """Build; return the statuses of the steps of %post, and what programs said."""
    user.write("x.def", text)
    result = user(["singularity", "build", "--json", "-F", *words, image, "x.def"], env=environ or None, timeout=900)
    assert result.returncode == 0, result.stderr + result.stdout[-2000:]
    found = [json.loads(line) for line in result.stdout.splitlines()]
    kinds = {event["step"]: event["kind"] for event in found if event["event"] == "start"}
    said = "".join(event["text"] + "\n" for event in found if event["event"] in ("log", "message"))
    return [one["status"] for one in found if one["event"] == "end" and kinds[one["step"]] == "post"], said


MAKE = """\
mkdir -p /opt/keep /opt/gone/in /opt/again /opt/file /opt/deep/a/b; cd /opt
    echo 1 > keep/one; ln keep/one keep/two; ln keep/one three; echo 2 > keep/alone; ln -s alone keep/link
    echo x > gone/in/x; echo x > again/old; echo x > file/x; echo x > folder; echo x > deep/a/b/x; echo x > deep/a/y
    mknod dev c 1 3; mknod blk b 7 1; chown 5:6 dev; mknod pipe p; chown 7:8 pipe
    chown -h 9:10 keep/link; chown 11:12 keep; chmod 2775 keep; chmod 4711 keep/alone; chmod 000 deep/a/y
    echo far > far; chown 65533:65534 far; dd if=/dev/urandom of=big bs=1000 count=300"""
CHANGE = """\
cd /opt; cat three; echo more >> three; cat keep/two; chmod 640 keep/one
    rm -r gone again file folder; mkdir again folder; echo new > again/new; echo f > file; echo x > folder/x
    mv keep/alone keep/renamed; chown 13 keep/renamed; ln keep/renamed linked; rm keep/link; ln -s x keep/link
    chmod 600 dev; mv blk blk2; chown 14 pipe; mv deep shallow; echo late >> big; chown 15:16 far
    touch made; mkdir only; echo 1 > only/x"""
AFTER = "cd /opt; rm made linked; rm -r again only; mkdir again; touch again/third; rm three; mv keep/two two; ls -R"


def test_real_root_gets_the_same_over_a_snapshot_and_leaves_no_mount(real_root, base):
    text = recipe(base, MAKE, "echo first", CHANGE, AFTER)
    build(real_root, "kept.sif", text)
    found, said = build(real_root, "over.sif", text.replace("echo first", TELL))
    assert found == ["cached", *["done"] * 3] and OVERLAID in said
    plain, over = tree_of(real_root, "kept.sif"), tree_of(real_root, "over.sif")
    assert over.pop("opt/big")[6][:300_000] == plain.pop("opt/big")[6][:300_000]
    assert over == plain and over["opt/blk2"][4]
    assert str(real_root.tmp) not in Path("/proc/self/mountinfo").read_text()


def test_what_a_step_finds_and_leaves_is_the_same(user, base):
    """Hard links, devices, replaced folders, owners, whiteouts of things that were only just made."""
    text = recipe(base, MAKE, "echo first", CHANGE, AFTER, "touch /opt/last")
    assert build(user, "plain.sif", text, "--no-cache")[0] == ["done"] * 5
    build(user, "kept.sif", text)
    text = text.replace("echo first", TELL)
    found, said = build(user, "over.sif", text)
    assert found == ["cached", *["done"] * 4] and OVERLAID in said
    plain = tree_of(user, "plain.sif")
    plain["opt/big"] = tree_of(user, "kept.sif")["opt/big"]
    assert tree_of(user, "kept.sif") == plain
    over = tree_of(user, "over.sif")
    assert over["opt/two"][6] == b"1\nmore\n" and over["opt/two"][5] == over["opt/keep/one"][5]
    assert over == plain
    # What was kept over a snapshot is a snapshot like any other, from every step on.
    for number in (1, 2, 3, 4):
        lines = text.splitlines()
        lines.insert(lines.index(f"    #step {number}") + 1, f"    : {number}")
        found, _ = build(user, "again.sif", "\n".join(lines) + "\n")
        assert found == ["cached"] * number + ["done"] * (5 - number)
        assert tree_of(user, "again.sif") == plain


def test_other_ways_to_be_root_unpack_and_get_the_same(user, base):
    text = recipe(base, MAKE, "echo first", CHANGE, AFTER)
    build(user, "kept.sif", text)
    build(user, "over.sif", text.replace("echo first", "echo second"))
    found, said = build(user, "notify.sif", text.replace("echo first", TELL), SINGULARITY_ROOTLESS="notify")
    assert found[0] == "cached" and OVERLAID not in said
    assert tree_of(user, "notify.sif") == tree_of(user, "over.sif")


PACKAGES = """\
export DEBIAN_FRONTEND=noninteractive
    apt-get update -q; apt-get install -qy --no-install-recommends python3-pip libcap2-bin iputils-ping git attr
    cp /bin/true /opt/cap; setcap cap_net_raw+ep /opt/cap; setfattr -n user.note -v hello /opt/cap
    useradd alice; useradd -u 65000 far; echo x > /opt/far; chown far /opt/far
    pip install -q --break-system-packages --no-cache-dir idna==3.4"""
MORE = """\
export DEBIAN_FRONTEND=noninteractive
    apt-get install -qy --no-install-recommends sudo man-db; apt-get purge -qy iputils-ping
    pip install -q --break-system-packages --no-cache-dir -U --no-compile idna
    getcap /opt/cap | grep cap_net_raw; cp -a /opt/cap /opt/cap2; echo >> /opt/cap; getfattr -n user.note /opt/cap
    chown -R alice /usr/share/doc/git; rm -r /usr/share/perl5/Git; mkdir /usr/share/perl5/Git
    su alice -c id; sudo -u far id; chmod -R g+w /usr/lib/git-core"""


@pytest.mark.network
@pytest.mark.long
def test_packages_are_installed_and_removed_over_a_snapshot_as_in_a_plain_root(user):
    """apt, dpkg and pip of a real Debian; the other way unpacks the same snapshot and records owners."""
    user.write("base.def", "Bootstrap: debootstrap\nInclude: ca-certificates\n")
    user(["singularity", "build", "base.sif", "base.def"], timeout=900, check=True)
    base = user.tmp / "base.sif"
    build(user, "first.sif", recipe(base, PACKAGES))
    found, said = build(user, "over.sif", recipe(base, PACKAGES, f"{TELL}; {MORE}"))
    assert found == ["cached", "done"] and OVERLAID in said
    found, said = build(user, "notify.sif", recipe(base, PACKAGES, f": ; {MORE}"), SINGULARITY_ROOTLESS="notify")
    assert found == ["cached", "done"]
    over, notify = tree_of(user, "over.sif"), tree_of(user, "notify.sif")
    noise = (".pyc", "var/log/", "var/cache/", "ldconfig")
    different = {name for name in over.keys() | notify.keys() if over.get(name) != notify.get(name)}
    assert {name for name in different if not any(word in name for word in noise)} == set()
    assert over["opt/cap2"][7].keys() == {b"security.capability", b"user.note"}


def test_sandbox_is_unpacked(user, base):
    build(user, "kept.sif", recipe(base, "echo 1 > /opt/one", "echo 2"))
    found, said = build(user, "box", recipe(base, "echo 1 > /opt/one", TELL), "--sandbox")
    assert found == ["cached", "done"] and OVERLAID not in said
    assert (user.tmp / "box/opt/one").read_text() == "1\n"


def test_a_kept_step_takes_no_more_room_than_what_it_changed(user, base):
    text = recipe(base, "dd if=/dev/urandom of=/opt/big bs=1M count=4", "echo 2 > /opt/small", "rm /opt/big", "ls")
    build(user, "x.sif", text)
    sizes = sorted(path.stat().st_size for path in (user.tmp / "cache/cache/image").glob("step-*.sif"))
    assert len(sizes) == 4 and sizes[-1] > 4 << 20 and sum(sizes[:-1]) < 100_000
    assert (user.tmp / "x.sif").stat().st_size < sizes[-1] - (3 << 20)


def test_small_files_that_go_leave_no_room_behind(user, base):
    """They share blocks with others that stay; an image without kept steps would not have them either."""
    make = (
        "mkdir /opt/many; cd /opt/many; n=0; while test $n -lt 2000; do"
        " dd if=/dev/urandom of=$n bs=1500 count=1 2> /dev/null; n=$((n + 1)); done"
    )
    text = recipe(base, make, "cd /opt/many; rm *[0-8]", "ls /opt/many")
    build(user, "plain.sif", text, "--no-cache")
    build(user, "kept.sif", text)
    plain, kept = ((user.tmp / name).stat().st_size for name in ("plain.sif", "kept.sif"))
    assert abs(kept - plain) < 128 << 10
    assert sum(name.startswith("opt/many/") for name in tree_of(user, "kept.sif")) == 200


def test_two_caches_give_the_same_bytes_for_one_date(user, base):
    text = recipe(base, "echo 1 > /opt/one", "echo 2 > /opt/two; rm /opt/one", "mkdir /opt/three")
    images = []
    for name in ("x", "y"):
        environ = {"SINGULARITY_CACHEDIR": str(user.tmp / f"cache-{name}"), "SOURCE_DATE_EPOCH": "1700000000"}
        build(user, "x.sif", text, **environ)
        images.append((user.tmp / "x.sif").read_bytes())
        time.sleep(1.1)
    assert images[0] == images[1]


def test_step_whose_files_are_not_all_there_runs_again(user, base):
    text = recipe(base, "echo 1 > /opt/log", "echo 2 >> /opt/log", "echo 3 >> /opt/log")
    build(user, "x.sif", text)
    pieces = sorted((user.tmp / "cache/cache/image").glob("step-*.sif"), key=lambda path: path.stat().st_mtime_ns)
    pieces[0].unlink()
    (user.tmp / "x.sif").unlink()
    assert build(user, "x.sif", text)[0] == ["done"] * 3
    assert tree_of(user, "x.sif")["opt/log"][6] == b"1\n2\n3\n"
    assert build(user, "x.sif", text.replace("echo 3", "echo 4"))[0] == ["cached", "cached", "done"]


def test_rename_of_a_kept_folder_that_fails_is_tried_again_unpacked(user, perl_base):
    """mv copies by itself where rename(2) is refused; what does not gets a plain folder."""
    rename = """perl -e 'rename("/opt/a", "/opt/b") or die "rename: $!\\n"'"""
    first = "mkdir /opt/a; echo x > /opt/a/x"
    build(user, "x.sif", recipe(perl_base, first, "echo 1"))
    found, said = build(user, "x.sif", recipe(perl_base, first, f"{TELL}; {rename}; echo y > /opt/b/y"))
    assert found == ["cached", "done"]
    assert OVERLAID in said and "cross-device link" in said and "begins anew" in said
    tree = tree_of(user, "x.sif")
    assert "opt/b/x" in tree and "opt/b/y" in tree and "opt/a" not in tree


def children_named(pid: int, name: str) -> list[int]:
    listing = subprocess.run(["ps", "-eo", "pid=,ppid=,comm="], capture_output=True, text=True).stdout
    words = [line.split(None, 2) for line in listing.splitlines()]
    return [int(one) for one, parent, comm in words if int(parent) == pid and comm.startswith(name)]


def wait_for(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def running(user, base):
    """A build whose last step sleeps over a mounted snapshot; its process, and what it says."""
    build(user, "x.sif", recipe(base, "echo 1 > /opt/one", "ls /opt"))
    user.write("x.def", recipe(base, "echo 1 > /opt/one", f"sleep {nap(user)} || true; cat /opt/one"))
    with open(user.tmp / "said", "wb") as said:
        started = user.popen(["singularity", "build", "-F", "x.sif", "x.def"], stdout=said, stderr=said)
    wait_for(lambda: sleeping(user) or started.poll() is not None)
    yield started
    if started.poll() is None:
        started.kill()
        started.wait()


def ends(user) -> bool:
    return leftovers(user) == [] and sleeping(user) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_leaves_neither_mounts_nor_servers(user, running, number):
    before = (user.tmp / "x.sif").read_bytes()
    assert children_named(running.pid, "singularity-fs")
    running.send_signal(number)
    assert running.wait(timeout=30) != 0
    wait_for(lambda: ends(user))
    assert str(user.tmp) not in Path("/proc/self/mountinfo").read_text()
    assert (user.tmp / "x.sif").read_bytes() == before


def test_killed_worker_leaves_neither_mounts_nor_servers(user, running):
    workers = [
        pid for pid in children_named(running.pid, "") if pid not in children_named(running.pid, "singularity-fs")
    ]
    for pid in workers:
        os.kill(pid, signal.SIGKILL)
    assert running.wait(timeout=30) == 255
    wait_for(lambda: ends(user))


def test_killed_server_ends_the_build_with_its_reason(user, running):
    for pid in children_named(running.pid, "singularity-fs"):
        os.kill(pid, signal.SIGKILL)
    for line in sleeping(user):
        os.kill(int(line.split()[0]), signal.SIGKILL)
    assert running.wait(timeout=30) == 255
    assert "the process that reads the kept step has ended" in (user.tmp / "said").read_text()
    wait_for(lambda: ends(user))
