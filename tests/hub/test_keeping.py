# SPDX-License-Identifier: Apache-2.0
"""Garbage, retention, scrubbing, backup and restore, and the archive of plain files."""

from __future__ import annotations

import functools
import http.server
import json
import os
import threading
from pathlib import Path

import pytest
import sqlalchemy as sa

from pysingularity.errors import SingularityError
from pysingularity.hub.accounts.rights import STRANGER
from pysingularity.hub.catalog import set_tag
from pysingularity.hub.command import main
from pysingularity.hub.context import Hub
from pysingularity.hub.keeping.archive import export
from pysingularity.hub.keeping.backup import back_up, restore
from pysingularity.hub.keeping.garbage import DAY, collect
from pysingularity.hub.keeping.scrub import scrub
from pysingularity.hub.models import Blob, BlobLink, Collection, Container, Image, Manifest, Upload, User, now
from pysingularity.hub.protocols.uploads import begin
from pysingularity.hub.robots import Robots
from pysingularity.hub.settings import load_settings

from .shelf import SINGULARITY, make_sif, put_image, run
from .world import Server

COMMIT = "89abcdef0123456789abcdef0123456789abcdef"


def age(hub: Hub, sha256: str, days: float) -> None:
    """Let a stored file look old."""
    path = hub.settings.folder("blobs") / sha256[:2] / sha256
    os.utime(path, (now() - days * DAY,) * 2)


def numbers(hub: Hub) -> list[int]:
    with hub.read() as session:
        return list(session.scalars(sa.select(Image.id).order_by(Image.id)))


def make_images(hub: Hub, folder: Path, count: int, **more: object) -> list[Image]:
    return [
        put_image(hub, make_sif(folder / f"{place}.sif", f"text {place}"), "lab/tools", tags=["v1"], **more)
        for place in range(count)
    ]


def test_running_hub_keeps_its_house_as_often_as_the_settings_say(hub: Hub, tmp_path: Path):
    image = make_images(hub, tmp_path, 1)[0]
    with hub.write() as session:
        session.execute(sa.delete(Collection))
    age(hub, image.sha256, 3)
    path = hub.settings.folder("blobs") / image.sha256[:2] / image.sha256
    hub.settings.keep.collect_hours = hub.settings.keep.scrub_days = 0
    robots = Robots(hub)
    robots._keep_house()
    assert path.exists()
    hub.settings.keep.collect_hours = 24
    robots._keep_house()
    assert not path.exists()
    # The next one is a day away, also for the robot of another process.
    second = put_image(hub, make_sif(tmp_path / "second.sif", "second"), "lab/more", tags=["v1"])
    with hub.write() as session:
        session.execute(sa.delete(Collection))
    age(hub, second.sha256, 3)
    path = hub.settings.folder("blobs") / second.sha256[:2] / second.sha256
    Robots(hub)._keep_house()
    assert path.exists()
    os.utime(hub.settings.data / ".collected", (now() - DAY - 1,) * 2)
    Robots(hub)._keep_house()
    assert not path.exists()


def test_running_hub_reads_its_files_again(hub: Hub, tmp_path: Path):
    image = make_images(hub, tmp_path, 1)[0]
    path = hub.settings.folder("blobs") / image.sha256[:2] / image.sha256
    path.chmod(0o600)
    path.write_bytes(b"rotten")
    Robots(hub)._keep_house()
    with hub.read() as session:
        assert "other content" in session.get_one(Blob, image.sha256).damaged


# --- garbage ---------------------------------------------------------------------------------------------------------


def test_unneeded_files_go_after_grace_and_needed_ones_stay(hub: Hub, tmp_path: Path):
    kept, dropped, fresh = make_images(hub, tmp_path, 3)
    for image in (kept, dropped):
        age(hub, image.sha256, 2)
    with hub.write() as session:
        session.execute(sa.delete(Image).where(Image.id.in_([dropped.id, fresh.id])))
    report = collect(hub, dry_run=True)
    assert (report.blobs, report.bytes) == (1, dropped.size)
    assert hub.storage.has(dropped.sha256)
    assert collect(hub).blobs == 1
    assert [hub.storage.has(one.sha256) for one in (kept, dropped, fresh)] == [True, False, True]
    with hub.read() as session:
        assert session.get(Blob, dropped.sha256) is None
    assert collect(hub, grace=-1).blobs == 1
    assert not hub.storage.has(fresh.sha256)


