# SPDX-License-Identifier: Apache-2.0
"""Blobs on their way: downloads that readers follow while they grow, continued after cuts, checked at the end.

A `Download` runs in a thread of a `Downloads` group; `open` gives a reader that waits for bytes still to come. A large
blob comes in parts over several connections, which pays over distant links; parts are written in their order, so that
what is there is always the beginning. With
a cache the bytes go to `partial/` under a lock for the digest, so that two processes never fetch one blob twice and
the next process continues what a killed one left. Without a cache they go to an unnamed file. Size and SHA-256 are
checked before a reader is told that all is there.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import urllib3

from pysingularity.cache import Cache
from pysingularity.errors import HostError, RegistryError, SingularityError
from pysingularity.locks import Lock
from pysingularity.registry.http import Answer, explain, pause
from pysingularity.registry.oci import Descriptor

PIECE = 1 << 18
#: Downloads at once, and how often a cut one is continued without a byte of progress.
AT_ONCE, PATIENCE = 4, 5
#: Blobs with more bytes to come than this are fetched in parts of PART bytes, over CONNECTIONS connections.
IN_PARTS, PART, CONNECTIONS = 256 << 20, 8 << 20, 4


class LayerSource(Protocol):
    """One layer's compressed bytes."""

    name: str

    def open(self) -> Callable[[int], bytes]:
        """Return a function that reads from the start on, up to n bytes a call."""

    def finish(self) -> None:
        """Return when the layer is whole and is what its digest says; raise otherwise."""


class Stopped(Exception):
    """The group was told to stop."""


