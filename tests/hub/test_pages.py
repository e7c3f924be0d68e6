# SPDX-License-Identifier: Apache-2.0
"""The pages, as browsers without scripts see them: read with an HTML parser that knows every tag and attribute."""

from __future__ import annotations

import json
import re
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from xml.etree import ElementTree

import pytest
import sqlalchemy as sa

from pysingularity.hub.accounts.tokens import add_share
from pysingularity.hub.builds.log import log_path
from pysingularity.hub.catalog import find_collection
from pysingularity.hub.context import Hub
from pysingularity.hub.models import Build, Delivery, Image, Recipe
from pysingularity.hub.pages.signing import local

from .browser import Browser, check, page
from .shelf import make_sif, put_image
from .world import Server

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>&amp;\u202e"
COMMIT = "89abcdef0123456789abcdef0123456789abcdef"


@pytest.fixture
def server(clean: tuple[Server, Hub]) -> Server:
    return clean[0]


@pytest.fixture
def hub(clean: tuple[Server, Hub]) -> Hub:
    return clean[1]


def put(hub: Hub, folder: Path, text: str = "hello", name: str = "lab/tools", **more: object) -> Image:
    more.setdefault("tags", ["latest"])
    return put_image(hub, make_sif(folder / f"{abs(hash((text, name)))}.sif", text), name, **more)


def put_build(hub: Hub, name: str = "lab/tools", *, log: bytes = b"", state: str = "done", **more: object) -> int:
    with hub.write() as session:
        collection = find_collection(session, *name.split("/"))
        assert collection is not None
        values = {"recipe": "Singularity", "tag": "latest", "commit": COMMIT, "claimed_at": 1.0, "finished_at": 62.0}
        build = Build(collection_id=collection.id, state=state, **{**values, **more})
        session.add(build)
        session.flush()
        number = build.id
    path = log_path(hub.settings.folder("logs"), number)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(log)
    return number


def test_home_and_search_show_public_collections_only(server: Server, hub: Hub, tmp_path: Path) -> None:
    put(hub, tmp_path, "a", "lab/open")
    put(hub, tmp_path, "b", "lab/closed", private=True)
    for path in ("/", "/search", "/search?q=lab", "/lab"):
        found = page(server, path)
        assert "lab/open" in found.text
        assert "lab/closed" not in found.text
    assert "lab/open" not in page(server, "/search?q=nothing").text
    browser = Browser(server)
    assert "lab/closed" in browser.sign_in(to="/search").text


def test_collection_shows_how_to_pull_images_builds_and_recipes(server: Server, hub: Hub, tmp_path: Path) -> None:
    image = put(hub, tmp_path, tags=["latest", "v1"], commit=COMMIT)
    number = put_build(hub)
    with hub.write() as session:
        collection = find_collection(session, "lab", "tools")
        assert collection is not None
        session.add(
            Recipe(
                collection_id=collection.id,
                branch="main",
                path="gpu/Singularity.gpu",
                tag="gpu",
                commit=COMMIT,
                changed_at=1.0,
            )
        )
    found = page(server, "/lab/tools")
    links = [link.get("href") for link in found.all("a")]
    assert f"/lab/tools/images/{image.id}" in links
    assert f"/lab/tools/builds/{number}" in links
    assert "gpu/Singularity.gpu" in found.text
    host = server.url.partition("://")[2]
    for line in (f"shub://{host}/lab/tools:", "library://lab/tools/tools:", f"oras://{host}/lab/tools:"):
        assert line in found.text
    secret = server.get("/api/v1/collections/lab/tools").json["webhook_secret"]
    assert secret not in found.text