def test_files_of_pushed_manifests_stay_and_young_links_protect(hub: Hub, tmp_path: Path):
    first, second, third = make_images(hub, tmp_path, 3)
    with hub.write() as session:
        container = session.get_one(Image, first.id).container_id
        session.execute(sa.delete(Image))
        reference = f"sha256:{first.sha256}"
        session.add(
            Manifest(container_id=container, digest="sha256:x", media_type="y", content=b"", references=[reference])
        )
        session.add(BlobLink(container_id=container, sha256=second.sha256))
        session.add(BlobLink(container_id=container, sha256=third.sha256, created_at=now() - 3 * DAY))
    for image in (first, second, third):
        age(hub, image.sha256, 2)
    assert collect(hub).blobs == 1
    assert [hub.storage.has(one.sha256) for one in (first, second, third)] == [True, True, False]


def test_file_brought_again_while_it_was_garbage_stays(hub: Hub, tmp_path: Path):
    (image,) = make_images(hub, tmp_path, 1)
    age(hub, image.sha256, 2)
    with hub.write() as session:
        session.execute(sa.delete(Image))
    again = hub.storage.staging() / "again"
    again.write_bytes((tmp_path / "0.sif").read_bytes())
    hub.storage.take(again, image.sha256)
    assert collect(hub).blobs == 0
    assert hub.storage.has(image.sha256)


def test_retention_keeps_tagged_frozen_pulled_and_the_last(hub: Hub, tmp_path: Path):
    images = make_images(hub, tmp_path, 6)
    oldest, frozen, pulled, plain, last, tagged = images
    assert collect(hub).images == []  # without a rule everything stays
    with hub.write() as session:
        session.get_one(Image, frozen.id).frozen = True
        session.get_one(Image, pulled.id).pulled_at = now() - 10 * DAY
        session.get_one(Image, oldest.id).pulled_at = now() - 200 * DAY
        session.scalars(sa.select(Collection)).one().keep = {"last": 1, "pulled_days": 90}
    assert collect(hub, dry_run=True).images == [plain.id, oldest.id]
    assert len(numbers(hub)) == 6
    assert collect(hub).images == [plain.id, oldest.id]
    assert numbers(hub) == [frozen.id, pulled.id, last.id, tagged.id]
    with hub.write() as session:
        set_tag(session, session.get_one(Image, pulled.id), "paper")
        session.get_one(Image, pulled.id).pulled_at = None
    assert collect(hub).images == []


def test_old_uploads_and_announcements_go(hub: Hub, tmp_path: Path):
    (image,) = make_images(hub, tmp_path, 1)
    with hub.write() as session:
        container = session.scalars(sa.select(Container)).one()
        old, young = begin(session, STRANGER, container), begin(session, STRANGER, container)
        old.changed_at = now() - 5 * DAY
        session.add(Image(container_id=container.id, sha256="0" * 64, created_at=now() - 5 * DAY, hidden=True))
    folder = hub.settings.folder("uploads")
    for name in (old.id, young.id, f"{old.id}.1", "stray"):
        (folder / name).write_bytes(b"x")
        os.utime(folder / name, (now() - 5 * DAY,) * 2)
    assert collect(hub).uploads == 1
    assert [path.name for path in folder.iterdir()] == [young.id]
    with hub.read() as session:
        assert list(session.scalars(sa.select(Upload.id))) == [young.id]
    assert numbers(hub) == [image.id]


def test_scrub_finds_changed_and_missing_files_and_their_recovery(hub: Hub, tmp_path: Path):
    good, changed, gone = make_images(hub, tmp_path, 3)
    assert scrub(hub)["damaged"] == {}
    path = hub.settings.folder("blobs") / changed.sha256[:2] / changed.sha256
    whole = path.read_bytes()
    path.chmod(0o600)
    path.write_bytes(whole[:-1] + b"!")
    hub.storage.remove(gone.sha256)
    value = scrub(hub)
    assert value["checked"] == 3
    assert set(value["damaged"]) == {changed.sha256, gone.sha256}
    with hub.read() as session:
        assert session.get_one(Blob, changed.sha256).damaged
        assert not session.get_one(Blob, good.sha256).damaged
    path.write_bytes(whole)
    assert set(scrub(hub)["damaged"]) == {gone.sha256}
    assert scrub(hub, older=3600)["checked"] == 0
    assert scrub(hub, most=1)["checked"] == 1


# --- backup ----------------------------------------------------------------------------------------------------------


