# SPDX-License-Identifier: Apache-2.0
"""`singularity exec` as programs rely on it: status, signals, streams, descriptors, environment, files."""

from __future__ import annotations

import os
import signal
import subprocess
import time

import pytest

pytestmark = pytest.mark.rootless


@pytest.fixture(params=["sandbox", "squashfs"])
def any_image(request, box):
    """The same root file system as a sandbox and as an image file."""
    return box if request.param == "sandbox" else request.getfixturevalue("image")


def out(result):
    assert result.returncode == 0, result.stderr
    return result.stdout


# --- status, signals, streams ---


@pytest.mark.parametrize("options", [[], ["--pid"], ["--pid", "--no-init"]])
def test_exit_status_is_the_programs(sing, any_image, options):
    assert sing("exec", *options, any_image, "sh", "-c", "exit 7").returncode == 7


@pytest.mark.parametrize("options", [[], ["--pid"]])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGUSR1])
def test_death_by_signal_is_seen_as_one(sing, any_image, options, number):
    assert sing("exec", *options, any_image, "sh", "-c", f"kill -{int(number)} $$").returncode == -number


@pytest.mark.parametrize("options", [[], ["--pid"]])
def test_signals_reach_the_program(as_user, box, options):
    script = 'trap "exit 42" TERM; echo ready; while :; do sleep 0.05; done'
    child = as_user.popen(["singularity", "exec", *options, box, "sh", "-c", script], stdout=subprocess.PIPE)
    assert child.stdout.readline() == b"ready\n"
    child.send_signal(signal.SIGTERM)
    assert child.wait(10) == 42
    child.stdout.close()


def test_program_is_the_very_process_that_was_started(as_user, box):
    child = as_user.popen(["singularity", "exec", box, "sh", "-c", "echo $$; exec sleep 9"], stdout=subprocess.PIPE)
    assert int(child.stdout.readline()) == child.pid
    child.kill()
    child.wait()
    child.stdout.close()


def test_sigpipe_has_its_default_effect(sing, box):
    result = sing("exec", box, "sh", "-c", "grep SigIgn /proc/self/status")
    assert int(out(result).split()[1], 16) & (1 << (signal.SIGPIPE - 1) | 1 << (signal.SIGXFSZ - 1)) == 0


def test_quiet_start_writes_nothing_of_its_own(sing, any_image):
    for words in (["-q", "exec"], ["exec", "-q"], ["-q", "-s", "exec"]):
        result = sing(*words, any_image, "echo", "x")
        assert (result.stdout, result.stderr) == ("x\n", "")


@pytest.mark.parametrize("closed", ["0<&-", "1>&-", "2>&-", "0<&- 1>&- 2>&-"])
def test_closed_descriptors_stay_closed(as_user, any_image, closed):
    # The program tells by its status which of the three it has.
    script = "s=0; for n in 0 1 2; do if [ -e /proc/self/fd/$n ]; then s=$((s + (1 << n))); fi; done; exit $s"
    probe = f"singularity exec {any_image} sh -c '{script.replace('/self/', '/$$/')}' {closed}"
    expected = 7
    for word in closed.split():
        expected &= ~(1 << int(word[0]))
    assert as_user(["sh", "-c", probe]).returncode == expected


def test_inherited_descriptors_pass_and_ours_do_not(as_user, any_image):
    read, write = os.pipe()
    os.set_inheritable(write, True)
    words = ["singularity", "exec", any_image, "sh", "-c", f"echo hello >&{write}; ls /proc/$$/fd; true"]
    result = as_user(words, pass_fds=[write])
    os.close(write)
    assert os.read(read, 100) == b"hello\n"
    os.close(read)
    assert set(result.stdout.split()) - {"0", "1", "2", str(write)} <= {"10"}  # ash keeps the script there


def test_umask_passes(as_user, box):
    assert as_user(["sh", "-c", f"umask 0027; singularity exec {box} sh -c umask"]).stdout == "0027\n"
    assert as_user(["sh", "-c", f"umask 0027; singularity exec --no-umask {box} sh -c umask"]).stdout == "0022\n"


