# SPDX-License-Identifier: Apache-2.0
"""What the administrator's commands do; parsing and printing is `command`.

Each function takes the parsed arguments and returns a value that can be JSON: `_alone` is what people see without
`--json`, `_json` asks for JSON always, `_status` is the exit status.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import sqlalchemy as sa

from pysingularity.errors import UsageError
from pysingularity.hub.accounts import people, tokens
from pysingularity.hub.accounts.audit import record
from pysingularity.hub.accounts.passwords import hash_password
from pysingularity.hub.accounts.rights import ALL_SCOPES, Principal
from pysingularity.hub.accounts.signin import sign_out_everywhere
from pysingularity.hub.api.views import build_view, collection_view, when
from pysingularity.hub.builds.planning import manual
from pysingularity.hub.catalog import add_collection, get_collection, parse_name
from pysingularity.hub.context import Hub
from pysingularity.hub.engines.base import builder_program
from pysingularity.hub.errors import Conflict, NotFound
from pysingularity.hub.models import Build, Collection, Image, Token, User, now
from pysingularity.hub.settings import Settings, load_settings, make_data_folder
from pysingularity.hub.sources.git import check_url
from pysingularity.hub.sources.intake import resync
from pysingularity.linux import namespaces


@contextmanager
def opened(arguments: argparse.Namespace) -> Iterator[Hub]:
    """Open the hub of a data folder."""
    hub = Hub(load_settings(arguments.data))
    try:
        hub.database.check()
        yield hub
    finally:
        hub.close()


def init(arguments: argparse.Namespace) -> dict[str, Any]:
    """Make the data folder and the database, or migrate them."""
    folder = make_data_folder(arguments.data)
    hub = Hub(load_settings(folder))
    try:
        before = hub.database.revision()
        hub.database.migrate()
        after = hub.database.revision()
    finally:
        hub.close()
    say = "is up to date" if before == after else "was made" if before is None else "was brought up to date"
    return {"data": str(folder), "revision": after, "_alone": f"{folder}: the hub {say}"}


def settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return all settings, without secrets."""
    value = load_settings(arguments.data).model_dump(mode="json")
    for provider in (*value["sign_in"]["oidc"].values(), value["sign_in"]["github"]):
        if provider.get("client_secret"):
            provider["client_secret"] = "[secret]"
    value["storage"]["options"] = {
        key: "[secret]" if "secret" in key else item for key, item in value["storage"]["options"].items()
    }
    return {**value, "_json": True}


# --- people ----------------------------------------------------------------------------------------------------------


def _password() -> str:
    text = sys.stdin.readline().rstrip("\n")
    if not text:
        raise UsageError("no-password", "standard input holds no password")
    return text


def user_add(arguments: argparse.Namespace) -> dict[str, Any]:
    """Add a user."""
    password = _password() if arguments.password_stdin else None
    with opened(arguments) as hub, hub.write() as session:
        user = people.add_user(session, arguments.name, password=password, admin=arguments.admin, email=arguments.email)
        record(session, "command", "user.add", user.name, admin=user.admin)
        return {"id": user.id, "name": user.name, "admin": user.admin, "_alone": f"user {user.name} was added"}


def user_list(arguments: argparse.Namespace) -> list[Any]:
    """List users."""
    with opened(arguments) as hub, hub.read() as session:
        return [
            {
                "name": row.name,
                "kind": row.kind,
                "admin": row.admin,
                "active": row.active,
                "created_at": when(row.created_at),
                "seen_at": when(row.seen_at),
            }
            for row in session.scalars(sa.select(User).order_by(User.name))
        ]


def user_password(arguments: argparse.Namespace) -> dict[str, Any]:
    """Change a password; every browser has to sign in again."""
    password = hash_password(_password())
    with opened(arguments) as hub, hub.write() as session:
        user = people.find_user(session, arguments.name)
        user.password = password
        sign_out_everywhere(session, user)
        record(session, "command", "user.password", user.name)
        return {"name": user.name, "_alone": f"user {user.name} has another password"}


