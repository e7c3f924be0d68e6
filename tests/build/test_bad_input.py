# SPDX-License-Identifier: Apache-2.0
"""Recipes and moments that go wrong: nothing stays behind, what was there before stays, the log is kept, status 255."""

from __future__ import annotations

import http.server
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest

from pysingularity.build import space
from traces import leftovers, nap, sleeping

pytestmark = pytest.mark.rootless

PREVIOUS = "previous image"


@pytest.fixture(params=["as_subuid_user", "as_plain_user"])
def user(request):
    return request.getfixturevalue(request.param)


def environ(user, **more: str) -> dict[str, str]:
    scratch = user.tmp / "scratch"
    scratch.mkdir(exist_ok=True)
    user.own(scratch)
    return {**user.environ, "SINGULARITY_TMPDIR": str(scratch), **more}


def failing(user, text: str, *words: str, timeout: float = 120, **options):
    """Build what must fail onto an image that is there; return what was said."""
    user.write("x.def", text)
    user.write("x.sif", PREVIOUS)
    command = ["singularity", "build", "--force", *words, "x.sif", "x.def"]
    result = user(command, env=environ(user), timeout=timeout, **options)
    assert result.returncode == 255, result.stderr
    assert (user.tmp / "x.sif").read_text() == PREVIOUS
    assert leftovers(user) == []
    return result.stderr


def log_of(said: str) -> str:
    line = next(line for line in said.splitlines() if "the whole log is kept in" in line)
    with open(line.rpartition(" ")[2]) as file:
        return file.read()


def stopped(user, started: subprocess.Popen, number: int = signal.SIGINT, wait: float = 60) -> None:
    started.send_signal(number)
    assert started.wait(wait) == 255
    deadline = time.monotonic() + 20
    while leftovers(user):
        assert time.monotonic() < deadline, leftovers(user)
        time.sleep(0.1)


def test_log_of_a_failed_build_is_kept_and_that_of_a_good_one_is_not(user, base):
    text = f"Bootstrap: localimage\nFrom: {base}\n%post\n  echo said early\n  echo said late >&2\n  exit 3\n"
    log = log_of(failing(user, text))
    assert "said early\n" in log and "said late\n" in log
    assert "==> %post\n" in log and "==> failed after" in log
    assert "%post ended with status 3" in log
    user.write("good.def", f"Bootstrap: localimage\nFrom: {base}\n%post\n  echo fine\n")
    done = user(["singularity", "build", "good.sif", "good.def"], env=environ(user))
    assert done.returncode == 0 and "log is kept" not in done.stderr
    assert len(list((user.tmp / "cache/cache/logs").iterdir())) == 1


def test_failed_event_names_the_log_once(as_user, base):
    as_user.write("x.def", f"Bootstrap: localimage\nFrom: {base}\n%post\n  echo told\n  exit 3\n")
    result = as_user(["singularity", "build", "--json", "x.sif", "x.def"], env=environ(as_user))
    assert result.returncode == 255
    found = [json.loads(line) for line in result.stdout.splitlines()]
    failed = [event for event in found if event["event"] == "failed"]
    assert len(failed) == 1
    assert found[-1] == failed[0]
    assert failed[0]["id"] == "section-failed" and failed[0]["line"] == 3
    assert "told" in Path(failed[0]["log"]).read_text()


def test_post_that_removes_everything_harms_nobody(user, base):
    """All that can be seen is removed: the host's devices, shared memory and the user's files do not notice."""
    precious = user.write("precious", "mine")
    shared = f"/dev/shm/{user.tmp.name}"
    user(["sh", "-c", f"echo mine > {shared}"], check=True)
    try:
        said = failing(user, f"Bootstrap: localimage\nFrom: {base}\n%post\n  rm -rf --no-preserve-root /\n  true\n")
        assert "%post ended with status" in said
        with open(shared) as file:
            assert file.read() == "mine\n"
    finally:
        os.unlink(shared)
    assert precious.read_text() == "mine"
    assert (base / "bin/sh").exists()
    assert os.path.exists("/dev/null") and os.path.exists("/dev/pts")


