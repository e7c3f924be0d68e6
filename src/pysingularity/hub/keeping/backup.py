# SPDX-License-Identifier: Apache-2.0
"""Backup of a running hub into a folder, and a hub made of such a folder again.

A backup is: the database as it stood at one moment, then every file that it speaks of, then settings and secret, then
`manifest.json` with the digest of each. Files come after the database, so that nothing it names is missing, and are
hashed on their way; those that the folder holds from an earlier backup are not copied again. A backup without
`manifest.json` was interrupted and is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sqlite3
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from pysingularity.errors import HostError
from pysingularity.hub.builds.accept import copy
from pysingularity.hub.context import Hub
from pysingularity.hub.database import Database
from pysingularity.hub.keeping.garbage import needed
from pysingularity.hub.models import Base, Blob
from pysingularity.hub.settings import FILE, Settings, load_settings
from pysingularity.hub.storage.base import hash_file
from pysingularity.hub.storage.files import sync_folder
from pysingularity.version import __version__

MANIFEST = "manifest.json"
DATABASE = "hub.sqlite"
FORMAT = 1


def back_up(hub: Hub, target: Path) -> dict[str, Any]:
    """Write a backup into a folder, new or of an earlier backup of the same hub.

    Returns:
        `path`, `blobs`, `bytes`, `copied` (files that an earlier backup did not have) and `missing`: digests of files
        that images need and the hub's storage has no more, or not whole.

    Raises:
        HostError: the folder holds something else.
    """
    data = hub.settings.data
    target.mkdir(mode=0o700, parents=True, exist_ok=True)
    known = {MANIFEST, DATABASE, FILE, "secret", "blobs", "logs"}
    strange = [path.name for path in target.iterdir() if path.name.removesuffix(".partial") not in known]
    if strange:
        hint = "choose a new folder, or that of an earlier backup"
        raise HostError("not-a-backup", f"{target}: holds {strange[0]}, which is of no backup", hint=hint)
    (target / MANIFEST).unlink(missing_ok=True)
    _copy_database(hub, target / DATABASE)
    snapshot = Database(f"sqlite:///{target / DATABASE}")
    try:
        with snapshot.read() as session:
            sizes: dict[str, int] = dict(session.execute(sa.select(Blob.sha256, Blob.size)).all())
            wanted = needed(session)
        revision = snapshot.revision()
    finally:
        snapshot.close()
    copied, missing = 0, []
    for sha256, size in sorted(sizes.items()):
        try:
            copied += _copy_blob(hub, sha256, size, target / "blobs" / sha256[:2] / sha256)
        except (FileNotFoundError, _Damaged):
            missing.append(sha256)
    _remove_others(target / "blobs", set(sizes))
    if (data / "logs").exists():
        shutil.copytree(data / "logs", target / "logs", dirs_exist_ok=True)
    for name in (FILE, "secret"):
        shutil.copy2(data / name, target / name)
    value = {
        "format": FORMAT,
        "version": __version__,
        "revision": revision,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "files": {name: hash_file(target / name).sha256 for name in (DATABASE, FILE, "secret")},
        "blobs": sizes,
        "missing": missing,
    }
    partial = target / f"{MANIFEST}.partial"
    partial.write_text(json.dumps(value))
    os.replace(partial, target / MANIFEST)
    sync_folder(target)
    lost = [sha256 for sha256 in missing if sha256 in wanted]
    return {
        "path": str(target),
        "blobs": len(sizes) - len(missing),
        "bytes": sum(size for sha256, size in sizes.items() if sha256 not in missing),
        "copied": copied,
        "missing": lost,
    }


class _Damaged(Exception):
    """A stored file is not what its name says."""


def _remove_others(folder: Path, known: set[str]) -> None:
    for path in folder.glob("??/*"):
        if path.name not in known:
            path.unlink()


def _copy_database(hub: Hub, target: Path) -> None:
    """Write the database of one moment as a SQLite file, whatever database the hub uses."""
    partial = target.with_name(target.name + ".partial")
    partial.unlink(missing_ok=True)
    if hub.database.sqlite:
        place = str(hub.database.engine.url.database)
        with closing(sqlite3.connect(place)) as source, closing(sqlite3.connect(partial)) as copied:
            source.backup(copied)  # in one step: in WAL mode nobody waits for it
            copied.execute("PRAGMA journal_mode=DELETE")  # one file, nothing beside it
    else:
        _transfer(hub.database.engine, f"sqlite:///{partial}", hub.database.revision())
    partial.chmod(0o600)
    os.replace(partial, target)


def _transfer(source: sa.Engine, url: str, revision: str | None) -> None:
    """Copy all rows from one moment of a database into an empty one.

    Raises:
        HostError: the two have different schemas, or the other one is not empty.
    """
    database = Database(url)
    try:
        database.migrate()
        if database.revision() != revision:
            hint = "run singularity-hub init"
            raise HostError("wrong-schema", "the database's schema is not this program's", hint=hint)
        reading = source if source.name == "sqlite" else source.execution_options(isolation_level="REPEATABLE READ")
        with reading.connect() as old, database.engine.begin() as new:
            for table in Base.metadata.sorted_tables:
                if new.scalar(sa.select(sa.func.count()).select_from(table)):
                    raise HostError("not-empty", f"the database of the settings has rows already ({table.name})")
                rows = old.execution_options(yield_per=1000).execute(sa.select(table).order_by(*table.primary_key))
                for part in rows.mappings().partitions():
                    new.execute(sa.insert(table), [dict(row) for row in part])
                if new.dialect.name == "postgresql" and "id" in table.c and table.c.id.type.python_type is int:
                    # Its counter does not know of numbers that were given from outside.
                    counter = sa.func.pg_get_serial_sequence(table.name, "id")
                    highest = sa.select(sa.func.coalesce(sa.func.max(table.c.id), 0) + 1).scalar_subquery()
                    new.execute(sa.select(sa.func.setval(counter, highest, False)))
        if database.sqlite:
            with database.engine.connect() as connection:
                connection.connection.execute("PRAGMA journal_mode=DELETE")
    finally:
        database.close()


def _copy_blob(hub: Hub, sha256: str, size: int, target: Path) -> int:
    """Bring a stored file into the backup, checked; returns 0 when it is there already."""
    if target.exists() and target.stat().st_size == size:
        return 0
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    partial = target.with_name(f".{sha256}.partial")
    partial.unlink(missing_ok=True)
    source = hub.storage.open(sha256)
    try:
        out = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o400)
        try:
            copy(source, out, os.fstat(source).st_size)
            os.fsync(out)
            if hash_file(out).sha256 != sha256:
                raise _Damaged
        finally:
            os.close(out)
        os.replace(partial, target)
    finally:
        os.close(source)
        partial.unlink(missing_ok=True)
    return 1


def restore(source: Path, data: Path) -> dict[str, Any]:
    """Make a data folder of a backup. Every file is checked on its way; the folder appears at the end or not at all.

    Raises:
        HostError: no complete backup, a damaged one, or a data folder that is there already.
    """
    try:
        value = json.loads((source / MANIFEST).read_text())
    except (OSError, ValueError):
        raise HostError("not-a-backup", f"{source}: no complete backup ({MANIFEST} is missing)")
    if value.get("format") != FORMAT:
        raise HostError("not-a-backup", f"{source}: a backup of another format ({value.get('format')})")
    data = data.absolute()
    if data.exists() and any(data.iterdir()):
        raise HostError("not-empty", f"{data}: is there already", hint="restore into a new folder")
    partial = data.with_name(f".{data.name}.{os.getpid()}.partial")
    partial.mkdir(mode=0o700, parents=True)
    try:
        for name in ("git", "logs", "work", "blobs", "uploads"):
            (partial / name).mkdir(mode=0o700)
        for name, digest in value["files"].items():
            _checked(source / name, partial / name, digest)
        missing = set(value["missing"])
        for sha256 in value["blobs"]:
            if sha256 not in missing:
                (partial / "blobs" / sha256[:2]).mkdir(mode=0o700, exist_ok=True)
                _checked(source / "blobs" / sha256[:2] / sha256, partial / "blobs" / sha256[:2] / sha256, sha256)
        if (source / "logs").exists():
            shutil.copytree(source / "logs", partial / "logs", dirs_exist_ok=True)
        settings = load_settings(partial)
        _restore_database(settings, partial / DATABASE)
        if settings.storage.url:
            _fill_store(settings, partial / "blobs")
        if data.exists():
            data.rmdir()
        os.replace(partial, data)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return {"data": str(data), "blobs": len(value["blobs"]), "missing": sorted(missing), "created": value["created"]}


def _checked(source: Path, target: Path, digest: str) -> None:
    """Copy a file of a backup, and refuse one that is not what was put there."""
    try:
        with source.open("rb") as file, target.open("xb") as out:
            sha256 = hashlib.sha256()
            while chunk := file.read(1 << 20):
                sha256.update(chunk)
                out.write(chunk)
            out.flush()
            os.fsync(out.fileno())
    except FileNotFoundError:
        raise HostError("damaged-backup", f"{source}: is missing")
    if sha256.hexdigest() != digest:
        raise HostError("damaged-backup", f"{source}: has other content than when it was written")
    target.chmod(0o400 if len(target.name) == 64 else 0o600)


def _restore_database(settings: Settings, file: Path) -> None:
    """Bring an older schema up to date; and fill the server of the settings when the hub used one."""
    local = Database(f"sqlite:///{file}")
    try:
        local.migrate()
        if not settings.database:
            return
        _transfer(local.engine, settings.database_url, local.revision())
    finally:
        local.close()
    file.unlink()


def _fill_store(settings: Settings, folder: Path) -> None:
    """Give an object store back what it has not."""
    hub = Hub(settings)
    try:
        for path in sorted(folder.glob("??/*")):
            hub.storage.take(path, path.name)
    finally:
        hub.close()