def user_block(arguments: argparse.Namespace) -> dict[str, Any]:
    """Block a user or let him in again."""
    with opened(arguments) as hub, hub.write() as session:
        user = people.find_user(session, arguments.name)
        user.active = not arguments.block
        sign_out_everywhere(session, user)
        record(session, "command", "user.block" if arguments.block else "user.unblock", user.name)
        return {"name": user.name, "active": user.active}


def token_create(arguments: argparse.Namespace) -> dict[str, Any]:
    """Make a token."""
    with opened(arguments) as hub, hub.write() as session:
        user = people.find_user(session, arguments.user)
        collection = get_collection(session, *parse_name(arguments.collection)) if arguments.collection else None
        secret, row = tokens.add_token(
            session, user, scopes=arguments.scope, name=arguments.name, days=arguments.expires, collection=collection
        )
        record(session, "command", "token.add", user.name, token=row.id, scopes=row.scopes)
        return {
            "id": row.id,
            "token": secret,
            "scopes": row.scopes.split(),
            "expires_at": when(row.expires_at),
            "_alone": secret,
        }


def token_list(arguments: argparse.Namespace) -> list[Any]:
    """List tokens."""
    query = sa.select(Token, User.name).join(User, User.id == Token.user_id).order_by(Token.id)
    if arguments.user:
        query = query.where(User.name == arguments.user.lower())
    with opened(arguments) as hub, hub.read() as session:
        return [
            {
                "id": row.id,
                "user": name,
                "scopes": row.scopes,
                "name": row.name,
                "expires_at": when(row.expires_at),
                "used_at": when(row.used_at),
                "revoked_at": when(row.revoked_at),
            }
            for row, name in session.execute(query)
        ]


def token_revoke(arguments: argparse.Namespace) -> dict[str, Any]:
    """Take a token back."""
    with opened(arguments) as hub, hub.write() as session:
        row = session.get(Token, arguments.id)
        if row is None:
            raise NotFound("no-such-token", f"token {arguments.id}: there is no such token")
        row.revoked_at = now()
        record(session, "command", "token.revoke", str(row.id))
        return {"id": row.id, "_alone": f"token {row.id} was taken back"}


# --- collections -----------------------------------------------------------------------------------------------------


def collection_add(arguments: argparse.Namespace) -> dict[str, Any]:
    """Connect a repository; the owner must be a user or group."""
    owner, _ = parse_name(arguments.name)
    with opened(arguments) as hub:
        if arguments.git:
            check_url(arguments.git, hub.settings.sources, approved=True)
        with hub.write() as session:
            user = session.scalar(sa.select(User).where(User.name == owner.lower()))
            who = Principal(user or User(id=0, name="command", admin=True), ALL_SCOPES, via="command")
            if user is None:
                people.find_group(session, owner)
            collection = add_collection(
                session,
                who,
                arguments.name,
                git_url=arguments.git,
                branches=arguments.branch,
                private=arguments.private,
                description=arguments.description,
            )
            collection.poll, collection.approved_url = arguments.poll, arguments.git
            record(session, "command", "collection.add", collection.full_name, git_url=arguments.git)
        if arguments.git:
            resync(hub, collection.id, by="command")
        return {**collection_view(collection, _url(hub.settings), secrets=True), "_json": True}


def _url(settings: Settings) -> str:
    return settings.url.rstrip("/") or f"http://{settings.host}:{settings.port}"


def collection_list(arguments: argparse.Namespace) -> list[Any]:
    """List collections."""
    with opened(arguments) as hub, hub.read() as session:
        return [
            {"name": row.full_name, "private": row.private, "git_url": row.git_url, "pulls": row.pulls}
            for row in session.scalars(sa.select(Collection).order_by(Collection.owner, Collection.name))
        ]


def collection_show(arguments: argparse.Namespace) -> dict[str, Any]:
    """Show a collection."""
    with opened(arguments) as hub, hub.read() as session:
        collection = get_collection(session, *parse_name(arguments.name))
        return {**collection_view(collection, _url(hub.settings), secrets=True), "_json": True}


