# SPDX-License-Identifier: Apache-2.0
"""Whole builds as a real ordinary user, from a small root of the host's own programs: no network is needed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from traces import leftovers, nap, sleeping

pytestmark = pytest.mark.rootless

RECIPE = """\
Bootstrap: localimage
From: {base}

%setup
    mkdir "$SINGULARITY_ROOTFS/fromsetup"

%files
    data /opt/data
    "with blank" /opt/
    *.txt /opt/texts/

%environment
    export GREETING=hello

%post
    test "$(id -u)" = 0
    test -z "$SECRET"
    test "$HOME" = /root
    echo made > /opt/made
    echo junk > /tmp/junk
    mkdir -p /opt/deep
    echo "Color green" >> "$SINGULARITY_LABELS"
    echo 'export FROM_POST=yes' >> "$SINGULARITY_ENVIRONMENT"

%runscript
    echo "running $*"

%labels
    Author somebody
    Long a value with blanks

%help
    how to

%test
    test -e /opt/made
    test "$GREETING" = hello
    test "$FROM_POST" = yes
"""


@pytest.fixture(params=["as_subuid_user", "as_plain_user"])
def user(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def project(as_user, base):
    as_user.write("data/file", "content")
    as_user.write("with blank", "blank")
    as_user.write("a.txt", "a")
    as_user.write("b.txt", "b")
    as_user.write("x.def", RECIPE.format(base=base))
    return as_user


def prepare(user, base, text: str = RECIPE) -> None:
    user.write("data/file", "content")
    user.write("with blank", "blank")
    user.write("a.txt", "a")
    user.write("b.txt", "b")
    user.write("x.def", text.format(base=base))


def build(user, *words, env=None, **options):
    (user.tmp / "scratch").mkdir(exist_ok=True)
    user.own(user.tmp / "scratch")
    environ = {"SINGULARITY_TMPDIR": str(user.tmp / "scratch"), "SECRET": "host", **(env or {})}
    return user(["singularity", "build", *words], env=environ, **options)


def test_every_section_does_its_part(user, base):
    prepare(user, base)
    result = build(user, "--sandbox", "box", "x.def")
    assert result.returncode == 0, result.stderr
    box = user.tmp / "box"
    assert (box / "opt/data/file").read_text() == "content"
    assert (box / "opt/with blank").read_text() == "blank"
    assert sorted(path.name for path in (box / "opt/texts").iterdir()) == ["a.txt", "b.txt"]
    assert (box / "opt/made").read_text() == "made\n"
    assert (box / "fromsetup").is_dir()
    assert not (box / "tmp/junk").exists()
    assert not (box / ".singularity.d/build").exists()
    labels = json.loads((box / ".singularity.d/labels.json").read_text())
    assert labels["Author"] == "somebody" and labels["Long"] == "a value with blanks" and labels["Color"] == "green"
    assert labels["org.label-schema.usage.singularity.deffile.bootstrap"] == "localimage"
    assert (box / ".singularity.d/Singularity").read_text() == RECIPE.format(base=base)
    assert "how to" in (box / ".singularity.d/runscript.help").read_text()
    assert os.access(box / ".singularity.d/runscript", os.X_OK)
    assert leftovers(user) == []


def test_image_file_runs_and_tells_what_it_is(user, base):
    prepare(user, base)
    result = build(user, "x.sif", "x.def")
    assert result.returncode == 0, result.stderr
    assert "made in" in result.stderr and result.stdout == ""
    found = json.loads(user(["singularity", "inspect", "--json", "--all", "x.sif"], check=True).stdout)
    attributes = found["data"]["attributes"]
    assert attributes["labels"]["Author"] == "somebody"
    assert "running" in attributes["runscript"]
    ran = user(["singularity", "run", "x.sif", "1", "2"])
    assert (ran.returncode, ran.stdout) == (0, "running 1 2\n"), ran.stderr
    assert leftovers(user) == []


def test_sandbox_round_trip_keeps_what_was_done_in_it(as_user, base):
    """The second part of the old guide: unpack, change by hand, make the final image, look."""
    prepare(as_user, base)
    assert build(as_user, "demo.sif", "x.def").returncode == 0
    assert build(as_user, "--sandbox", "box", "demo.sif").returncode == 0
    home = as_user.tmp / "home"
    as_user.write("home/tool", "#!/bin/sh\necho tool works\n", 0o755)
    script = "mkdir -p /usr/local/bin && cat /home/tool > /usr/local/bin/tool && chmod 755 /usr/local/bin/tool"
    made = as_user(["singularity", "shell", "--writable", "-H", f"{home}:/home", "box"], input=script + "\n")
    assert made.returncode == 0, made.stderr
    words = ["singularity", "exec", "--writable", "box", "mkdir", "/dataset", "/tmp_log", "/final_log"]
    made = as_user(words)
    assert made.returncode == 0, made.stderr
    assert build(as_user, "final.simg", "box").returncode == 0
    ran = as_user(["singularity", "exec", "final.simg", "sh", "-c", "/usr/local/bin/tool; ls -d /dataset /tmp_log"])
    assert (ran.returncode, ran.stdout) == (0, "tool works\n/dataset\n/tmp_log\n"), ran.stderr
    with open(as_user.tmp / "final.simg", "rb") as stream:
        assert stream.read(64)[32:41] == b"SIF_MAGIC"
    assert leftovers(as_user) == []


def test_adding_files_and_labels_copies_the_blocks_of_the_base(as_user, base):
    prepare(as_user, base)
    assert build(as_user, "base.sif", str(base)).returncode == 0
    as_user.write(
        "more.def",
        "Bootstrap: localimage\nFrom: base.sif\n%files\na.txt /opt/new/\n"
        "%labels\nAdded yes\n%environment\nexport A=1\n",
    )
    result = build(as_user, "--json", "more.sif", "more.def")
    assert result.returncode == 0, result.stderr
    plan = json.loads(result.stdout.splitlines()[0])
    assert "reuse" in [step["kind"] for step in plan["steps"]]
    ran = as_user(["singularity", "exec", "more.sif", "sh", "-c", "cat /opt/new/a.txt; echo $A"])
    assert (ran.returncode, ran.stdout) == (0, "a1\n"), ran.stderr
    inspected = as_user(["singularity", "inspect", "more.sif"], check=True).stdout
    assert "Added: yes" in inspected


def test_stages_hand_files_on_and_apps_are_laid_out(as_user, base):
    as_user.write(
        "x.def",
        f"""\