def test_post_that_removes_everything_and_says_nothing_makes_an_empty_image(user, base):
    user.write("x.def", f"Bootstrap: localimage\nFrom: {base}\n%post\n  rm -rf --no-preserve-root / || exit 0\n")
    result = user(["singularity", "build", "x.sif", "x.def"], env=environ(user))
    assert result.returncode == 0, result.stderr
    assert leftovers(user) == []


@pytest.mark.parametrize("where", ["/dev/null", "/sys/kernel/mm", "/dev/sda", "/proc/sys/kernel/panic", "/etc/hosts"])
def test_post_cannot_write_to_what_the_host_lends(as_user, base, where):
    """A write goes nowhere or into the container's own copy; the host's file is as before."""
    before = os.stat(where) if os.path.exists(where) else None
    text = (
        f"Bootstrap: localimage\nFrom: {base}\n%post\n  chmod 777 {where} || true\n  rm -f {where} || true\n"
        f"  echo junk > {where} || true\n  mv /bin/ls {where} || true\n"
    )
    as_user.write("x.def", text)
    result = as_user(["singularity", "build", "--sandbox", "box", "x.def"], env=environ(as_user))
    assert result.returncode == 0, result.stderr
    after = os.stat(where) if os.path.exists(where) else None
    assert (before and (before.st_mode, before.st_ino, before.st_size)) == (
        after and (after.st_mode, after.st_ino, after.st_size)
    )
    assert leftovers(as_user) == []


@pytest.mark.parametrize("swap", ["ln -s {secret}", "mkdir", "mkfifo", "rm -rf ;#"])
def test_what_post_puts_in_the_place_of_its_labels_is_not_followed(as_user, base, tiny, swap):
    secret = as_user.write("secret", "Password hidden\n")
    line = f'rm "$SINGULARITY_LABELS"; {swap.format(secret=secret)} "$SINGULARITY_LABELS"'
    if swap == "mkfifo":
        line = 'rm "$SINGULARITY_LABELS"; /bin/busybox mkfifo "$SINGULARITY_LABELS" || true'
    as_user.write("x.def", f"Bootstrap: localimage\nFrom: {base}\n%post\n  {line}\n")
    result = as_user(["singularity", "build", "--sandbox", "box", "x.def"], env=environ(as_user))
    assert result.returncode == 0, result.stderr
    assert "hidden" not in (as_user.tmp / "box/.singularity.d/labels.json").read_text()


def test_post_that_hangs_ends_with_control_c(user, base):
    user.write("x.def", f"Bootstrap: localimage\nFrom: {base}\n%post\n  trap '' INT TERM HUP\n  sleep {nap(user)}\n")
    user.write("x.sif", PREVIOUS)
    with open(user.tmp / "said", "wb") as said:
        command = ["singularity", "build", "--force", "x.sif", "x.def"]
        started = user.popen(command, env=environ(user), stdout=said, stderr=said)
    wait_for(lambda: sleeping(user), started)
    stopped(user, started)
    assert sleeping(user) == []
    assert (user.tmp / "x.sif").read_text() == PREVIOUS
    assert "sleep" in log_of((user.tmp / "said").read_text())


def test_post_that_forks_for_ever_is_stopped_whole(user, base):
    """Every process forks the next and ends: no list of them is right by the time it is read."""
    script = f"next() {{ sleep 0.05; next & }}\n  sleep {nap(user)} &\n  next\n  sleep 1000\n"
    user.write("x.def", f"Bootstrap: localimage\nFrom: {base}\n%post\n  {script}")
    started = user.popen(["singularity", "build", "x.sif", "x.def"], env=environ(user), stderr=subprocess.DEVNULL)
    wait_for(lambda: sleeping(user), started)
    time.sleep(0.5)
    stopped(user, started, signal.SIGTERM)
    assert sleeping(user) == []
    assert not (user.tmp / "x.sif").exists()


