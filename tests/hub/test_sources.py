# SPDX-License-Identifier: Apache-2.0
"""Repositories: which recipes count and which changes concern them, and what hostile ones cannot do."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st

from pysingularity.hub.builds.planning import look, manual, moved
from pysingularity.hub.builds.releases import look_at_tag
from pysingularity.hub.builds.run import second_choice
from pysingularity.hub.catalog import PART
from pysingularity.hub.context import Hub
from pysingularity.hub.errors import Conflict, HubError, Invalid, NotFound, TooMany
from pysingularity.hub.models import Build, Collection, Recipe
from pysingularity.hub.settings import SourceSettings
from pysingularity.hub.sources.discovery import inputs, recipes_of, tag_of, touches
from pysingularity.hub.sources.git import GitError, Mirror, check_branch, check_url

from .world import RECIPE, Repository, made_collection


@pytest.fixture
def sources(tmp_path: Path) -> SourceSettings:
    return SourceSettings(protocols=["https", "file"], local=[str(tmp_path)])


@pytest.fixture
def mirror(repository: Repository, sources: SourceSettings, tmp_path: Path) -> Mirror:
    return Mirror(tmp_path / "mirror.git", f"file://{repository.path}", sources)


@pytest.fixture
def collection(hub: Hub, repository: Repository) -> Collection:
    return made_collection(hub, repository)


def found(mirror: Mirror, commit: str) -> dict[str, tuple[str, str, bool]]:
    mirror.fetch()
    return {one.path: (one.tag, one.problem, one.shadowed) for one in recipes_of(mirror, commit, limit=1 << 20)}


def builds(hub: Hub, **where: object) -> list[Build]:
    with hub.read() as session:
        query = sa.select(Build).order_by(Build.id)
        for name, value in where.items():
            query = query.where(getattr(Build, name) == value)
        return list(session.scalars(query))


def recipes(hub: Hub) -> list[str]:
    return [one.recipe for one in builds(hub)]


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "tag"),
    [
        ("Singularity", "latest"),
        ("deep/er/Singularity", "latest"),
        ("Singularity Recipes/Singularity.gpu", "gpu"),
        ("Singularity.v1.0", "v1.0"),
        ("Singularity.", None),
        ("Singularityx", None),
        ("xSingularity", None),
        ("singularity", None),
        ("Singularity/readme", None),
        ("Dockerfile", None),
    ],
)
def test_name_of_a_recipe_is_its_tag(path: str, tag: str | None):
    assert tag_of(path) == tag


def test_recipes_are_found_in_any_folder(mirror: Mirror, repository: Repository):
    head = repository.commit({"Singularity": RECIPE, "a b/c/Singularity.gpu": RECIPE, "Singularity.d/x": "no"})
    assert found(mirror, head) == {
        "Singularity": ("latest", "", False),
        "a b/c/Singularity.gpu": ("gpu", "", False),
    }


def test_newest_of_a_tag_wins_whatever_its_folder(mirror: Mirror, repository: Repository):
    repository.commit({"a/Singularity": RECIPE})
    repository.commit({"b/Singularity": RECIPE})
    repository.commit({"notes": "x"})
    head = repository.commit({"a/Singularity": RECIPE + "\n"})
    assert [path for path, (_, _, shadowed) in found(mirror, head).items() if not shadowed] == ["a/Singularity"]
    # Both in one commit: the same one every time, the shorter path.
    head = repository.commit({"a/Singularity": RECIPE + "\n\n", "b/Singularity": RECIPE + "\n", "Singularity": RECIPE})
    assert [path for path, (_, _, shadowed) in found(mirror, head).items() if not shadowed] == ["Singularity"]


def test_recipe_that_cannot_be_built_says_why_and_hides_no_other(mirror: Mirror, repository: Repository):
    repository.write({"Singularity.good": RECIPE, "Singularity.bad": "this is no recipe\n", "x/secret": "x"})
    (repository.path / "Singularity.link").symlink_to("/etc/passwd")
    (repository.path / "Singularity.big").write_text("#" * (2 << 20))
    (repository.path / "Singularity.-x").write_text(RECIPE)
    (repository.path / ("Singularity." + "x" * 65)).write_text(RECIPE)
    (repository.path / "Singularity.a b").write_text(RECIPE)
    (repository.path / "Singularity.new\nline").write_text(RECIPE)
    (repository.path / "x" / "Singularity.good").symlink_to("../Singularity.good")
    head = repository.commit()
    problems = {path: problem for path, (_, problem, _) in found(mirror, head).items()}
    assert [path for path, problem in problems.items() if not problem] == ["Singularity.good"]
    assert "symlink" in problems["Singularity.link"]
    assert "bytes" in problems["Singularity.big"]
    assert "tag" in problems["Singularity.-x"]
    assert "symlink" in problems["x/Singularity.good"]
    assert len(problems) == 9


@given(name=st.text(st.characters(blacklist_characters="/\0", blacklist_categories=["Cs"]), max_size=80))
def test_any_file_name_gives_a_tag_that_clients_can_write_or_a_problem(name: str):
    from pysingularity.hub.sources.discovery import _look
    from pysingularity.hub.sources.git import Entry

    path = "Singularity." + name
    tag = tag_of(path)
    if tag is not None:
        one = _look(Entry("100644", "blob", "a" * 40, 10, path), tag, 1 << 20, ("", 0.0), RECIPE.encode())
        assert one.problem or (PART.match(one.tag) and one.tag[0] not in ".-")


# --- what a recipe depends on ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "changed", "concerns"),
    [
        ("data.txt /x", "env/data.txt", True),  # beside the recipe
        ("data.txt /x", "data.txt", True),  # at the root, the second choice
        ("data.txt /x", "other/data.txt", False),
        ("../data.txt /x", "data.txt", True),
        ("../../etc/passwd /x", "etc/passwd", False),
        ("tree /x", "env/tree/deep/file", True),
        ("*.py /x", "env/tool.py", True),
        ("*.py /x", "env/deep/tool.py", False),
        ("src/*/x.c", "src/a/x.c", True),
        (". /x", "anything", True),
        ("/etc/hosts /x", "etc/hosts", False),
    ],
)
def test_files_that_a_recipe_copies_concern_it(files: str, changed: str, concerns: bool):
    text = f"Bootstrap: scratch\n%files\n    {files}\n".encode()
    patterns, _ = inputs(text, "env/Singularity")
    assert touches(patterns, changed) is concerns


def test_setup_may_read_everything_and_other_stages_nothing():
    assert inputs(b"Bootstrap: scratch\n%setup\n    cp x y\n", "Singularity")[0] == ["**"]
    text = b"Bootstrap: docker\nFrom: debian:12\nStage: one\n\nBootstrap: scratch\nStage: two\n"
    text += b"%files from one\n    /a /b\n"
    patterns, base = inputs(text, "Singularity")
    assert patterns == []
    assert base == "scratch"


def test_base_is_a_reference():
    assert inputs(b"Bootstrap: docker\nFrom: debian:12\n", "Singularity")[1] == "docker://debian:12"
    text = b"Bootstrap: docker\nRegistry: reg.example.org\nFrom: lab/x\n"
    assert inputs(text, "Singularity")[1] == "docker://reg.example.org/lab/x"


def test_second_choice_links_only_inside_the_clone():
    text = b"Bootstrap: scratch\n%files\n    data/x.txt\n    ../../out\n    /etc/hosts\n    *.py\n"
    links = second_choice(["env/Singularity", "data/x.txt", "tool.py", "out"], "env/Singularity", text)
    assert links == [("env/data/x.txt", "../../data/x.txt"), ("env/tool.py", "../tool.py")]


# --- looking ---------------------------------------------------------------------------------------------------------


def test_first_look_builds_the_whole_head(hub: Hub, collection: Collection, repository: Repository):
    repository.commit({"Singularity": RECIPE, "x/Singularity.gpu": RECIPE})
    repository.commit({"notes": "nothing about recipes"})
    look(hub, collection.id)
    assert recipes(hub) == ["Singularity", "x/Singularity.gpu"]


def test_only_what_changed_is_built_also_by_copied_files(hub: Hub, collection: Collection, repository: Repository):
    copying = RECIPE + "\n%files\n    data.txt /data.txt\n"
    repository.commit({"Singularity": RECIPE, "env/Singularity.gpu": copying, "env/data.txt": "1", "README": "x"})
    look(hub, collection.id)
    repository.commit({"README": "y"})
    assert look(hub, collection.id).builds == []
    repository.commit({"env/data.txt": "2"})
    plan = look(hub, collection.id)
    assert [one.recipe for one in builds(hub) if one.id in plan.builds] == ["env/Singularity.gpu"]


def test_force_push_and_vanished_history_are_told_by_git(hub: Hub, collection: Collection, repository: Repository):
    first = repository.commit({"Singularity": RECIPE, "Singularity.gpu": RECIPE})
    repository.commit({"Singularity": RECIPE + "\n"})
    look(hub, collection.id)
    repository.git("reset", "--quiet", "--hard", first)
    repository.commit({"Singularity.gpu": RECIPE + "\n"})
    plan = look(hub, collection.id)
    assert sorted(one.recipe for one in builds(hub) if one.id in plan.builds) == ["Singularity", "Singularity.gpu"]


def test_removed_recipe_is_not_built_and_uncovers_the_older_one(
    hub: Hub, collection: Collection, repository: Repository
):
    repository.commit({"a/Singularity": RECIPE})
    repository.commit({"b/Singularity": RECIPE})
    look(hub, collection.id)
    assert recipes(hub) == ["b/Singularity"]
    repository.git("rm", "--quiet", "b/Singularity")
    repository.commit()
    look(hub, collection.id)
    with hub.read() as session:
        assert list(session.scalars(sa.select(Recipe.path).where(Recipe.shadowed.is_(False)))) == ["a/Singularity"]


def test_only_enabled_branches_build(hub: Hub, repository: Repository):
    collection = made_collection(hub, repository, branches=["main", "release/*"])
    repository.commit({"Singularity": RECIPE})
    for name in ("release/1", "feature"):
        repository.git("checkout", "--quiet", "-b", name)
        repository.commit({"Singularity": RECIPE + f"# {name}\n"})
    look(hub, collection.id)
    assert [one.branch for one in builds(hub)] == ["main", "release/1"]


def test_without_branches_named_the_default_one_builds(hub: Hub, repository: Repository):
    collection = made_collection(hub, repository)
    repository.git("checkout", "--quiet", "-b", "trunk")
    repository.commit({"Singularity": RECIPE})
    repository.git("checkout", "--quiet", "-b", "main")
    repository.commit({"Singularity.other": RECIPE})
    repository.git("checkout", "--quiet", "trunk")
    look(hub, collection.id)
    assert [(one.branch, one.recipe) for one in builds(hub)] == [("trunk", "Singularity")]


def test_bad_recipe_is_a_build_that_has_failed(hub: Hub, collection: Collection, repository: Repository):
    repository.commit({"Singularity": "this is no recipe\n"})
    look(hub, collection.id)
    build = builds(hub)[0]
    assert (build.state, build.error_id) == ("failed", "bad-recipe")
    assert build.reason


def test_deployment_builds_what_pushes_only_announced(hub: Hub, repository: Repository):
    collection = made_collection(hub, repository, triggers=["deployment"])
    repository.commit({"Singularity": RECIPE})
    assert look(hub, collection.id).builds == []
    head = repository.commit({"notes": "x"})
    assert look(hub, collection.id).builds == []
    plan = look(hub, collection.id, trigger="deployment")
    assert len(plan.builds) == 1
    assert [(one.commit, one.trigger) for one in builds(hub)] == [(head, "deployment")]
    assert look(hub, collection.id, trigger="deployment").builds == []


def test_what_changed_while_building_was_off_is_built_afterwards(
    hub: Hub, collection: Collection, repository: Repository
):
    repository.commit({"Singularity": RECIPE})
    look(hub, collection.id)
    with hub.write() as session:
        session.get_one(Collection, collection.id).building = False
    repository.commit({"Singularity": RECIPE + "\n"})
    assert "off" in look(hub, collection.id).remarks[0]
    with hub.write() as session:
        session.get_one(Collection, collection.id).building = True
    assert len(look(hub, collection.id).builds) == 1


def test_git_tag_builds_every_recipe_under_its_name(hub: Hub, repository: Repository):
    collection = made_collection(hub, repository, triggers=["tag"])
    head = repository.commit({"Singularity": RECIPE, "Singularity.gpu": RECIPE})
    repository.git("tag", "-a", "v1.0", "-m", "release")
    repository.git("tag", "odd/name+x")
    look_at_tag(hub, collection.id, "v1.0")
    look_at_tag(hub, collection.id, "odd/name+x")
    tags = ["v1.0", "v1.0-gpu", "odd-name_x", "odd-name_x-gpu"]
    assert [(one.tag, one.commit) for one in builds(hub)] == [(tag, head) for tag in tags]
    assert "no tag" in look_at_tag(hub, collection.id, "v9").remarks[0]


def test_poll_notices_what_moved_and_only_that(hub: Hub, collection: Collection, repository: Repository):
    repository.commit({"Singularity": RECIPE})
    assert moved(hub, collection.id)
    look(hub, collection.id)
    assert not moved(hub, collection.id)
    repository.git("branch", "feature")
    assert not moved(hub, collection.id)
    repository.commit({"notes": "x"})
    assert moved(hub, collection.id)


def test_manual_build_takes_any_recipe_of_any_commit(hub: Hub, collection: Collection, repository: Repository):
    first = repository.commit({"Singularity": RECIPE})
    repository.commit({"Singularity": RECIPE + "\n", "x/Singularity.gpu": RECIPE})
    build = manual(hub, collection.id, ref=first[:10], by="lab")
    assert (build.commit, build.recipe) == (first, "Singularity")
    assert manual(hub, collection.id, recipe="x/Singularity.gpu", by="lab").tag == "gpu"
    assert manual(hub, collection.id, tag="gpu", by="lab").recipe == "x/Singularity.gpu"
    with pytest.raises(NotFound):
        manual(hub, collection.id, tag="none", by="lab")
    for ref in ("nothing", "f" * 40, "--all", "main^{/x}", "main..x", "@{-1}"):
        with pytest.raises((NotFound, Invalid)):
            manual(hub, collection.id, ref=ref, by="lab")
    with pytest.raises(NotFound):
        manual(hub, collection.id, recipe="../../etc/passwd", by="lab")


def test_manual_build_asks_which_of_several(hub: Hub, collection: Collection, repository: Repository):
    repository.commit({"Singularity.a": RECIPE, "Singularity.b": RECIPE})
    with pytest.raises(Conflict, match="several"):
        manual(hub, collection.id, by="lab")


def test_full_queue_takes_no_more(hub: Hub, collection: Collection, repository: Repository):
    hub.settings.builds.queued_per_collection = 3
    repository.commit({f"Singularity.t{number}": RECIPE for number in range(5)})
    plan = look(hub, collection.id)
    assert len(plan.builds) == 3
    assert "wait at a time" in plan.remarks[0]
    with pytest.raises(TooMany):
        manual(hub, collection.id, tag="t1", by="lab")


# --- hostile repositories --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        *(
            "",
            " ",
            "--upload-pack=touch /tmp/x",
            "-u",
            "ext::sh -c touch% /tmp/x",
            "fd::17/foo",
            "ssh://-oProxyCommand=x/y",
        ),
        *(
            "https://-x/y",
            "git@-oProxyCommand=x:y",
            "file:///etc",
            "/etc",
            "../x",
            "x",
            "https://a b/c",
            "https://h/\nx",
        ),
        *("ftp://h/x", "http://h/x", "git://h/x", "https://" + "h" * 3000, "git@host:-x/y", "persistent-https://h/x"),
    ],
)
def test_addresses_that_are_options_or_transports_are_refused(url: str, sources: SourceSettings):
    with pytest.raises(Invalid):
        check_url(url, sources)


def test_local_address_may_not_leave_its_folder_by_a_symlink(sources: SourceSettings, tmp_path: Path):
    (tmp_path / "way").symlink_to("/etc")
    for url in (f"file://{tmp_path}/way", f"{tmp_path}/../../etc", f"file://{tmp_path}/../other"):
        with pytest.raises(Invalid):
            check_url(url, sources)
    assert check_url(f"file://{tmp_path}/x", sources)


@given(st.text(max_size=60))
def test_any_address_is_checked_without_surprise(url: str):
    try:
        check_url(url, SourceSettings())
    except Invalid:
        return
    assert not url.startswith("-")
    assert "\n" not in url


@given(st.text(max_size=60))
def test_any_branch_is_a_name_and_no_option(name: str):
    try:
        check_branch(name)
    except Invalid:
        return
    assert name
    assert not name.startswith("-")
    assert ".." not in name
    assert not any(letter in name for letter in "\0\n ~^:?*[\\")


def test_submodules_are_empty_folders_and_never_fetched(
    mirror: Mirror, repository: Repository, tmp_path: Path, hub: Hub
):
    module = f'[submodule "x"]\n\tpath = x\n\turl = file://{tmp_path}/secret\n'
    repository.write({"Singularity": RECIPE, ".gitmodules": f"{module}\tupdate = !touch {tmp_path}/ran\n"})
    repository.git("add", "--all")
    repository.git("update-index", "--add", "--cacheinfo", "160000," + "a" * 40 + ",x")
    repository.git("commit", "--quiet", "-m", "submodule")
    with pytest.raises(GitError, match="disallowed submodule"):
        mirror.fetch()
    repository.commit({".gitmodules": module})
    repository.git("checkout", "--quiet", "--orphan", "clean")
    repository.git("update-index", "--add", "--cacheinfo", "160000," + "a" * 40 + ",x")
    repository.git("commit", "--quiet", "-m", "no history")
    repository.git("branch", "--quiet", "-D", "main")
    head = repository.git("rev-parse", "HEAD")
    mirror.fetch()
    mirror.checkout(head, tmp_path / "out")
    assert list((tmp_path / "out" / "x").iterdir()) == []
    assert not (tmp_path / "ran").exists()


def test_filters_and_attributes_of_a_repository_run_nothing(mirror: Mirror, repository: Repository, tmp_path: Path):
    repository.write({"Singularity": RECIPE, ".gitattributes": "* filter=evil diff=evil merge=evil\n"})
    repository.git("config", "filter.evil.smudge", f"touch {tmp_path}/ran")
    repository.git("config", "uploadpack.packObjectsHook", f"touch {tmp_path}/ran; exec")
    repository.git("config", "core.fsmonitor", f"touch {tmp_path}/ran")
    for name in ("post-checkout", "pre-upload-pack", "reference-transaction"):
        hook = repository.path / ".git" / "hooks" / name
        hook.parent.mkdir(exist_ok=True)
        hook.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
        hook.chmod(0o755)
    repository.git(
        "-c", "core.hooksPath=/dev/null", "-c", "core.fsmonitor=false", "-c", "filter.evil.clean=cat", "add", "-A"
    )
    repository.git("-c", "core.hooksPath=/dev/null", "-c", "core.fsmonitor=false", "commit", "--quiet", "-m", "x")
    head = repository.git("-c", "core.fsmonitor=false", "rev-parse", "HEAD")
    (tmp_path / "ran").unlink(missing_ok=True)
    mirror.fetch()
    mirror.checkout(head, tmp_path / "out")
    assert (tmp_path / "out" / "Singularity").exists()
    assert not (tmp_path / "ran").exists()


def test_checkout_writes_nothing_outside_through_symlinks(mirror: Mirror, repository: Repository, tmp_path: Path):
    outside = tmp_path / "outside"
    outside.mkdir()
    repository.write({"Singularity": RECIPE})
    repository.commit()
    # A tree with the symlink `x` and a file below `x`, as no honest git would make it.
    link = blob(repository, str(outside).encode())
    text = blob(repository, b"evil")
    inner = mktree(repository, f"100644 blob {text}\tfile")
    tree = mktree(repository, f"120000 blob {link}\tx", f"040000 tree {inner}\tx")
    commit = repository.git("commit-tree", tree, "-m", "evil")
    repository.git("update-ref", "refs/heads/main", commit)
    try:
        mirror.fetch()  # refuses objects that are not sound
        mirror.checkout(commit, tmp_path / "out")
    except GitError:
        pass
    assert list(outside.iterdir()) == []


def blob(repository: Repository, data: bytes) -> str:
    path = repository.path / ".git" / "data"
    path.write_bytes(data)
    return repository.git("hash-object", "-w", str(path))


def mktree(repository: Repository, *lines: str) -> str:
    import subprocess

    from .world import GIT

    # `mktree` would sort and refuse doubles: the object is written as it is.
    rows = b""
    for line in lines:
        about, _, name = line.partition("\t")
        mode, _, sha = about.split(" ")
        rows += f"{mode.lstrip('0')} {name}\0".encode() + bytes.fromhex(sha)
    result = subprocess.run(
        ["git", "hash-object", "-t", "tree", "-w", "--literally", "--stdin"],
        cwd=repository.path, env=GIT, input=rows, capture_output=True, check=True,
    )  # fmt: skip
    return result.stdout.decode().strip()


def test_repository_that_is_too_big_is_refused_and_forgotten(repository: Repository, tmp_path: Path):
    repository.commit({"Singularity": RECIPE, "large": os.urandom(3 << 20)})
    settings = SourceSettings(protocols=["file"], local=[str(tmp_path)], size_limit=1 << 20)
    mirror = Mirror(tmp_path / "mirror.git", f"file://{repository.path}", settings)
    try:
        mirror.fetch()
    except GitError as error:
        assert error.id == "repository-too-big"
        assert not mirror.path.exists()
    else:
        pytest.fail("a repository beyond the limit was taken")


def test_passwords_of_addresses_are_in_no_complaint(tmp_path: Path):
    settings = SourceSettings(protocols=["https"], time_limit=20)
    mirror = Mirror(tmp_path / "mirror.git", "https://me:hush%40hush@127.0.0.1:9/lab/tools.git", settings)
    with pytest.raises(GitError) as caught:
        mirror.fetch()
    assert "127.0.0.1:9/lab/tools.git" in str(caught.value)
    assert "hush" not in str(caught.value)
    assert "me:" not in str(caught.value)


def test_git_that_hangs_is_ended(repository: Repository, tmp_path: Path):
    program = tmp_path / "git"
    program.write_text("#!/bin/sh\nsleep 60 & sleep 60\n")
    program.chmod(0o755)
    settings = SourceSettings(protocols=["file"], local=[str(tmp_path)], git=str(program), time_limit=1)
    started = time.monotonic()
    with pytest.raises(GitError, match="longer"):
        Mirror(tmp_path / "mirror.git", f"file://{repository.path}", settings).fetch()
    assert time.monotonic() - started < 10


def test_ten_thousand_recipes_are_looked_at_and_a_few_built(hub: Hub, collection: Collection, repository: Repository):
    folder = repository.path / "many"
    folder.mkdir()
    for number in range(10_050):
        (folder / f"Singularity.t{number}").write_text(f"{RECIPE}# {number}\n")
    repository.commit()
    started = time.monotonic()
    plan = look(hub, collection.id)
    assert time.monotonic() - started < 60
    assert len(plan.builds) == hub.settings.builds.recipes_per_push
    assert any("left out" in remark for remark in plan.remarks)
    with hub.read() as session:
        assert session.scalar(sa.select(sa.func.count()).select_from(Recipe)) == 10_000


def test_odd_branches_do_no_harm(hub: Hub, repository: Repository):
    collection = made_collection(hub, repository, branches=["*"])
    repository.commit({"Singularity": RECIPE})
    for name in ("ünï-code", "a/b/c", "x" * 200, "it's;$(touch${IFS}x)"):
        repository.git("branch", name)
    look(hub, collection.id)
    assert len(builds(hub)) == 5
    assert sorted({one.branch for one in builds(hub)}) == sorted(
        ["main", "ünï-code", "a/b/c", "x" * 200, "it's;$(touch${IFS}x)"]
    )


def test_repository_of_a_hub_that_forbids_files_is_refused(hub: Hub, collection: Collection, repository: Repository):
    hub.settings.sources.local = []
    with pytest.raises(HubError):
        look(hub, collection.id)


def test_address_that_an_administrator_wrote_is_not_bound_by_the_settings(
    hub: Hub, collection: Collection, repository: Repository
):
    hub.settings.sources.local = []
    hub.settings.sources.protocols = ["https"]
    repository.commit({"Singularity": RECIPE})
    if os.geteuid() == 0:  # it belongs to another account
        for folder, _, names in os.walk(repository.path):
            for name in (".", *names):
                os.chown(os.path.join(folder, name), 4711, 4711)
    with hub.write() as session:
        session.get_one(Collection, collection.id).approved_url = collection.git_url
    assert len(look(hub, collection.id).builds) == 1
    # Somebody else wrote another one.
    with hub.write() as session:
        session.get_one(Collection, collection.id).git_url = f"{repository.path}/.git"
    with pytest.raises(HubError):
        look(hub, collection.id)
    for url in ("ext::sh", "--upload-pack=x", "ftp://h/x", "file://-x"):
        with pytest.raises(Invalid):
            check_url(url, hub.settings.sources, approved=True)
