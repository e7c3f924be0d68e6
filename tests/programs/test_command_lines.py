# SPDX-License-Identifier: Apache-2.0
"""Command lines as other programs generate them, word for word but for the paths; the programs are not needed."""

from __future__ import annotations

import os

import pytest

pytestmark = [pytest.mark.rootless, pytest.mark.fuse]


@pytest.fixture
def tools(box, squash, fuse):
    """An image with something that answers to bash."""
    (box / "bin/bash").write_text('#!/bin/sh\nexec sh "$@"\n')
    (box / "bin/bash").chmod(0o755)
    (box / "exit_37").write_text("#!/bin/sh\nexit 37\n")
    (box / "exit_37").chmod(0o755)
    return squash(box)


@pytest.fixture
def work(as_user):
    """The working folder of a task, with a script in it."""
    script = "#!/bin/bash -ue\necho out > result.txt; echo $NXF_DEBUG; id -u; pwd; exit ${STATUS:-0}\n"
    return as_user.write("work/ab/cdef/.command.sh", script).parent


def test_nextflow(as_user, tools, work):
    program = as_user(["sh", "-c", "command -v singularity"]).stdout.strip()
    line = (
        'set +u; env - PATH="$PATH" ${TMP:+SINGULARITYENV_TMP="$TMP"} ${TMPDIR:+SINGULARITYENV_TMPDIR="$TMPDIR"} '
        f'SINGULARITYENV_NXF_DEBUG="${{NXF_DEBUG:=0}}" {program} exec --no-home --pid -B {work} {tools} '
        f"/bin/bash -ue {work}/.command.sh"
    )
    result = as_user(["bash", "-c", line], cwd=work, env={"TMP": "/tmp"})
    assert result.stdout.split() == ["0", str(as_user.uid), str(work)], result.stderr
    assert result.stderr == ""
    assert (work / "result.txt").read_text() == "out\n"
    failed = as_user(["bash", "-c", line.replace("PATH=", "SINGULARITYENV_STATUS=7 PATH=")], cwd=work)
    assert failed.returncode == 7


def test_nextflow_of_older_days(as_user, tools, work):
    line = f'singularity exec {tools} /bin/bash -c "cd {work}; /bin/bash -ue .command.sh"'
    assert as_user(["bash", "-c", line], cwd=work, env={"NXF_DEBUG": "1"}).stdout.split()[0] == "1"


def test_miniwdl(as_user, tools, work):
    task = "/mnt/miniwdl_task_container"
    words = ["--verbose", "exec", "--pwd", f"{task}/work", "--containall", "--no-mount", "hostfs"]
    words += ["--bind", f"{work}:{task}/work", "--bind", f"{work}/.command.sh:{task}/command:ro", tools]
    script = f"/bin/bash {task}/command >> stdout.txt 2>> stderr.txt"
    result = as_user(["singularity", *map(str, words), "/bin/sh", "-c", script], env={"LEAK": "1"})
    assert result.returncode == 0, result.stderr
    # pwd, and no variable of the caller (-u makes an unset one an error in a script that says so itself).
    assert (work / "result.txt").read_text() == "out\n"
    assert f"{task}/work" in (work / "stdout.txt").read_text()


def test_cwltool(as_user, tools, work):
    words = ["--quiet", "exec", "--contain", "--ipc", "--cleanenv", "--no-eval", "--userns"]
    words += ["--home", f"{work}:/kXyZab", "--mount=type=bind,source=/etc,target=/var/lib/cwl/stg1/etc,readonly"]
    words += ["--pwd", "/kXyZab", "--net", "--network", "none", tools]
    script = "echo $HOME; pwd; ls /var/lib/cwl/stg1/etc/hosts; touch made; echo $LEAK; grep -c : /proc/net/dev"
    result = as_user(["singularity", *map(str, words), "sh", "-c", script], env={"LEAK": "leaks"})
    assert result.stdout == "/kXyZab\n/kXyZab\n/var/lib/cwl/stg1/etc/hosts\n\n1\n", result.stderr
    assert (work / "made").exists()


def test_snakemake(as_user, tools, work):
    line = (
        f"singularity  exec --home {work}  --bind /usr/share:/mnt/snakemake {tools} bash -c 'set -eu; pwd; echo $HOME'"
    )
    result = as_user(["bash", "-c", line], cwd=work)
    assert result.stdout.split() == [str(work)] * 2, result.stderr


