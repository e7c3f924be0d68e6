# SPDX-License-Identifier: Apache-2.0
"""Equal inputs give the same image again, and bases that move give new ones."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st

from pysingularity.hub.builds import bases, reuse
from pysingularity.hub.builds.bases import check_bases, present_digest
from pysingularity.hub.builds.planning import look, manual
from pysingularity.hub.builds.releases import look_at_tag
from pysingularity.hub.builds.states import FINAL
from pysingularity.hub.context import Hub
from pysingularity.hub.engines.job import bases_of
from pysingularity.hub.models import Blob, Build, Collection, Image, Recipe
from pysingularity.hub.robots import Robots

from .world import RECIPE, Repository, made_collection, wait_for

COPYING = RECIPE + "\n%files\n    data.txt /data.txt\n"
ONE, TWO = "sha256:" + "1" * 64, "sha256:" + "2" * 64


@pytest.fixture
def collection(hub: Hub, repository: Repository) -> Collection:
    return made_collection(hub, repository, triggers=["push", "tag"])


@pytest.fixture
def working(hub: Hub) -> Iterator[None]:
    """Robots in this process."""
    robots = Robots(hub)
    robots.start()
    yield
    robots.stop()


def ended(hub: Hub, number: int) -> tuple[Build, Image]:
    def load() -> tuple[Build, Image | None] | None:
        with hub.read() as session:
            build = session.get_one(Build, number)
            return (build, session.get(Image, build.image_id or 0)) if build.state in FINAL else None

    build, image = wait_for(load, 60, "the end of the build")
    assert build.state == "done", build.reason
    assert image is not None
    return build, image


def built(hub: Hub, collection: Collection) -> tuple[Build, Image]:
    return ended(hub, look(hub, collection.id).builds[-1])


def test_revert_and_tag_give_the_image_again_under_their_own_commit(
    hub: Hub, collection: Collection, repository: Repository, working: None
):
    repository.commit({"Singularity": COPYING, "data.txt": "1"})
    _, first = built(hub, collection)
    repository.commit({"data.txt": "2"})
    _, second = built(hub, collection)
    head = repository.commit({"data.txt": "1"})
    build, third = built(hub, collection)
    assert first.sha256 != second.sha256
    assert third.sha256 == first.sha256
    assert (third.commit, third.id != first.id) == (head, True)
    assert third.key != first.key or third.commit == first.commit
    assert f"image {first.id}" in build.reason
    repository.git("tag", "v1.0")
    _, released = ended(hub, look_at_tag(hub, collection.id, "v1.0").builds[0])
    assert (released.sha256, released.tag) == (first.sha256, "v1.0")


@pytest.mark.parametrize("change", ["by hand", "other recipe", "other mode", "too old", "damaged", "switched off"])
def test_what_is_not_the_same_is_built(
    hub: Hub, collection: Collection, repository: Repository, working: None, change: str
):
    repository.commit({"Singularity": COPYING, "data.txt": "1"})
    _, first = built(hub, collection)
    if change == "by hand":
        _, second = ended(hub, manual(hub, collection.id, by="lab").id)
    else:
        if change == "other mode":
            (repository.path / "data.txt").chmod(0o755)
        if change == "switched off":
            hub.settings.builds.reuse_days = 0
        with hub.write() as session:
            if change == "too old":
                session.execute(sa.update(Image).values(created_at=1.0))
            if change == "damaged":
                session.execute(sa.update(Blob).values(damaged="rotten"))
        if change != "other mode":
            repository.commit({"data.txt": "2"})
            built(hub, collection)
        repository.commit({"data.txt": "1", **({"Singularity": COPYING + "\n"} if change == "other recipe" else {})})
        _, second = built(hub, collection)
    assert second.sha256 != first.sha256


def test_image_on_a_base_is_given_again_only_while_the_base_is_the_same(
    hub: Hub, collection: Collection, repository: Repository, working: None, monkeypatch: pytest.MonkeyPatch
):
    now = {"docker://debian:12": ONE}
    monkeypatch.setattr(reuse, "present_digest", lambda _hub, text: now.get(text, ""))
    recipe = COPYING.replace("Bootstrap: scratch", "Bootstrap: docker\nFrom: debian:12")
    repository.commit({"Singularity": recipe, "data.txt": "1"})
    _, first = built(hub, collection)
    with hub.write() as session:  # the stand-in builder fetches no base: as the real one says it
        image = session.get_one(Image, first.id)
        said = image.provenance["predicate"]["buildDefinition"]["resolvedDependencies"]
        said.append({"uri": "docker://debian:12", "digest": {"sha256": "1" * 64}})
        image.provenance = dict(image.provenance)
        sa.orm.attributes.flag_modified(image, "provenance")
    for text in ("2", "1"):
        repository.commit({"data.txt": text})
        _, last = built(hub, collection)
    assert last.sha256 == first.sha256
    now["docker://debian:12"] = TWO
    for text in ("3", "1"):
        repository.commit({"data.txt": text})
        _, last = built(hub, collection)
    assert last.sha256 != first.sha256


# --- where an image comes from ---------------------------------------------------------------------------------------


def test_image_says_where_it_comes_from(hub: Hub, collection: Collection, repository: Repository, working: None):
    head = repository.commit({"env/Singularity.gpu": RECIPE})
    build, image = built(hub, collection)
    said = image.provenance
    assert said["subject"] == [{"name": "tools_gpu.sif", "digest": {"sha256": image.sha256}}]
    definition, details = said["predicate"]["buildDefinition"], said["predicate"]["runDetails"]
    assert definition["externalParameters"] == {
        "repository": collection.git_url, "branch": "main", "recipe": "env/Singularity.gpu", "tag": "gpu",
    }  # fmt: skip
    assert definition["resolvedDependencies"][0]["digest"] == {"gitCommit": head}
    assert definition["internalParameters"]["environment"]["PATH"]
    assert not any("proxy" in name.lower() for name in definition["internalParameters"]["environment"])
    assert details["builder"]["version"]["singularity"]
    assert details["metadata"]["startedOn"] <= details["metadata"]["finishedOn"]
    assert details["metadata"]["invocationId"].endswith(str(build.id))


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=20),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["uri", "digest", "x"]), inner, max_size=3)
        ),
        max_leaves=8,
    )
)
def test_whatever_a_builder_says_of_its_bases_has_the_right_form_afterwards(value: object):
    for one in bases_of(value):
        assert set(one) == {"uri", "digest"}
        assert all(isinstance(text, str) for text in (one["uri"], *one["digest"], *one["digest"].values()))


def test_base_that_the_builder_fetched_is_named(hub: Hub):
    said = [{"uri": "docker://debian:12", "digest": ONE}, {"uri": 7, "digest": ONE}, "x", {"uri": "y", "digest": "z"}]
    assert bases_of(said) == [{"uri": "docker://debian:12", "digest": {"sha256": "1" * 64}}]


# --- bases -----------------------------------------------------------------------------------------------------------


def test_base_that_moves_builds_the_recipes_that_begin_with_it(
    hub: Hub, repository: Repository, monkeypatch: pytest.MonkeyPatch
):
    now = {"docker://debian:12": ONE, "docker://alpine:3": ONE}
    monkeypatch.setattr(bases, "present_digest", lambda _hub, text: now.get(text, ""))
    collection = made_collection(hub, repository, triggers=["base"])
    made_collection(hub, repository, "lab/quiet")
    debian, alpine = (RECIPE.replace("Bootstrap: scratch", f"Bootstrap: docker\nFrom: {name}") for name in
                      ("debian:12", "alpine:3"))  # fmt: skip
    repository.commit({"Singularity": debian, "Singularity.alpine": alpine, "Singularity.own": RECIPE})
    look(hub, collection.id)

    def later() -> list[str]:
        with hub.write() as session:
            session.execute(sa.update(Collection).values(bases_at=1.0))
        numbers = check_bases(hub)
        with hub.read() as session:
            return [session.get_one(Build, number).recipe for number in numbers]

    assert later() == []  # what they are now is noted
    assert later() == []
    now["docker://debian:12"] = TWO
    assert later() == ["Singularity"]
    assert later() == []
    now["docker://debian:12"] = ""  # the registry is away
    assert later() == []
    # Another push forgets nothing of it.
    repository.commit({"notes": "x"})
    look(hub, collection.id)
    now["docker://debian:12"] = ONE
    assert later() == ["Singularity"]
    assert check_bases(hub) == []  # it is not time yet
    with hub.read() as session:
        found = session.scalars(sa.select(Recipe.base_digest).where(Recipe.base.like("docker%"))).all()
        assert set(found) == {ONE}


class Registry(BaseHTTPRequestHandler):
    """Answers for one tag."""

    def do_HEAD(self) -> None:
        self.send_response(200 if "/manifests/1" in self.path or self.path == "/v2/" else 404)
        self.send_header("Docker-Content-Digest", ONE)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *_: object) -> None:
        pass


def test_registry_is_asked_from_a_sandbox_by_the_rules_of_builds(hub: Hub, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SINGULARITY_NOHTTPS", "1")
    hub.settings.builds.environment = ["SINGULARITY_NOHTTPS"]
    server = ThreadingHTTPServer(("127.0.0.1", 0), Registry)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        reference = f"docker://127.0.0.1:{server.server_address[1]}/lab/base:1"
        assert present_digest(hub, reference) == ""  # loopback may not be reached
        hub.settings.egress.allow = ["127.0.0.1"]
        assert present_digest(hub, reference) == ONE
        assert list(hub.settings.folder("work").iterdir()) == []
    finally:
        server.shutdown()
        server.server_close()
