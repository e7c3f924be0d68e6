# SPDX-License-Identifier: Apache-2.0
"""Blobs in an object store (S3, Google, Azure, memory for tests) through obstore.

What the hub itself has to read (to send it or to look inside) is fetched into a folder of the data folder once and
kept until it is in the way; clients are normally sent to signed links.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import obstore
from obstore.exceptions import BaseError
from obstore.store import from_url

from pysingularity.errors import HostError
from pysingularity.hub.errors import HubError
from pysingularity.hub.storage.base import SHA256, Storage, check_sha256

#: Options that are about the connection, not about the store.
CONNECTION = frozenset(
    "allow_http allow_invalid_certificates connect_timeout pool_idle_timeout proxy_url timeout user_agent".split()
)


class StoreFailed(HubError):
    """The object store does not answer as it should."""

    status = 503


@contextmanager
def _asking() -> Iterator[None]:
    """Tell clients and the administrator apart what they can do when the store fails."""
    try:
        yield
    except FileNotFoundError:
        raise
    except BaseError as error:
        first = str(error).partition("\n")[0]
        raise StoreFailed("store-failed", f"the store of images cannot be reached: {first[:300]}")


def open_store(url: str, options: dict[str, str]) -> Any:
    """Open an object store.

    Raises:
        HostError: an option is unknown, or one is missing.
    """
    client: dict[str, Any] = {key: value for key, value in options.items() if key in CONNECTION}
    for key in ("allow_http", "allow_invalid_certificates"):
        if key in client:
            client[key] = client[key].lower() in ("1", "true", "yes")
    more = {key: value for key, value in options.items() if key not in CONNECTION}
    try:
        return from_url(url, client_options=client or None, **more)  # type: ignore[call-overload]
    except (BaseError, ValueError, TypeError) as error:
        first = str(error).partition("\n")[0]
        raise HostError("wrong-setting", f"storage: {first}", hint="see the settings storage.url and storage.options")


class ObjectStorage(Storage):
    """Blobs below a prefix of an object store.

    Arguments:
        url: `s3://bucket/prefix` and its kin.
        options: as obstore names them (`endpoint`, `region`, `access_key_id` ...).
        public: address of the store as clients reach it, when the hub reaches it by another; for signed links.
        local: folder for files on their way in and for copies of what was read.
        store: an opened store, for tests that share one.
    """

    def __init__(self, url: str, options: dict[str, str], local: Path, store: Any = None, *, public: str = "") -> None:
        self.store: Any = open_store(url, options) if store is None else store
        self.signer: Any = open_store(url, {**options, "endpoint": public}) if public else self.store
        self.local = local
        self.links = url.partition("://")[0] not in ("memory", "file")

    def _key(self, sha256: str) -> str:
        return f"{check_sha256(sha256)[:2]}/{sha256}"

    def take(self, path: Path, sha256: str) -> None:
        """Send a file to the store; a broken connection leaves nothing there (uploads become visible at their end)."""
        if not self.has(sha256):
            with path.open("rb") as file, _asking():
                obstore.put(self.store, self._key(sha256), file)
        path.unlink()

    def has(self, sha256: str) -> bool:
        """Return whether a blob is there."""
        try:
            with _asking():
                obstore.head(self.store, self._key(sha256))
        except FileNotFoundError:
            return False
        return True

    def size(self, sha256: str) -> int:
        """Return the size of a blob."""
        with _asking():
            return int(obstore.head(self.store, self._key(sha256))["size"])

    def open(self, sha256: str) -> int:
        """Return a descriptor of the local copy of a blob, fetched when there is none."""
        target = self.local / "copies" / check_sha256(sha256)
        with contextlib.suppress(FileNotFoundError):
            return os.open(target, os.O_RDONLY | os.O_CLOEXEC)
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        partial = self.staging() / f"copy-{sha256}-{secrets.token_hex(4)}"
        try:
            with _asking():
                answer = obstore.get(self.store, self._key(sha256))
            with partial.open("wb") as file, _asking():
                for chunk in answer.stream(min_chunk_size=1 << 20):
                    file.write(chunk)
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)
        return os.open(target, os.O_RDONLY | os.O_CLOEXEC)

    def link(self, sha256: str, seconds: int) -> str | None:
        """Return a signed address."""
        if not self.links:
            return None
        return str(obstore.sign(self.signer, "GET", self._key(sha256), timedelta(seconds=seconds)))

    def remove(self, sha256: str) -> None:
        """Remove a blob and its copy."""
        (self.local / "copies" / check_sha256(sha256)).unlink(missing_ok=True)
        with contextlib.suppress(FileNotFoundError), _asking():
            obstore.delete(self.store, self._key(sha256))

    def list(self) -> Iterator[tuple[str, int, float]]:
        """Return all blobs."""
        with _asking():
            found = [item for batch in obstore.list(self.store) for item in batch]
        for item in found:
            name = str(item["path"]).rpartition("/")[2]
            if SHA256.match(name):
                yield name, int(item["size"]), item["last_modified"].timestamp()

    def staging(self) -> Path:
        """Return a local folder."""
        folder = self.local / "incoming"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return folder
