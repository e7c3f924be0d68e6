# SPDX-License-Identifier: Apache-2.0
"""Instances: started, listed, joined, logged, measured and stopped; nothing is left when one has ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time

import pytest

pytestmark = pytest.mark.rootless


@pytest.fixture
def configured(as_user):
    """Keep the entries of this test's instances to itself, and stop them all at the end."""
    as_user.environ["SINGULARITY_CONFIGDIR"] = str(as_user.tmp / "config")
    yield as_user
    as_user(["singularity", "-q", "instance", "stop", "--all", "--force"])


@pytest.fixture
def instance(sing, configured):
    """Run `singularity instance ...`."""
    return lambda *words, **options: sing("instance", *words, **options)


def listed(instance, *words):
    return json.loads(instance("list", "--json", *words).stdout)["instances"]


def until(wish, seconds=10):
    deadline = time.monotonic() + seconds
    while not wish():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.02)


@pytest.fixture(params=["box", "image"])
def any_image(request):
    return request.getfixturevalue(request.param)


def test_instance_lives_until_it_is_stopped(instance, sing, any_image):
    assert instance("start", any_image, "web").returncode == 0
    (found,) = listed(instance)
    assert (found["instance"], found["img"]) == ("web", str(any_image))
    assert os.path.exists(f"/proc/{found['pid']}")
    assert sing("exec", "instance://web", "sh", "-c", "exit 5").returncode == 5
    assert instance("stop", "web").returncode == 0
    assert listed(instance) == []
    until(lambda: not os.path.exists(f"/proc/{found['pid']}/root"))


def test_name_is_taken_only_as_long_as_the_instance_lives(instance, box):
    assert instance("start", box, "web").returncode == 0
    again = instance("start", box, "web")
    assert again.returncode == 255
    assert "already exists" in again.stderr
    instance("stop", "web")
    assert instance("start", box, "web").returncode == 0


def test_joined_processes_see_the_instances_processes_and_files(instance, sing, box):
    instance("start", "--writable-tmpfs", box, "web")
    sing("exec", "instance://web", "sh", "-c", "echo inside > /opt-note")
    assert sing("exec", "instance://web", "cat", "/opt-note").stdout == "inside\n"
    assert sing("exec", "instance://web", "sh", "-c", "echo $$").stdout != "1\n"
    spaces = {sing("exec", "instance://web", "readlink", "/proc/self/ns/pid").stdout for _ in range(2)}
    assert len(spaces) == 1
    assert spaces != {os.readlink("/proc/self/ns/pid") + "\n"}


def test_programs_know_the_instance_they_are_in(instance, sing, box):
    (box / ".singularity.d/startscript").write_text("#!/bin/sh\necho in $SINGULARITY_INSTANCE\n")
    instance("start", box, "web")
    until(lambda: instance("logs", "web").stdout == "in web\n")
    words = ["sh", "-c", "echo $SINGULARITY_INSTANCE $APPTAINER_INSTANCE"]
    assert sing("exec", "instance://web", *words).stdout == "web web\n"
    assert sing("exec", box, *words).stdout == "\n"


def test_logs_are_followed_until_the_instance_ends(configured, instance, box):
    script = "#!/bin/sh\nfor n in 1 2 3; do echo $n; sleep 0.3; done; exit 3\n"
    (box / ".singularity.d/startscript").write_text(script)
    instance("start", box, "web")
    assert instance("logs", "--follow", "web", timeout=20).stdout == "1\n2\n3\n"
    until(lambda: listed(instance) == [])


def test_signals_and_status_pass_through_a_join(configured, instance, box):
    instance("start", box, "web")
    script = 'trap "exit 42" TERM; echo ready; while :; do sleep 0.05; done'
    child = configured.popen(["singularity", "exec", "instance://web", "sh", "-c", script], stdout=subprocess.PIPE)
    assert child.stdout.readline() == b"ready\n"
    child.send_signal(signal.SIGTERM)
    assert child.wait(10) == 42
    child.stdout.close()


