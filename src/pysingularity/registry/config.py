# SPDX-License-Identifier: Apache-2.0
"""Mirrors and insecure registries, from containers-registries.conf(5), version 2 of its format.

Read are $CONTAINERS_REGISTRIES_CONF, else ~/.config/containers/registries.conf, else /etc/containers/registries.conf,
with the drop-in files of the folder beside it (`registries.conf.d`). We take `registry` tables with prefix, location,
insecure, blocked and mirrors; the other keys are about short names, which Singularity has its own rule for.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from pysingularity.errors import UserError


class Endpoint(NamedTuple):
    """One place that serves a repository: "HOST[:PORT]" and the repository's name there."""

    host: str
    repository: str
    insecure: bool = False
    mirror: bool = False


class Registry(NamedTuple):
    """One table of the file."""

    prefix: str
    location: str
    insecure: bool
    blocked: bool
    mirrors: list[tuple[str, bool, str]]


def load(environ: Mapping[str, str]) -> list[Registry]:
    """Return the tables of the files that apply, later files first.

    Raises:
        UserError: a file is no TOML or has values of the wrong type.
    """
    named = environ.get("CONTAINERS_REGISTRIES_CONF")
    home = environ.get("XDG_CONFIG_HOME") or os.path.join(environ.get("HOME", "/"), ".config")
    own = os.path.join(home, "containers/registries.conf")
    main = named or (own if os.path.exists(own) else "/etc/containers/registries.conf")
    paths = [main]
    if not named:
        for folder in ("/etc/containers/registries.conf.d", own + ".d"):
            if os.path.isdir(folder):
                paths += sorted(os.path.join(folder, name) for name in os.listdir(folder) if name.endswith(".conf"))
    found: dict[str, Registry] = {}
    for path in paths:
        for registry in _read(path, must=path == named):
            found[registry.prefix] = registry
    return list(found.values())


def _read(path: str, *, must: bool) -> list[Registry]:
    import tomllib  # 19 ms: only for people who have such a file

    try:
        with open(path, "rb") as file:
            data = tomllib.load(file)
    except FileNotFoundError:
        if must:
            raise UserError("no-registries-conf", f"{path}: CONTAINERS_REGISTRIES_CONF names no file") from None
        return []
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise UserError("bad-registries-conf", f"{path}: {error}") from None
    tables = data.get("registry", [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise UserError("bad-registries-conf", f"{path}: `registry` must be an array of tables ([[registry]])")
    return [_table(table, path) for table in tables]


def _table(table: dict[str, Any], path: str) -> Registry:
    location = str(table.get("location", "")).rstrip("/")
    prefix = str(table.get("prefix", "")).rstrip("/") or location
    if not prefix:
        raise UserError("bad-registries-conf", f"{path}: a registry has neither prefix nor location")
    found = Registry(prefix, location or prefix, bool(table.get("insecure")), bool(table.get("blocked")), [])
    for mirror in table.get("mirror", []):
        if isinstance(mirror, dict) and mirror.get("location"):
            only_digest = table.get("mirror-by-digest-only")
            kind = str(mirror.get("pull-from-mirror") or ("digest-only" if only_digest else "all"))
            found.mirrors.append((str(mirror["location"]).rstrip("/"), bool(mirror.get("insecure")), kind))
    return found


def endpoints(registries: list[Registry], host: str, repository: str, *, digest: bool) -> list[Endpoint]:
    """Return the places to ask for a repository, in order: mirrors, then the registry itself.

    Arguments:
        digest: the image is named by digest (some mirrors serve only those).

    Raises:
        UserError: the configuration blocks this registry.
    """
    full = f"{host}/{repository}"
    best: Registry | None = None
    for registry in registries:
        if _matches(registry.prefix, full) and (best is None or len(registry.prefix) > len(best.prefix)):
            best = registry
    if best is None:
        return [Endpoint(host, repository)]
    if best.blocked:
        raise UserError("registry-blocked", f"{full}: registries.conf blocks {best.prefix}")
    rest = full[len(best.prefix) :] if not best.prefix.startswith("*.") else None
    found = []
    for location, insecure, kind in best.mirrors:
        if kind == "all" or (kind == "digest-only") == digest:
            found.append(_endpoint(location + (rest if rest is not None else "/" + repository), insecure, True))
    main = best.location + rest if rest is not None else full
    return [*found, _endpoint(main, best.insecure, False)]


def _endpoint(full: str, insecure: bool, mirror: bool) -> Endpoint:
    host, _, repository = full.partition("/")
    return Endpoint(host, repository, insecure, mirror)


def _matches(prefix: str, full: str) -> bool:
    if prefix.startswith("*."):
        return full.partition("/")[0].endswith(prefix[1:])
    return full == prefix or full.startswith((prefix + "/", prefix + ":", prefix + "@"))
