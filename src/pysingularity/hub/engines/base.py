# SPDX-License-Identifier: Apache-2.0
"""What every engine can do with a job, and the specification that all of them hand to it."""

from __future__ import annotations

import os
import secrets
import sys
import sysconfig
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any
from urllib.request import getproxies_environment

from pysingularity.hub.builds.log import log_path
from pysingularity.hub.context import Hub
from pysingularity.hub.models import Build, Collection
from pysingularity.hub.settings import Settings

#: Variables that builds see when the hub has them.
PASSED = ("LANG", "LC_ALL", "TZ", "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "PIP_CERT")
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class Engine(ABC):
    """Starts jobs and says whether they still run."""

    name = ""
    #: Seconds that a result may take to be seen after its job has ended (a file system between two machines).
    settle = 0.2

    @abstractmethod
    def start(self, folder: Path, spec: dict[str, Any]) -> str:
        """Start the job of a working folder and return the name by which the engine knows it."""

    @abstractmethod
    def running(self, job: str) -> bool:
        """Return whether a job may still be at work (it waits for a node, it runs, it is not known)."""

    @abstractmethod
    def cancel(self, job: str) -> None:
        """Ask a job to end; it says so in its result."""

    @abstractmethod
    def kill(self, job: str) -> None:
        """End a job that does not end when asked."""

    def waits(self, job: str) -> str:  # noqa: ARG002
        """Return why a job has not begun yet, as its scheduler puts it; "" when it has, or nobody knows."""
        return ""

    def verdict(self, job: str) -> tuple[str, str, str]:
        """Say how a job ended that left no result: (state, error id, sentence).

        The state "queued" means that the build is not to blame and is tried again.
        """
        return "failed", "job-lost", f"the job {job} ended without a result"

    @property
    def survives(self) -> bool:
        """Whether jobs go on when the hub ends."""
        return False

    @abstractmethod
    def close(self) -> None:
        """Stop what the engine itself runs."""


def builder_program(settings: Settings) -> list[str]:
    """Return the program that builds: the setting, or this interpreter with our own command."""
    return list(settings.builds.program) or [sys.executable, "-I", "-m", "pysingularity"]


def specification(hub: Hub, build: Build, folder: Path, *, links: list[tuple[str, str]]) -> dict[str, Any]:
    """Return what `job.json` says."""
    settings = hub.settings
    limits = {**build.collection.limits}
    builds = settings.builds
    return {
        "build": build.id,
        # A job that finds another token in its folder was given up, and ends without a word.
        "token": secrets.token_hex(16),
        "program": builder_program(settings),
        "recipe": build.recipe,
        "log": str(log_path(settings.folder("logs"), build.id)),
        "sandbox": builds.sandbox,
        "network": settings.egress.mode if builds.sandbox == "namespaces" else "host",
        "policy": policy_of(settings),
        "readable": readable(settings),
        "environment": environment(settings),
        "secrets": secrets_of(build.collection),
        "links": links,
        "limits": {
            "seconds": min(int(limits.get("seconds", builds.time_limit)), builds.time_limit),
            "memory": min(int(limits.get("memory", builds.memory_limit)), builds.memory_limit),
            "processes": builds.process_limit,
            "disk": builds.disk_limit,
            "reserve": settings.storage.reserve,
            "log": builds.log_limit,
        },
        "folder": str(folder),
        "die_with_parent": True,
        "scratch": "",
    }


def sandboxed(settings: Settings, seconds: int) -> dict[str, Any]:
    """Return the specification of a question that is asked in a sandbox like that of builds (see `builds.bases`)."""
    builds = settings.builds
    return {
        "build": secrets.randbelow(1 << 20),
        "token": secrets.token_hex(16),
        "program": [sys.executable, "-I", "-m", "pysingularity.hub.engines.digest"],
        "sandbox": builds.sandbox,
        "network": settings.egress.mode if builds.sandbox == "namespaces" else "host",
        "policy": policy_of(settings),
        "readable": readable(settings),
        "environment": environment(settings),
        "secrets": [],
        "links": [],
        "limits": {
            "seconds": seconds,
            "memory": 1 << 30,
            "processes": 256,
            "disk": 1 << 28,
            "reserve": 0,
            "log": 1 << 20,
        },
        "scratch": "",
    }


def secrets_of(collection: Collection) -> list[str]:
    """Return what must not be read in a log: the collection's own secrets (addresses lose their passwords anyway)."""
    return [text for text in (collection.hook_secret, collection.status_token) if text]


def environment(settings: Settings) -> dict[str, str]:
    """Return the environment of builds: almost empty, nothing secret."""
    found = {name: os.environ[name] for name in (*PASSED, *settings.builds.environment) if name in os.environ}
    if settings.egress.mode == "host" or settings.builds.sandbox == "none":
        for name in ("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"):
            if name in os.environ:
                found[name] = os.environ[name]
    return {"PATH": PATH, "LANG": "C.UTF-8", "USER": "root", "LOGNAME": "root", **found}


def readable(settings: Settings) -> list[str]:
    """Return host folders that the builder needs: our interpreter and package, its certificates, and the setting."""
    places = [sys.prefix, sys.base_prefix, sys.exec_prefix, sysconfig.get_path("stdlib"), *sys.path]
    places += [os.environ[name] for name in PASSED if os.environ.get(name, "").startswith("/")]
    places += settings.builds.readable
    data = str(settings.data.resolve())
    found: list[str] = []
    for place in places:
        path = os.path.abspath(place) if place else ""
        # The hub's own folder must not come in by the back door, nor everything at once.
        hides = path in ("", "/") or data == path or data.startswith(path + "/") or path.startswith(data + "/")
        if not hides and os.path.exists(path) and path not in found:
            found.append(path)
    return sorted(found, key=len)


def policy_of(settings: Settings) -> dict[str, Any]:
    """Return the arguments of `egress.Policy`."""
    egress = settings.egress
    known = getproxies_environment()
    return {
        "allow": list(egress.allow),
        "deny": list(egress.deny),
        "closed": egress.closed,
        "upstream": egress.upstream or known.get("https") or known.get("http") or "",
        "direct": [item.strip() for item in known.get("no", "").split(",") if item.strip()],
    }
