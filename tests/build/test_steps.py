# SPDX-License-Identifier: Apache-2.0
"""Cached steps: a recipe cut by `#step` lines runs only what is new, and the image is the same as without."""

from __future__ import annotations

import json

import pytest

from pysingularity.build.plan import post_parts

pytestmark = pytest.mark.rootless

RECIPE = """\
Bootstrap: localimage
From: {base}

%files
    data /opt/

%post
    #step one
    echo one >> /opt/log
    dd if=/dev/urandom of=/opt/big bs=1M count=3
    echo "Color green" >> "$SINGULARITY_LABELS"
    #step two
    echo two >> /opt/log
    chown 5:6 /opt/data
    #step three
    echo {last} >> /opt/log
    rm -f /opt/big

%test
    test -e /opt/log
"""


@pytest.fixture(params=["as_subuid_user", "as_plain_user"])
def user(request, base):
    found = request.getfixturevalue(request.param)
    found.write("data", "content")
    found.write("x.def", RECIPE.format(base=base, last="three"))
    return found


def statuses(user, *words) -> dict[str, str]:
    result = user(["singularity", "build", "--json", "-F", *words])
    assert result.returncode == 0, result.stderr
    found = [json.loads(line) for line in result.stdout.splitlines()]
    titles = {event["step"]: event["title"] for event in found if event["event"] == "start"}
    return {titles[event["step"]].split(" /")[0]: event["status"] for event in found if event["event"] == "end"}


def log_of(user, image: str) -> str:
    ran = user(["singularity", "exec", image, "cat", "/opt/log"])
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_parts_of_a_script():
    assert post_parts("a\nb\n") == [(None, "a\nb\n")]
    assert post_parts("# c\n  #step One\na\n# Step: two\nb\n") == [("One", "a\n"), ("two", "b\n")]
    assert post_parts("a\n#step\nb\n") == [("", "a\n"), ("", "b\n")]
    assert post_parts("#steps are not\n#stepping\n") == [(None, "#steps are not\n#stepping\n")]


def test_second_build_runs_nothing(user):
    first = statuses(user, "x.sif", "x.def")
    assert set(first.values()) == {"done"}
    again = statuses(user, "y.sif", "x.def")
    assert [again[name] for name in again if name.startswith("%post")] == ["cached"] * 3
    assert again["%test"] == "cached"
    assert log_of(user, "y.sif") == "one\ntwo\nthree\n"
    labels = user(["singularity", "inspect", "y.sif"], check=True).stdout
    assert "Color: green" in labels


def test_change_in_the_last_step_runs_that_one_alone(user, base):
    statuses(user, "x.sif", "x.def")
    user.write("x.def", RECIPE.format(base=base, last="another"))
    found = statuses(user, "x.sif", "x.def")
    assert [found[name] for name in found if name.startswith("%post")] == ["cached", "cached", "done"]
    assert log_of(user, "x.sif") == "one\ntwo\nanother\n"


def test_changed_file_runs_everything_again(user):
    statuses(user, "x.sif", "x.def")
    user.write("data", "changed")
    assert set(statuses(user, "x.sif", "x.def").values()) == {"done"}


def test_no_cache_neither_reads_nor_writes(user):
    assert set(statuses(user, "--no-cache", "x.sif", "x.def").values()) == {"done"}
    assert set(statuses(user, "x.sif", "x.def").values()) == {"done"}
    assert set(statuses(user, "--no-cache", "x.sif", "x.def").values()) == {"done"}


def test_failed_step_is_not_kept_and_the_ones_before_are(user, base):
    user.write("bad.def", RECIPE.format(base=base, last="x\n    exit 9"))
    assert user(["singularity", "build", "bad.sif", "bad.def"]).returncode == 255
    found = user(["singularity", "build", "--json", "bad.sif", "bad.def"])
    ends = [json.loads(line) for line in found.stdout.splitlines()]
    assert [event["status"] for event in ends if event["event"] == "end"] == ["cached"] * 4 + ["failed"]


def test_sandbox_is_filled_from_the_cache(user):
    statuses(user, "x.sif", "x.def")
    found = statuses(user, "--sandbox", "box", "x.def")
    assert [found[name] for name in found if name.startswith("%post")] == ["cached"] * 3
    assert (user.tmp / "box/opt/log").read_text() == "one\ntwo\nthree\n"


def test_image_is_as_large_and_owned_as_one_without_cache(user, tool):
    statuses(user, "x.sif", "x.def")
    statuses(user, "--no-cache", "plain.sif", "x.def")
    statuses(user, "again.sif", "x.def")
    sizes = [(user.tmp / name).stat().st_size for name in ("x.sif", "plain.sif", "again.sif")]
    assert max(sizes) - min(sizes) <= 8192
    listings = []
    for name in ("x.sif", "plain.sif", "again.sif"):
        ran = user(["singularity", "exec", "--fakeroot", name, "ls", "-ln", "/opt"])
        listings.append([line.split()[:4] + line.split()[-1:] for line in ran.stdout.splitlines()[1:]])
    assert listings[0] == listings[1] == listings[2] and listings[0]


def test_plan_tells_what_is_cached(user):
    before = user(["singularity", "build", "--plan", "x.sif", "x.def"], check=True).stdout
    assert "cached" not in before
    statuses(user, "x.sif", "x.def")
    lines = user(["singularity", "build", "--plan", "z.sif", "x.def"], check=True).stdout.splitlines()
    assert ["cached" in line for line in lines] == [True] * 5 + [False] * 3
