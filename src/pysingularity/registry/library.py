# SPDX-License-Identifier: Apache-2.0
"""library://: the Library API, fetched and pushed.

Every answer is `{"data": …}` or `{"error": {"code", "message"}}`; a token goes along as `Authorization: Bearer`, never
to another host, nor to a presigned address. Hashes are written `sha256.HEX`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

from pysingularity.errors import RegistryError
from pysingularity.reference import Reference
from pysingularity.registry.http import Answer, Http, refused
from pysingularity.registry.remote import RemoteFile, ranged
from pysingularity.registry.settings import Settings

#: Files above this size are sent in parts to servers that can take them.
MULTIPART = 64 << 20


class Library:
    """One library.

    Arguments:
        reference: may name the host; else the settings' library (--library, SINGULARITY_LIBRARY).
    """

    def __init__(self, reference: Reference, settings: Settings, note: Callable[[str], None]) -> None:
        base = reference.host or settings.library
        if not base:
            raise RegistryError(
                "no-library",
                f"{reference}: names no library, and none is configured",
                hint="write library://HOST/entity/collection/name:tag, or set SINGULARITY_LIBRARY",
            )
        if "://" not in base:
            base = f"{'http' if settings.no_https else 'https'}://{base}"
        self.base = base.rstrip("/")
        self.reference = reference
        self.http = Http(settings.environ, note=note)
        token = settings.environ.get("SINGULARITY_LIBRARY_TOKEN") or (
            settings.credentials.password if settings.credentials else ""
        )
        self.secrets = {"Authorization": f"Bearer {token}"} if token else {}

    def call(self, method: str, path: str, value: Any = None, *, missing: bool = False) -> Any:
        """Return the `data` of an answer; None for 404 when `missing` is allowed.

        Raises:
            RegistryError: the library refuses.
        """
        body = None if value is None else json.dumps(value).encode()
        headers = {"Content-Type": "application/json"} if body is not None else {}
        answer = self.http.request(method, self.base + path, headers, body=body, secrets=self.secrets)
        if answer.status == 404 and missing:
            answer.close()
            return None
        if answer.status not in (200, 201, 202, 204):
            raise refused(answer, f"{self.reference} at {self.base}")
        if answer.status == 204:
            answer.close()
            return None
        found = answer.json()
        return found.get("data") if isinstance(found, dict) else None

    def version(self) -> int:
        """Return the major number of the API's version, 0 when it is not told."""
        found = self.call("GET", "/version", missing=True)
        text = str(found.get("apiVersion") or "") if isinstance(found, dict) else ""
        major = text.partition(".")[0]
        return int(major) if major.isdigit() else 0


def look_up(reference: Reference, settings: Settings, note: Callable[[str], None]) -> RemoteFile:
    """Return the image of a reference.

    Raises:
        RegistryError: the library does not have it.
    """
    library = Library(reference, settings, note)
    name = f"{reference.name}:{reference.digest or reference.tag}"
    path = f"{quote(name, safe='/:.')}?arch={quote(settings.arch)}"
    found = library.call("GET", f"/v1/images/{path}", missing=True)
    if not isinstance(found, dict):
        raise RegistryError("not-found", f"{reference}: not in {library.base} for {settings.arch}")
    digest, size = str(found.get("hash") or ""), found.get("size")
    if not digest.startswith("sha256.") or len(digest) != 71:
        raise RegistryError("bad-answer", f"{reference}: the library tells no SHA-256 of the image")
    if reference.digest and digest != reference.digest:
        raise RegistryError("wrong-image", f"{reference}: the library offers another image ({digest[:19]}…)")
    if found.get("uploaded") is False:
        raise RegistryError("not-ready", f"{reference}: has not been uploaded completely")

    def start(offset: int, validator: str) -> Answer:
        answer = library.http.request(
            "GET", f"{library.base}/v1/imagefile/{path}", ranged(offset, validator), secrets=library.secrets
        )
        if answer.status not in (200, 206, 416):
            raise refused(answer, str(reference))
        return answer

    return RemoteFile(
        str(reference),
        key=digest.replace(".", "-"),
        open=start,
        size=size if isinstance(size, int) and size > 0 else None,
        sha256=digest[7:],
        sif=True,
    )