def test_no_new_privileges_and_no_capabilities(sing, any_image):
    text = out(sing("exec", any_image, "cat", "/proc/self/status"))
    assert "NoNewPrivs:\t1" in text
    assert "CapEff:\t0000000000000000" in text
    assert "CapPrm:\t0000000000000000" in text


@pytest.mark.parametrize("options", [(), ("--pid",)])
def test_user_gets_the_capabilities_of_the_namespace_that_he_asks_for(sing, box, options):
    command = ("grep", "CapEff", "/proc/self/status")
    assert (
        out(sing("exec", *options, "--add-caps", "CAP_NET_RAW,chown", box, *command)).split()[1]
        == f"{1 << 13 | 1:016x}"
    )
    assert (
        out(sing("exec", *options, "--add-caps", "chown", "--fakeroot", "--drop-caps", "all", box, *command))
        .split()[1]
        .endswith("1")
    )


def test_user_stays_who_he_is(sing, as_user, any_image):
    assert out(sing("exec", any_image, "id", "-u")).strip() == str(as_user.uid)
    assert out(sing("exec", any_image, "id", "-un")).strip() == as_user.name


# --- mistakes ---


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        (["exec", "nosuch.sif", "true"], 255, "nosuch.sif: no such image"),
        (["exec", "/etc/passwd", "true"], 255, "image format not recognized"),
        (["exec", "BOX"], 1, "too few arguments"),
        (["exec", "BOX", "nosuchcmd"], 255, '"nosuchcmd": executable file not found'),
        (["exec", "BOX", "/no/such/cmd"], 255, "/no/such/cmd: no such file"),
        (["exec", "BOX", "/etc/passwd"], 255, "/etc/passwd: Permission denied"),
        (["exec", "-B", "/nosuch", "BOX", "true"], 255, "/nosuch"),
        (["exec", "-B", "/etc:/b:zz", "BOX", "true"], 255, "zz is not a valid bind option"),
        (["exec", "--pwd", "/nosuch", "BOX", "true"], 255, "/nosuch"),
        (["exec", "--nosuchflag", "BOX", "true"], 1, "unknown flag: --nosuchflag"),
        (["exec", "--env", "FOO", "BOX", "true"], 1, "FOO"),
        (["exec", "instance://nope", "true"], 255, "no instance found with name nope"),
        (["exec", "--writable", "--writable-tmpfs", "BOX", "true"], 1, "cannot both be given"),
        (["exec", "-H", "/tmp:rel", "BOX", "true"], 255, "absolute"),
        (["exec", "--network", "bridge", "BOX", "true"], 255, "bridge"),
        (["exec", "--writable", "-B", "/etc:/new/place", "BOX", "true"], 255, "/new/place"),
        (["exec", "--drop-caps", "nonsense", "BOX", "true"], 255, "nonsense"),
        (["run", "--app", "foo", "BOX"], 1, "Could not locate the container application: foo"),
    ],
)
def test_mistakes_are_answered_in_one_line(sing, box, words, status, says):
    result = sing(*[str(box) if word == "BOX" else word for word in words])
    assert result.returncode == status
    assert says in result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert len(result.stderr.splitlines()) <= 2  # the error and a hint


def test_writing_needs_a_sandbox(sing, image):
    result = sing("exec", "--writable", image, "true")
    assert result.returncode == 255
    assert "--writable-tmpfs" in result.stderr


# --- files ---


def test_image_is_read_only(sing, any_image):
    assert "Read-only file system" in sing("exec", any_image, "touch", "/x").stderr


def test_writable_sandbox_keeps_changes(sing, box):
    out(sing("exec", "--writable", box, "sh", "-c", "mkdir /dataset && echo hi > /dataset/x"))
    assert (box / "dataset/x").read_text() == "hi\n"


