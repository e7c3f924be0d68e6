# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the hub's tests; the classes behind them are in `world`."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="needs the hub extra: pip install '.[hub]'")
pytest.importorskip("sqlalchemy", reason="needs the hub extra: pip install '.[hub]'")

from pysingularity.hub.context import Hub
from pysingularity.hub.settings import load_settings, make_data_folder

from .world import BUILDER, Repository, Server


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark everything here."""
    for item in items:
        if "tests/hub/" in str(item.path):
            item.add_marker(pytest.mark.hub)


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    """An empty repository."""
    if shutil.which("git") is None:
        pytest.skip("needs the program git")
    return Repository(tmp_path / "repository")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data folder with settings for tests and a migrated database."""
    folder = make_data_folder(
        tmp_path / "data",
        f"""name = "Test Hub"
[builds]
program = [{json.dumps(sys.executable)}, "-I", {json.dumps(str(BUILDER))}]
readable = [{json.dumps(str(BUILDER.parent))}]
lease = 5.0
[sources]
protocols = ["https", "file"]
local = [{json.dumps(str(tmp_path))}]
[storage]
reserve = 0
""",
    )
    hub = Hub(load_settings(folder))
    hub.database.migrate()
    hub.close()
    return folder


@pytest.fixture
def hub(data: Path) -> Iterator[Hub]:
    """An opened hub without processes."""
    hub = Hub(load_settings(data))
    yield hub
    hub.close()


@pytest.fixture
def server(data: Path) -> Iterator[Server]:
    """A running hub with the administrator `lab` and his token."""
    server = Server(data)
    server.command("user", "add", "lab", "--admin", "--password-stdin", text="correct horse\n")
    server.token = server.command("token", "create", "--user", "lab", "--scope", "read,push,build,admin").strip()
    server.start()
    yield server
    server.stop()