def test_backup_of_a_serving_hub_is_a_hub_again(server: Server, hub: Hub, tmp_path: Path, capsys):
    path = make_sif(tmp_path / "a.sif", pad=1 << 20)
    image = put_image(hub, path, "lab/tools", tags=["v1"], commit=COMMIT)
    target, data = tmp_path / "backup", tmp_path / "restored"
    assert main(["backup", "--data", str(server.data), str(target), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["copied"] == 1
    server.command("user", "add", "later")
    assert server.get("/healthz").status == 200
    assert main(["restore", "--data", str(data), str(target)]) == 0
    server.stop()
    second = Server(data)
    second.start()
    try:
        answer = second.get("/api/container/lab/tools:v1").json
        assert (answer["commit"], answer["id"]) == (COMMIT, image.id)
        assert second.get(answer["image"].removeprefix(second.url)).body == path.read_bytes()
        second.token = server.token
        assert second.get("/api/v1/user").json["name"] == "lab"
    finally:
        second.stop()
    restored = Hub(load_settings(data))
    with restored.read() as session:
        assert session.scalar(sa.select(User.id).where(User.name == "later")) is None
    restored.close()


def test_second_backup_copies_only_what_is_new(hub: Hub, tmp_path: Path):
    images = make_images(hub, tmp_path, 2)
    target = tmp_path / "backup"
    assert back_up(hub, target)["copied"] == 2
    put_image(hub, make_sif(tmp_path / "new.sif", "new"), "lab/tools", tags=["v2"])
    with hub.write() as session:
        session.execute(sa.delete(Image).where(Image.id == images[0].id))
    collect(hub, grace=-1)
    value = back_up(hub, target)
    assert (value["copied"], value["blobs"], value["missing"]) == (1, 2, [])
    assert not list(target.glob(f"blobs/*/{images[0].sha256}"))


def test_damaged_and_interrupted_backups_are_refused(hub: Hub, tmp_path: Path):
    (image,) = make_images(hub, tmp_path, 1)
    target, data = tmp_path / "backup", tmp_path / "restored"
    back_up(hub, target)
    file = target / "blobs" / image.sha256[:2] / image.sha256
    whole = file.read_bytes()
    file.chmod(0o600)
    file.write_bytes(whole[:-1] + b"!")
    with pytest.raises(SingularityError, match="other content"):
        restore(target, data)
    file.unlink()
    with pytest.raises(SingularityError, match="missing"):
        restore(target, data)
    (target / "manifest.json").unlink()
    with pytest.raises(SingularityError, match="no complete backup"):
        restore(target, data)
    assert not data.exists()
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".partial")]
    with pytest.raises(SingularityError, match="of no backup"):
        back_up(hub, tmp_path)


def test_backup_does_not_take_damaged_files_for_whole_ones(hub: Hub, tmp_path: Path):
    first, second = make_images(hub, tmp_path, 2)
    path = hub.settings.folder("blobs") / first.sha256[:2] / first.sha256
    path.chmod(0o600)
    path.write_bytes(b"!" * first.size)
    value = back_up(hub, tmp_path / "backup")
    assert (value["missing"], value["blobs"]) == ([first.sha256], 1)
    assert restore(tmp_path / "backup", tmp_path / "restored")["missing"] == [first.sha256]
    assert (tmp_path / "restored" / "blobs" / second.sha256[:2] / second.sha256).exists()


def test_restore_never_writes_over_a_hub(hub: Hub, data: Path, tmp_path: Path):
    back_up(hub, tmp_path / "backup")
    with pytest.raises(SingularityError, match="there already"):
        restore(tmp_path / "backup", data)