def test_private_collections_are_missing_for_strangers_on_every_page(server: Server, hub: Hub, tmp_path: Path) -> None:
    first = put(hub, tmp_path, "a", "lab/closed", private=True)
    second = put(hub, tmp_path, "b", "lab/closed")
    number = put_build(hub, "lab/closed", log=b"secret words\n")
    paths = [
        "/lab/closed",
        f"/lab/closed/builds/{number}",
        f"/lab/closed/images/{first.id}",
        f"/lab/closed/compare/{first.id}...{second.id}",
        "/badge/lab/closed.svg",
        "/lab",
    ]
    for path in paths:
        missing = page(server, path, 404).text.replace(path, "")
        assert "secret words" not in missing
    for path in (f"/api/v1/images/{first.id}/files/", f"/api/v1/images/{first.id}/compare/{second.id}"):
        assert server.get(path, token="").status == 401 or server.request("GET", path, token="").status == 404
    browser = Browser(server)
    browser.sign_in()
    for path in paths:
        assert browser.send(path).status == 200, path
    # Images and builds are found below their own collection only.
    put(hub, tmp_path, "c", "lab/open")
    for path in (f"/lab/open/images/{first.id}", f"/lab/open/builds/{number}", f"/lab/open/compare/{first.id}...1"):
        assert browser.send(path).status == 404
    with hub.write() as session:
        collection = find_collection(session, "lab", "closed")
        assert collection is not None
        share = add_share(session, collection, by="lab")
    shared = page(server, f"/t/{share}/lab/closed")
    assert f"/t/{share}/lab/closed/images/{first.id}" in [link.get("href") for link in shared.all("a")]
    inside = page(server, f"/t/{share}/lab/closed/images/{first.id}")
    assert f"/t/{share}/lab/closed/images/{first.id}#files" in [link.get("href") for link in inside.all("a")]


def test_log_is_readable_without_scripts_and_folded_by_steps(server: Server, hub: Hub, tmp_path: Path) -> None:
    put(hub, tmp_path)
    log = b"==> Cloning\ncloned\n==> Running %post\n\x1b[31mred\x1b[0m <b>bold</b>\nhalf a line"
    number = put_build(hub, log=log, state="building", finished_at=None, worker="nobody", leased_until=1e12)
    found = page(server, f"/lab/tools/builds/{number}")
    assert len(found.all("details")) == 2
    assert "red <b>bold</b>" in found.text
    assert not found.all("b")
    assert {"class": "fg-red"} in found.all("span")
    assert "half a line" not in found.text
    offset = log.index(b"half")
    stream = [box.get("data-stream") for box in found.all("div") if box.get("id") == "log"]
    assert stream == [f"/api/v1/builds/{number}/log/stream?offset={offset}"]
    assert any(meta.get("http-equiv") == "refresh" for meta in found.all("meta"))
    ended = page(server, f"/lab/tools/builds/{put_build(hub, log=b'')}")
    assert not any(script.get("src") == "/static/log.js" for script in ended.all("script"))
    assert "The log is empty" in ended.text


def test_page_and_stream_together_are_the_whole_log(server: Server, hub: Hub, tmp_path: Path) -> None:
    put(hub, tmp_path)
    log = b"==> One\nfirst\n==> Two\nsecond\nthird"
    number = put_build(hub, log=log, state="building", finished_at=None, worker="nobody", leased_until=1e12)
    found = page(server, f"/lab/tools/builds/{number}")
    address = next(box["data-stream"] or "" for box in found.all("div") if box.get("id") == "log")
    path = log_path(hub.settings.folder("logs"), number)
    path.write_bytes(log + b" and its end\n==> Three\nfourth\n")
    with hub.write() as session:
        session.get_one(Build, number).state = "done"
    events = server.get(address, token="").text
    assert "data: third and its end\ndata: ==> Three\ndata: fourth\n" in events
    assert "second" not in events
    assert events.endswith(f"event: state\nid: {path.stat().st_size}\ndata: done\n\n")


def test_a_long_log_shows_its_end(server: Server, hub: Hub, tmp_path: Path) -> None:
    put(hub, tmp_path)
    number = put_build(hub, log=b"first line\n" + b"x" * 99 + b"\n" + (b"y" * 99 + b"\n") * 12000 + b"last line\n")
    found = page(server, f"/lab/tools/builds/{number}")
    assert "last line" in found.text
    assert "first line" not in found.text
    assert "The log is long" in found.text