Bootstrap: localimage
From: {base}
Stage: build
%post
  mkdir /out
  echo program > /out/prog

Bootstrap: localimage
From: {base}
%files from build
  /out/prog /opt/
%appinstall foo
  echo installed > made
%apprun foo
  cat "$SCIF_APPROOT/made"
%appfiles foo
  x.def
""",
    )
    result = build(as_user, "--sandbox", "box", "x.def")
    assert result.returncode == 0, result.stderr
    box = as_user.tmp / "box"
    assert (box / "opt/prog").read_text() == "program\n"
    assert not (box / "out").exists()
    assert (box / "scif/apps/foo/made").read_text() == "installed\n"
    assert (box / "scif/apps/foo/x.def").exists()
    ran = as_user(["singularity", "run", "--app", "foo", "box"])
    assert (ran.returncode, ran.stdout) == (0, "installed\n"), ran.stderr


def test_post_with_another_shell(as_user, base):
    as_user.write("x.def", f"Bootstrap: localimage\nFrom: {base}\n%post -c /bin/sh -u\n  false\n  echo $0 > /opt/who\n")
    assert build(as_user, "--sandbox", "box", "x.def").returncode == 0
    assert "post" in (as_user.tmp / "box/opt/who").read_text()


def test_update_runs_on_the_sandbox_that_is_there(as_user, base):
    as_user.write("x.def", f"Bootstrap: localimage\nFrom: {base}\n%post\n  echo 1 >> /opt/count\n")
    assert build(as_user, "--sandbox", "box", "x.def").returncode == 0
    (as_user.tmp / "box/opt/mine").write_text("mine")
    assert build(as_user, "--sandbox", "--update", "box", "x.def").returncode == 0
    assert (as_user.tmp / "box/opt/count").read_text() == "1\n1\n"
    assert (as_user.tmp / "box/opt/mine").read_text() == "mine"


def test_events_come_as_one_object_per_line(as_user, base):
    prepare(as_user, base)
    result = build(as_user, "--json", "--sandbox", "box", "x.def")
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert found[0]["event"] == "plan" and found[-1]["event"] == "result"
    starts = [event["kind"] for event in found if event["event"] == "start"]
    assert starts == ["bootstrap", "setup", "files", "post", "metadata", "test", "assemble"]
    assert "echo made" in "".join(event["text"] for event in found if event["event"] == "log")
    assert {event["status"] for event in found if event["event"] == "end"} == {"done"}


def test_quiet_build_says_nothing_unless_it_fails(as_user, base):
    prepare(as_user, base)
    result = build(as_user, "-q", "--sandbox", "box", "x.def")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    as_user.write("bad.def", f"Bootstrap: localimage\nFrom: {base}\n%post\n  echo told\n  exit 3\n")
    result = build(as_user, "-q", "--sandbox", "bad", "bad.def")
    assert result.returncode == 255
    assert "told" in result.stderr and "bad.def:3: %post ended with status 3" in result.stderr


# -- what goes wrong


@pytest.mark.parametrize(
    ("section", "line", "words"),
    [
        ("%post\n  exit 7\n", 3, "%post ended with status 7"),
        ("%post\n  kill -9 $$\n", 3, "%post was ended by signal 9"),
        ("%setup\n  false\n", 3, "%setup ended with status 1"),
        ("%files\n  nosuch /opt\n", 4, "there is no file nosuch"),
        ("%test\n  exit 2\n", 3, "%test ended with status 2"),
        ("%test\n  exit 2\n", 3, "--notest builds without it"),
        ("%pots\n  true\n", 3, '"%pots" is no section'),
        ("%post\n  true\n%files from nope\n /x\n", 5, 'no stage "nope"'),
    ],
)
def test_failure_names_the_line_and_writes_nothing(as_user, base, section, line, words):
    as_user.write("x.def", f"Bootstrap: localimage\nFrom: {base}\n{section}")
    as_user.write("x.sif", "previous")
    result = build(as_user, "--force", "x.sif", "x.def")
    assert result.returncode == 255
    assert f"x.def:{line}" in result.stderr and words in result.stderr
    assert (as_user.tmp / "x.sif").read_text() == "previous"
    assert leftovers(as_user) == []


def test_target_is_checked_before_any_work(as_user, base):
    prepare(as_user, base)
    as_user.write("there.sif", "x")
    for words, told in (
        (("there.sif", "x.def"), "exists already"),
        (("no/such/folder/x.sif", "x.def"), "no/such/folder"),
        (("--sandbox", "--force", "data", "x.def"), "is no sandbox"),
        (("--sandbox", "--force", "there.sif", "x.def"), "is a file"),
        (("x.sif", "nosuch.def"), "there is no such file"),
    ):
        result = build(as_user, *words)
        assert result.returncode == 255
        assert told in result.stderr, result.stderr
        assert "[1/" not in result.stderr
    assert (as_user.tmp / "data/file").read_text() == "content"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("kind", ["sandbox", "file"])
def test_interrupted_build_leaves_nothing(user, base, number, kind):
    text = "Bootstrap: localimage\nFrom: {base}\n%post\n  touch /opt/begun\n  sleep 98765 &\n  sleep SLEEP\n"
    prepare(user, base, text.replace("SLEEP", nap(user)))
    (user.tmp / "scratch").mkdir()
    user.own(user.tmp / "scratch")
    environ = {**user.environ, "SINGULARITY_TMPDIR": str(user.tmp / "scratch")}
    words = ["singularity", "build", *(["--sandbox", "box"] if kind == "sandbox" else ["x.sif"]), "x.def"]
    with open(user.tmp / "told", "wb") as told:
        started = user.popen(words, env=environ, stdout=subprocess.DEVNULL, stderr=told)
    deadline = time.monotonic() + 30
    while not sleeping(user):
        assert time.monotonic() < deadline and started.poll() is None
        time.sleep(0.05)
    started.send_signal(number)
    assert started.wait(30) == (-number if number == signal.SIGKILL else 255)
    # Cleaning up needs root again, which is nothing to tell twice.
    assert (user.tmp / "told").read_text().count("root without root") == 1
    while leftovers(user) or sleeping(user):
        assert time.monotonic() < deadline, (leftovers(user), sleeping(user))
        time.sleep(0.1)
    assert not (user.tmp / "box").exists() and not (user.tmp / "x.sif").exists()


def test_what_two_killed_processes_left_is_removed_by_the_next_build(as_subuid_user, base):
    user = as_subuid_user
    text = "Bootstrap: localimage\nFrom: {base}\n%post\n  touch /opt/x\n  chown 5:5 /opt/x\n  sleep SLEEP\n"
    prepare(user, base, text.replace("SLEEP", nap(user)))
    (user.tmp / "scratch").mkdir()
    user.own(user.tmp / "scratch")
    environ = {**user.environ, "SINGULARITY_TMPDIR": str(user.tmp / "scratch")}
    started = user.popen(["singularity", "build", "--sandbox", "box", "x.def"], env=environ, start_new_session=True)
    deadline = time.monotonic() + 30
    while not sleeping(user):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    children = Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text().split()
    started.send_signal(signal.SIGSTOP)  # so that it cannot clean up after its worker
    for pid in children:
        os.kill(int(pid), signal.SIGKILL)
    started.kill()
    started.wait(30)
    assert any("partial" in name for name in leftovers(user))
    user.write("y.def", f"Bootstrap: localimage\nFrom: {base}\n")
    assert build(user, "--sandbox", "box", "y.def").returncode == 0
    assert leftovers(user) == []


def test_full_disk_is_one_clear_line(root_only, as_user, base):
    prepare(
        as_user, base, "Bootstrap: localimage\nFrom: {base}\n%post\n  dd if=/dev/zero of=/opt/big bs=1M count=200\n"
    )
    small = as_user.tmp / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96m,mode=1777", "none", small], check=True)
    try:
        result = as_user(["singularity", "build", "x.sif", "x.def"], env={"SINGULARITY_TMPDIR": str(small)})
        assert result.returncode == 255
        assert "no space left" in result.stderr.lower() and "SINGULARITY_TMPDIR" in result.stderr
        assert list(small.iterdir()) == []
        as_user.write("big.def", f"Bootstrap: localimage\nFrom: {base}\n%files\n  huge /opt/\n")
        with open(as_user.tmp / "huge", "wb") as stream:
            stream.write(os.urandom(100 << 20))
        as_user.own(as_user.tmp / "huge")
        result = as_user(["singularity", "build", "x.sif", "big.def"], env={"SINGULARITY_TMPDIR": str(small)})
        assert result.returncode == 255
        assert "MiB are free" in result.stderr
        assert list(small.iterdir()) == []
    finally:
        subprocess.run(["umount", small], check=True)


def test_post_cannot_reach_the_host(user, base):
    """Ends all it can see, removes everything it can write: the host and the user's files do not notice."""
    precious = user.write("precious", "mine")
    text = "Bootstrap: localimage\nFrom: {base}\n%post\n  kill -9 -1 || true\n  rm -rf /opt /home /usr/share || true\n"
    prepare(user, base, text)
    result = build(user, "--sandbox", "box", "x.def")
    assert result.returncode == 255 or result.returncode == 0
    assert precious.read_text() == "mine"
    assert base.joinpath("bin/sh").exists()
    assert leftovers(user) == []


