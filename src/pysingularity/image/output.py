# SPDX-License-Identifier: Apache-2.0
"""Results appear whole or not at all: checked before the work, written beside the target, renamed when complete.

A file is made without a name where the file system can (nothing stays behind even after SIGKILL), otherwise as
`.NAME.XXXX.partial` beside its target. Folders are always made as partials. A partial is locked by who writes it;
one that nobody holds any more is removed by the next who writes the same target. `epoch` is the time that results
bear when the caller asks for reproducible ones.
"""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import stat

from pysingularity.errors import HostError, UserError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from types import FrameType, TracebackType

#: Errors that mean that there is no room.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
IMAGE_MODE = 0o755


class Terminated(BaseException):
    """The process was asked to end by a signal; raised so that everything is put away first."""

    def __init__(self, number: int) -> None:
        super().__init__(f"signal {number}")
        self.number = number


class Orderly:
    """Turn SIGTERM and SIGHUP into an exception while results are written, then die by the same signal.

    Used by commands around their work; only the main thread may enter it.
    """

    def __init__(self) -> None:
        self._before: dict[int, Callable[[int, FrameType | None], object] | int | None] = {}

    def __enter__(self) -> Orderly:
        def stop(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
            raise Terminated(number)

        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) == signal.SIG_DFL:
                self._before[number] = signal.signal(number, stop)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if isinstance(value, Terminated):
            os.kill(os.getpid(), value.number)


