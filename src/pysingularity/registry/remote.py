# SPDX-License-Identifier: Apache-2.0
"""An image that is one file on a server: fetch it, continue after cuts, check what is known of it.

The clients of oras, library, shub and plain addresses each look up one `RemoteFile`; what they know differs (a
SHA-256, an MD5, only a size), and everything that is known is checked before the file gets a name.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import urllib3

from pysingularity.cache import Cache
from pysingularity.errors import RegistryError
from pysingularity.registry.assemble import check_sif
from pysingularity.registry.http import Answer, explain, pause

PIECE = 1 << 18
PATIENCE = 5


@dataclass
class RemoteFile:
    """A file to be fetched.

    Arguments:
        what: its name for messages.
        key: what makes it different from others: a hash, or address and date.
        open: opens it at an offset; `validator` (an ETag) is to be sent as If-Range when it is not empty.
        size: bytes, None when not known.
        sha256, md5: hex digests, "" when not known.
        facts: kept with the tag.
        sif: it must be a SIF file.
        lasting: the key says which content is meant, also tomorrow.
    """

    what: str
    key: str
    open: Callable[[int, str], Answer]
    size: int | None = None
    sha256: str = ""
    md5: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)
    sif: bool = False
    lasting: bool = True

    def save(self, path: str, tell: Callable[[int], None], cache: Cache | None) -> str:
        """Fetch the file to `path` and return its SHA-256 (hex).

        What a killed process left is continued when the SHA-256 is known, so that the whole can be checked.

        Raises:
            RegistryError: it cannot be fetched, or is not what it should be.
            ImageError: it is no image.
        """
        if cache is None or not self.sha256:
            return self._save(path, path, tell)
        with cache.lock_partial("file-" + self.key):
            return self._save(path, cache.path("partial", "file-" + self.key), tell)

    def _save(self, path: str, partial: str, tell: Callable[[int], None]) -> str:
        keep = partial != path
        fd = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            sha256, md5 = self._fetch(fd, tell)
            wrong = self._wrong(sha256, md5, os.fstat(fd).st_size)
            if wrong:
                os.unlink(partial)
                raise RegistryError("digest-mismatch", f"{self.what}: {wrong}; nothing of it is kept")
            os.fsync(fd)
            if self.sif:
                check_sif(partial, self.what)
            if partial != path:
                os.rename(partial, path)
        except BaseException:
            if not keep and os.path.exists(partial):
                os.unlink(partial)
            raise
        finally:
            os.close(fd)
        return sha256

    def _wrong(self, sha256: str, md5: str, size: int) -> str:
        if self.size is not None and size != self.size:
            return f"{size} bytes came instead of {self.size}"
        if self.sha256 and sha256 != self.sha256:
            return "what came is not what its SHA-256 says"
        if self.md5 and md5 != self.md5:
            return "what came is not what its MD5 says"
        return ""

    def _fetch(self, fd: int, tell: Callable[[int], None]) -> tuple[str, str]:
        sha256, md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
        have = 0
        while data := os.pread(fd, 1 << 20, have):
            sha256.update(data)
            md5.update(data)
            have += len(data)
        if have:
            tell(have)
        failures, validator, total = 0, "", self.size
        while total is None or have < total:
            before = have
            whole = False
            try:
                answer = self.open(have, validator)
                if have and answer.status != 206:  # begins anew
                    tell(-have)
                    os.ftruncate(fd, 0)
                    have, sha256, md5 = 0, hashlib.sha256(), hashlib.md5(usedforsecurity=False)
                    if answer.status == 416:
                        answer.close()
                        failures += 1
                        if failures > PATIENCE:
                            raise RegistryError("bad-answer", f"{self.what}: the server gives no part of it")
                        continue
                tag = answer.headers.get("ETag", "")
                validator = "" if tag.startswith("W/") else tag
                length = answer.headers.get("Content-Length", "")
                if total is None and length.isdigit():
                    total = have + int(length)
                for data in answer.pieces(PIECE):
                    at = have
                    view = memoryview(data)
                    while view:
                        count = os.pwrite(fd, view, at)
                        at, view = at + count, view[count:]
                    sha256.update(data)
                    md5.update(data)
                    have += len(data)
                    tell(len(data))
                    if self.size is not None and have > self.size:
                        answer.close()
                        raise RegistryError("size-mismatch", f"{self.what}: more than the {self.size} bytes announced")
                whole = total is None
                reason = f"the connection ended after {have} bytes"
            except (urllib3.exceptions.HTTPError, ConnectionError, TimeoutError) as error:
                reason = explain(error)
            if whole or (total is not None and have >= total):
                break
            if not validator and not self.sha256 and have:
                os.ftruncate(fd, 0)
                tell(-have)
                have, sha256, md5 = 0, hashlib.sha256(), hashlib.md5(usedforsecurity=False)
            failures = 1 if have > before else failures + 1
            if failures > PATIENCE:
                raise RegistryError("connection-cut", f"{self.what}: {reason}", hint="try again")
            import time

            time.sleep(pause(failures))
        return sha256.hexdigest(), md5.hexdigest()


def ranged(offset: int, validator: str) -> dict[str, str]:
    """Return the headers that ask for a file from an offset on."""
    if not offset:
        return {}
    return {"Range": f"bytes={offset}-", **({"If-Range": validator} if validator else {})}