def test_kill_of_process_one_removes_the_entry(instance, box):
    instance("start", box, "web")
    (found,) = listed(instance)
    os.kill(found["pid"], signal.SIGKILL)
    until(lambda: listed(instance) == [])


def test_starter_whose_terminal_goes_away_leaves_the_instance_alone(configured, instance, box):
    starter = configured.popen(["singularity", "instance", "start", box, "web"], start_new_session=True)
    assert starter.wait(20) == 0
    try:
        os.killpg(starter.pid, signal.SIGHUP)
    except ProcessLookupError:
        pass  # nobody is left in that group: what is to be shown
    assert [one["instance"] for one in listed(instance)] == ["web"]


def test_output_is_kept_and_shown(instance, configured, box):
    (box / ".singularity.d").mkdir(exist_ok=True)
    script = box / ".singularity.d/runscript"
    script.write_text('#!/bin/sh\necho "out $*"\necho err >&2\n')
    script.chmod(0o755)
    assert instance("run", box, "web", "a", "b").returncode == 0
    until(lambda: instance("logs", "web").stdout == "out a b\n")
    assert instance("logs", "--err", "web").stdout == "err\n"
    assert [one["instance"] for one in listed(instance)] == ["web"]  # it stays when its program has ended well


def test_script_that_fails_ends_the_instance_and_is_named(instance, box):
    (box / ".singularity.d").mkdir(exist_ok=True)
    script = box / ".singularity.d/startscript"
    script.write_text("#!/nowhere\n")
    script.chmod(0o755)
    result = instance("start", box, "web")
    assert result.returncode == 255
    assert listed(instance) == []


def test_pid_file_holds_the_pid(instance, configured, box):
    assert instance("start", "--pid-file", configured.tmp / "pid", box, "web").returncode == 0
    assert int((configured.tmp / "pid").read_text()) == listed(instance)[0]["pid"]


def test_patterns_choose_and_nothing_found_is_status_one(instance, box):
    for name in ("web1", "web2", "db"):
        instance("start", box, name)
    assert [one["instance"] for one in listed(instance, "web*")] == ["web1", "web2"]
    assert instance("stop", "web*").returncode == 0
    assert [one["instance"] for one in listed(instance)] == ["db"]
    assert instance("stop", "web*").returncode == 1


def test_program_that_ignores_the_signal_is_killed_in_time(instance, box):
    (box / ".singularity.d").mkdir(exist_ok=True)
    script = box / ".singularity.d/startscript"
    script.write_text("#!/bin/sh\ntrap '' INT\nwhile :; do sleep 0.1; done\n")
    script.chmod(0o755)
    assert instance("start", box, "web").returncode == 0
    result = instance("stop", "--timeout", "0.5", "web")
    assert result.returncode == 0
    assert "killed" in result.stderr
    assert listed(instance) == []


def test_shell_that_waits_for_its_program_ends_with_it(instance, box):
    """As with the peers the signal reaches the process group, not only a shell that looks at it later."""
    (box / ".singularity.d").mkdir(exist_ok=True)
    script = box / ".singularity.d/startscript"
    script.write_text("#!/bin/sh\nsleep 60\necho never\n")
    script.chmod(0o755)
    for name in ("INT", "TERM"):
        assert instance("start", box, "web").returncode == 0
        result = instance("stop", "--timeout", "10", "--signal", name, "web")
        assert (result.returncode, "killed" in result.stderr) == (0, False)
        assert listed(instance) == []


def test_stats_count_the_processes(instance, box):
    instance("start", box, "web")
    found = json.loads(instance("stats", "--json", "web").stdout)
    assert found["processes"] >= 1
    assert found["memoryBytes"] > 0


@pytest.mark.parametrize("name", ["../web", ".web", "a b", "a/b", ""])
def test_names_that_could_leave_the_folder_are_refused(instance, box, name):
    result = instance("start", box, name)
    assert result.returncode == 255
    assert "cannot be an instance's name" in result.stderr


def test_unknown_instance_is_one_clear_line(sing):
    result = sing("exec", "instance://nope", "true")
    assert result.returncode == 255
    assert "no instance found with name nope" in result.stderr
