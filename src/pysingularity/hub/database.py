# SPDX-License-Identifier: Apache-2.0
"""The database: one engine per process, sessions for reading and for writing, and the schema's migrations.

SQLite runs in WAL mode; writers say BEGIN IMMEDIATE, so that two of them wait for each other at the start of a
transaction instead of failing at its end. PostgreSQL needs neither. Slow work (git, hashing) never happens inside a
transaction.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from alembic import command as alembic
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy.orm import Session, sessionmaker

from pysingularity.errors import HostError

_IMMEDIATE = "hub_immediate"


class Database:
    """Connections to the hub's database.

    Arguments:
        url: as SQLAlchemy writes it (`sqlite:///…`, `postgresql+psycopg://…`).
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.sqlite = url.startswith("sqlite")
        options: dict[str, Any] = {"pool_pre_ping": not self.sqlite}
        if self.sqlite:
            # A thread may give its connection back for another one to use.
            options["connect_args"] = {"check_same_thread": False, "timeout": 30}
            options["pool_size"], options["max_overflow"] = 16, 64
        self.engine = sa.create_engine(url, **options)
        if self.sqlite:
            sa.event.listen(self.engine, "connect", _prepare_sqlite)
            sa.event.listen(self.engine, "begin", _begin_sqlite)
        self._readers = sessionmaker(self.engine, expire_on_commit=False)
        self._writers = sessionmaker(self.engine.execution_options(**{_IMMEDIATE: True}), expire_on_commit=False)

    @contextmanager
    def read(self) -> Iterator[Session]:
        """Open a session that only reads."""
        with self._readers() as session:
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        """Open a session whose transaction is committed at the end, or rolled back when an error leaves it."""
        with self._writers.begin() as session:
            yield session

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()

    def revision(self) -> str | None:
        """Return the schema's revision in the database, or None when it is empty."""
        with self.engine.connect() as connection:
            return MigrationContext.configure(connection).get_current_revision()

    def migrate(self) -> None:
        """Bring the schema to the newest revision."""
        config = migration_config()
        with self.engine.connect() as connection:
            config.attributes["connection"] = connection
            alembic.upgrade(config, "head")

    def check(self) -> None:
        """Refuse to work on a schema that is not ours.

        Raises:
            HostError: the schema is older or newer than this program.
        """
        have, want = self.revision(), newest_revision()
        if have != want:
            raise HostError(
                "wrong-schema",
                f"the database's schema is at {have or 'nothing'}, this program needs {want}",
                hint="run singularity-hub init on the same data folder: it migrates and keeps everything",
            )


def migration_config() -> Config:
    """Return the configuration that Alembic needs to find the migrations shipped with the package."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.set_main_option("path_separator", "os")
    return config


def newest_revision() -> str | None:
    """Return the revision that this program's models stand at."""
    return ScriptDirectory.from_config(migration_config()).get_current_head()


def _prepare_sqlite(connection: Any, _record: object) -> None:
    # Transactions are begun by us (see _begin_sqlite), not by the sqlite3 module's guess.
    connection.isolation_level = None
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=NORMAL")
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.execute("PRAGMA busy_timeout=30000")
    cursor.close()


def _begin_sqlite(connection: sa.Connection) -> None:
    immediate = connection.get_execution_options().get(_IMMEDIATE, False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if immediate else "BEGIN")
