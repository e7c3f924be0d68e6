# SPDX-License-Identifier: Apache-2.0
"""What strangers' recipes can see and do: hostile recipes in a running hub, as three kinds of users."""

from __future__ import annotations

import os
import pwd
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import pysingularity
from users import User, has_subids

from .conftest import make_data, started
from .world import RECIPE, Repository, Server, wait_for

pytestmark = pytest.mark.rootless
LIMITS = """
time_limit = 20
memory_limit = 402653184
process_limit = 120
disk_limit = 104857600
log_limit = 200000
attempts = 1
"""

REACH = """
import socket, sys
for address in (("127.0.0.1", {port}), ("169.254.169.254", 80), ("10.0.0.1", 80)):
    try:
        socket.create_connection(address, 2)
    except OSError:
        continue
    sys.exit(f"reached {{address}}")
"""
CALLS = """
import ctypes, errno, os, socket, sys
libc = ctypes.CDLL(None, use_errno=True)
names = {"x86_64": {"keyctl": 250, "bpf": 321, "perf_event_open": 298, "userfaultfd": 323, "io_uring_setup": 425}}
for name, number in names.get(os.uname().machine, {}).items():
    if libc.syscall(number, 0, 0, 0, 0, 0) != -1 or ctypes.get_errno() != errno.ENOSYS:
        sys.exit(name)
for family in (38, 40, 30, 21):
    try:
        socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        if error.errno in (errno.EAFNOSUPPORT, errno.ESOCKTNOSUPPORT):
            continue
    sys.exit(f"family {family}")
with open("/proc/self/status") as file:
    text = file.read()
assert "Seccomp:\\t2" in text and "NoNewPrivs:\\t1" in text, text
print("all refused")
"""


@pytest.fixture(scope="module", params=["subuid", "plain", pytest.param("root", marks=pytest.mark.long)])
def hub_of(request: pytest.FixtureRequest, user_space: Path) -> Iterator[Server]:
    """A running hub of a kind of user, with small limits."""
    root = os.geteuid() == 0
    if request.param == "root" and not root:
        pytest.skip("needs to be started as root")
    name = {"subuid": "pysing", "plain": "pysing-plain", "root": "root"}[request.param]
    try:
        account = pwd.getpwnam(name) if root else pwd.getpwuid(os.getuid())
    except KeyError:
        pytest.skip(f"no user {name} on this machine (scripts/test makes it when started as root)")
    if request.param == "subuid" and not has_subids(account.pw_name):
        pytest.skip(f"user {account.pw_name} has no range in /etc/subuid")
    if request.param == "plain" and has_subids(account.pw_name):
        pytest.skip(f"user {account.pw_name} has a range in /etc/subuid")
    user = User(account, user_space)
    data = make_data(user.tmp, LIMITS)
    server = started(data)
    server.stop()
    for path in [data, *data.rglob("*")]:
        user.own(path)
    server.user = user
    server.environ = {"SINGULARITY_HUB_NOTICE": "the environment's secret"}
    server.start()
    yield server
    server.stop()


@pytest.fixture
def build(hub_of: Server) -> Callable[..., tuple[dict, str]]:
    """Build a recipe whose %post is a script; returns the build and its log."""

    def call(script: str, *, seconds: float = 60, files: dict[str, str] | None = None) -> tuple[dict, str]:
        assert hub_of.user is not None
        number = time.monotonic_ns()
        repository = Repository(hub_of.user.tmp / f"r{number}", hub_of.user)
        body = "".join(f"    {line}\n" for line in script.strip().splitlines())
        repository.commit({"Singularity": RECIPE.replace("    echo hello from post\n", body), **(files or {})})
        made = hub_of.connect(repository, f"lab/c{number}")
        ended = hub_of.ended(made["id"], seconds)
        return ended, hub_of.log(made["id"])

    return call