def push(
    path: str,
    reference: Reference,
    settings: Settings,
    *,
    sha256: str,
    arch: str,
    description: str,
    note: Callable[[str], None],
) -> str:
    """Send a SIF file and give it its tags; return "sha256.HEX".

    Raises:
        RegistryError: the library refuses.
    """
    library = Library(reference, settings, note)
    entity, collection, container = reference.name.split("/")
    owner = _ensure(library, f"/v1/entities/{entity}", "/v1/entities", {"name": entity})
    shelf = _ensure(
        library, f"/v1/collections/{entity}/{collection}", "/v1/collections", {"name": collection, "entity": owner}
    )
    box = _ensure(
        library, f"/v1/containers/{reference.name}", "/v1/containers", {"name": container, "collection": shelf}
    )
    digest = "sha256." + sha256
    image = library.call("GET", f"/v1/images/{reference.name}:{digest}?arch={arch}", missing=True)
    if not isinstance(image, dict):
        image = library.call("POST", "/v1/images", {"hash": digest, "description": description, "container": box})
    if not isinstance(image, dict) or not image.get("id"):
        raise RegistryError("bad-answer", f"{reference}: the library gives the new image no id")
    number = str(image["id"])
    major = library.version()
    if not image.get("uploaded"):
        _send(library, number, path, sha256, major)
    for tag in (reference.tag or "latest").split(","):
        if major >= 2:
            library.call("POST", f"/v2/tags/{box}", {"Arch": arch, "Tag": tag, "ImageID": number})
        else:
            library.call("POST", f"/v1/tags/{box}", {"Tag": tag, "ImageID": number})
    return digest


def _ensure(library: Library, path: str, create: str, value: dict[str, str]) -> str:
    """Return the id of an entity, collection or container, made when it is missing."""
    found = library.call("GET", path, missing=True)
    if not isinstance(found, dict):
        found = library.call("POST", create, value)
    if not isinstance(found, dict) or not found.get("id"):
        raise RegistryError("bad-answer", f"{library.base}{create}: no id in the answer")
    return str(found["id"])


def _send(library: Library, number: str, path: str, sha256: str, major: int) -> None:
    """Send the bytes in the newest way that the library has."""
    size = os.stat(path).st_size
    if major >= 2 and size > MULTIPART:
        start = library.call("POST", f"/v2/imagefile/{number}/_multipart", {"filesize": size}, missing=True)
        if isinstance(start, dict):
            _send_parts(library, number, path, start)
            return
    with open(path, "rb") as file:
        if major < 2:
            headers = {"Content-Type": "application/octet-stream", "Content-Length": str(size)}
            url = f"{library.base}/v1/imagefile/{number}"
            answer = library.http.request("POST", url, headers, body=file, secrets=library.secrets)
            if answer.status not in (200, 201, 204):
                raise refused(answer, str(library.reference))
            answer.close()
            return
        md5 = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
        value = {"filesize": size, "sha256sum": sha256, "md5sum": md5}
        found = library.call("POST", f"/v2/imagefile/{number}", value)
        url = str((found or {}).get("uploadURL") or "")
        if not url:
            raise RegistryError("bad-answer", f"{library.reference}: the library names no place for the upload")
        answer = library.http.request("PUT", url, {"Content-Length": str(size)}, body=file)
        if answer.status not in (200, 201, 204):
            raise refused(answer, f"{library.reference}: upload")
        answer.close()
    library.call("PUT", f"/v2/imagefile/{number}/_complete", {})


def _send_parts(library: Library, number: str, path: str, start: dict[str, Any]) -> None:
    upload, size = str(start.get("uploadID") or ""), int(start.get("partSize") or 0)
    count = int(start.get("totalParts") or 0)
    if not upload or size <= 0 or count <= 0:
        raise RegistryError("bad-answer", f"{library.reference}: the library's upload in parts makes no sense")
    options = start.get("options") or {}
    parts = []
    try:
        with open(path, "rb") as file:
            for part in range(1, count + 1):
                data = file.read(size)
                mark = hashlib.sha256(data).hexdigest()
                value = {"partSize": len(data), "uploadID": upload, "partNumber": part, "sha256sum": mark}
                found = library.call("PUT", f"/v2/imagefile/{number}/_multipart", value)
                url = str((found or {}).get("presignedURL") or "")
                headers = {} if options.get("s3compliant") == "false" else {"x-amz-content-sha256": mark}
                answer = library.http.request("PUT", url, headers, body=data)
                if answer.status not in (200, 201, 204):
                    raise refused(answer, f"{library.reference}: part {part}")
                parts.append({"partNumber": part, "token": answer.headers.get("ETag", "")})
                answer.close()
    except BaseException:
        library.call("PUT", f"/v2/imagefile/{number}/_multipart_abort", {"uploadID": upload}, missing=True)
        raise
    library.call("PUT", f"/v2/imagefile/{number}/_multipart_complete", {"uploadID": upload, "completedParts": parts})
