# SPDX-License-Identifier: Apache-2.0
"""Locks between processes, on whatever file system."""

from __future__ import annotations

import errno
import fcntl
import os
import time

from pysingularity.files import remove

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

#: How long a lock made of a hard link may go without a heartbeat, in seconds.
STALE = 60.0


class Lock:
    """A held lock between processes, on whatever file system; `close` or a `with` block gives it back.

    POSIX record locks first: Linux passes them to an NFS server. They belong to the process, so that threads must not
    compete for one key (they share the download instead). Where they are not supported, a hard link is the lock: making
    it is atomic everywhere, its owner renews its time, and one without heartbeat for a minute is broken.
    """

    def __init__(self, path: str, waiting: Callable[[], None] | None = None) -> None:
        self.path = path
        self._fd = -1
        self._link: _LinkLock | None = None
        try:
            self._take(waiting)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
                raise
            self._link = _LinkLock(path + ".link", waiting)

    def _take(self, waiting: Callable[[], None] | None) -> None:
        while True:
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                try:
                    fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError as error:
                    if error.errno not in (errno.EACCES, errno.EAGAIN):
                        raise
                    if waiting is not None:
                        waiting()
                    fcntl.lockf(fd, fcntl.LOCK_EX)
                if _same(fd, self.path):
                    self._fd = fd
                    return
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)  # the last owner has removed the file meanwhile

    def close(self) -> None:
        """Give the lock back; the file goes with it."""
        if self._fd >= 0:
            remove(self.path)
            os.close(self._fd)
            self._fd = -1
        if self._link is not None:
            self._link.close()
            self._link = None

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def held(path: str) -> bool:
    """Return whether another process holds a lock."""
    try:
        if time.time() - os.stat(path + ".link").st_mtime < STALE:
            return True
    except OSError:
        pass
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in (errno.EACCES, errno.EAGAIN)
    finally:
        os.close(fd)
    return False


def locked(path: str) -> bool:
    """Return whether somebody holds flock(2) on a file."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(fd)
    return False


class _LinkLock:
    """A lock that is a hard link with a heartbeat, for file systems without POSIX locks."""

    def __init__(self, path: str, waiting: Callable[[], None] | None) -> None:
        import threading

        self.path = path
        self._own = f"{path}.{os.uname().nodename}-{os.getpid()}-{os.urandom(4).hex()}"
        os.close(os.open(self._own, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666))
        try:
            self._wait(waiting)
        except BaseException:
            remove(self._own)
            raise
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def _wait(self, waiting: Callable[[], None] | None) -> None:
        seen: tuple[int, int] | None = None
        since = time.monotonic()
        while True:
            try:
                os.link(self._own, self.path)
                return
            except FileExistsError:
                pass
            if os.stat(self._own).st_nlink == 2:  # NFS lost the answer, not the link
                return
            if waiting is not None:
                waiting()
                waiting = None
            try:
                status = os.stat(self.path)
            except OSError:
                continue
            now = (status.st_ino, status.st_mtime_ns)
            if now != seen:
                seen, since = now, time.monotonic()
            elif time.monotonic() - since > STALE:
                self._break(now)
            time.sleep(0.1)

    def _break(self, seen: tuple[int, int]) -> None:
        """Remove a lock whose owner has died: by rename, so that exactly one of the waiting does it."""
        away = self._own + ".stale"
        try:
            os.rename(self.path, away)
            status = os.stat(away)
            if (status.st_ino, status.st_mtime_ns) != seen:
                os.link(away, self.path)  # it changed hands between the look and the rename
        except OSError:
            return
        remove(away)

    def _beat(self) -> None:
        while not self._stop.wait(STALE / 6):
            try:
                os.utime(self._own)
            except OSError:
                return

    def close(self) -> None:
        self._stop.set()
        try:
            if os.stat(self.path).st_ino == os.stat(self._own).st_ino:
                remove(self.path)
        except OSError:
            pass
        remove(self._own)


def _same(fd: int, path: str) -> bool:
    """Return whether a name still leads to an open file."""
    try:
        mine, now = os.fstat(fd), os.stat(path)
    except OSError:
        return False
    return (mine.st_dev, mine.st_ino) == (now.st_dev, now.st_ino)