def leftovers(mark: str) -> list[str]:
    """Return the command lines of processes that a build left behind."""
    found = subprocess.run(["pgrep", "--full", "--list-full", "--", mark], capture_output=True, text=True, check=False)
    return [line for line in found.stdout.splitlines() if "pgrep" not in line and "pytest" not in line]


def test_nothing_of_the_host_is_seen(hub_of: Server, build: Callable[..., tuple[dict, str]]):
    assert hub_of.user is not None
    secret = hub_of.user.write("private/secret", "hush", mode=0o644)
    # The way to the hub's own programs is there, empty but for them: they may be installed below somebody's home.
    tops = ("/root", "/home", "/mnt", "/srv", "/media")
    places = (sys.prefix, sys.base_prefix, os.path.dirname(pysingularity.__file__))
    ways = {path[len(top) + 1 :].split("/")[0] for path in places for top in tops if path.startswith(top + "/")}
    known = " ".join(f"-e '{way}'" for way in ways) or ""
    script = f"""
    fail() {{ echo "SEEN: $1"; exit 1; }}
    ls {hub_of.data} 2>/dev/null && fail data
    cat {hub_of.data}/hub.sqlite 2>/dev/null && fail database
    cat {secret} 2>/dev/null && fail "another file of the account"
    ls {hub_of.user.home} 2>/dev/null | grep . && fail home
    ls -A /root /home /tmp/.[a-z]* /old /mnt /srv /media /boot 2>/dev/null | grep -v -x {known} -e '' -e '.*:' \
        && fail folders
    cat /etc/shadow /etc/subuid /etc/hostname 2>/dev/null | grep -v build && fail shadow
    env | grep -i -e hub_ -e secret -e token && fail environment
    cat /proc/*/environ 2>/dev/null | tr '\\0' '\\n' | grep -e SINGULARITY_HUB -e environment.s && fail environ
    cat /proc/[0-9]*/cmdline | tr '\\0' ' ' | grep -e 'hub[.]command' -e 'hub[.]serve' && fail "processes of the hub"
    touch /source/x 2>/dev/null && fail "writable clone"
    touch /usr/x 2>/dev/null && fail "writable system"
    mount -o remount,rw /usr 2>/dev/null && touch /usr/x && fail "remounted system"
    python3 /source/probe.py || fail network
    for url in http://127.0.0.1:{hub_of.port}/healthz http://169.254.169.254/latest/ http://localhost:{hub_of.port}/ \\
        http://[::1]:{hub_of.port}/ http://[::ffff:127.0.0.1]:{hub_of.port}/ http://0.0.0.0:{hub_of.port}/ \\
        http://2130706433:{hub_of.port}/ http://metadata.google.internal/ ; do
        curl -sf -g -m 5 --noproxy '' -x "$http_proxy" "$url" && fail "$url by the proxy"
    done
    curl -s -m 5 -p -x "$http_proxy" http://127.0.0.1:{hub_of.port}/healthz | grep status && fail tunnel
    echo hostname $(cat /proc/sys/kernel/hostname)
    echo "ended well"
    """
    ended, log = build(script, files={"probe.py": REACH.format(port=hub_of.port)})
    assert ended["state"] == "done", log
    assert "hostname build" in log
    assert "SEEN" not in log


def test_calls_and_sockets_that_no_build_needs_are_not_there(build: Callable[..., tuple[dict, str]]):
    ended, log = build("python3 /source/probe.py", files={"probe.py": CALLS})
    assert ended["state"] == "done", log
    assert "all refused" in log


def test_fork_bomb_ends_with_its_build_and_the_hub_answers(hub_of: Server, build: Callable[..., tuple[dict, str]]):
    ended, log = build("bomb() { bomb | bomb & }; bomb; sleep 3000.77; wait", seconds=90)
    assert ended["state"] in ("failed", "timed_out"), log
    assert hub_of.get("/healthz").json["status"] == "ok"
    wait_for(lambda: not leftovers("sleep 3000.77"), what="the end of all its processes")