def test_changes_in_memory_go_with_the_container(sing, any_image):
    script = "echo hi > /etc/new && rm /etc/hosts2 2>/dev/null; cat /etc/new; mkdir /opt/x; ls -d /opt/x"
    assert out(sing("exec", "--writable-tmpfs", any_image, "sh", "-c", script)) == "hi\n/opt/x\n"
    assert sing("exec", any_image, "cat", "/etc/new").returncode == 1


def test_overlay_folder_keeps_changes_beside_the_image(sing, as_user, any_image):
    folder = as_user.own(_mkdir(as_user.tmp / "over"))
    out(sing("exec", "--overlay", folder, any_image, "sh", "-c", "echo hi > /opt/x; rm /bin/tty"))
    assert out(sing("exec", "--overlay", folder, any_image, "cat", "/opt/x")) == "hi\n"
    assert out(sing("exec", "--overlay", f"{folder}:ro", any_image, "cat", "/opt/x")) == "hi\n"
    assert sing("exec", "--overlay", f"{folder}:ro", any_image, "touch", "/opt/y").returncode == 1
    assert sing("exec", "--overlay", folder, any_image, "ls", "/bin/tty").returncode == 1
    assert sing("exec", any_image, "ls", "/opt/x").returncode == 1


def _mkdir(path):
    path.mkdir()
    return path


def test_bind_makes_missing_targets_without_touching_the_image(sing, as_user, any_image):
    data = as_user.write("data/file", "content")
    words = ["-B", f"{data.parent}:/a/b/c", "-B", f"{data}:/x/y"]
    assert out(sing("exec", *words, any_image, "cat", "/a/b/c/file", "/x/y")) == "contentcontent"
    if any_image.is_dir():
        assert not (any_image / "a").exists()


def test_read_only_bind_cannot_be_written_and_others_can(sing, as_user, any_image):
    data = as_user.write("data/file", "content")
    assert sing("exec", "-B", f"{data.parent}:/d:ro", any_image, "touch", "/d/new").returncode == 1
    out(sing("exec", "-B", f"{data.parent}:/d", any_image, "touch", "/d/new"))
    assert (data.parent / "new").exists()


def test_inner_binds_come_after_outer_ones_in_any_order(sing, as_user, any_image):
    outer, inner = as_user.write("outer/sub/one", "1").parent.parent, as_user.write("inner/two", "2").parent
    words = ["-B", f"{inner}:/d/sub", "-B", f"{outer}:/d"]
    assert out(sing("exec", *words, any_image, "ls", "/d/sub")) == "two\n"


def test_inner_binds_may_need_a_new_folder_in_the_outer_one(sing, as_user, any_image):
    (inner, outer) = as_user.write("inner/file", "in").parent, as_user.write("outer/file", "out").parent
    listing = sing(
        "exec", "-B", f"{inner}:/mnt/new/deep,{outer}:/mnt", any_image, "cat", "/mnt/new/deep/file", check=True
    )
    assert listing.stdout == "in"
    assert (outer / "new/deep").is_dir()
    refused = sing("exec", "-B", f"{inner}:/mnt/other,{outer}:/mnt:ro", any_image, "true")
    assert refused.returncode == 255
    assert refused.stderr.startswith("FATAL:   cannot mount")


def test_mount_option_with_csv_quotes(sing, as_user, any_image):
    data = as_user.write("a,b/file", "content").parent
    spec = f'type=bind,"source={data}",destination=/d,ro'
    assert out(sing("exec", "--mount", spec, any_image, "cat", "/d/file")) == "content"


def test_bind_texts_from_the_environment_add_to_the_options(sing, as_user, box):
    one, two = as_user.write("one/1").parent, as_user.write("two/2").parent
    result = sing("exec", "-B", f"{one}:/d1", box, "ls", "/d1", "/d2", env={"SINGULARITY_BIND": f"{two}:/d2"})
    assert out(result).split() == ["/d1:", "1", "/d2:", "2"]


