# SPDX-License-Identifier: Apache-2.0
"""Names and passwords for registries: where Docker, Podman, Apptainer and we keep them, and how to add and remove some.

Read, in this order: what the caller gives (options, SINGULARITY_DOCKER_USERNAME and _PASSWORD), the file of
--authfile or REGISTRY_AUTH_FILE, ~/.singularity/docker-config.json, ~/.apptainer/docker-config.json, Docker's
config.json, containers' auth.json. A file may name helper programs (`credHelpers`, `credsStore`), which are asked as
Docker asks them.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
from collections.abc import Mapping
from typing import Any

from pysingularity import messages
from pysingularity.errors import HostError, RegistryError, UserError
from pysingularity.reference import DOCKER_HUB
from pysingularity.registry.auth import Credentials

#: The name under which Docker keeps its own registry.
HUB_KEY = "https://index." + DOCKER_HUB + "/v1/"


def own_file(environ: Mapping[str, str]) -> str:
    """Return the file that `registry login` writes."""
    top = environ.get("SINGULARITY_CONFIGDIR") or os.path.join(environ.get("HOME", "/"), ".singularity")
    return os.path.join(top, "docker-config.json")


def files(environ: Mapping[str, str], authfile: str = "") -> list[str]:
    """Return the files that are read, the strongest first."""
    home = environ.get("HOME", "/")
    found = [authfile or environ.get("REGISTRY_AUTH_FILE", ""), own_file(environ)]
    found.append(os.path.join(home, ".apptainer", "docker-config.json"))
    found.append(os.path.join(environ.get("DOCKER_CONFIG") or os.path.join(home, ".docker"), "config.json"))
    if environ.get("XDG_RUNTIME_DIR"):
        found.append(os.path.join(environ["XDG_RUNTIME_DIR"], "containers", "auth.json"))
    config = environ.get("XDG_CONFIG_HOME") or os.path.join(home, ".config")
    found.append(os.path.join(config, "containers", "auth.json"))
    return [path for path in dict.fromkeys(found) if path]


def given(environ: Mapping[str, str]) -> Credentials | None:
    """Return the credentials of the environment: SINGULARITY_, APPTAINER_ or bare DOCKER_USERNAME and _PASSWORD."""
    for prefix in ("SINGULARITY_", "APPTAINER_", ""):
        user, password = environ.get(prefix + "DOCKER_USERNAME"), environ.get(prefix + "DOCKER_PASSWORD")
        if user and password is not None:
            return Credentials(user, password)
    return None


def find(host: str, repository: str, environ: Mapping[str, str], authfile: str = "") -> Credentials | None:
    """Return who we are at a registry, or None for nobody.

    Arguments:
        host: with port, as in the reference.
        repository: auth.json may have entries for parts of a registry.
    """
    for path in files(environ, authfile):
        config = read(path, must=path == authfile)
        if config is None:
            continue
        try:
            found = _in_config(config, host, repository, environ)
        except RegistryError as error:
            messages.warning(f"{path}: {error.message}")
            continue
        if found is not None:
            return found
    return None


def read(path: str, *, must: bool = False) -> dict[str, Any] | None:
    """Return the content of a file of credentials, None when it is not there; a damaged one is said.

    Raises:
        UserError: `must`, and it is missing or damaged.
    """
    try:
        with open(path, encoding="utf-8") as file:
            value = json.load(file)
    except FileNotFoundError:
        if must:
            raise UserError("no-authfile", f"{path}: there is no such file of credentials") from None
        return None
    except (OSError, ValueError) as error:
        if must:
            raise UserError("bad-authfile", f"{path}: cannot be read: {error}") from None
        messages.warning(f"{path}: cannot be read: {error}")
        return None
    return value if isinstance(value, dict) else None


def keys(host: str, repository: str) -> list[str]:
    """Return the names under which a registry may be kept, the most exact first."""
    names = []
    parts = [part for part in repository.split("/") if part]
    names += ["/".join([host, *parts[:count]]) for count in range(len(parts), 0, -1)]
    bare = [host]
    if host == DOCKER_HUB:
        bare += ["index." + DOCKER_HUB, "registry-1." + DOCKER_HUB]
    for one in bare:
        names += [one, f"https://{one}", f"http://{one}", f"docker://{one}", f"oras://{one}"]
        names += [f"https://{one}/v1/", f"https://{one}/v2/", f"https://{one}/v1", f"https://{one}/", f"{one}/v1/"]
    return names


def _in_config(config: dict[str, Any], host: str, repository: str, environ: Mapping[str, str]) -> Credentials | None:
    names = keys(host, repository)
    helpers = config.get("credHelpers")
    if isinstance(helpers, dict):
        for name in names:
            if isinstance(helpers.get(name), str):
                found = _ask_helper(helpers[name], name, environ)
                if found is not None:
                    return found
    auths = config.get("auths")
    if isinstance(auths, dict):
        for name in names:
            entry = auths.get(name)
            if isinstance(entry, dict):
                found = _in_entry(entry)
                if found is not None:
                    return found
    store = config.get("credsStore")
    if isinstance(store, str) and store:
        return _ask_helper(store, HUB_KEY if host == DOCKER_HUB else host, environ)
    return None


def _in_entry(entry: dict[str, Any]) -> Credentials | None:
    identity = str(entry.get("identitytoken") or "")
    user, password = str(entry.get("username") or ""), str(entry.get("password") or "")
    if isinstance(entry.get("auth"), str) and entry["auth"]:
        try:
            text = base64.b64decode(entry["auth"], validate=True).decode()
        except (binascii.Error, ValueError):
            raise RegistryError("bad-credentials", "damaged entry of credentials") from None
        user, _, password = text.partition(":")
        password = password.rstrip("\0")
    if identity or user:
        return Credentials(user, password, identity)
    return None


def _ask_helper(name: str, server: str, environ: Mapping[str, str]) -> Credentials | None:
    """Ask `docker-credential-NAME get` for a registry."""
    import subprocess  # the one protocol of the registry room that is a program

    if "/" in name:
        raise RegistryError("bad-helper", f"{name!r} is no name of a credential helper")
    program = f"docker-credential-{name}"
    try:
        answer = subprocess.run(
            [program, "get"],
            input=server.encode(),
            capture_output=True,
            timeout=60,
            env=dict(environ),
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RegistryError("helper-failed", f"{program}: {error}") from None
    if answer.returncode:
        return None  # it knows nothing of this registry
    try:
        value = json.loads(answer.stdout)
        user, secret = str(value["Username"]), str(value["Secret"])
    except (ValueError, KeyError, TypeError):
        raise RegistryError("helper-failed", f"{program} answers nonsense") from None
    return Credentials("", "", secret) if user == "<token>" else Credentials(user, secret)


def store(path: str, host: str, credentials: Credentials | None) -> bool:
    """Keep credentials of a registry in a file, or remove them (None); return whether something changed.

    The file is for its owner alone and is replaced by rename.

    Raises:
        HostError: it cannot be written.
    """
    config = read(path) or {}
    auths = config.setdefault("auths", {})
    if credentials is None:
        if host not in auths:
            return False
        del auths[host]
    else:
        auths[host] = {"auth": credentials.basic().removeprefix("Basic ")}
    new = f"{path}.{os.getpid()}.new"
    try:
        os.makedirs(os.path.dirname(path) or ".", mode=0o700, exist_ok=True)
        fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with open(fd, "w", encoding="utf-8") as file:
            json.dump(config, file, indent="\t")
        os.rename(new, path)
    except OSError as error:
        raise HostError("credentials-not-written", f"{path}: cannot be written: {error.strerror}") from None
    return True