def test_process_that_hides_from_its_build_ends_with_it(build: Callable[..., tuple[dict, str]]):
    ended, log = build("setsid sleep 3000.88 >/dev/null 2>&1 </dev/null & echo left")
    assert ended["state"] == "done", log
    wait_for(lambda: not leftovers("sleep 3000.88"), what="its end")


def test_endless_output_fills_the_log_to_its_limit(hub_of: Server, build: Callable[..., tuple[dict, str]]):
    ended, log = build("yes something", seconds=90)
    assert (ended["state"], ended["error_id"]) == ("timed_out", "time-limit")
    assert "the log is full" in log
    assert len(log) < 201_000


@pytest.mark.parametrize("closed", [False, True])
def test_disk_is_not_filled_also_in_folders_that_are_closed(build: Callable[..., tuple[dict, str]], closed: bool):
    script = "mkdir d; cd d; "
    script += "chmod 0 . ; " if closed else ""
    script = f"cd /tmp; {script} for i in $(seq 1000); do head -c 4000000 /dev/zero > f$i || exit 3; sleep 0.05; done"
    ended, log = build(script, seconds=90)
    assert (ended["state"], ended["error_id"]) == ("failed", "disk-limit"), log


def test_one_file_does_not_grow_beyond_the_limit(build: Callable[..., tuple[dict, str]]):
    ended, log = build("head -c 300000000 /dev/zero > /tmp/x; echo end $?", seconds=90)
    assert ended["state"] in ("failed", "done"), log
    assert "end 0" not in log


@pytest.mark.parametrize("count", [1, 8])
def test_memory_is_not_filled_by_one_process_or_many(
    hub_of: Server, build: Callable[..., tuple[dict, str]], count: int
):
    size = 1 << 30 if count == 1 else 90 << 20
    program = f"x = bytearray(b'1' * {size}); import time; time.sleep(60)"
    ended, log = build(f'for i in $(seq {count}); do python3 -c "{program}" & done; wait %1; exit 4', seconds=90)
    assert ended["state"] == "failed", log
    assert ended["error_id"] == "memory-limit" or "MemoryError" in log


def test_recipe_with_an_odd_name_and_folder_is_built(hub_of: Server):
    assert hub_of.user is not None
    repository = Repository(hub_of.user.tmp / f"odd{time.monotonic_ns()}", hub_of.user)
    repository.commit({"Singularity Recipes/ü $(touch x);'/--json/Singularity.odd-1": RECIPE})
    ended = hub_of.ended(hub_of.connect(repository, f"lab/odd{time.monotonic_ns()}")["id"], 60)
    assert ended["state"] == "done", hub_of.log(ended["id"])


def test_symlinks_of_a_repository_lead_nowhere_outside(hub_of: Server, build: Callable[..., tuple[dict, str]]):
    assert hub_of.user is not None
    number = time.monotonic_ns()
    repository = Repository(hub_of.user.tmp / f"link{number}", hub_of.user)
    repository.write({"env/Singularity": RECIPE + "\n%files\n    way /copied\n"})
    os.symlink(hub_of.data / "secret", repository.path / "env" / "way")
    repository.commit()
    ended = hub_of.ended(hub_of.connect(repository, f"lab/link{number}")["id"], 60)
    assert ended["state"] == "failed", hub_of.log(ended["id"])


def test_build_that_says_skip_is_skipped(build: Callable[..., tuple[dict, str]]):
    ended, _ = build("exit 183")
    assert ended["state"] == "skipped"


def test_nothing_is_left_in_the_working_folder(hub_of: Server, build: Callable[..., tuple[dict, str]]):
    build("mkdir -p /tmp/a/b; chmod 0 /tmp/a; touch /scratch/x; chown 5:5 /scratch/x || true")
    wait_for(lambda: not list((hub_of.data / "work").iterdir()), what="an empty folder")