def test_ca_bundle_reaches_post_and_not_the_image(as_user, base):
    bundle = as_user.write("ca.pem", "CERTIFICATES\n")
    as_user.write(
        "x.def",
        f"Bootstrap: localimage\nFrom: {base}\n"
        '%post\n  cat "$SSL_CERT_FILE" > /opt/seen\n  echo $PIP_CERT >> /opt/seen\n',
    )
    result = build(as_user, "--ca-bundle", str(bundle), "--sandbox", "box", "x.def")
    assert result.returncode == 0, result.stderr
    assert (as_user.tmp / "box/opt/seen").read_text().startswith("CERTIFICATES\n/.singularity.d/build/")
    found = subprocess.run(["grep", "-rlI", "CERTIFICATES", as_user.tmp / "box"], capture_output=True, text=True).stdout
    assert found.split() == [str(as_user.tmp / "box/opt/seen"), str(as_user.tmp / "box/.singularity.d/Singularity")][:1]
    result = build(as_user, "--ca-bundle", "no", "--sandbox", "no", "x.def")
    assert result.returncode == 255


def test_binds_are_there_in_post_and_test(as_user, base):
    as_user.write("stuff/x", "bound")
    as_user.write(
        "x.def",
        f"Bootstrap: localimage\nFrom: {base}\n%post\n  cat /stuff/x > /opt/x\n%test\n  test -e /stuff/x\n",
    )
    result = build(as_user, "--bind", f"{as_user.tmp}/stuff:/stuff", "--sandbox", "box", "x.def")
    assert result.returncode == 0, result.stderr
    assert (as_user.tmp / "box/opt/x").read_text() == "bound"
    result = build(as_user, "--bind", "/nosuch:/x", "--sandbox", "no", "x.def")
    assert result.returncode == 255 and "/nosuch" in result.stderr
