# SPDX-License-Identifier: Apache-2.0
"""The command line of `build`: what it takes, what it refuses, and the plan it prints."""

from __future__ import annotations

import json

import pytest

from pysingularity.build.request import IMAGE, RECIPE, REFERENCE, SANDBOX
from pysingularity.cli import build
from pysingularity.cli.main import main
from pysingularity.cli.scan import scan
from pysingularity.errors import RecipeError, UsageError, UserError

DEF = "Bootstrap: scratch\n%labels\nA {{ V }}\n%arguments\nV=1\n"


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.def").write_text(DEF)
    return tmp_path


def asked(*words: str, environ: dict[str, str] | None = None):
    return build.request(scan(list(words), build.OPTIONS, environ or {}), environ or {})


def test_kind_is_found_by_content(here):
    (here / "box").mkdir()
    (here / "y.simg").write_bytes(b"hsqs" + bytes(100))
    assert asked("x.sif", "x.def").kind == RECIPE
    assert asked("x.sif", "box").kind == SANDBOX
    assert asked("x.sif", "y.simg").kind == IMAGE
    assert asked("x.sif", "docker://debian:12").kind == REFERENCE


def test_recipe_may_have_any_name(here):
    (here / "Singularity.v1").write_text(DEF)
    assert asked("x.sif", "Singularity.v1").recipe.stages[0].agent == "scratch"


def test_build_arguments_fill_the_recipe(here):
    assert "A 2\n" in asked("--build-arg", "V=2", "x.sif", "x.def").recipe.text
    (here / "args").write_text("V=3\n")
    assert "A 3\n" in asked("--build-arg-file", "args", "x.sif", "x.def").recipe.text
    with pytest.raises(UserError, match="not used"):
        asked("--build-arg", "W=2", "x.sif", "x.def")
    assert asked("--build-arg", "W=2", "--warn-unused-build-args", "x.sif", "x.def").recipe.unused == ("W",)


@pytest.mark.parametrize(
    ("words", "writer"),
    [
        ([], ("", None, 131072, None)),
        (["--compress", "zstd", "--level", "6"], ("zstd", 6, 131072, None)),
        (["--mksquashfs-args", "-comp zstd -Xcompression-level 9 -b 1M -processors 2"], ("zstd", 9, 1 << 20, 2)),
        (["--mksquashfs-args=-noappend -b 256K"], ("", None, 262144, None)),
        (["--level", "3"], ("gzip", 3, 131072, None)),
    ],
)
def test_options_of_mksquashfs_become_our_writers(here, words, writer):
    found = asked(*words, "x.sif", "x.def").writer
    assert (found.compression, found.level, found.block_size, found.threads) == writer


@pytest.mark.parametrize(
    "words",
    [
        ["--mksquashfs-args", "-ef list"],
        ["--mksquashfs-args", "-b 1000"],
        ["--section", "pots"],
        ["--level", "x"],
        ["--update"],
    ],
)
def test_what_cannot_be_understood_is_a_usage_error(here, words):
    with pytest.raises(UsageError):
        asked(*words, "x.sif", "x.def")


def test_unknown_agent_is_refused_with_its_line(here):
    (here / "x.def").write_text("# c\nBootstrap: dokcer\nFrom: x\n")
    with pytest.raises(RecipeError) as caught:
        asked("x.sif", "x.def")
    assert caught.value.line == 2 and "docker" in caught.value.hint


def test_environment_variables_are_options(here):
    found = asked("box", "x.def", environ={"SINGULARITY_SANDBOX": "yes", "SINGULARITY_NOTEST": "1"})
    assert found.sandbox and found.notest


def test_options_without_an_implementation_say_so(here, capfd):
    assert main(["build", "--remote", "x.sif", "x.def"]) == 255
    assert "no remote builder" in capfd.readouterr().err


def entry(folder, name: str, magic: str, flags: str, mask: str = "", first: str = "enabled") -> None:
    lines = [first, f"interpreter /usr/bin/{name}", f"flags: {flags}", "offset 0", f"magic {magic}"]
    (folder / name).write_text("\n".join([*lines, *([f"mask {mask}"] if mask else []), ""]))


ARM64 = "7f454c460201010000000000000000000200b700"
MASK = "ffffffffffffff00fffffffffffffffffeffffff"


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ([], "no emulator is registered"),
        ([("x", ARM64, "F", MASK, "disabled")], "no emulator is registered"),
        ([("x", ARM64.replace("b700", "f300"), "F", MASK)], "no emulator is registered"),
        ([("x", ARM64, "OC", MASK)], "without the flag F"),
        ([("y", ARM64, "F", MASK[:-2]), ("z", "rubbish", "F"), ("x", ARM64, "PF", MASK)], ""),
        (None, "is not mounted"),
    ],
)
def test_another_architecture_needs_an_emulator(here, monkeypatch, entries, words):
    from pysingularity.build import foreign

    folder = here / "binfmt"
    monkeypatch.setattr(foreign, "FOLDER", str(folder))
    monkeypatch.setattr(foreign.emulator, "__defaults__", (str(folder),))
    monkeypatch.setattr(build.os, "uname", lambda: type("Name", (), {"machine": "x86_64"}))
    if entries is not None:
        folder.mkdir()
        (folder / "status").write_text("enabled\n")
        for one in entries:
            entry(folder, *one)
    for text in ("Bootstrap: scratch\n%post\n true\n", "Bootstrap: debootstrap\n", "Bootstrap: busybox\n"):
        (here / "a.def").write_text(text)
        if not words:
            assert asked("--arch", "aarch64", "x.sif", "a.def").arch == "arm64"
            continue
        with pytest.raises(UserError, match=words):
            asked("--arch", "arm64", "x.sif", "a.def")
    assert asked("--arch", "arm64", "x.sif", "x.def").arch == "arm64"  # nothing runs
    assert asked("--arch", "386", "x.sif", "a.def").arch == "386"  # the processor does it
    with pytest.raises(UserError, match="no such architecture"):
        asked("--arch", "pdp11", "x.sif", "a.def")


def test_plan_is_printed_and_nothing_is_done(here, capfd):
    assert main(["build", "--plan", "x.sif", "x.def"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert len(lines) == 3 and "start from scratch" in lines[0]
    assert main(["build", "--plan", "--json", "x.sif", "x.def"]) == 0
    steps = json.loads(capfd.readouterr().out)["steps"]
    assert [step["kind"] for step in steps] == ["bootstrap", "metadata", "assemble"]
    assert not (here / "x.sif").exists()


@pytest.mark.parametrize("words", [["x.sif"], [], ["a", "b", "c"]])
def test_wrong_number_of_arguments_is_status_1(words, capfd):
    assert main(["build", *words]) == 1
    assert "usage" in capfd.readouterr().err


def test_error_of_the_recipe_is_status_255_with_its_place(here, capfd):
    (here / "x.def").write_text("Bootstrap: scratch\n%pots\n")
    assert main(["build", "x.sif", "x.def"]) == 255
    told = capfd.readouterr().err
    assert "x.def:2:1:" in told and "%pots" in told and "%post" in told