def test_image_shows_definition_labels_apps_and_a_map_of_its_files(server: Server, hub: Hub, tmp_path: Path) -> None:
    tree = tmp_path / "extra.tree"
    image = put(hub, tmp_path, "hello", commit=COMMIT)
    with hub.write() as session:
        row = session.get_one(Image, image.id)
        row.details = {
            "environment": {"/.singularity.d/env/90-environment.sh": "export A=1"},
            "apps": {"foo": {"runscript": "exec foo"}},
            "runscript": "exec run",
        }
    found = page(server, f"/lab/tools/images/{image.id}")
    for text in ("Bootstrap", "%labels", "TEXT", "export A=1", "exec foo", "exec run", image.sha256, "text"):
        assert text in found.text
    assert {"class": "section"} in found.all("span")
    assert any(picture.get("role") == "img" and picture.get("class") == "treemap" for picture in found.all("svg"))
    assert not tree.exists()


def test_hostile_names_labels_and_logs_stay_text(server: Server, hub: Hub, tmp_path: Path) -> None:
    image = put(hub, tmp_path)
    other = put(hub, tmp_path, "other")
    log = f"==> {HOSTILE}\n{HOSTILE}\n\x1b]8;;javascript:alert(1)\x07x\n".encode()
    number = put_build(hub, log=log, reason=HOSTILE, branch=HOSTILE, recipe=HOSTILE, state="failed")
    with hub.write() as session:
        row = session.get_one(Image, image.id)
        row.definition = f"Bootstrap: {HOSTILE}\n%post {HOSTILE}\n# {HOSTILE}\n{HOSTILE}"
        row.labels = {HOSTILE: HOSTILE}
        row.details = {
            "environment": {HOSTILE: HOSTILE},
            "apps": {HOSTILE: {HOSTILE: HOSTILE, "more": [HOSTILE]}},
            "runscript": HOSTILE,
            "test": {"not": "text"},
        }
        row.branch = row.recipe = HOSTILE
        collection = row.container.collection
        collection.description, collection.topics = HOSTILE, [HOSTILE]
        collection.git_url = "javascript:alert(3)"
        session.add(
            Recipe(
                collection_id=collection.id, branch=HOSTILE, path=HOSTILE, tag="x", commit=HOSTILE, changed_at=1.0,
                base=HOSTILE, problem=HOSTILE,
            )
        )  # fmt: skip
    paths = [
        "/",
        "/search?q=" + urllib.parse.quote(HOSTILE),
        "/lab/tools",
        f"/lab/tools/builds/{number}",
        f"/lab/tools/images/{image.id}",
        f"/lab/tools/images/{image.id}?path=/",
        f"/lab/tools/compare/{image.id}...{other.id}",
    ]
    for path in paths:
        found = page(server, path)
        assert "alert(1)" in found.text, path
        assert all(picture["src"] != "x" for picture in found.all("img"))
    for path in (
        "/lab/" + urllib.parse.quote(HOSTILE),
        f"/lab/tools/images/{image.id}?path={urllib.parse.quote(HOSTILE)}",
    ):
        answer = Browser(server).send(path)
        assert answer.status in (400, 404)
        check(answer)


def make_tree(folder: Path, files: dict[bytes, bytes]) -> Path:
    """Write a SIF with these files, whatever their names."""
    first = make_sif(folder / "first.sif")
    tree = folder / "first.tree"
    for name, content in files.items():
        path = bytes(tree) + b"/" + name
        Path(path.decode("utf-8", "surrogateescape")).parent.mkdir(parents=True, exist_ok=True)
        Path(path.decode("utf-8", "surrogateescape")).write_bytes(content)
    again = folder / "again"
    again.mkdir()
    (tree).rename(again / "tree")
    first.unlink()
    squashfs = again / "root.squashfs"
    subprocess.run(
        ["mksquashfs", again / "tree", squashfs, "-quiet", "-no-progress", "-noappend"], check=True, stdout=2
    )
    return squashfs


