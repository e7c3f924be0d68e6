# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the hub's tests; the classes behind them are in `world`."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs the hub extra: pip install '.[hub]'")
pytest.importorskip("sqlalchemy", reason="needs the hub extra: pip install '.[hub]'")

import sqlalchemy as sa

from pysingularity.hub.context import Hub
from pysingularity.hub.models import Collection
from pysingularity.hub.settings import load_settings, make_data_folder
from users import User

from .shelf import run
from .world import BUILDER, Repository, Server


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark everything here."""
    for item in items:
        if "tests/hub/" in str(item.path):
            item.add_marker(pytest.mark.hub)
            # A hub made of a backup has the settings of the first one, and so its database in PostgreSQL.
            if os.environ.get("HUB_TEST_POSTGRES") and ("backup" in item.name or "moves_to_postgresql" in item.name):
                item.add_marker(pytest.mark.skip(reason="restores beside the hub: on SQLite only"))


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    """An empty repository."""
    if shutil.which("git") is None:
        pytest.skip("needs the program git")
    return Repository(tmp_path / "repository")


def make_data(folder: Path, builds: str = "", more: str = "") -> Path:
    """Make a data folder with settings for tests and a migrated database.

    HUB_TEST_POSTGRES names a PostgreSQL (`postgresql://USER@/?host=FOLDER`) in which every hub gets a database of its
    own: so the tests run on it as they run on SQLite.

    Arguments:
        builds, more: lines of the settings' table `builds`; further lines of `storage`, and further tables.
    """
    server = os.environ.get("HUB_TEST_POSTGRES", "")
    database = f"database = {json.dumps(new_database(server))}\n" if server else ""
    data = make_data_folder(
        folder / "data",
        f"""name = "Test Hub"
{database}
[builds]
program = [{json.dumps(sys.executable)}, "-I", {json.dumps(str(BUILDER))}]
readable = [{json.dumps(str(BUILDER.parent))}]
lease = 5.0
{builds}
[sources]
protocols = ["https", "file"]
local = [{json.dumps(str(folder))}]
[storage]
reserve = 0
part_size = 5242880
{more}
""",
    )
    hub = Hub(load_settings(data))
    hub.database.migrate()
    hub.close()
    return data


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data folder of the test's own."""
    return make_data(tmp_path)


@pytest.fixture
def hub(data: Path) -> Iterator[Hub]:
    """An opened hub without processes."""
    hub = Hub(load_settings(data))
    yield hub
    hub.close()


@pytest.fixture
def server(data: Path) -> Iterator[Server]:
    """A running hub with the administrator `lab` and his token."""
    server = started(data)
    yield server
    server.stop()


def started(data: Path, user: User | None = None) -> Server:
    """Start a hub, as an ordinary user if one is given."""
    server = Server(data, user)
    server.command("user", "add", "lab", "--admin", "--password-stdin", text="correct horse\n")
    server.token = server.command("token", "create", "--user", "lab", "--scope", "read,push,build,admin").strip()
    server.start()
    return server


@pytest.fixture(scope="module")
def stand(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Hub]]:
    """One running hub for all tests of a file, and the same hub opened; starting one for each takes too long."""
    data = make_data(tmp_path_factory.mktemp("stand"))
    server = started(data)
    hub = Hub(load_settings(data))
    yield server, hub
    hub.close()
    server.stop()


@pytest.fixture
def clean(stand: tuple[Server, Hub]) -> tuple[Server, Hub]:
    """The running hub without collections of earlier tests."""
    with stand[1].write() as session:
        session.execute(sa.delete(Collection))
    return stand


@pytest.fixture
def reference() -> Callable[..., subprocess.CompletedProcess[str]]:
    """The reference client, as a function of its arguments; `REFERENCE_APPTAINER` names the program."""
    program = os.environ.get("REFERENCE_APPTAINER", "")
    if not program or shutil.which(program) is None:
        pytest.skip("needs the reference client: REFERENCE_APPTAINER=PROGRAM")

    def call(*words: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
        return run(program, *words, **options)

    return call


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """A PostgreSQL of the tests' own, on a socket in a short folder: its address without a database."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    pytest.importorskip("psycopg", reason="needs the postgres extra: pip install '.[postgres]'")
    if not found:
        pytest.skip("needs Debian's PostgreSQL: apt install postgresql")
    programs = found[-1].parent
    # It refuses to run as root; Debian's package makes a user for it.
    prefix = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"] if os.geteuid() == 0 else []
    folder = Path(tempfile.mkdtemp(prefix="pg"))
    if prefix:
        shutil.chown(folder, "postgres", "postgres")
    data, sockets = folder / "data", folder

    def call(*words: str | Path) -> None:
        result = run(*prefix, *words, cwd=folder)
        assert result.returncode == 0, result.stderr

    try:
        call(programs / "initdb", "-D", data, "-U", "hub", "-A", "trust", "--no-sync", "-E", "UTF8", "--locale=C")
        options = f"-c listen_addresses='' -c unix_socket_directories={sockets} -c fsync=off -c max_connections=300"
        call(programs / "pg_ctl", "-D", data, "-o", options, "-l", folder / "log", "-w", "start")
        try:
            yield f"postgresql://hub@/?host={sockets}"
        finally:
            call(programs / "pg_ctl", "-D", data, "-m", "immediate", "-w", "stop")
    finally:
        shutil.rmtree(folder)


def new_database(server: str) -> str:
    """Make an empty database and return its URL."""
    import psycopg

    name = f"hub_{secrets.token_hex(6)}"
    with psycopg.connect(server.replace("/?", "/postgres?"), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    return server.replace("/?", f"/{name}?")


@pytest.fixture
def postgres(postgres_server: str) -> str:
    """The URL of an empty database in PostgreSQL."""
    return new_database(postgres_server)


CHROMIUM = "/usr/bin/chromium"
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A browser."""
    if not os.access(CHROMIUM, os.X_OK):
        pytest.skip("needs Debian's Chromium: apt install chromium")
    api = pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install playwright")
    with api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()
