# SPDX-License-Identifier: Apache-2.0
"""shub://: Singularity Hub's protocol, two requests and no login.

`GET HUB/api/container/USER/REPO:TAG[@DIGEST]` answers a JSON object whose `image` is the address of the file. What is
checked: `version` when it is the MD5 of the file (as the old hub had it), and a size when the server tells one. The
cache knows an image by hub, name, commit and version together: `commit` alone is shared by the images of one push.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from urllib.parse import urljoin, urlsplit

from pysingularity.errors import RegistryError
from pysingularity.reference import Reference
from pysingularity.registry.http import Answer, Http, refused
from pysingularity.registry.remote import RemoteFile, ranged
from pysingularity.registry.settings import Settings

DEFAULT_HUB = "singularity-hub.org"


def hub_of(reference: Reference, settings: Settings) -> str:
    """Return the address of a reference's hub: from the reference, SINGULARITY_HUB, or the first hub's name."""
    host = reference.host or settings.environ.get("SINGULARITY_HUB", "") or DEFAULT_HUB
    if "://" in host:
        return host.rstrip("/")
    return f"{'http' if settings.no_https else 'https'}://{host}"


def look_up(reference: Reference, settings: Settings, note: Callable[[str], None]) -> RemoteFile:
    """Return the file of a reference.

    Raises:
        RegistryError: the hub does not know it, or answers nonsense.
    """
    http = Http(settings.environ, note=note)
    name = reference.name
    if reference.tag:
        name += f":{reference.tag}"
    if reference.digest:
        name += f"@{reference.digest}"
    hub = hub_of(reference, settings)
    answer = http.request("GET", f"{hub}/api/container/{name}", {"Accept": "application/json"})
    if answer.status != 200:
        raise refused(answer, f"{reference} at {hub}")
    value = answer.json()
    if not isinstance(value, dict):  # the old hub's way to say that a quota is used up
        raise RegistryError(
            "too-many-requests", f"{reference}: the hub answers {str(value)[:40]!r} instead of an image"
        )
    image = value.get("image")
    if not isinstance(image, str) or not image:
        raise RegistryError("not-ready", f"{reference}: the hub has no image for it (is the build finished?)")
    address = urljoin(answer.url, image)
    if urlsplit(address).scheme not in ("http", "https"):
        raise RegistryError("bad-answer", f"{reference}: the hub names {image[:80]!r} as the image")
    if settings.no_https:
        address = "http" + address[5:] if address.startswith("https:") else address
    elif hub.startswith("https:") and address.startswith("http:"):
        raise RegistryError("insecure-image", f"{reference}: the hub sends us to plain http: {address[:80]}")
    commit, version = str(value.get("commit") or ""), str(value.get("version") or "")
    if reference.digest and reference.digest not in (commit.partition("-")[0], commit, version):
        raise RegistryError("wrong-image", f"{reference}: the hub offers another image (commit {commit or '?'})")

    def start(offset: int, validator: str) -> Answer:
        found = http.request("GET", address, ranged(offset, validator))
        if found.status not in (200, 206, 416):
            raise refused(found, f"{reference}: image file")
        return found

    md5 = version if len(version) == 32 and all(letter in "0123456789abcdef" for letter in version) else ""
    mark = f"{hub} {reference.name} {commit} {version} {value.get('tag')}".encode()
    stamp = f"{zlib.crc32(mark):08x}-{commit[:48] or 'none'}-{md5 or 'none'}"
    return RemoteFile(str(reference), key=f"shub-{_plain(stamp)}", open=start, md5=md5, facts={"commit": commit})


def _plain(text: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "._-" else "_" for letter in text)
