# SPDX-License-Identifier: Apache-2.0
"""http:// and https://: any file of any server, known in the cache by address, date and ETag."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from pysingularity.reference import Reference
from pysingularity.registry.http import Answer, Http, place, refused
from pysingularity.registry.remote import RemoteFile, ranged
from pysingularity.registry.settings import Settings


def look_up(reference: Reference, settings: Settings, note: Callable[[str], None]) -> RemoteFile:
    """Return the file of an address.

    Raises:
        RegistryError: the server does not have it.
    """
    http = Http(settings.environ, note=note)
    what = place(reference.path)

    def start(offset: int, validator: str) -> Answer:
        found = http.request("GET", reference.path, ranged(offset, validator))
        if found.status not in (200, 206, 416):
            raise refused(found, what)
        return found

    head = http.request("HEAD", reference.path)
    head.close()
    size = None
    stamp = ""
    if head.status == 200:
        length = head.headers.get("Content-Length", "")
        size = int(length) if length.isdigit() else None
        stamp = head.headers.get("ETag", "") + head.headers.get("Last-Modified", "")
        stamp += length if stamp else ""
    elif head.status == 404:
        raise refused(head, what)
    mark = hashlib.sha256(f"{reference.path}\n{stamp}".encode()).hexdigest()
    # Without a stamp nothing tells two versions of it apart.
    return RemoteFile(what, key="net-" + mark, open=start, size=size, lasting=bool(stamp))
