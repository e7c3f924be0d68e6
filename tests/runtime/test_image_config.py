# SPDX-License-Identifier: Apache-2.0
"""WORKDIR and USER of OCI images: honoured when asked for, by an ordinary user; ENV and CMD survive on the way."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from containers import busybox, make_tree
from pysingularity.errors import ImageError
from pysingularity.runtime.imageconfig import look_up
from registries import digest, tar_of

__all__ = ["busybox"]
SINGULARITY = str(Path(sys.executable).parent / "singularity")
PASSWD = b"root:x:0:0:root:/root:/bin/sh\napp:x:123:45:App:/srv:/bin/sh\n"
GROUP = b"root:x:0:\nlab:x:77:\n"


@pytest.fixture
def image(as_user, busybox, tmp_path):
    """Return a function that makes a SIF of an OCI configuration, over busybox."""
    tree = make_tree(tmp_path / "tree", busybox)
    (tree / "etc/passwd").write_bytes(PASSWD)
    (tree / "etc/group").write_bytes(GROUP)
    (tree / "srv/data").mkdir(parents=True)
    layer = subprocess.run(
        ["tar", "-c", "--owner=0", "--group=0", "-C", tree, "."], check=True, capture_output=True
    ).stdout

    def make(**config) -> str:
        text = json.dumps({"architecture": "amd64", "rootfs": {"diff_ids": [digest(layer)]}, "config": config}).encode()
        manifest = [{"Config": "c.json", "RepoTags": ["x:1"], "Layers": ["l.tar"]}]
        data = tar_of([("manifest.json", json.dumps(manifest).encode()), ("c.json", text), ("l.tar", layer)])
        as_user.write("image.tar", data)
        as_user([SINGULARITY, "-q", "pull", "-F", "image.sif", "docker-archive:image.tar"], check=True)
        return "image.sif"

    return make


@pytest.mark.usefixtures("fuse")
def test_folder_and_user_of_the_image_are_taken_when_asked_for(as_user, image):
    path = image(WorkingDir="/srv/data", User="app:lab", Env=["PATH=/bin"], Cmd=["sh", "-c", "pwd; id -u; id -g"])

    def run(*options):
        result = as_user([SINGULARITY, "run", *options, path], check=True)
        return result.stdout.split()

    usual = run()
    assert usual[1:] == [str(as_user.uid), str(as_user.gid)] and usual[0] != "/srv/data"
    assert run("--image-cwd") == ["/srv/data", *usual[1:]]
    assert run("--image-user") == [usual[0], "123", "77"]
    assert run("--compat") == ["/srv/data", "123", "77"]
    assert run("--compat", "--cwd", "/tmp") == ["/tmp", "123", "77"]
    assert run("--compat", "--fakeroot")[1] == "0"
    # What is written outside belongs to the caller.
    as_user([SINGULARITY, "exec", "--image-user", "-B", f"{as_user.tmp}:/opt", path, "touch", "/opt/mine"], check=True)
    assert (as_user.tmp / "mine").stat().st_uid == as_user.uid
    said = as_user([SINGULARITY, "exec", "--image-user", path, "sh", "-c", "id -un; echo $USER"], check=True).stdout
    assert said.split() == ["app", "app"]
    both = as_user([SINGULARITY, "exec", "--image-user", "--fakeroot", path, "true"])
    assert both.returncode == 1 and "cannot both" in both.stderr


@pytest.mark.usefixtures("fuse")
def test_user_without_an_entry_and_one_that_is_missing(as_user, image):
    path = image(User="4321", Cmd=["/bin/id", "-u"])
    assert as_user([SINGULARITY, "run", "--image-user", path], check=True).stdout == "4321\n"
    path = image(User="nobody-here", Cmd=["/bin/id"])
    refused = as_user([SINGULARITY, "run", "--image-user", path])
    assert refused.returncode == 255 and "'nobody-here'" in refused.stderr and len(refused.stderr.splitlines()) == 1
    as_user([SINGULARITY, "run", path], check=True)


@pytest.mark.usefixtures("fuse")
def test_values_reach_the_program_as_the_image_has_them(as_user, image):
    awkward = "a $HOME `id` \"quoted\" 'single' \\ back\nline\ttab é } { * ? ~ # ; & | < >"
    path = image(
        Env=[f"AWKWARD={awkward}", "PATH=/bin", "EMPTY="], Entrypoint=["/bin/printf", "%s|"], Cmd=[awkward, "b"]
    )
    assert as_user([SINGULARITY, "run", path], check=True).stdout == f"{awkward}|b|"
    assert as_user([SINGULARITY, "run", path, "$X", "`id`"], check=True).stdout == "$X|`id`|"
    found = as_user([SINGULARITY, "exec", path, "/bin/sh", "-c", 'printf %s "$AWKWARD"'], check=True).stdout
    assert found == awkward


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("app", (123, 45, "app")),
        ("123", (123, 45, "app")),
        ("app:lab", (123, 77, "app")),
        ("app:8", (123, 8, "app")),
        ("5000", (5000, 0, "5000")),
        ("5000:lab", (5000, 77, "5000")),
        ("root", (0, 0, "root")),
    ],
)
def test_users_are_looked_up_as_docker_does(text, found):
    assert look_up(text, PASSWD, GROUP, "x") == found


@pytest.mark.parametrize("text", ["nobody", "app:nogroup", "99999999999", "1:99999999999", ":5", "-1"])
def test_users_that_are_none_are_refused(text):
    with pytest.raises(ImageError):
        look_up(text, PASSWD, GROUP, "x")