def test_part_of_another_image_is_bound(sing, image, box):
    words = ["-B", f"{image}:/other:image-src=/etc"]
    assert "root:x:0" in out(sing("exec", *words, box, "cat", "/other/passwd"))


def test_home_is_there_and_can_be_replaced_or_left_out(sing, as_user, any_image):
    home = as_user.write("newhome/mine").parent
    assert out(sing("exec", any_image, "sh", "-c", "echo $HOME")).strip() == str(as_user.home)
    script = "cd; pwd; ls; grep -c ':/h:' /etc/passwd"
    assert out(sing("exec", "-H", f"{home}:/h", any_image, "sh", "-c", script)).split() == ["/h", "mine", "1"]
    assert sing("exec", "--no-home", any_image, "ls", as_user.home, cwd="/").returncode == 1


def test_current_folder_is_kept(sing, as_user, any_image):
    folder = as_user.write("here/file").parent
    assert out(sing("exec", any_image, "sh", "-c", "pwd; ls", cwd=folder)).split() == [str(folder), "file"]


def test_deleted_current_folder_falls_back_to_home(as_user, box):
    script = f"mkdir gone; cd gone; rmdir ../gone; singularity exec {box} pwd"
    result = as_user(["bash", "-c", script])
    assert out(result).strip() == str(as_user.home)
    assert "WARNING" in result.stderr
    script = f"mkdir gone; cd gone; rmdir ../gone; singularity exec -B x:/mnt {box} pwd"
    result = as_user(["bash", "-c", script])
    assert result.returncode == 255
    assert "FATAL:   x: the current folder does not exist" in result.stderr


def test_contained_container_shows_nothing_of_the_host(sing, as_user, any_image):
    mark = as_user.write("mark")
    script = f"pwd; ls -A /tmp /var/tmp; ls {mark} 2>&1 | grep -c 'No such'; ls /dev; id -u; ps | wc -l; env"
    text = out(sing("exec", "--containall", any_image, "sh", "-c", script, env={"SECRET": "1"}))
    assert text.splitlines()[0] == str(as_user.home)
    assert "SECRET" not in text
    for name in ("null", "zero", "random", "urandom", "tty", "pts", "shm", "ptmx"):
        assert f"\n{name}\n" in text
    assert "sda" not in text
    assert "\nkvm\n" not in text


def test_contained_folders_live_in_the_workdir(sing, as_user, any_image):
    work = as_user.own(_mkdir(as_user.tmp / "work"))
    script = "touch /tmp/a /var/tmp/b ~/c /s/d"
    out(sing("exec", "-c", "-W", work, "-S", "/s", any_image, "sh", "-c", script))
    assert sorted(path.name for path in work.rglob("?") if path.is_file()) == ["a", "b", "c", "d"]
    assert sing("exec", "-c", "-W", as_user.tmp / "nosuch", any_image, "true").returncode == 255


def test_mounts_are_left_out_on_request(sing, as_user, any_image):
    assert out(sing("exec", "--no-mount", "tmp,home,proc", any_image, "ls", "-A", "/tmp", "/proc", cwd="/")) == (
        "/proc:\n\n/tmp:\n"
    )


def test_missing_home_on_the_host_is_no_error(as_user, box):
    assert as_user(["singularity", "exec", box, "true"], env={"HOME": "/nonexistent"}).returncode == 0


# --- environment ---


def test_empty_environment_gets_what_a_program_needs(as_user, any_image):
    program = as_user(["sh", "-c", "command -v singularity"]).stdout.strip()
    result = as_user([program, "exec", any_image, "env"], clean=True)
    found = dict(line.split("=", 1) for line in out(result).splitlines())
    assert found["HOME"] == str(as_user.home)
    assert found["USER"] == as_user.name
    assert found["PATH"].startswith("/usr/local/sbin:")
    assert "LC_CTYPE" not in found