def put_tree(hub: Hub, folder: Path, files: dict[bytes, bytes], name: str = "lab/tools") -> Image:
    import os
    import time

    from pysingularity.sif import layout
    from pysingularity.sif.file import SifObject, create, random_identity

    folder.mkdir()
    squashfs = make_tree(folder, files)
    root = os.open(squashfs, os.O_RDONLY)
    path = folder / f"{folder.name}.sif"
    target = os.open(path, os.O_RDWR | os.O_CREAT, 0o755)
    extra = layout.partition_extra(layout.SQUASHFS, layout.PRIMARY, "amd64")
    document = json.dumps({"data": {"attributes": {"labels": {"NAME": folder.name}}}, "type": "container"})
    create(
        target,
        [
            SifObject(layout.JSON, document.encode(), name="inspect-metadata.json"),
            SifObject(layout.PARTITION, fd=root, extra=extra),
        ],
        identity=random_identity(),
        when=int(time.time()),
    )
    return put_image(hub, path, name, tags=["latest"])


def test_files_of_an_image_are_browsed_folder_by_folder(server: Server, hub: Hub, tmp_path: Path) -> None:
    odd = b"a&b?c=%23 <i>\xff\n\xe2\x80\xae"
    image = put_tree(hub, tmp_path / "one", {b"usr/lib/big": b"x" * 5000, b"usr/bin/small": b"y", odd + b"/f/g": b"12"})
    top = server.get(f"/api/v1/images/{image.id}/files/", token="").json
    assert top["path"] == "/"
    assert top["entries"][0]["name"] == "usr"
    assert top["entries"][0]["size"] == 5001
    shown = "a&b?c=%23 <i>\\xff\\n\\u202e"
    assert shown in [row["name"] for row in top["entries"]]
    usr = server.get(f"/api/v1/images/{image.id}/files/usr", token="").json
    assert [(row["name"], row["size"], row["files"]) for row in usr["entries"]] == [("lib", 5000, 1), ("bin", 1, 1)]
    found = page(server, f"/lab/tools/images/{image.id}")
    links = [link["href"] for link in found.all("a") if "?path=" in (link["href"] or "")]
    assert len(links) > 4
    for link in links:
        target = link if link.startswith("/") else f"/lab/tools/images/{image.id}{link}"
        page(server, target.partition("#")[0])
    assert not found.all("i")
    page(server, f"/lab/tools/images/{image.id}?path=/usr/missing", 404)
    assert server.get(f"/api/v1/images/{image.id}/files/usr/lib/big", token="").status == 404


def test_an_image_that_cannot_be_listed_still_has_a_page(server: Server, hub: Hub, tmp_path: Path) -> None:
    image = put(hub, tmp_path)
    stored = hub.storage.path(image.sha256)  # type: ignore[attr-defined]
    stored.chmod(0o600)
    data = bytearray(stored.read_bytes())
    start = data.index(b"hsqs")
    data[start + 96 : -1] = bytes(len(data) - start - 97)
    stored.write_bytes(data)
    found = page(server, f"/lab/tools/images/{image.id}")
    assert "problem" in [box.get("class") for box in found.all("p")]
    assert server.get(f"/api/v1/images/{image.id}/files/").status == 422


