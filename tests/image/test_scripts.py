# SPDX-License-Identifier: Apache-2.0
"""Shell scripts of images: every legal value survives, in every shell that is here."""

from __future__ import annotations

import shutil
import subprocess

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pysingularity.image import scripts

SHELLS = [path for name in ("dash", "bash", "busybox") if (path := shutil.which(name))]
AWKWARD = "a $HOME `id` \"quoted\" 'single' \\ back\nnew line\ttab é } { * ? ~ # ; & | < > $(id) ${x}"
values = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=40)


def shell(path: str, script: str, *words: str, env: dict[str, str] | None = None) -> str:
    applet = ["sh"] if path.endswith("busybox") else []
    result = subprocess.run(
        [path, *applet, "-c", script, "sh", *words],
        capture_output=True,
        env={"PATH": "/usr/bin:/bin", **(env or {})},
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == b""
    return result.stdout.decode("utf-8", "surrogateescape")


@pytest.mark.parametrize("path", SHELLS)
@settings(max_examples=40, deadline=None)
@example(AWKWARD)
@example("")
@given(values)
def test_environment_values_survive(path, value):
    script = scripts.docker_environment([f"VALUE={value}", "PATH=/usr/bin:/bin:/opt/x y"])
    found = shell(path, script + '\nprintf %s "$VALUE|$PATH"')
    assert found == f"{value}|/usr/bin:/bin:/opt/x y"


def test_environment_values_that_are_set_win_except_path():
    script = scripts.docker_environment(["A=image", "PATH=/image", "EMPTY="])
    assert shell(SHELLS[0], script + '\necho "$A $PATH ${EMPTY+set}"', env={"A": "caller"}) == "caller /image set\n"


def test_names_that_no_shell_accepts_are_left_out_and_later_values_win():
    script = scripts.docker_environment(["a.b=1", "1a=2", "=3", "é=4", "A=5", "A=6", "$(touch x)=7"])
    assert shell(SHELLS[0], script + '\necho "$A"') == "6\n"
    assert script.count("export") == 1


@pytest.mark.parametrize(
    ("entrypoint", "command", "without", "with_words"),
    [
        (["echo", "E"], ["C"], "E C\n", "E x y\n"),
        (["echo", "E"], [], "E\n", "E x y\n"),
        ([], ["echo", "C"], "C\n", None),
        (["echo", AWKWARD], [AWKWARD], f"{AWKWARD} {AWKWARD}\n", f"{AWKWARD} x y\n"),
    ],
)
def test_runscript_starts_what_docker_would(entrypoint, command, without, with_words):
    script = scripts.oci_runscript(entrypoint, command)
    assert shell(SHELLS[0], script) == without
    if with_words is not None:
        assert shell(SHELLS[0], script, "x", "y") == with_words


def test_arguments_replace_a_command_and_are_never_evaluated():
    script = scripts.oci_runscript([], ["false"])
    assert shell(SHELLS[0], script, "echo", "$HOME", "`id`") == "$HOME `id`\n"


def test_image_without_entrypoint_and_command_runs_a_shell():
    script = scripts.oci_runscript([], [])
    assert script.endswith("exec /bin/sh\n")
    assert shell(SHELLS[0], script, "echo", "hi") == "hi\n"


def test_section_arguments_go_on_the_first_line():
    assert scripts.section_script("  echo a\n") == "#!/bin/sh\n\n  echo a\n"
    assert scripts.section_script("echo a", "-x -e").startswith("#!/bin/sh -x -e\n\necho a\n")
    assert scripts.section_script("#!/usr/bin/python3\nprint()\n", "-x") == "#!/usr/bin/python3\nprint()\n"


def test_environment_sections_are_appended():
    once = scripts.append_environment("", "export A=1")
    twice = scripts.append_environment(once, 'export B="$A$A"\n')
    assert shell(SHELLS[0], twice + "\necho $B") == "11\n"


@pytest.mark.parametrize("path", SHELLS)
@pytest.mark.parametrize(
    "script",
    [getattr(scripts, name) for name in dir(scripts) if name.startswith(("ENV_", "ACTION_"))],
    ids=[name for name in dir(scripts) if name.startswith(("ENV_", "ACTION_"))],
)
def test_scripts_are_good_posix_sh(path, script):
    applet = ["sh"] if path.endswith("busybox") else []
    result = subprocess.run([path, *applet, "-n"], input=script.encode(), capture_output=True, check=False)
    assert (result.returncode, result.stderr) == (0, b"")


def test_library_and_path_variables_are_composed():
    tail = '\necho "$LD_LIBRARY_PATH|$PATH|${SING_USER_DEFINED_PATH-unset}"'
    script = scripts.ENV_LIBRARIES + scripts.ENV_RUNTIME + tail
    environment = {"SING_USER_DEFINED_PREPEND_PATH": "/a", "SING_USER_DEFINED_APPEND_PATH": "/z"}
    assert shell(SHELLS[0], script, env=environment) == "/.singularity.d/libs|/a:/usr/bin:/bin:/z|unset\n"
    environment = {"LD_LIBRARY_PATH": "/x", "SING_USER_DEFINED_PATH": "/only"}
    assert shell(SHELLS[0], script, env=environment) == "/x:/.singularity.d/libs|/only|unset\n"