def test_image_beats_host_and_caller_beats_image(sing, box, squash):
    (box / ".singularity.d/env/90-environment.sh").write_text("#!/bin/sh\nexport A=image B='im age' C=\"$A-c\"\n")
    host = {"A": "host", "B": "host", "D": "host", "SINGULARITYENV_B": "caller", "APPTAINERENV_C": "apptainer"}
    found = dict(line.split("=", 1) for line in out(sing("exec", "--env", "E=x,y", box, "env", env=host)).splitlines())
    assert (found["A"], found["B"], found["C"], found["D"], found["E"]) == (
        "image",
        "caller",
        "apptainer",
        "host",
        "x,y",
    )
    assert found["SINGULARITY_NAME"] == "box"
    assert "SINGULARITYENV_B" not in found


SHELL_ONLY = 'for one in A B; do export $one=image; done\nif [ -n "$HOME" ]; then export C="x\ny"; fi\n'


def test_scripts_that_need_a_shell_have_the_same_rules(sing, box):
    (box / ".singularity.d/env/90-environment.sh").write_text(SHELL_ONLY)
    host = {"A": "host", "D": "h o 'st", "SINGULARITYENV_B": "caller", "SINGULARITYENV_PREPEND_PATH": "/pre"}
    text = out(sing("exec", box, "env", env=host))
    for line in ("A=image", "B=caller", "C=x\ny", "D=h o 'st", f"SINGULARITY_CONTAINER={box}"):
        assert f"\n{line}\n" in "\n" + text
    assert "\nPATH=/pre:/usr/local/sbin" in "\n" + text
    assert "_file" not in text
    assert sing("exec", box, "nosuchcmd").returncode == 255
    assert sing("exec", box, "sh", "-c", "exit 9").returncode == 9


def test_image_without_a_shell_still_runs(sing, box, image):
    (box / "bin/sh").unlink()
    assert out(sing("exec", box, "echo", "hi")) == "hi\n"
    (box / ".singularity.d/env/90-environment.sh").write_text(SHELL_ONLY)
    result = sing("exec", box, "echo", "hi")
    assert out(result) == "hi\n"
    assert "needs a shell" in result.stderr


def test_clean_environment(sing, box):
    host = {"SECRET": "1", "TERM": "vt100", "http_proxy": "http://proxy", "SINGULARITYENV_IN": "2"}
    found = dict(line.split("=", 1) for line in out(sing("exec", "-e", box, "env", env=host)).splitlines())
    assert "SECRET" not in found
    assert (found["TERM"], found["http_proxy"], found["IN"], found["LANG"]) == ("vt100", "http://proxy", "2", "C")


def test_path_parts(sing, box):
    host = {"SINGULARITYENV_PREPEND_PATH": "/first", "SINGULARITYENV_APPEND_PATH": "/last"}
    path = out(sing("exec", box, "sh", "-c", "echo $PATH", env=host)).strip()
    assert path.startswith("/first:")
    assert path.endswith(":/last")
    words = ["exec", box, "/bin/sh", "-c", "echo $PATH"]
    assert out(sing(*words, env={"SINGULARITYENV_PATH": "/only"})).strip() == "/only"


def test_host_libraries_never_enter(sing, box):
    text = out(sing("exec", box, "sh", "-c", "echo $LD_LIBRARY_PATH", env={"LD_LIBRARY_PATH": "/host"}))
    assert text == "/.singularity.d/libs\n"


def test_env_file(sing, as_user, box):
    path = as_user.write("vars", "# comment\nA=1\nexport B=\"$A $OUTER\"\nC='x y'\n")
    found = out(sing("exec", "--env-file", path, box, "sh", "-c", 'echo "$A,$B,$C"', env={"OUTER": "o"}))
    assert found == "1,1 o,x y\n"
    hard = as_user.write("hard", 'for n in 1 2; do eval "V$n=$n"; done\n')
    assert out(sing("exec", "--env-file", hard, box, "sh", "-c", "echo $V1$V2")) == "12\n"
    assert sing("exec", "--env-file", "/nosuch", box, "true").returncode == 255