class Download:
    """One blob that is being fetched.

    Arguments:
        blob: digest and size.
        start: opens the blob at an offset, to its end or to another offset (0: its end): status 206 continues, 200
            begins anew, 416 means that there is no more.
        tell: told how many bytes have come (negative when a download begins anew).
    """

    def __init__(self, blob: Descriptor, start: Callable[[int, int], Answer], tell: Callable[[int], None]) -> None:
        self.blob, self.name = blob, blob.digest[:19] + "…"
        self.path: str | None = None
        self.fd = -1
        self.have = 0
        self.done = False
        self.error: BaseException | None = None
        self.fetched = False
        #: Starts this download when somebody wants it after all; None once it runs.
        self.begin: Callable[[Download], None] | None = None
        #: Told how many bytes were read for the first time.
        self.taken: Callable[[int], None] = lambda _: None
        self._taken = 0
        self._start, self._tell = start, tell
        self._change = threading.Condition()
        self._stop = threading.Event()
        self._give_up_parts, self._in_parts = threading.Event(), False

    def stop(self) -> None:
        """Give the download up."""
        self._stop.set()

    def run(self, cache: Cache | None, folder: str) -> None:
        """Fetch the blob; errors are kept for those who read."""
        try:
            if cache is None:
                self.fd = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
                self._fetch(0, hashlib.new(self._kind()))
            else:
                self._into_cache(cache)
        except BaseException as error:
            self._fail(error)
            return
        with self._change:
            self.done = True
            self._change.notify_all()

    def _kind(self) -> str:
        return self.blob.digest.partition(":")[0]

    def _fail(self, error: BaseException) -> None:
        if isinstance(error, OSError) and not isinstance(error, SingularityError) and error.errno in (28, 122):
            error = HostError(
                "disk-full", "no space left for a download", hint="clean the cache: singularity cache clean"
            )
        with self._change:
            self.error = error
            self._change.notify_all()

    def _into_cache(self, cache: Cache) -> None:
        if self._adopt(cache):
            return
        with _lock(cache, self.blob.digest, self._stop):
            if self._adopt(cache):  # somebody else has fetched it while we waited
                return
            partial = cache.path("partial", self.blob.digest)
            self.fd = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            digest = hashlib.new(self._kind())
            have = 0
            while data := os.pread(self.fd, 1 << 20, have):
                digest.update(data)
                have += len(data)
            if have > self.blob.size:
                os.ftruncate(self.fd, 0)
                have, digest = 0, hashlib.new(self._kind())
            self._tell(have)
            try:
                self._fetch(have, digest)
            except RegistryError as error:
                if error.id in ("digest-mismatch", "size-mismatch"):
                    os.unlink(partial)
                raise
            try:
                self.path = cache.add_blob(self.blob.digest, partial)
            except FileNotFoundError:
                pass  # somebody has emptied the folder by hand; our open file is whole, and enough for this image

    def _adopt(self, cache: Cache) -> bool:
        path = cache.blob(self.blob.digest, self.blob.size)
        if path is None:
            return False
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:  # cleaned away just now
            return False
        digest = hashlib.new(self._kind())
        at = 0
        while data := os.pread(fd, 1 << 20, at):  # verified on use: a disk may have changed it since
            digest.update(data)
            at += len(data)
            if self._stop.is_set():
                os.close(fd)
                raise Stopped
        if f"{self._kind()}:{digest.hexdigest()}" != self.blob.digest:
            os.close(fd)
            cache.drop("blob", self.blob.digest)
            return False
        self.path, self.fd = path, fd
        self._tell(self.blob.size)
        with self._change:
            self.have = self.blob.size
            self._change.notify_all()
        return True

    def _fetch(self, have: int, digest: hashlib._Hash) -> None:
        self.fetched = True
        size = self.blob.size
        with self._change:
            self.have = have
            self._change.notify_all()
        failures = old = 0
        what = f"blob {self.name}"
        if size - have > IN_PARTS:
            have = self._fetch_parts(have, digest)  # as far as all is well; the rest is for the patient way
        while have < size:
            before = have
            try:
                answer = self._start(have, 0)
                if answer.status == 416 or (answer.status == 200 and have):
                    if have:  # begin anew; what is there is compared, for a reader may have used it already
                        self._tell(-have)
                        old, have, digest = max(old, have), 0, hashlib.new(self._kind())
                    if answer.status == 416:
                        answer.close()
                        failures += 1
                        if failures > PATIENCE:
                            raise RegistryError("bad-answer", f"{what}: the registry gives no part of it")
                        continue
                told = _whole_size(answer)
                if told is not None and told != size:
                    answer.close()
                    word = "more than" if told > size else "instead of"
                    raise RegistryError(
                        "size-mismatch",
                        f"{what}: the registry has {told} bytes of it, {word} the {size} of its manifest",
                    )
                for data in answer.pieces(PIECE):
                    if self._stop.is_set():
                        answer.close()
                        raise Stopped
                    if have + len(data) > size:
                        answer.close()
                        raise RegistryError("size-mismatch", f"{what}: more than the {size} bytes of its manifest")
                    known = min(len(data), max(old - have, 0))
                    if known and os.pread(self.fd, known, have) != data[:known]:
                        raise RegistryError("digest-mismatch", f"{what}: differs from what came before; begin again")
                    _write(self.fd, data, have)
                    digest.update(data)
                    have += len(data)
                    self._tell(len(data))
                    with self._change:
                        self.have = max(self.have, have)
                        self._change.notify_all()
            except (urllib3.exceptions.HTTPError, ConnectionError, TimeoutError) as error:
                reason = explain(error)
            else:
                reason = f"the connection ended after {have} of {size} bytes"
            if have < size:
                failures = 1 if have > before else failures + 1
                if failures > PATIENCE:
                    raise RegistryError(
                        "connection-cut", f"{what}: {reason}", hint="try again: what has come so far is kept"
                    )
                if self._stop.wait(pause(failures)):
                    raise Stopped
        if f"{self._kind()}:{digest.hexdigest()}" != self.blob.digest:
            raise RegistryError(
                "digest-mismatch", f"{what}: what came is not what its digest says; nothing of it is kept"
            )

    def _fetch_parts(self, have: int, digest: hashlib._Hash) -> int:
        """Fetch parts at once, up to the first that cannot be had; return how many bytes are there then."""
        size = self.blob.size
        waiting: deque[Future[bytearray | None]] = deque()
        asked = have
        with ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="part") as pool:
            try:
                while have < size:
                    # The first part goes alone: whoever does not know ranges is asked once.
                    most = CONNECTIONS + 1 if self._in_parts else 1
                    while asked < size and len(waiting) < most:
                        end = min(asked + PART, size)
                        waiting.append(pool.submit(self._part, asked, end))
                        asked = end
                    data = waiting.popleft().result()
                    if self._stop.is_set():
                        raise Stopped
                    if data is None:
                        break
                    self._in_parts = True
                    _write(self.fd, data, have)
                    digest.update(data)
                    have += len(data)
                    self._tell(len(data))
                    with self._change:
                        self.have = have
                        self._change.notify_all()
            finally:
                self._give_up_parts.set()
                pool.shutdown(wait=True, cancel_futures=True)
        return have

    def _part(self, start: int, end: int) -> bytearray | None:
        """Return some bytes of the blob, None when the registry does not give exactly these."""
        found = bytearray(end - start)
        at = 0
        try:
            answer = self._start(start, end)
            if answer.status != 206 or _whole_size(answer) != self.blob.size:
                answer.close()
                return None
            for data in answer.pieces(PIECE):
                if self._give_up_parts.is_set() or self._stop.is_set() or at + len(data) > len(found):
                    answer.close()
                    return None
                found[at : at + len(data)] = data
                at += len(data)
        except (urllib3.exceptions.HTTPError, OSError, RegistryError):
            return None
        return found if at == len(found) else None

    def open(self) -> Callable[[int], bytes]:
        """Return a reader from the start; it waits for bytes that are still to come."""
        begin, self.begin = self.begin, None
        if begin is not None:
            begin(self)
        position = 0

        def read(size: int) -> bytes:
            nonlocal position
            with self._change:
                while self.error is None and not self.done and self.have <= position < self.blob.size:
                    self._change.wait()
                if self.error is not None:
                    raise self.error
                ready = self.have
            if position >= self.blob.size:
                return b""
            data = os.pread(self.fd, min(size, ready - position), position)
            position += len(data)
            if position > self._taken:
                self.taken(position - self._taken)
                self._taken = position
            return data

        return read

    def passed(self) -> None:
        """Count what nobody needs to read as read."""
        self.taken(self.blob.size - self._taken)
        self._taken = self.blob.size

    def finish(self) -> None:
        """Wait until the blob is whole and verified.

        Raises:
            RegistryError: it is not what its digest says, or cannot be fetched.
        """
        if self.begin is not None:  # nobody wanted it
            return
        with self._change:
            while self.error is None and not self.done:
                self._change.wait()
            if self.error is not None:
                raise self.error

    def close(self) -> None:
        """Close the file."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class Downloads:
    """Downloads of one image, a few at a time in the order given; a context manager that leaves no thread behind."""

    def __init__(
        self, downloads: Sequence[Download], cache: Cache | None, folder: str, *, later: Sequence[Download] = ()
    ) -> None:
        self._downloads, self._cache, self._folder = list(downloads), cache, folder
        self._queue = [one for one in downloads if one not in later]
        for one in later:
            one.begin = self._add
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Downloads:
        for _ in range(min(AT_ONCE, len(self._queue))):
            thread = threading.Thread(target=self._work, daemon=True)
            thread.start()
            self._threads.append(thread)
        return self

    def _add(self, one: Download) -> None:
        with self._lock:
            self._queue.insert(0, one)
        thread = threading.Thread(target=self._work, daemon=True)
        thread.start()
        self._threads.append(thread)

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._queue:
                    return
                one = self._queue.pop(0)
            one.run(self._cache, self._folder)

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._queue.clear()
        for one in self._downloads:
            one.stop()
        for thread in self._threads:
            thread.join()
        for one in self._downloads:
            one.close()


class FileLayer:
    """A layer inside a file of this machine, checked while it is read.

    Arguments:
        path: the file; `offset` and `size` tell where the layer lies in it.
        digest: of these bytes, or "" when nobody knows it.
    """

    def __init__(self, path: str, offset: int, size: int, digest: str, name: str) -> None:
        self.path, self.offset, self.size, self.digest, self.name = path, offset, size, digest, name
        #: Told how many bytes were read for the first time.
        self.tell: Callable[[int], None] = lambda _: None
        self._told = 0
        self._hash = hashlib.new(digest.partition(":")[0]) if digest else None
        self._hashed = 0
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def open(self) -> Callable[[int], bytes]:
        """Return a reader from the start."""
        position = 0

        def read(size: int) -> bytes:
            nonlocal position
            data = os.pread(self._fd, min(size, self.size - position), self.offset + position)
            if self._hash is not None and position == self._hashed:
                self._hash.update(data)
                self._hashed += len(data)
            position += len(data)
            if position > self._told:
                self.tell(position - self._told)
                self._told = position
            return data

        return read

    def finish(self) -> None:
        """Read what nobody has read, and check the digest.

        Raises:
            ImageError: it is damaged.
        """
        if self._hash is None:
            return
        while self._hashed < self.size:
            data = os.pread(self._fd, min(1 << 20, self.size - self._hashed), self.offset + self._hashed)
            if not data:
                break
            self._hash.update(data)
            self._hashed += len(data)
        if f"{self._hash.name}:{self._hash.hexdigest()}" != self.digest:
            raise RegistryError("digest-mismatch", f"{self.path}: layer {self.name} is not what its digest says")

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)


def _lock(cache: Cache, digest: str, stop: threading.Event) -> Lock:
    if stop.is_set():
        raise Stopped
    return cache.lock_partial(digest)


def _whole_size(answer: Answer) -> int | None:
    """Return how long a server says the whole blob is, None when it does not say."""
    text = answer.headers.get("Content-Length", "")
    if answer.status == 206:
        text = answer.headers.get("Content-Range", "").rpartition("/")[2]
    return int(text) if text.isdigit() else None


def _write(fd: int, data: bytes | bytearray, at: int) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(fd, view, at)
        at += count
        view = view[count:]