# --- archive ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path):
    """A folder and the address where a plain file server shows it."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            """Say nothing."""

    folder = tmp_path / "archive"
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield folder, server.server_address[1]
    server.shutdown()
    server.server_close()
    thread.join()


def test_archive_answers_our_client_from_a_file_server(hub: Hub, files, tmp_path: Path):
    folder, port = files
    path = make_sif(tmp_path / "a.sif", pad=1 << 20)
    image = put_image(hub, path, "lab/Tools", tags=["v1"], commit=COMMIT)
    put_image(hub, make_sif(tmp_path / "b.sif", "secret"), "lab/secret", tags=["v1"], private=True)
    put_image(hub, make_sif(tmp_path / "c.sif", "request"), "lab/Tools", tags=["x"], hidden=True)
    assert export(hub, folder, f"http://127.0.0.1:{port}")["images"] == 1
    assert "secret" not in (folder / "index.json").read_text()
    for name in ("tools:v1", "tools", "Tools:v1", f"tools@{COMMIT}", f"tools:v1@{image.version}", "tools:latest"):
        assert json.loads((folder / "api/container/lab" / name).read_text())["version"] == image.version, name
    target = tmp_path / "pulled.sif"
    result = run(
        *SINGULARITY, "pull", "--no-https", target, f"shub://127.0.0.1:{port}/lab/tools:v1",
        env={"SINGULARITY_CACHEDIR": str(tmp_path / "cache")},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert target.read_bytes() == path.read_bytes()


def test_next_export_takes_back_what_became_private(hub: Hub, tmp_path: Path):
    folder = tmp_path / "archive"
    put_image(hub, make_sif(tmp_path / "a.sif"), "lab/tools", tags=["v1"])
    put_image(hub, make_sif(tmp_path / "b.sif", "other"), "lab/other", tags=["v1"])
    assert export(hub, folder, "https://archive.example.org")["images"] == 2
    with hub.write() as session:
        session.scalars(sa.select(Collection).where(Collection.name == "other")).one().private = True
    assert export(hub, folder, "https://archive.example.org")["images"] == 1
    assert len(list((folder / "images").iterdir())) == 1
    assert not list((folder / "api").glob("container/lab/other*"))
    assert "shub://archive.example.org/lab/tools:v1" in (folder / "index.html").read_text()


def test_export_refuses_addresses_and_folders_that_cannot_be(hub: Hub, tmp_path: Path):
    with pytest.raises(SingularityError, match="whole address"):
        export(hub, tmp_path / "archive", "/relative")
    with pytest.raises(SingularityError, match="no earlier export"):
        export(hub, tmp_path, "https://archive.example.org")
    with pytest.raises(SingularityError, match="no public collection"):
        export(hub, tmp_path / "archive", "https://archive.example.org", names=["lab/none"])


@pytest.mark.peer
def test_archive_answers_the_reference_client(hub: Hub, files, tmp_path: Path, reference):
    folder, port = files
    path = make_sif(tmp_path / "a.sif")
    put_image(hub, path, "lab/tools", tags=["v1"], commit=COMMIT)
    # A name without a port, as this client demands; the file server is reached as the hub would be, through a proxy
    # variable, so its answers must not depend on the host: the handler takes the path of an absolute request line.
    export(hub, folder, "http://hub.lab")
    env = {"http_proxy": f"http://127.0.0.1:{port}", "APPTAINER_CACHEDIR": str(tmp_path / "cache")}
    target = tmp_path / "pulled.sif"
    (folder / "http:").mkdir()
    (folder / "http:" / "hub.lab").symlink_to(folder)
    result = reference("pull", "--no-https", target, "shub://hub.lab/lab/tools:v1", env=env)
    assert result.returncode == 0, result.stderr
    assert target.read_bytes() == path.read_bytes()


def test_commands_say_what_they_did(hub: Hub, data: Path, tmp_path: Path, capsys):
    make_images(hub, tmp_path, 1)
    assert main(["gc", "--data", str(data), "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["dry_run"] is True
    assert main(["scrub", "--data", str(data)]) == 0
    assert "1 files" in capsys.readouterr().out
    address = "https://archive.example.org"
    assert main(["export", "--data", str(data), "--url", address, str(tmp_path / "archive"), "lab/tools"]) == 0
    assert "1 collections, 1 images" in capsys.readouterr().out
    [(sha256, _, _)] = hub.storage.list()
    hub.storage.remove(sha256)
    assert main(["scrub", "--data", str(data)]) == 1
    assert main(["backup", "--data", str(data), str(tmp_path / "backup")]) == 1


@pytest.mark.postgres
def test_hub_moves_to_postgresql_and_back(hub: Hub, postgres: str, tmp_path: Path, monkeypatch):
    first, second = make_images(hub, tmp_path, 2)
    back_up(hub, tmp_path / "backup")
    monkeypatch.setenv("SINGULARITY_HUB_DATABASE", postgres)
    restore(tmp_path / "backup", tmp_path / "moved")
    moved = Hub(load_settings(tmp_path / "moved"))
    assert not moved.database.sqlite
    moved.database.check()
    third = put_image(moved, make_sif(tmp_path / "new.sif", "new"), "lab/tools", tags=["v2"])
    assert third.id > second.id
    with moved.write() as session:
        session.execute(sa.delete(Image).where(Image.id == first.id))
    assert collect(moved, grace=-1).blobs == 1
    assert scrub(moved)["damaged"] == {}
    assert back_up(moved, tmp_path / "second")["blobs"] == 2
    with pytest.raises(SingularityError, match="has rows already"):
        restore(tmp_path / "second", tmp_path / "again")
    moved.close()
    monkeypatch.delenv("SINGULARITY_HUB_DATABASE")
    restore(tmp_path / "second", tmp_path / "again")
    again = Hub(load_settings(tmp_path / "again"))
    assert numbers(again) == [second.id, third.id]
    again.close()