def collection_remove(arguments: argparse.Namespace) -> dict[str, Any]:
    """Remove a collection."""
    with opened(arguments) as hub, hub.write() as session:
        collection = get_collection(session, *parse_name(arguments.name))
        frozen = session.scalar(
            sa.select(sa.func.count())
            .select_from(Image)
            .where(Image.frozen, Image.container.has(collection_id=collection.id))
        )
        if frozen and not arguments.force:
            raise Conflict("frozen", f"{collection.full_name} has {frozen} frozen images", hint="--force removes them")
        session.delete(collection)
        record(session, "command", "collection.delete", collection.full_name)
        return {"removed": collection.full_name}


def build(arguments: argparse.Namespace) -> dict[str, Any]:
    """Queue a build; a running hub takes it."""
    with opened(arguments) as hub:
        with hub.read() as session:
            collection = get_collection(session, *parse_name(arguments.name))
        made = manual(hub, collection.id, recipe=arguments.recipe, tag=arguments.tag, ref=arguments.ref, by="command")
        with hub.read() as session:
            row = session.get_one(Build, made.id)
            value = build_view(row, _url(hub.settings))
        return {**value, "_alone": f"build {row.id} of {collection.full_name}:{row.tag} is {row.state}"}


# --- health ----------------------------------------------------------------------------------------------------------


def doctor(arguments: argparse.Namespace) -> dict[str, Any]:
    """Check what the hub needs; the status is 1 when something is missing."""
    with opened(arguments) as hub:
        checks = dict(_checks(hub))
    bad = [name for name, text in checks.items() if not text.startswith("ok")]
    lines = [f"{name}: {text}" for name, text in checks.items()]
    return {"checks": checks, "good": not bad, "_alone": "\n".join(lines), "_status": int(bool(bad))}


def _checks(hub: Hub) -> Iterator[tuple[str, str]]:
    values = hub.settings
    yield "database", f"ok, revision {hub.database.revision()}"
    if hub.database.sqlite:
        yield "sqlite", f"ok, {sqlite3.sqlite_version}"
    disk = os.statvfs(values.data)
    free = disk.f_bavail * disk.f_frsize
    yield "disk", f"{'ok' if free > values.storage.reserve else 'little'}: {free >> 20} MiB are free"
    mode = values.data.stat().st_mode & 0o077
    yield "data folder", "ok" if not mode else f"others may look into it (mode {mode:03o}): chmod 700 {values.data}"
    git = shutil.which(values.sources.git)
    yield "git", f"ok, {git}" if git else "missing: install git"
    program = builder_program(values)
    found = shutil.which(program[0])
    yield "builder", f"ok, {' '.join(program)}" if found else f"{program[0]}: missing (setting builds.program)"
    if values.builds.engine == "slurm":
        missing = [name for name in ("sbatch", "squeue", "scancel") if shutil.which(name) is None]
        yield "slurm", f"{', '.join(missing)}: missing" if missing else _slurm()
    if values.builds.sandbox == "none":
        yield "sandbox", "off: builds run with the hub's own account (setting builds.sandbox)"
    else:
        yield "sandbox", _sandbox()


def _slurm() -> str:
    """Ask the cluster for its partitions."""
    try:
        result = subprocess.run(["sinfo", "--noheader", "--format=%R"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"sinfo does not answer: {error}"
    if result.returncode:
        return f"sinfo: {result.stderr.strip().splitlines()[-1] if result.stderr.strip() else result.returncode}"
    return f"ok, partitions {', '.join(sorted(set(result.stdout.split())))}"


def _sandbox() -> str:
    """Try to make the namespaces of a sandbox, in a process of its own."""
    flags = namespaces.NEWUSER | namespaces.NEWNS | namespaces.NEWPID | namespaces.NEWNET
    code = f"from pysingularity.linux import namespaces; namespaces.unshare({flags})"
    result = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=False)
    if result.returncode:
        lines = result.stderr.strip().splitlines()
        return f"namespaces cannot be made here: {lines[-1] if lines else 'no reason given'}"
    return "ok"