def check_target(path: str, *, force: bool = False, folder: bool = False) -> None:
    """Find out before the work whether a result can be put at `path`.

    Arguments:
        path: the file or folder to be made.
        force: something that stands there may be replaced.
        folder: a folder is to be made.

    Raises:
        UserError: it exists, is of the wrong kind, or its folder is missing or may not be written.
    """
    place = os.path.dirname(path) or "."
    try:
        status = os.stat(place)
    except OSError as error:
        raise UserError(
            "no-output-folder",
            f"{path}: the folder {place} cannot be used: {(error.strerror or '').lower()}",
            hint=f"make it first: mkdir -p {place}",
        ) from None
    if not stat.S_ISDIR(status.st_mode):
        raise UserError("no-output-folder", f"{path}: {place} is not a folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError("output-not-writable", f"{path}: you may not write into the folder {place}")
    try:
        there = os.lstat(path)
    except OSError:
        return
    if not force:
        raise UserError("target-exists", f"{path}: exists already", hint="use --force to replace it")
    if stat.S_ISDIR(there.st_mode) and not folder:
        raise UserError(
            "target-exists",
            f"{path}: is a folder and is not replaced by a file",
            hint="remove it, or choose another name",
        )
    if folder and not stat.S_ISDIR(there.st_mode):
        raise UserError(
            "target-exists",
            f"{path}: is a file and is not replaced by a folder",
            hint="remove it, or choose another name",
        )


def epoch(environ: Mapping[str, str]) -> int | None:
    """Return SOURCE_DATE_EPOCH (Unix seconds) when it is set.

    Raises:
        UserError: it is no number.
    """
    text = environ.get("SOURCE_DATE_EPOCH", "")
    if not text:
        return None
    if not text.isdigit() or int(text) > 0xFFFFFFFF:
        raise UserError("source-date-epoch", f"SOURCE_DATE_EPOCH={text}: is no time in seconds since 1970")
    return int(text)


class OutputFile:
    """A file that appears under its name when it is complete: `fd` to write to, then `publish`.

    Leaving the context without `publish` removes what was written; a full disk becomes one clear error.

    Arguments:
        path: the target.
        force: replace what stands there.
        mode: permission bits of the result.
    """

    def __init__(self, path: str, *, force: bool = False, mode: int = IMAGE_MODE) -> None:
        self.path, self.mode, self.fd = path, mode, -1
        self._force = force
        self._partial: str | None = None
        check_target(path, force=force)

    def __enter__(self) -> OutputFile:
        place = os.path.dirname(self.path) or "."
        sweep(self.path)
        try:
            self.fd = os.open(place, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError as error:
            # File systems without unnamed files: NFS, Lustre, FUSE; EISDIR and ENOENT are old kernels' words for it.
            if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL):
                raise cannot_write(self.path, error) from None
            self._partial = partial_name(self.path)
            try:
                self.fd = os.open(self._partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            except OSError as other:
                raise cannot_write(self.path, other) from None
        hold(self.fd)
        return self

    def publish(self) -> None:
        """Make the file durable and put it in place of the target.

        Raises:
            UserError: somebody else has made the target meanwhile, and it may not be replaced.
        """
        os.fchmod(self.fd, self.mode)
        os.fsync(self.fd)
        if self._partial is None:
            self._partial = partial_name(self.path)
            place = os.open(os.path.dirname(self.path) or ".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                # Given a dir_fd, Python calls linkat(2) with AT_SYMLINK_FOLLOW, which names an unnamed file.
                os.link(f"/proc/self/fd/{self.fd}", os.path.basename(self._partial), dst_dir_fd=place)
            finally:
                os.close(place)
        if self._force or not _linked(self._partial, self.path):
            os.rename(self._partial, self.path)
        self._partial = None
        sync_folder(os.path.dirname(self.path) or ".")

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._partial is not None:
            try:
                os.unlink(self._partial)
            except FileNotFoundError:  # swept by somebody, or never named
                pass
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        if isinstance(value, OSError) and value.errno in FULL:
            raise no_room(self.path) from None


class OutputFolder:
    """A folder that appears under its name when it is complete: `partial` is its path until `publish`.

    Arguments:
        path: the target.
        force: replace the folder that stands there.
    """

    def __init__(self, path: str, *, force: bool = False) -> None:
        self.path = path.rstrip("/") or "/"
        self._force = force
        self.partial = ""
        self._fd = -1
        check_target(self.path, force=force, folder=True)

    def __enter__(self) -> OutputFolder:
        sweep(self.path)
        self.partial = partial_name(self.path)
        try:
            os.mkdir(self.partial, 0o700)
        except OSError as error:
            raise cannot_write(self.path, error) from None
        self._fd = os.open(self.partial, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        hold(self._fd)
        return self

    def publish(self) -> None:
        """Put the folder in place of the target; what stood there is removed afterwards.

        Raises:
            UserError: somebody else has made the target meanwhile, and it may not be replaced.
        """
        old = None
        if not self._force and os.path.lexists(self.path):
            raise _made_meanwhile(self.path)
        if os.path.lexists(self.path):
            old = partial_name(self.path)
            os.rename(self.path, old)
        try:
            os.rename(self.partial, self.path)
        except BaseException:
            if old is not None:
                os.rename(old, self.path)
            raise
        self.partial = ""
        sync_folder(os.path.dirname(self.path) or ".")
        if old is not None:
            remove_tree(old)

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        if self.partial:
            remove_tree(self.partial)
        if isinstance(value, OSError) and value.errno in FULL:
            raise no_room(self.path) from None


def _linked(partial: str, path: str) -> bool:
    """Give a finished file its name, unless that is taken; return False where the file system has no hard links.

    Raises:
        UserError: the name is taken.
    """
    try:
        os.link(partial, path)
    except FileExistsError:
        raise _made_meanwhile(path) from None
    except OSError as error:
        if error.errno in FULL:
            raise
        if os.path.lexists(path):
            raise _made_meanwhile(path) from None
        return False
    os.unlink(partial)
    return True


def _made_meanwhile(path: str) -> UserError:
    return UserError(
        "target-exists",
        f"{path}: exists already: it was made while this was worked on",
        hint="use --force to replace it",
    )


def partial_name(path: str) -> str:
    """Return a name beside `path` for what is not complete yet."""
    place, name = os.path.split(path)
    return os.path.join(place, f".{name}.{os.urandom(4).hex()}.partial")


def sweep(path: str) -> None:
    """Remove partials of the same target that a killed process left behind."""
    for old in _partials(path):
        try:
            fd = os.open(old, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            continue  # somebody else's, or gone
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if stat.S_ISDIR(os.fstat(fd).st_mode):
                remove_tree(old)
            else:
                os.unlink(old)
        except OSError:
            continue  # in use, or not ours to remove
        finally:
            os.close(fd)


def _partials(path: str) -> Iterator[str]:
    place, name = os.path.split(path)
    try:
        names = os.listdir(place or ".")
    except OSError:
        return
    start, end = f".{name}.", ".partial"
    for other in names:
        middle = other[len(start) : -len(end)]
        if other.startswith(start) and other.endswith(end) and len(middle) == 8:
            yield os.path.join(place, other)


def hold(fd: int) -> None:
    """Lock a partial, so that nobody sweeps it; on file systems without locks it is merely not swept."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # then nobody else can lock it either
        pass


def sync_folder(path: str) -> None:
    """Make a rename in a folder durable, where the file system can."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EROFS, errno.EBADF):
            raise
    finally:
        os.close(fd)


def remove_tree(path: str) -> None:
    """Remove a folder with everything in it, also where modes forbid it to its owner.

    What belongs to somebody else stays.
    """
    for folder, names, _ in os.walk(path, topdown=True, onerror=None):
        for name in (".", *names):
            one = os.path.join(folder, name)
            if not os.path.islink(one):
                try:
                    os.chmod(one, 0o700)
                except OSError:  # not ours; the removal will say so by leaving it
                    pass
    import shutil  # heavy, and only needed here

    shutil.rmtree(path, ignore_errors=True)


def cannot_write(path: str, error: OSError) -> UserError | HostError:
    """Return the error for a target that cannot be written."""
    if error.errno in FULL:
        return no_room(path)
    return UserError("output-not-writable", f"{path}: cannot be written: {(error.strerror or str(error)).lower()}")


def no_room(path: str) -> HostError:
    """Return the error for a full disk."""
    place = os.path.abspath(os.path.dirname(path) or ".")
    return HostError("disk-full", f"{path}: no space left in {place}", hint="make room there, or choose another folder")