def test_comparison_names_files_packages_labels_and_definition(server: Server, hub: Hub, tmp_path: Path) -> None:
    status = "Package: {}\nStatus: install ok installed\nArchitecture: amd64\nVersion: {}\n\n"
    one = put_tree(
        hub,
        tmp_path / "one",
        {
            b"same": b"same",
            b"gone": b"gone",
            b"edited": b"abc",
            b"var/lib/dpkg/status": (status.format("bash", "5.1") + status.format("old", "1")).encode(),
        },
    )
    two = put_tree(
        hub,
        tmp_path / "two",
        {
            b"same": b"same",
            b"new": b"newer",
            b"edited": b"xyz",
            b"var/lib/dpkg/status": (status.format("bash", "5.2") + status.format("fresh", "2")).encode(),
        },
    )
    with hub.write() as session:
        session.get_one(Image, one.id).definition = "Bootstrap: scratch\n%post\n  echo 1\n"
        session.get_one(Image, two.id).definition = "Bootstrap: scratch\n%post\n  echo 2\n"
    value = server.get(f"/api/v1/images/{one.id}/compare/{two.id}", token="").json
    changes = {row["path"]: (row["change"], row["what"]) for row in value["files"]["entries"]}
    assert changes["gone"] == ("removed", [])
    assert changes["new"] == ("added", [])
    assert changes["edited"] == ("changed", ["content"])
    assert "same" not in changes
    assert value["files"]["unchecked"] == 0
    assert value["packages"] == {
        "added": {"fresh": "2"},
        "removed": {"old": "1"},
        "changed": {"bash": {"before": "5.1", "after": "5.2"}},
    }
    assert value["labels"]["changed"] == {"NAME": {"before": "one", "after": "two"}}
    assert "-  echo 1" in value["definition"]
    assert "+  echo 2" in value["definition"]
    found = page(server, f"/lab/tools/compare/{one.id}...{two.id}")
    for text in ("/edited", "changed: content", "5.1", "5.2", "+  echo 2"):
        assert text in found.text
    same = server.get(f"/api/v1/images/{one.id}/compare/{one.id}").json
    assert same["files"]["entries"] == []
    assert same["files"]["similarity"] == 1
    assert page(server, "/lab/tools/compare/latest...latest").text.count("No difference") == 4
    page(server, "/lab/tools/compare/latest", 404)
    page(server, f"/lab/tools/compare/{one.id}...999999", 404)


def test_badges_are_pictures_of_the_newest_build(server: Server, hub: Hub, tmp_path: Path) -> None:
    image = put(hub, tmp_path)
    for path, text in (("lab/tools", "no builds"), ("lab/tools:latest", "no builds")):
        assert text in server.get(f"/badge/{path}.svg", token="").text
    put_build(hub, state="failed")
    put_build(hub, state="done", tag="v1")
    for path, text in (("lab/tools:latest", "latest: failed"), ("lab/tools", "tools: done"), ("lab/tools:v1", "done")):
        answer = server.get(f"/badge/{path}.svg", token="")
        assert answer.headers["Content-Type"].startswith("image/svg+xml")
        assert "max-age=60" in answer.headers["Cache-Control"]
        assert text in (ElementTree.fromstring(answer.text).get("aria-label") or "")
    assert "KiB" in server.get("/badge/lab/tools.svg?show=size", token="").text
    assert f"{image.pulls} pulls" in server.get("/badge/lab/tools:latest.svg?show=pulls", token="").text
    assert server.get("/badge/lab/tools.png", token="").status == 404
    assert server.get("/badge/lab/missing.svg", token="").status == 404


def test_badges_of_what_is_not_there_yet_are_pictures_too(server: Server, hub: Hub) -> None:
    server.post("/api/v1/collections", {"name": "lab/empty"})
    for query, text in (("", "no builds"), ("?show=size", "no image"), ("?show=pulls", "0 pulls")):
        answer = server.get(f"/badge/lab/empty.svg{query}", token="")
        assert answer.status == 200
        assert text in answer.text
    assert server.get("/badge/lab/missing.svg", token="").status == 404


def test_refusals_know_who_is_signed_in(server: Server) -> None:
    browser = Browser(server)
    browser.sign_in()
    answer = browser.send("/lab/nothing")
    assert answer.status == 404
    assert "Sign out" in check(answer).text
    assert "may help" not in answer.text


