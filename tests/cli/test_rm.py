# SPDX-License-Identifier: Apache-2.0
"""`singularity rm`: removes sandboxes of all owners, and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from pysingularity.cli import rm
from pysingularity.cli.main import main
from pysingularity.errors import UserError
from pysingularity.image.remove import remove_deeply

FILL = """
import os, sys
from pysingularity.runtime.rootless import become_root
become_root()
root = sys.argv[1]
os.makedirs(root + "/etc/deep")
for name, owner in (("a", 101), ("etc/b", 1000), ("etc/deep/c", 0)):
    open(f"{root}/{name}", "w").close()
    os.chown(f"{root}/{name}", owner, owner)
os.chown(root + "/etc/deep", 33, 33)
os.chmod(root + "/etc/deep", 0o000)
os.chown(root + "/etc", 33, 33)
os.chmod(root + "/etc", 0o500)
"""


@pytest.fixture
def box(tmp_path):
    root = tmp_path / "box"
    (root / "etc").mkdir(parents=True)
    (root / "etc/passwd").touch()
    return root


@pytest.mark.rootless
def test_files_of_subordinate_ids_go(as_subuid_user):
    root = as_subuid_user.tmp / "box"
    as_subuid_user([sys.executable, "-c", FILL, root], check=True)
    assert os.lstat(root / "a").st_uid != as_subuid_user.uid
    assert as_subuid_user(["rm", "-rf", root]).returncode != 0
    result = as_subuid_user([sys.executable, "-m", "pysingularity", "rm", root])
    assert result.returncode == 0, result.stderr
    assert not root.exists()


@pytest.mark.rootless
def test_files_of_somebody_else_stay_and_are_named(as_plain_user):
    if not as_plain_user.other:
        pytest.skip("needs to be started as root, to make a file of somebody else")
    root = as_plain_user.tmp / "box"
    as_plain_user.write("box/etc/mine")
    (root / "locked").mkdir(mode=0o755)
    (root / "locked/theirs").touch()
    result = as_plain_user([sys.executable, "-m", "pysingularity", "rm", root])
    assert result.returncode == 255
    assert "belongs to user 0" in result.stderr
    assert (root / "locked/theirs").exists()


def test_sandbox_goes(box):
    assert main(["rm", str(box)]) == 0
    assert not box.exists()


def test_folders_without_permissions_go(as_user):
    root = as_user.tmp / "box"
    for name in ("etc/a/b/c", "usr/x"):
        as_user.write(f"box/{name}")
    for name in ("etc/a/b", "etc/a", "etc"):
        (root / name).chmod(0)
    assert as_user([sys.executable, "-m", "pysingularity", "rm", root]).returncode == 0
    assert not root.exists()


def test_links_are_removed_and_not_followed(box, tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/file").touch()
    (box / "etc/link").symlink_to(tmp_path / "precious")
    (box / "usr").symlink_to(tmp_path / "precious")
    assert main(["rm", str(box)]) == 0
    assert (tmp_path / "precious/file").exists()


def test_deeper_than_any_path_may_be(box):
    script = "import os\nfor n in range(3000):\n    os.mkdir('d'); open('f', 'w').close(); os.chdir('d')\n"
    subprocess.run([sys.executable, "-c", script], cwd=box, check=True)
    assert remove_deeply(str(box)) == 6003
    assert not box.exists()


def test_names_that_are_in_the_way_do_no_harm(box):
    for number in range(1, 4):
        (box / f".removed-{number}").touch()
        (box / f"usr/{number}/x/y").mkdir(parents=True)
    remove_deeply(str(box))
    assert not box.exists()


@pytest.mark.root
def test_mounts_inside_are_left_alone(root_only, box, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/file").touch()
    (box / "mnt").mkdir()
    command = f"{sys.executable} -m pysingularity rm {box}"
    script = f"mount -t tmpfs tmpfs {box}/mnt && touch {box}/mnt/f && {command}; ls {box}/mnt"
    result = subprocess.run(["unshare", "-m", "sh", "-c", script], capture_output=True, text=True, check=False)
    assert result.stdout == "f\n"
    assert "mounted" in result.stderr


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda path: None, "no such"),
        (lambda path: path.touch(), "not a folder"),
        (lambda path: path.symlink_to("/tmp"), "is a link"),
        (lambda path: (path / "thesis").mkdir(parents=True), "does not look like a sandbox"),
    ],
)
def test_what_is_no_sandbox_is_refused(tmp_path, make, word):
    path = tmp_path / "x"
    make(path)
    with pytest.raises(UserError, match=word):
        rm.check(str(path) + "/", {}, False)


def test_dear_folders_are_refused_even_by_force(tmp_path, monkeypatch):
    home = tmp_path / "home"
    (home / "etc/here").mkdir(parents=True)
    for path in ("/", "//", "/.", str(tmp_path), str(home), f"{home}/etc/.."):
        with pytest.raises(UserError, match="is or contains"):
            rm.check(path, {"HOME": str(home)}, True)
    monkeypatch.chdir(home / "etc/here")
    with pytest.raises(UserError, match="where you are"):
        rm.check("..", {"HOME": "/nowhere"}, True)


def test_nothing_is_removed_when_one_is_refused(box, tmp_path):
    assert main(["rm", str(box), str(tmp_path / "none")]) == 255
    assert box.exists()


def test_force_removes_any_folder(tmp_path):
    (tmp_path / "x/thesis").mkdir(parents=True)
    assert main(["rm", "--force", str(tmp_path / "x")]) == 0
    assert not (tmp_path / "x").exists()