def test_post_that_forks_more_than_it_may_fails_alone(as_user, base, tool):
    """A limit of the user's holds inside, too; the build ends with an error, and so does what it has started."""
    listing = subprocess.run(["ps", "-L", "-u", str(as_user.uid), "-o", "lwp="], capture_output=True, text=True).stdout
    most = len(listing.split()) + 150
    script = f"while true; do sleep {nap(as_user)} & done"
    as_user.write("x.def", f"Bootstrap: localimage\nFrom: {base}\n%post\n  {script}\n")
    command = [tool("prlimit"), f"--nproc={most}", "singularity", "build", "x.sif", "x.def"]
    result = as_user(command, env=environ(as_user))
    assert result.returncode == 255
    assert "%post ended with status" in result.stderr
    assert leftovers(as_user) == [] and sleeping(as_user) == []


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("nosuch /opt/", "there is no file nosuch"),
        ("*.nosuch /opt/", "*.nosuch"),
        ("secret /opt/", "secret"),
    ],
)
def test_files_that_cannot_be_copied_are_named(as_user, base, lines, words):
    as_user.write("secret", "x", 0o000)
    if os.getuid() == 0:
        os.chown(as_user.tmp / "secret", 0, 0)
    said = failing(as_user, f"Bootstrap: localimage\nFrom: {base}\n%files\n  {lines}\n%post\n  true\n")
    assert "x.def:4" in said and words in said


def test_target_of_files_cannot_leave_the_image(user, base):
    """Neither by dots nor by a link that the base brings."""
    (base / "way").unlink(missing_ok=True)
    (base / "way").symlink_to(user.tmp)
    user.write("data", "x")
    text = f"Bootstrap: localimage\nFrom: {base}\n%files\n  data /../../../../escaped\n  data /way/inside\n"
    user.write("x.def", text)
    result = user(["singularity", "build", "--sandbox", "box", "x.def"], env=environ(user))
    assert not os.path.exists("/escaped") and not (user.tmp / "inside").exists()
    assert result.returncode in (0, 255), result.stderr
    if result.returncode == 0:
        assert (user.tmp / "box/escaped").exists()
    (base / "way").unlink()


def wait_for(what, started: subprocess.Popen, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline and started.poll() is None
        time.sleep(0.05)


@pytest.fixture
def stalling():
    """A server that sends a little of a file and then nothing more."""
    go_on = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "100000000")
            self.end_headers()
            self.wfile.write(b"\x1f\x8b" + bytes(1000))
            self.wfile.flush()
            go_on.wait(60)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/root.tar.gz"
    go_on.set()
    server.shutdown()
    server.server_close()
    thread.join()


PHASES = {
    "pre": "Bootstrap: localimage\nFrom: {base}\n%pre\n  sleep {nap}\n",
    "bootstrap": "Bootstrap: http\nFrom: {url}\n",
    "setup": "Bootstrap: localimage\nFrom: {base}\n%setup\n  sleep {nap}\n",
    "files": "Bootstrap: localimage\nFrom: {base}\n%files\n  many /opt/\n%post\n  true\n",
    "post": "Bootstrap: localimage\nFrom: {base}\n%post\n  sleep {nap}\n",
    "test": "Bootstrap: localimage\nFrom: {base}\n%test\n  sleep {nap}\n",
    "assemble": "Bootstrap: localimage\nFrom: {base}\n%files\n  noise /opt/\n%post\n  true\n",
}