def test_every_page_has_a_json_twin_at_its_own_address(server: Server, hub: Hub, tmp_path: Path) -> None:
    image = put(hub, tmp_path)
    number = put_build(hub)
    twins = {
        "/": "/api/v1/collections",
        "/search": "/api/v1/collections",
        "/lab/tools": "/api/v1/collections/lab/tools",
        f"/lab/tools/builds/{number}": f"/api/v1/builds/{number}",
        f"/lab/tools/images/{image.id}": f"/api/v1/images/{image.id}",
        f"/lab/tools/compare/{image.id}...{image.id}": f"/api/v1/images/{image.id}/compare/{image.id}",
        "/account": "/api/v1/user",
    }
    for path, twin in twins.items():
        got = server.get(path, headers={"Accept": "application/json"})
        assert got.json == server.get(twin).json, path
    missing = server.get("/lab/missing", headers={"Accept": "application/json"})
    assert missing.json["error"]["id"] == "no-such-collection"


def test_signing_in_and_out(server: Server) -> None:
    browser = Browser(server)
    assert browser.sign_in(password="wrong").status == 401
    assert not [cookie for cookie in browser.jar if cookie.name == "hub_session"]
    assert browser.sign_in(to="/account").status == 200
    assert browser.address.endswith("/account")
    cookie = next(cookie for cookie in browser.jar if cookie.name == "hub_session")
    assert cookie.has_nonstandard_attr("HttpOnly")
    assert (cookie.get_nonstandard_attr("SameSite") or "").lower() == "lax"
    assert browser.send("/sign-out", {"csrf": "wrong"}).status == 403
    assert "Sign out" in browser.send("/").text
    browser.send("/sign-out", {"csrf": browser.hidden("/", "csrf")})
    assert "Sign out" not in browser.send("/").text
    assert browser.send("/account").status == 200
    assert "/sign-in" in browser.address


def test_signing_in_needs_the_form_of_this_browser(server: Server) -> None:
    other = Browser(server).hidden("/sign-in", "form")
    for form in (other, ""):
        browser = Browser(server)
        answer = browser.send("/sign-in", {"form": form, "name": "lab", "password": "correct horse"})
        assert answer.status == 403
        assert not [cookie for cookie in browser.jar if cookie.name == "hub_session"]


@pytest.mark.parametrize(
    "target", ["https://evil.example/", "//evil.example", "/\\evil.example", "/a\r\nX: y", "evil", "", "/\t/evil"]
)
def test_signing_in_leads_to_this_hub_only(target: str) -> None:
    assert local(target) == "/"
    assert local("/lab/tools?path=a") == "/lab/tools?path=a"


def test_tokens_are_made_shown_once_and_taken_back(server: Server) -> None:
    browser = Browser(server)
    browser.sign_in()
    csrf = browser.hidden("/account", "csrf")
    assert browser.send("/account", {"csrf": "", "action": "token", "scopes": "read"}).status == 403
    made = browser.send("/account", {"csrf": csrf, "action": "token", "value": HOSTILE, "scopes": "read"})
    check(made)
    assert made.headers["Cache-Control"] == "no-store"
    secret = re.search(r"pyhub_[-_0-9A-Za-z]{200,}", made.text)
    assert secret
    user = server.get("/api/v1/user", token=secret[0])
    assert user.json["scopes"] == ["read"]
    again = browser.send("/account")
    check(again)
    assert secret[0] not in again.text
    number = max(row["id"] for row in server.get("/api/v1/tokens").json["tokens"])
    browser.send("/account", {"csrf": csrf, "action": "revoke", "value": str(number)})
    assert server.get("/api/v1/user", token=secret[0]).status == 401


def test_exchanges_with_the_forge_are_shown_to_insiders(server: Server, hub: Hub, tmp_path: Path) -> None:
    put(hub, tmp_path)
    with hub.write() as session:
        collection = find_collection(session, "lab", "tools")
        assert collection is not None
        collection.git_url = "https://forge.example/lab/tools"
        values = {"delivery": "1", "forge": "gitea", "event": "push", "status": 202, "state": "done"}
        session.add(Delivery(collection_id=collection.id, result=HOSTILE, answer="queued", **values))
    assert "gitea" not in page(server, "/lab/tools").text
    browser = Browser(server)
    browser.sign_in()
    found = check(browser.send("/lab/tools"))
    assert "gitea" in found.text
    assert "alert(1)" in found.text
    assert collection.hook_secret not in found.text
    assert collection.hook_secret in check(browser.send("/lab/tools/settings")).text
    number = server.get("/api/v1/collections/lab/tools/deliveries").json["deliveries"][0]["id"]
    found = check(browser.send(f"/lab/tools/deliveries/{number}"))
    assert "gitea" in found.text


