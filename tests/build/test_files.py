# SPDX-License-Identifier: Apache-2.0
"""%files: what cp does, inside the image only; cp itself is the judge."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from pysingularity.build.files import Copier
from pysingularity.errors import RecipeError
from pysingularity.recipe.sections import FilePair


@pytest.fixture
def world(tmp_path) -> Path:
    source = tmp_path / "src"
    (source / "dir/inner").mkdir(parents=True)
    (source / "dir/a").write_text("a")
    (source / "dir/inner/b").write_text("b")
    (source / "dir/link").symlink_to("a")
    (source / "file").write_text("file")
    (source / "exe").write_text("#!/bin/sh\n")
    (source / "exe").chmod(0o755)
    (source / "my file").write_text("blank")
    (source / "x.py").write_text("x")
    (source / "y.py").write_text("y")
    root = tmp_path / "root"
    (root / "opt").mkdir(parents=True)
    (root / "usr/lib").mkdir(parents=True)
    (root / "lib").symlink_to("usr/lib")
    (root / "etc").mkdir()
    return tmp_path


def copy(world: Path, source: str, target: str = "", **options) -> None:
    with Copier(str(world / "root"), directory=str(world / "src"), file="x.def") as copier:
        copier.copy(FilePair(source, target, "", 7), **options)


def tree(root: Path) -> dict[str, object]:
    found: dict[str, object] = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if path.is_symlink():
            found[name] = os.readlink(path)
        elif path.is_dir():
            found[name] = "dir"
        else:
            found[name] = (path.read_bytes(), oct(path.stat().st_mode & 0o777))
    return found


CASES = [
    ("file", "/opt/new"),
    ("file", "/opt"),
    ("file", "/opt/"),
    ("file", "/made/deep/new"),
    ("file", "/made/deep/"),
    ("exe", "/bin/exe"),
    ("my file", "/opt/"),
    ("dir", "/opt"),
    ("dir", "/data"),
    ("dir", "/data/"),
    ("dir/", "/data"),
    ("dir/.", "/data"),
    ("dir", "/lib"),
    ("*.py", "/opt/"),
    ("*.py", "/scripts"),
    ("[x]*", "/opt"),
    ("dir/link", "/opt/"),
]


@pytest.mark.parametrize(("source", "target"), CASES)
def test_result_is_that_of_cp_fLr(world, source, target):
    judged = world / "judged"
    shutil.copytree(world / "root", judged, symlinks=True)
    names = sorted((world / "src").glob(source)) if "*" in source else [world / "src" / source]
    words = [str(name) + ("/." if source.endswith("/.") else "") for name in names]
    place = f"{judged}{target}"
    os.makedirs(place if target.endswith("/") or len(words) > 1 else os.path.dirname(place), exist_ok=True)
    if target == "/lib":
        place = f"{judged}/usr/lib"
    for word in words:
        subprocess.run(["cp", "-fLr", word, place], check=True, umask=0o022)
    copy(world, source, target)
    assert tree(world / "root") == tree(judged)


def test_missing_target_keeps_the_path_of_the_source(world):
    copy(world, "dir/a")
    assert (world / "root/dir/a").read_text() == "a"
    copy(world, str(world / "src/file"))
    assert (world / "root" / str(world / "src/file")[1:]).read_text() == "file"


def test_links_of_a_hostile_image_never_lead_out_of_it(world):
    victim = world / "victim"
    victim.mkdir()
    root = world / "root"
    (root / "out").symlink_to(victim)
    (root / "up").symlink_to("../../../../../../../../../../.." + str(victim))
    (root / "opt/file").symlink_to(victim / "file")
    for target in ("/out/x", "/up/x", "/up/"):
        with pytest.raises(RecipeError):
            copy(world, "file", target)
    copy(world, "file", "/opt/")
    copy(world, "file", "/../../victim2/x")
    assert list(victim.iterdir()) == []
    assert (root / "victim2/x").read_text() == "file"
    assert (root / "opt/file").read_text() == "file"


def test_link_to_a_folder_of_the_image_is_followed_inside_it(world):
    (world / "src/tree/lib").mkdir(parents=True)
    (world / "src/tree/lib/x.so").write_text("so")
    copy(world, "tree/.", "/")
    assert (world / "root/lib").is_symlink()
    assert (world / "root/usr/lib/x.so").read_text() == "so"


def test_existing_file_with_other_names_keeps_its_content_there(world):
    (world / "root/opt/file").write_text("old")
    os.link(world / "root/opt/file", world / "root/opt/other")
    copy(world, "file", "/opt/file")
    assert (world / "root/opt/other").read_text() == "old"
    assert (world / "root/opt/file").read_text() == "file"


def test_setuid_and_group_write_do_not_pass(world):
    (world / "src/exe").chmod(0o6777)
    copy(world, "exe", "/opt/")
    assert (world / "root/opt/exe").stat().st_mode & 0o7777 == 0o755


@pytest.mark.parametrize(
    ("source", "target", "words"),
    [
        ("nosuch", "/opt/", "there is no file nosuch"),
        ("no*such", "/opt/", "there is no file"),
        ("file", "/etc/../opt/blocked/x", "is a file, not a folder"),
        ("dir", "/opt/blocked", "is a file, not a folder"),
        ("broken", "/opt/", "no such file"),
        ("loop", "/data", "contains itself"),
    ],
)
def test_what_cannot_be_copied_is_an_error_with_its_line(world, source, target, words):
    (world / "root/opt/blocked").write_text("")
    (world / "src/broken").symlink_to("nowhere")
    (world / "src/loop").mkdir()
    (world / "src/loop/again").symlink_to("..")
    (world / "src/loop/self").symlink_to(".")
    if source == "loop":
        shutil.rmtree(world / "src/dir")
        (world / "src/broken").unlink()
    with pytest.raises(RecipeError) as caught:
        copy(world, source, target)
    assert words in caught.value.message
    assert str(caught.value).startswith("x.def:7: ")


def test_files_of_a_stage_are_resolved_in_it_and_keep_inner_links(world):
    stage = world / "stage"
    (stage / "app/sub").mkdir(parents=True)
    (stage / "app/sub/x").write_text("x")
    (stage / "app/passwd").symlink_to("/etc/passwd")
    (stage / "current").symlink_to("/app")
    with Copier(str(world / "root"), directory=str(world), file="x.def") as copier:
        copier.copy(FilePair("/current", "/opt/new", "one", 3), stage=str(stage))
        copier.copy(FilePair("/app/s*", "", "one", 4), stage=str(stage))
        with pytest.raises(RecipeError, match='in the stage "one"'):
            copier.copy(FilePair("/etc/passwd", "", "one", 5), stage=str(stage))
    assert (world / "root/opt/new/sub/x").read_text() == "x"
    assert os.readlink(world / "root/opt/new/passwd") == "/etc/passwd"
    assert (world / "root/app/sub/x").read_text() == "x"


def test_hostile_stage_gives_no_file_of_the_host(world):
    stage = world / "stage"
    stage.mkdir()
    (stage / "secret").symlink_to(world / "src/file")
    with (
        Copier(str(world / "root"), directory=str(world), file="x.def") as copier,
        pytest.raises(RecipeError),
    ):
        copier.copy(FilePair("/secret", "/opt/x", "one", 3), stage=str(stage))


def test_big_file_with_a_hole_is_copied_whole(world):
    with open(world / "src/big", "wb") as stream:
        stream.seek(5 << 20)
        stream.write(b"end")
    copy(world, "big", "/opt/")
    assert (world / "root/opt/big").stat().st_size == (5 << 20) + 3
    assert (world / "root/opt/big").read_bytes().endswith(b"end")
