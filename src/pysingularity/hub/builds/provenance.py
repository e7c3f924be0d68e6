# SPDX-License-Identifier: Apache-2.0
"""Where an image comes from, as an in-toto statement: in the image itself and in the API.

The one in the image speaks of its root file system (its own digest would change with it); the one in the API of the
whole file. Sources: in-toto Statement v1, SLSA provenance v1.
"""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any

from pysingularity.hub.models import Build
from pysingularity.sif.file import SifFile, SifObject
from pysingularity.sif.layout import JSON
from pysingularity.version import FULL

NAME = "provenance.intoto.json"
STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "https://slsa.dev/provenance/v1"
BUILD_TYPE = "https://singularity-hub.org/definition-file/v1"


def statement(build: Build, *, subject: dict[str, str], name: str, url: str, result: dict[str, Any]) -> dict[str, Any]:
    """Return the statement on one build.

    Arguments:
        subject: digests by algorithm.
        url: how the hub is reached, "" when that is not known.
        result: what the job reported: start, end, node.
    """
    collection = build.collection
    return {
        "_type": STATEMENT,
        "subject": [{"name": name, "digest": subject}],
        "predicateType": PREDICATE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": {
                    "repository": _public(collection.git_url),
                    "branch": build.branch,
                    "recipe": build.recipe,
                    "tag": build.tag,
                },
                "internalParameters": {"environment": result.get("environment", {}), "trigger": build.trigger},
                "resolvedDependencies": [
                    {"uri": f"git+{_public(collection.git_url)}", "digest": {"gitCommit": build.commit}},
                    *({"uri": base["uri"], "digest": base["digest"]} for base in result.get("bases", [])),
                ],
            },
            "runDetails": {
                "builder": {
                    "id": f"{url or 'singularity-hub'}/builders/{build.engine or 'local'}",
                    "version": {"singularity": FULL},
                },
                "metadata": {
                    "invocationId": f"{url}/api/v1/builds/{build.id}" if url else f"build-{build.id}",
                    "startedOn": _iso(build.claimed_at),
                    "finishedOn": _iso(result.get("at")),
                },
            },
        },
    }


def embed(path: Path, build: Build, *, url: str, result: dict[str, Any]) -> None:
    """Put the statement on a SIF's root file system into the file.

    Raises:
        ImageError: the file is no sound SIF.
    """
    with SifFile.open(str(path), writable=True) as sif:
        primary = sif.primary()
        if primary is None:
            return  # refused a moment later by whoever looks at the image
        digest = hashlib.sha256()
        for chunk in sif.chunks(primary):
            digest.update(chunk)
        value = statement(build, subject={"sha256": digest.hexdigest()}, name="rootfs", url=url, result=result)
        sif.add(SifObject(JSON, json.dumps(value, separators=(",", ":")).encode(), name=NAME), when=int(time.time()))


def _public(url: str) -> str:
    """Return an address without a password."""
    scheme, slashes, rest = url.partition("://")
    return f"{scheme}{slashes}{rest.rpartition('@')[2]}" if slashes else url


def _iso(at: object) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(float(at))) if isinstance(at, int | float) else ""