def test_buttons_do_what_the_api_does_with_its_rights(server: Server, hub: Hub, tmp_path: Path) -> None:
    image = put(hub, tmp_path)
    number = put_build(hub, state="queued", claimed_at=None, finished_at=None, publish=False)
    stranger = Browser(server)
    path, build = f"/lab/tools/images/{image.id}", f"/lab/tools/builds/{number}"
    assert stranger.send(path, {"action": "freeze"}).status == 403
    assert "Freeze" not in stranger.send(path).text
    server.command("user", "add", f"guest{number}", "--password-stdin", text="another password\n")
    guest = Browser(server)
    guest.sign_in(f"guest{number}", "another password")
    assert guest.send(path, {"action": "freeze", "csrf": guest.hidden("/", "csrf")}).status == 403
    browser = Browser(server)
    browser.sign_in()
    csrf = browser.hidden("/", "csrf")
    assert browser.send(path, {"action": "freeze", "csrf": guest.hidden("/", "csrf")}).status == 403
    assert "frozen" in browser.send(path, {"action": "freeze", "csrf": csrf}).text
    assert server.get(f"/api/v1/images/{image.id}").json["frozen"] is True
    browser.send("/lab/tools", {"action": "star", "csrf": csrf})
    assert server.get("/api/v1/collections/lab/tools").json["stars"] == 1
    assert browser.send("/lab/tools", {"action": "explode", "csrf": csrf}).status == 400
    assert browser.send(build, {"action": "cancel", "csrf": csrf}).status in (200, 409)
    with hub.read() as session:
        assert session.scalar(sa.select(Build.state).where(Build.id == number)) != "queued"


def test_a_token_presses_no_buttons(server: Server, hub: Hub, tmp_path: Path) -> None:
    image = put(hub, tmp_path)
    answer = server.post(
        f"/lab/tools/images/{image.id}", b"action=freeze", headers={"Content-Type": "application/x-www-form-urlencoded"}
    )
    assert answer.status == 403
    assert server.get(f"/api/v1/images/{image.id}").json["frozen"] is False


def test_new_collections_are_made_with_a_form(server: Server) -> None:
    browser = Browser(server)
    browser.sign_in()
    csrf = browser.hidden("/new", "csrf")
    check(browser.send("/new"))
    made = browser.send("/new", {"csrf": csrf, "name": "lab/fresh", "private": "yes"})
    assert made.status == 200
    assert browser.address.endswith("/lab/fresh")
    assert server.get("/api/v1/collections/lab/fresh").json["private"] is True
    wrong = browser.send("/new", {"csrf": csrf, "name": HOSTILE})
    assert wrong.status == 400
    check(wrong)


def test_pages_do_not_answer_for_other_doors(server: Server) -> None:
    for path in ("/api/v1/nothing", "/v1/nothing", "/v1/oci-redirect", "/pks/nothing", "/assets/nothing"):
        answer = Browser(server).send(path)
        assert answer.status == 404
        assert answer.headers["Content-Type"].startswith("application/json"), path
    page(server, "/nobody", 404)
    page(server, "/nobody/nothing", 404)
    page(server, "/nobody/nothing/at/all", 404)
    for path in ("/static/hub.css", "/static/log.js"):
        assert server.get(path, token="").status == 200
    assert server.get("/static/..%2fsite.py", token="").status == 404
    style = server.get("/static/hub.css", token="").text
    assert "prefers-color-scheme: dark" in style
    assert "url(" not in style
    assert "@import" not in style
