# SPDX-License-Identifier: Apache-2.0
"""The plan: which steps, in which order, and what their hashes depend on."""

from __future__ import annotations

import pytest

from pysingularity.build import plan
from pysingularity.build.request import IMAGE, RECIPE, BuildRequest
from pysingularity.build.sections import Wanted
from pysingularity.recipe.parser import parse

FULL = """\
Bootstrap: scratch
Stage: one
%post
  make

Bootstrap: localimage
From: base.sif
%pre
  true
%apprun foo
  foo
%appinstall foo
  install foo
%files from one
  /x
%files
  data /opt/
%setup
  true
%post
  echo
%test
  true
"""


def make(text: str, **options) -> plan.Plan:
    return plan.make(BuildRequest("/x.sif", "x.def", RECIPE, parse(text, "x.def", {}), **options))


def kinds(found: plan.Plan) -> list[str]:
    return [step.kind for step in found.steps]


def test_steps_are_in_the_order_of_the_sections_rules(tmp_path):
    found = make(FULL, directory=str(tmp_path))
    assert kinds(found) == [
        *(plan.BOOTSTRAP, plan.POST),
        *(plan.PRE, plan.BOOTSTRAP, plan.APPS, plan.STAGE_FILES, plan.SETUP, plan.FILES, plan.POST),
        *(plan.METADATA, plan.TEST, plan.ASSEMBLE),
    ]
    assert [step.number for step in found.steps] == list(range(1, 13))
    assert "install foo" in found.steps[8].text


@pytest.mark.parametrize(
    ("options", "gone"),
    [
        ({"notest": True}, {plan.TEST}),
        ({"wanted": Wanted(["post"])}, {plan.PRE, plan.SETUP, plan.FILES, plan.STAGE_FILES, plan.TEST}),
        ({"wanted": Wanted(["none"])}, {plan.PRE, plan.SETUP, plan.FILES, plan.STAGE_FILES, plan.TEST, plan.POST}),
        ({"update": True, "sandbox": True}, {plan.BOOTSTRAP}),
    ],
)
def test_options_take_steps_out(tmp_path, options, gone):
    everything, found = (
        kinds(make(FULL, directory=str(tmp_path))),
        kinds(make(FULL, directory=str(tmp_path), **options)),
    )
    assert set(everything) - set(found) == gone


def test_hashes_change_with_content_and_only_from_there_on(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/a").write_text("1")
    before = make(FULL, directory=str(tmp_path)).steps
    (tmp_path / "data/a").write_text("2")
    after = make(FULL, directory=str(tmp_path)).steps
    same = [one.id == two.id for one, two in zip(before, after, strict=True)]
    assert same == [True] * 7 + [False] * 5


@pytest.mark.parametrize("patience", [0.0, 60.0])
def test_reading_many_files_is_said_once_when_it_takes_long(tmp_path, monkeypatch, capfd, patience):
    (tmp_path / "data").mkdir()
    for name in "abc":
        (tmp_path / "data" / name).write_bytes(bytes(3 << 20))
    hashes = [make(FULL, directory=str(tmp_path)).steps[-1].id]
    capfd.readouterr()
    monkeypatch.setattr(plan, "PATIENCE", patience)
    hashes.append(make(FULL, directory=str(tmp_path)).steps[-1].id)
    assert hashes[0] == hashes[1]
    assert capfd.readouterr().err.count("reading what %files copies") == (0 if patience else 1)


def test_hash_does_not_depend_on_the_time_of_files(tmp_path):
    (tmp_path / "data").write_text("1")
    before = make(FULL, directory=str(tmp_path)).steps[-1].id
    (tmp_path / "data").write_text("1")
    assert make(FULL, directory=str(tmp_path)).steps[-1].id == before
    (tmp_path / "data").chmod(0o755)
    assert make(FULL, directory=str(tmp_path)).steps[-1].id != before


LOCAL = "Bootstrap: localimage\nFrom: base.sif\n"


@pytest.mark.parametrize(
    ("text", "options", "reused"),
    [
        (LOCAL + "%labels\nA 1\n%files\na\n%environment\nX=1\n", {}, True),
        (LOCAL + "%post\n#\n", {}, False),
        (LOCAL + "%post\n#\n", {"wanted": Wanted(["labels"])}, True),
        (LOCAL + "%setup\ntrue\n", {}, False),
        (LOCAL + "%test\ntrue\n", {}, False),
        (LOCAL + "%test\ntrue\n", {"notest": True}, True),
        (LOCAL, {"sandbox": True}, False),
        (LOCAL, {"fix_perms": True}, False),
        ("Bootstrap: scratch\n%labels\nA 1\n", {}, False),
    ],
)
def test_blocks_of_the_base_are_reused_when_nothing_runs(text, options, reused):
    assert make(text, **options).has(plan.REUSE) is reused


def test_build_without_a_recipe_is_one_step():
    assert kinds(plan.make(BuildRequest("/x.sif", "y.sif", IMAGE))) == [plan.CONVERT]
