# SPDX-License-Identifier: Apache-2.0
"""Bring files from mirrors: over http and https with proxies and the site's certificates, or from file: and copy:.

Large files are fetched several at a time, checked while they come in, and kept in a cache under the name of their
checksum; a file appears there only whole and right. Small ones (Release files) are returned as bytes.
"""

from __future__ import annotations

import base64
import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, NamedTuple, TypeVar
from urllib.parse import quote, unquote, urlsplit

from pysingularity.errors import HostError, RegistryError, SingularityError, UserError

if TYPE_CHECKING:
    from pysingularity.registry.http import Http

CHUNK = 1 << 17
#: Connections at once; mirrors are patient, but not endlessly.
PARALLEL = 8
ATTEMPTS = 3
#: Parts of a path that may stand in an address as they are; "%" in a file's name has to be written as %25.
_SAFE = "/~+:@=,!$&'()*;"


_T = TypeVar("_T")


class Item(NamedTuple):
    """A file to bring: its address, exact size, checksum, and a name for people."""

    url: str
    size: int
    sha256: str
    name: str


class NotFound(UserError):
    """The mirror has no such file."""


class Fetcher:
    """Fetches for one build.

    Arguments:
        cache: folder for files named by their checksum; made when missing.
        environ: proxies (http_proxy, https_proxy, all_proxy, no_proxy) and certificates (SSL_CERT_FILE, SSL_CERT_DIR).
        progress: called as progress(text, done, total), in this thread only.
    """

    def __init__(self, cache: str, environ: Mapping[str, str], progress: Callable[..., None]) -> None:
        self.cache, self.environ, self.progress = cache, environ, progress
        os.makedirs(cache, exist_ok=True)
        self._http: Http | None = None
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._done = 0

    def get(self, url: str, limit: int) -> bytes:
        """Return a small file.

        Raises:
            NotFound: the mirror does not have it.
            UserError: it is larger than `limit` bytes, or the mirror cannot be reached.
        """

        def once() -> bytes:
            data = b""
            for chunk in self._open(url):
                data += chunk
                if len(data) > limit:
                    raise UserError("too-large", f"{url}: more than {limit} bytes")
            return data

        return self._retry(once)

    def stream(self, url: str, limit: int, text: str) -> tuple[str, str]:
        """Fetch a file whose checksum nobody told; return its path, which is the caller's to remove, and its SHA-256.

        Raises:
            NotFound: there is nothing.
            UserError: it is larger than `limit` bytes, or cannot be reached.
            HostError: there is no space.
        """
        path = self._partial("stream")

        def once() -> str:
            digest, size = hashlib.sha256(), 0
            with open(path, "wb") as file:
                for chunk in self._open(url):
                    size += len(chunk)
                    if size > limit:
                        raise UserError("too-large", f"{url}: more than {limit} bytes")
                    digest.update(chunk)
                    file.write(chunk)
                    self.progress(text, size)
            return digest.hexdigest()

        try:
            return path, self._retry(once)
        except BaseException as error:
            _remove(path)
            if isinstance(error, OSError):
                raise self._full(error) from None
            raise

    def cached(self, sha256: str) -> str | None:
        """Return the path of a file in the cache when it is there and still right."""
        path = os.path.join(self.cache, sha256)
        try:
            with open(path, "rb") as file:
                right = hashlib.file_digest(file, "sha256").hexdigest() == sha256
        except OSError:
            return None
        if not right:  # a disk forgets, a user edits
            os.unlink(path)
            return None
        os.utime(path)  # used now: who cleans the cache looks at this time
        return path

    def keep(self, data: bytes, sha256: str) -> str:
        """Put bytes with a known checksum into the cache and return their path."""
        path = os.path.join(self.cache, sha256)
        partial = self._partial(sha256)
        try:
            with open(partial, "wb") as file:
                file.write(data)
            os.replace(partial, path)
        except OSError as error:
            _remove(partial)
            raise self._full(error) from None
        return path

    def bring(self, items: Sequence[Item], text: str) -> dict[str, str]:
        """Return checksum → path in the cache for all items, fetching what is not there.

        Raises:
            UserError: the mirror lacks one, or serves another content than promised.
            HostError: the cache has no space.
        """
        total = sum(item.size for item in items)
        self._done = 0
        found: dict[str, str] = {}
        with ThreadPoolExecutor(PARALLEL, thread_name_prefix="fetch") as pool:
            # Large files first: the last one to finish then is a small one.
            order = sorted(items, key=lambda item: -item.size)
            waiting: dict[Future[str], Item] = {pool.submit(self._one, item): item for item in order}
            try:
                while waiting:
                    done, _ = wait(waiting, timeout=0.2, return_when=FIRST_EXCEPTION)
                    for future in done:
                        found[waiting.pop(future).sha256] = future.result()
                    self.progress(text, self._done, total)
            except BaseException:
                self._stop.set()
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        return found

    def close(self) -> None:
        """Close all connections."""
        if self._http is not None:
            self._http.close()

    def _one(self, item: Item) -> str:
        path = self.cached(item.sha256)
        if path is not None:
            self._count(item.size)
            return path
        path = os.path.join(self.cache, item.sha256)
        return self._retry(lambda: self._download(item, path))

    def _download(self, item: Item, path: str) -> str:
        partial = self._partial(item.sha256)
        digest, size = hashlib.sha256(), 0
        try:
            with open(partial, "wb") as file:
                for chunk in self._open(item.url):
                    size += len(chunk)
                    if size > item.size:
                        raise _wrong(item, f"is larger than the {item.size} bytes that its index promises")
                    digest.update(chunk)
                    file.write(chunk)
                    self._count(len(chunk))
            if size != item.size:
                raise _Broken(f"{item.url}: {size} of {item.size} bytes came")
            if digest.hexdigest() != item.sha256:
                raise _wrong(item, f"has the checksum {digest.hexdigest()}, not the {item.sha256} of its index")
            os.replace(partial, path)
        except BaseException as error:
            self._count(-size)
            _remove(partial)
            if isinstance(error, OSError):
                raise self._full(error) from None
            raise
        return path

    def _partial(self, sha256: str) -> str:
        return os.path.join(self.cache, f".{sha256}.{os.getpid()}.{threading.get_ident()}.partial")

    def _count(self, size: int) -> None:
        with self._lock:
            self._done += size

    def _full(self, error: OSError) -> HostError:
        return HostError(
            "cache-not-writable",
            f"the cache {self.cache} cannot be written: {error.strerror}",
            hint="give another place with SINGULARITY_CACHEDIR, or make room",
        )

    def _retry(self, work: Callable[[], _T]) -> _T:
        """Do something with the network, again when it fails in a way that may pass."""
        attempt = 1
        while True:
            try:
                return work()
            except _Broken as error:
                if attempt >= ATTEMPTS or self._stop.is_set():
                    raise UserError(
                        "mirror-unreachable",
                        str(error),
                        hint="is the network there, and does this site need http_proxy or https_proxy?",
                    ) from None
                self._stop.wait(0.5 * attempt)
                attempt += 1

    def _open(self, url: str) -> Iterator[bytes]:
        """Yield the content of an address.

        Raises:
            NotFound: there is nothing.
            _Broken: something failed that may work the next time.
        """
        parts = urlsplit(url)
        if parts.scheme in ("file", "copy"):
            yield from self._local(unquote(parts.path), url)
            return
        yield from self._remote(url)

    def _local(self, path: str, url: str) -> Iterator[bytes]:
        try:
            with open(path, "rb") as file:
                while chunk := file.read(CHUNK):
                    yield chunk
        except (FileNotFoundError, NotADirectoryError):
            raise NotFound("not-on-mirror", f"{url}: no such file") from None
        except OSError as error:
            raise UserError("mirror-unreachable", f"{url}: {error.strerror}") from None

    def _remote(self, url: str) -> Iterator[bytes]:
        http, errors_ = self._client()
        parts = urlsplit(url)
        secrets = None
        if parts.username is not None:
            word = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            secrets = {"Authorization": "Basic " + base64.b64encode(word.encode()).decode()}
            url = url.replace(parts.netloc, parts.netloc.rpartition("@")[2], 1)
        try:
            answer = http.request("GET", url, tries=1, secrets=secrets)
        except RegistryError as error:
            if error.id == "unreachable":
                raise _Broken(error.message) from None
            raise
        try:
            if answer.status in (404, 410):
                raise NotFound("not-on-mirror", f"{url}: the mirror has no such file (status {answer.status})")
            if answer.status >= 500 or answer.status == 429:
                raise _Broken(f"{url}: the mirror answers with status {answer.status}")
            if answer.status != 200:
                raise UserError("mirror-refuses", f"{url}: the mirror answers with status {answer.status}")
            for chunk in answer.pieces(CHUNK):
                if self._stop.is_set():
                    raise _Broken("stopped")
                yield chunk
        except errors_ as error:
            raise _Broken(f"{url}: the connection was cut: {error}") from None
        finally:
            answer.close()

    def _client(self) -> tuple[Http, tuple[type[Exception], ...]]:
        """Return the HTTP client, and what its streams raise."""
        import urllib3  # 50 ms, and not needed for a mirror on a disk

        from pysingularity.registry.http import Http

        with self._lock:
            if self._http is None:
                self._http = Http(self.environ)
        return self._http, (urllib3.exceptions.HTTPError, ConnectionError, TimeoutError)


class _Broken(Exception):
    """Something failed that may work the next time."""


def address(base: str, path: str) -> str:
    """Return the address of a file below a mirror, with its name quoted as an address wants it."""
    return f"{base.rstrip('/')}/{quote(path, safe=_SAFE)}"


def _wrong(item: Item, what: str) -> SingularityError:
    return UserError(
        "wrong-content",
        f"{item.url}: {what}: refused",
        hint="a mirror in the middle of an update, a proxy that changes files, or somebody in between; try again later",
    )


def _remove(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