@pytest.mark.parametrize("phase", PHASES)
def test_control_c_in_every_phase_leaves_nothing(user, base, stalling, phase):
    if phase == "files":
        for number in range(12_000):
            (user.write(f"many/{number}") if number == 0 else user.tmp / f"many/{number}").touch()
    if phase == "assemble":
        user.write("noise", os.urandom(48 << 20))
    user.write("x.def", PHASES[phase].format(base=base, url=stalling, nap=nap(user)))
    user.write("x.sif", PREVIOUS)
    command = ["singularity", "build", "--json", "--force", "--compress", "xz", "x.sif", "x.def"]
    started = user.popen(command, env=environ(user), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    for line in started.stdout:
        event = json.loads(line)
        if event["event"] == "start" and event["kind"] == phase:
            break
    else:
        raise AssertionError(f"{phase} was never begun")
    rest: list[str] = []
    drained = threading.Thread(target=lambda: rest.extend(started.stdout))
    drained.start()
    if "{nap}" in PHASES[phase]:
        wait_for(lambda: sleeping(user), started)
    elif phase != "files":
        time.sleep(0.5)
    stopped(user, started)
    drained.join()
    started.stdout.close()
    last = [json.loads(line) for line in rest]
    assert last[-1]["event"] == "failed" and last[-1]["id"] == "stopped"
    assert last[-2]["event"] == "end" and last[-2]["status"] == "failed"
    assert sleeping(user) == []
    assert (user.tmp / "x.sif").read_text() == PREVIOUS


@pytest.mark.parametrize("force", [True, False])
def test_two_builds_to_one_target_give_one_whole_image(as_user, base, force):
    as_user.write("one.def", f"Bootstrap: localimage\nFrom: {base}\n%post\n  sleep 1\n%labels\n  Which one\n")
    as_user.write("two.def", f"Bootstrap: localimage\nFrom: {base}\n%post\n  sleep 1\n%labels\n  Which two\n")
    words = ["--force"] if force else []
    started = [
        as_user.popen(
            ["singularity", "build", *words, "x.sif", name], env=environ(as_user), stderr=subprocess.PIPE, text=True
        )
        for name in ("one.def", "two.def")
    ]
    said = [one.communicate(timeout=120)[1] for one in started]
    codes = sorted(one.returncode for one in started)
    assert codes == ([0, 0] if force else [0, 255]), said
    if not force:
        assert any("exists already" in text for text in said)
    inspected = as_user(["singularity", "inspect", "x.sif"], check=True).stdout
    assert "Which: one" in inspected or "Which: two" in inspected
    assert as_user(["singularity", "exec", "x.sif", "ls"]).returncode == 0
    assert leftovers(as_user) == []


def test_folder_of_a_build_that_begins_is_never_taken_for_abandoned(tmp_path):
    """Another build looks at the same moment; what it took for left behind it would remove."""
    parent = str(tmp_path)
    looking = os.fork()
    if looking == 0:
        found: list[str] = []
        end = time.monotonic() + 1.5
        while not found and time.monotonic() < end:
            found = space.abandoned(parent)
        os._exit(bool(found))
    ended, status = os.waitpid(looking, os.WNOHANG)
    while not ended:
        place = space.Workplace(parent)
        shutil.rmtree(place.path)
        place.close()
        ended, status = os.waitpid(looking, os.WNOHANG)
    assert os.waitstatus_to_exitcode(status) == 0
    assert list(tmp_path.iterdir()) == []


def test_what_will_not_fit_is_refused_before_the_work(root_only, as_user, base):
    small = as_user.tmp / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=80m,mode=1777", "none", small], check=True)
    try:
        environment = {"SINGULARITY_TMPDIR": str(small)}
        as_user.write("big", os.urandom(90 << 20))
        as_user.write("files.def", f"Bootstrap: localimage\nFrom: {base}\n%files\n  big /opt/\n%post\n  true\n")
        as_user.write("image.def", "Bootstrap: localimage\nFrom: big.sif\n%post\n  true\n")
        with open(as_user.write("big.sif"), "wb") as file:
            file.truncate(400 << 20)
        as_user(["singularity", "build", "--force", "big.sif", base], check=True)
        with open(as_user.tmp / "big.sif", "ab") as file:
            file.truncate(400 << 20)
        for name, what in (("files.def", "copying what %files names"), ("image.def", "unpacking")):
            said = as_user(["singularity", "build", "x.sif", name], env=environment).stderr
            assert f"{what}" in said and "MiB are free" in said and "SINGULARITY_TMPDIR" in said
            assert "which lives in memory" in said
            assert list(small.iterdir()) == []
        said = as_user(["singularity", "build", "--sandbox", small / "box", "big.sif"], env=environment).stderr
        assert "unpacking" in said and "MiB are free" in said
        assert list(small.iterdir()) == []
        plain = {"SINGULARITY_TMPDIR": "", "TMPDIR": "", "SLURM_TMPDIR": str(small)}
        as_user.write("empty.def", "Bootstrap: scratch\n%post\n  true\n")
        said = as_user(["singularity", "build", "y.sif", "empty.def"], env=plain).stderr
        assert str(small) in said and "which lives in memory" in said
    finally:
        subprocess.run(["umount", small], check=True)