def test_explain_env_names_the_origin(sing, box):
    (box / ".singularity.d/env/90-environment.sh").write_text("export FROM_IMAGE=1\n")
    lines = out(sing("exec", "--explain-env", "--env", "MINE=2", box, "true", env={"OUTER": "3"})).splitlines()
    origin = {lines[at].split("=")[0]: lines[at + 1].strip() for at in range(0, len(lines) - 1, 2)}
    assert "90-environment.sh" in origin["FROM_IMAGE"]
    assert "--env" in origin["MINE"]
    assert origin["OUTER"] == "host"


# --- namespaces ---


def test_own_processes_are_reaped_and_end_together(sing, as_user, box):
    mark = f"31{os.getpid()}"
    script = f"(sleep {mark} &) ; (sh -c 'sleep 0.1 & exit' &); sleep 0.3; ps; echo $$"
    text = out(sing("exec", "--pid", box, "sh", "-c", script))
    assert "[sleep]" not in text
    assert int(text.splitlines()[-1]) < 10
    assert mark not in subprocess.run(["ps", "-ef"], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("options", [["--pid"], []])
def test_nothing_survives_kill_9(as_user, image, options):
    words = ["singularity", "exec", *options, image, "sh", "-c", "echo ready; exec sleep 1000"]
    before = _servers()
    child = as_user.popen(words, stdout=subprocess.PIPE, env={"SINGULARITY_IMAGE_KEEP": "0"})
    assert child.stdout.readline() == b"ready\n"
    servers = _servers() - before
    assert servers
    child.kill()
    child.wait()
    child.stdout.close()
    deadline = time.monotonic() + 5
    while _servers() & servers and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not _servers() & servers


def _servers():
    found = set()
    for name in os.listdir("/proc"):
        try:
            with open(f"/proc/{name}/comm") as file, open(f"/proc/{name}/stat") as state:
                if file.read() == "singularity-fs\n" and state.read().rpartition(")")[2].split()[0] != "Z":
                    found.add(name)
        except OSError:
            continue
    return found


def test_hostname_and_loopback(sing, box):
    assert out(sing("exec", "--hostname", "elsewhere", box, "hostname")) == "elsewhere\n"
    text = out(sing("exec", "--net", "--network", "none", box, "cat", "/proc/self/net/dev"))
    assert [line.split(":")[0].strip() for line in text.splitlines()[2:]] == ["lo"]


def test_fakeroot_is_root_inside(sing, any_image):
    assert out(sing("exec", "--fakeroot", any_image, "sh", "-c", "id -u; echo $HOME")).split() == ["0", "/root"]


def test_fakeroot_may_give_files_away(sing, any_image):
    script = "touch /new && chown 33:33 /new && stat -c %u:%g /new"
    assert out(sing("exec", "--fakeroot", "--writable-tmpfs", any_image, "sh", "-c", script)) == "33:33\n"


def test_compat_is_like_docker(sing, box):
    script = "umask; echo $$; touch /x && ls /x; ls -A /tmp"
    assert out(sing("exec", "--compat", box, "sh", "-c", script)).split() == ["0022", "1", "/x"]


def test_containers_in_containers(sing, as_user, box):
    top = as_user.tmp
    program = as_user(["sh", "-c", "command -v singularity"]).stdout.strip()
    binds = [
        word
        for path in ("/usr", "/lib", "/lib64", "/opt", "/work", "/var/cache")
        if os.path.exists(path)
        for word in ("-B", path)
    ]
    words = [program, "exec", str(box), "echo", "inner"]
    result = sing("exec", *binds, "-B", top, box, *words)
    assert out(result) == "inner\n"


# --- many at once ---


@pytest.mark.parametrize("which", ["box", "image"])
def test_a_hundred_parallel_starts_do_not_fail(as_user, request, which):
    path = request.getfixturevalue(which)
    script = f"for i in $(seq 100); do singularity exec {path} echo ok || echo bad & done; wait"
    result = as_user(["bash", "-c", script], timeout=300)
    assert result.stdout.split() == ["ok"] * 100
    assert result.stderr == ""
