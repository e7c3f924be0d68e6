# SPDX-License-Identifier: Apache-2.0
"""What forges are told of builds: the state of a commit, one context per tag. Only `send` does I/O.

Only collections with a token of their forge report. The token goes to the forge of the repository's own address, or to
the one that the administrator's settings name for it, and never follows a redirect. Sources: the REST documentation of
GitHub ("commit statuses"), GitLab ("commits API") and Gitea.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlsplit

from pysingularity.hub.builds.states import FINAL
from pysingularity.hub.errors import HubError
from pysingularity.hub.models import Build, Collection
from pysingularity.hub.settings import SourceSettings

#: Seconds for an answer.
PATIENCE = 15
#: Our words for a build, by its state; everything that is not over is pending.
WORDS = {
    "done": "success",
    "skipped": "success",
    "failed": "failure",
    "timed_out": "failure",
    "cancelled": "error",
    "superseded": "error",
}
_GITLAB = {"pending": "pending", "success": "success", "failure": "failed", "error": "canceled"}


class StatusError(HubError):
    """The forge did not take it."""

    status = 502


@dataclass(frozen=True)
class Forge:
    """Where a repository's states are told.

    Arguments:
        kind: "github", "gitlab" or "gitea".
        api: address of the API, without a slash at the end.
        repository: its path at the forge (`group/name`).
    """

    kind: str
    api: str
    repository: str


def word_of(state: str) -> str:
    """Return what a forge is told of a state."""
    return WORDS[state] if state in FINAL else "pending"


def forge_of(collection: Collection, settings: SourceSettings) -> Forge | None:
    """Return where a collection's states are told; None when its address does not say."""
    url = collection.git_url
    for one in settings.forges:
        prefix = one.get("prefix", "")
        if prefix and url.startswith(prefix):
            path = url.removeprefix(prefix)
            return Forge(one.get("kind", "github"), one.get("api", "").rstrip("/"), _repository(path))
    if "://" in url:
        parts = urlsplit(url)
        host, path = parts.hostname or "", parts.path
        port = f":{parts.port}" if parts.port and parts.scheme in ("http", "https") else ""
    else:  # git@host:group/name.git
        host, _, path = url.rpartition("@")[2].partition(":")
        port = ""
    if not host or not path:
        return None
    if host == "github.com":
        return Forge("github", "https://api.github.com", _repository(path))
    kind = collection.forge
    base = f"https://{host}{port}"
    if kind == "gitlab" or (not kind and host.startswith("gitlab.")):
        return Forge("gitlab", f"{base}/api/v4", _repository(path))
    if kind == "gitea" or (not kind and host in ("codeberg.org", "gitea.com")):
        return Forge("gitea", f"{base}/api/v1", _repository(path))
    return Forge("github", f"{base}/api/v3", _repository(path)) if kind == "github" else None


def _repository(path: str) -> str:
    return path.strip("/").removesuffix(".git")


def request_of(forge: Forge, build: Build, *, token: str, url: str) -> urllib.request.Request:
    """Return the request that tells a forge of a build.

    Arguments:
        url: of the build's page; "" when the hub does not know how people reach it.
    """
    word = word_of(build.state)
    name = f"singularity-hub/{build.tag}"
    text = (build.reason or build.state.replace("_", " "))[:140]
    if forge.kind == "gitlab":
        address = f"{forge.api}/projects/{quote(forge.repository, safe='')}/statuses/{build.commit}"
        value: dict[str, Any] = {"state": _GITLAB[word], "name": name, "description": text}
        headers = {"PRIVATE-TOKEN": token}
    else:
        address = f"{forge.api}/repos/{quote(forge.repository)}/statuses/{build.commit}"
        value = {"state": word, "context": name, "description": text}
        headers = {"Authorization": f"Bearer {token}" if forge.kind == "github" else f"token {token}"}
    if url:
        value["target_url"] = url
    headers |= {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "singularity-hub"}
    return urllib.request.Request(address, json.dumps(value).encode(), headers, method="POST")


class _Stay(urllib.request.HTTPRedirectHandler):
    """Follows nowhere: the token is for one address."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        """Refuse."""
        return


def send(request: urllib.request.Request) -> None:
    """Send a request.

    Raises:
        StatusError: the forge cannot be reached or says no.
    """
    if request.type not in ("https", "http"):
        raise StatusError("no-forge", f"{request.full_url}: no address of a forge")
    try:
        with urllib.request.build_opener(_Stay).open(request, timeout=PATIENCE) as answer:
            answer.read(1 << 16)
    except urllib.error.HTTPError as error:
        with error:
            raise StatusError("forge-refused", f"{request.host} says {error.code} to a commit's state")
    except (OSError, ValueError) as error:
        raise StatusError("forge-away", f"{request.host}: {error}")
