# SPDX-License-Identifier: Apache-2.0
"""Cached steps: a recipe cut by `#step` lines runs only what is new, and the image is the same as without."""

from __future__ import annotations

import json
import os
import pty
import select
import time

import pytest

from containers import tree_of
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


def test_image_of_an_unchanged_plan_is_taken_as_it_is(user):
    """Under its own name nothing is written, under another it is copied; a changed file is never taken."""
    statuses(user, "x.sif", "x.def")
    image, before = user.tmp / "x.sif", (user.tmp / "x.sif").stat()
    assert statuses(user, "--force", "x.sif", "x.def")["SIF file"] == "cached"
    assert (image.stat().st_ino, image.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert statuses(user, "y.sif", "x.def")["SIF file"] == "cached"
    assert (user.tmp / "y.sif").read_bytes() == image.read_bytes()
    assert statuses(user, "--arch", "386", "z.sif", "x.def").get("SIF file") == "done"
    with open(image, "r+b") as file:  # same size, and its times are set back
        file.seek(-1, 2)
        file.write(b"?")
    os.utime(image, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert statuses(user, "w.sif", "x.def")["SIF file"] == "done"
    assert log_of(user, "w.sif") == "one\ntwo\nthree\n"


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


CHANGES = """\
Bootstrap: localimage
From: {base}

%post
    #step make
    mkdir -p /opt/a /opt/emptied /opt/becomes-file
    echo 1 > /opt/a/one; ln /opt/a/one /opt/a/two; ln -s one /opt/a/link
    echo x > /opt/emptied/x; echo x > /opt/becomes-folder; echo x > /opt/gone
    chown 5:6 /opt/a/one; chmod 4750 /opt/a/one; chown -h 7:8 /opt/a/link
    mkdir -p /opt/mode; chmod 1777 /opt/mode; chown 9 /opt/mode
    #step change
    rm /opt/gone /opt/emptied/x /opt/becomes-folder; rm -r /opt/becomes-file
    mkdir /opt/becomes-folder; echo x > /opt/becomes-folder/in; echo x > /opt/becomes-file
    chown 10:11 /opt/becomes-file
    mv /opt/a /opt/moved
    ln /opt/moved/one /opt/three
    #step {last}
    touch /opt/{last}
"""


def test_what_steps_change_is_the_same_from_the_cache(user, base):
    user.write("x.def", CHANGES.format(base=base, last="last"))
    statuses(user, "--no-cache", "plain.sif", "x.def")
    statuses(user, "x.sif", "x.def")
    statuses(user, "again.sif", "x.def")
    plain = tree_of(user, "plain.sif", "opt")
    assert plain["opt/moved/one"][1:4] == ("0o4750", 5, 6) and plain["opt/moved/link"][2:4] == (7, 8)
    assert plain["opt/moved/one"][5] == plain["opt/moved/two"][5] == plain["opt/three"][5]
    assert "opt/gone" not in plain and plain["opt/becomes-file"][:4] == ("file", "0o644", 10, 11)
    assert tree_of(user, "x.sif", "opt") == plain == tree_of(user, "again.sif", "opt")
    # From the middle: what was unpacked again is what the step had left.
    user.write("x.def", CHANGES.format(base=base, last="other"))
    found = statuses(user, "x.sif", "x.def")
    assert [found[name] for name in found if name.startswith("%post")] == ["cached", "cached", "done"]
    other = tree_of(user, "x.sif", "opt")
    assert {**other, "opt/last": 0} == {**plain, "opt/other": other["opt/other"], "opt/last": 0}


def test_step_that_speaks_of_a_failed_network_is_not_kept(user, base):
    words = "W: Some index files failed to download."
    script = f"    #step one\n    echo fine\n    #step two\n    echo '{words}'\n    #step three\n"
    user.write("x.def", f"Bootstrap: localimage\nFrom: {base}\n%post\n{script}    echo three\n")
    first = user(["singularity", "build", "-F", "x.sif", "x.def"])
    assert first.returncode == 0 and "not kept in the cache" in first.stderr
    found = statuses(user, "x.sif", "x.def")
    assert [found[name] for name in found if name.startswith("%post")] == ["cached", "done", "done"]


def test_base_that_moved_runs_the_stages_behind_it_again(user, base):
    text = (
        "Bootstrap: localimage\nFrom: a.sif\nStage: one\n%post\n    #step one\n    cp /mark /copy\n"
        f"Bootstrap: localimage\nFrom: {base}\n%files from one\n    /copy\n"
        "%post\n    #step two\n    cat /copy > /said\n"
    )
    user.write("x.def", text)
    for word in ("first", "second"):
        user.write("a.def", f"Bootstrap: localimage\nFrom: {base}\n%post\n    echo {word} > /mark\n")
        user(["singularity", "build", "-F", "a.sif", "a.def"], check=True)
        statuses(user, "x.sif", "x.def")
        assert user(["singularity", "exec", "x.sif", "cat", "/said"], check=True).stdout == f"{word}\n"
    assert {status for name, status in statuses(user, "x.sif", "x.def").items() if "%post" in name} == {"cached"}


def test_cache_forgets_steps_to_stay_in_its_limit(user):
    statuses(user, "x.sif", "x.def")
    size = sum(path.stat().st_size for path in (user.tmp / "cache/cache/image").glob("*.sif"))
    user.environ["SINGULARITY_CACHE_SIZE"] = str(size // 2)
    # What was used a moment ago is safe from cleaning for space.
    for path in (user.tmp / "cache").rglob("*"):
        os.utime(path, (time.time() - 9000,) * 2, follow_symlinks=False)
    user.write("data", "changed")
    statuses(user, "x.sif", "x.def")
    assert log_of(user, "x.sif") == "one\ntwo\nthree\n"
    left = sum(path.stat().st_size for path in (user.tmp / "cache/cache/image").glob("*.sif"))
    assert left < size * 2


@pytest.mark.parametrize(
    ("name", "text", "shown"),
    [
        ("x.def", "Bootstrap: localimage\nFrom: {base}\n%post\n    echo here > /marker\n    false\n", "here"),
        (
            "kept.def",
            "Bootstrap: localimage\nFrom: {base}\n%post\n#step 1\necho here > /marker\n#step 2\nfalse\n",
            "here",
        ),
        ("Dockerfile", "FROM {base}\nENV V=var\nWORKDIR /w\nRUN echo here > /marker; exit 3\n", "here var /w"),
    ],
)
def test_debug_shell_opens_where_a_step_failed(user, base, name, text, shown):
    user.write(name, text.format(base=base))
    if name == "kept.def":
        assert user(["singularity", "build", "y.sif", name]).returncode == 255
    ours, theirs = pty.openpty()
    process = user.popen(
        ["setsid", "--ctty", "--wait", "singularity", "build", "--debug-shell", "y.sif", name],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    said, asked = b"", False
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if select.select([ours], [], [], 0.2)[0]:
            try:
                data = os.read(ours, 65536)
            except OSError:  # the other side is closed
                break
            said += data
        elif not asked and b"leave it with: exit" in said:
            os.write(ours, b"echo =$(cat /marker) $V $PWD=; exit\n")
            asked = True
    assert process.wait(timeout=30) == 255
    os.close(ours)
    text = said.decode(errors="replace")
    words = f"={shown} " if name != "Dockerfile" else f"={shown}="
    assert any(line.startswith(words) for line in text.splitlines()), text
    assert not (user.tmp / "y.sif").exists()