@pytest.mark.parametrize("verb", ["exec", "run"])
def test_htcondor(as_user, sing, box, squash, verb):
    (box / ".singularity.d/runscript").write_text('#!/bin/sh\nexec "$@"\n')
    (box / "exit_37").write_text("#!/bin/sh\nexit 37\n")
    (box / "exit_37").chmod(0o755)
    image, scratch = squash(box), as_user.write("scratch/file").parent
    words = ["-s", verb, "-S", "/tmp", "-S", "/var/tmp", "--pwd", "/srv", "-B", f"{scratch}:/srv", "--no-home", "-C"]
    result = sing(*words, image, "/exit_37")
    assert (result.returncode, result.stdout, result.stderr) == (37, "", "")
    listing = sing(*words, image, "/bin/sh", "-c", "ls; ls -A /tmp; touch /tmp/x /srv/new")
    assert (listing.stdout, listing.stderr) == ("file\n", "")
    assert (scratch / "new").exists()


def test_galaxy(as_user, sing, tools, work):
    words = ["-s", "exec", "--cleanenv", "-B", f"{work}:{work}:ro", "-B", "/usr/share/:/usr/share/:ro"]
    words += ["--home", f"{work}:{work}", "--pwd", work, tools, "/bin/sh", "-c", "pwd; echo $HOME; cat .command.sh"]
    result = sing(*words)
    assert result.stdout.splitlines()[:2] == [str(work)] * 2, result.stderr
    assert result.stderr == ""


@pytest.mark.parametrize(
    "words",
    [
        ["exec", "-eC", "-B/etc:/x", "-W{work}", "-S/s,/t"],
        ["exec", "-ecipB/etc:/x", "-W={work}", "-S", "/s", "-S", "/t"],
        ["exec", "-B=/etc:/x", "--scratch=/s", "--scratch=/t", "--pid=true", "--contain", "-W", "{work}"],
        ["-q", "exec", "-q", "-pB", "/etc:/x", "-cS/s,/t", "--cleanenv=false"],
        ["-s", "-q", "exec", "-cB", "/etc:/x:ro", "-S/s", "-S/t"],
        ["-d", "exec", "-S/s,/t", "-B", "/etc:/x", "-c"],
    ],
)
def test_short_flags_combine_and_take_attached_values(sing, tools, work, words):
    words = [word.format(work=work) for word in words]
    result = sing(*words, tools, "sh", "-c", "ls -d /x /x/hosts /s /t; echo ok -B /y")
    assert result.stdout == "/s\n/t\n/x\n/x/hosts\nok -B /y\n", result.stderr
    if "-q" in words or "-s" in words:
        assert result.stderr == ""


@pytest.mark.parametrize("place", ["before", "behind", "both"])
@pytest.mark.parametrize("flags", [["-q"], ["--quiet"], ["-q", "-s"], ["-s", "-q"], ["--silent"]])
def test_quiet_and_silent_may_stand_anywhere(sing, tools, flags, place):
    before = flags if place != "behind" else []
    # -s of exec is --silent as well; only `shell` has its own (--shell).
    behind = flags if place != "before" else []
    result = sing(*before, "exec", *behind, tools, "sh", "-c", "echo out; echo err >&2; exit 5")
    assert (result.returncode, result.stdout, result.stderr) == (5, "out\n", "err\n")


def test_array_of_jobs_with_one_image(as_user, tools):
    script = f"for i in $(seq 40); do SLURM_PROCID=$i singularity exec {tools} sh -c 'echo $SLURM_PROCID' & done; wait"
    result = as_user(["bash", "-c", script], env={"SINGULARITY_IMAGE_KEEP": "5"}, timeout=300)
    assert sorted(map(int, result.stdout.split())) == list(range(1, 41))
    assert result.stderr == ""


def test_descriptors_pass_and_payload_words_are_left_alone(as_user, tools):
    reader, writer = os.pipe()
    words = ["singularity", "exec", tools, "sh", "-c", f'echo through >&{writer}; echo "$@"', "sh", "-B", "--pid", "-q"]
    result = as_user(words, pass_fds=(writer,))
    os.close(writer)
    assert os.read(reader, 100) == b"through\n"
    os.close(reader)
    assert result.stdout == "-B --pid -q\n"
