# SPDX-License-Identifier: Apache-2.0
"""Small work with files: their hash, facts in lines, folders, removal, and handing out copies without copying."""

from __future__ import annotations

import errno
import fcntl
import os
import stat

from pysingularity import messages
from pysingularity.errors import ImageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

CHUNK = 1 << 20


def hash_file(path: str) -> str:
    """Return the hex SHA-256 of a file."""
    import hashlib  # 5 ms: only when something has changed

    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while data := file.read(CHUNK):
            digest.update(data)
    return digest.hexdigest()


def hash_stretch(fd: int, offset: int, size: int, name: str = "sha256") -> bytes:
    """Return the hash of a stretch of a file.

    Raises:
        ImageError: the file ends before.
    """
    import hashlib

    found = hashlib.new(name)
    buffer = memoryview(bytearray(CHUNK))
    end = offset + size
    while offset < end:
        count = os.preadv(fd, [buffer[: end - offset]], offset)
        if not count:
            raise ImageError("short-file", f"a file ended {end - offset} bytes too early while it was hashed")
        found.update(buffer[:count])
        offset += count
    return found.digest()


def read_lines(path: str) -> dict[str, str] | None:
    """Read a small file of `key=value` lines; None when it is not there or is none."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        data = os.read(fd, CHUNK)
    except OSError:
        return None
    finally:
        os.close(fd)
    found = {}
    for line in data.decode("utf-8", "surrogateescape").split("\n"):
        key, equals, value = line.partition("=")
        if equals:
            found[key] = value
    return found if found.pop("end", "") == "1" else None


def write_lines(path: str, facts: Mapping[str, str]) -> None:
    """Write a small file of `key=value` lines by rename; its last line tells that it is whole."""
    lines = [f"{key}={value}".replace("\n", " ") for key, value in facts.items() if key != "end"]
    data = "\n".join([*lines, "end=1", ""]).encode("utf-8", "surrogateescape")
    new = f"{path}.{os.getpid()}-{os.urandom(4).hex()}.new"
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        os.write(fd, data)
    except OSError:
        remove(new)
        raise
    finally:
        os.close(fd)
    os.rename(new, path)


def identity(status: os.stat_result) -> str:
    """Return what changes when a file is replaced or written to, but not when it is linked or renamed."""
    return f"{status.st_size}-{status.st_ino}-{status.st_mtime_ns}"


def make_folders(path: str) -> None:
    """Make a folder and its parents; the cache's own are the user's alone, parents as usual."""
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        if not os.path.isdir(path):
            raise
    except FileNotFoundError:
        make_folders(os.path.dirname(path))
        make_folders(path)


def files_below(top: str) -> Iterator[str]:
    """Yield the plain files below a folder, in order of names; what vanishes meanwhile is left out."""
    stack = [top]
    while stack:
        folder = stack.pop()
        try:
            names = sorted(os.listdir(folder))
        except OSError:
            continue
        for name in names:
            path = os.path.join(folder, name)
            try:
                mode = os.lstat(path).st_mode
            except OSError:
                continue
            if stat.S_ISDIR(mode):
                stack.append(path)
            elif stat.S_ISREG(mode):
                yield path


def size_on_disk(path: str) -> int:
    """Return the bytes that a file takes on its disk."""
    try:
        return os.lstat(path).st_blocks * 512
    except OSError:
        return 0


def remove(path: str) -> int:
    """Remove a file and return the bytes that it took; 0 when it was gone already."""
    size = size_on_disk(path)
    try:
        os.unlink(path)
    except FileNotFoundError:
        return 0
    except OSError as error:
        messages.debug(f"{path}: {error.strerror}")
        return 0
    return size


def hand_out(path: str, target: str) -> str:
    """Give the user a file of the cache: as a clone, else as a hard link, else as a copy; return which.

    `target` must not exist. A clone shares blocks and nothing else; a hard link shares the file, which is read-only.

    Raises:
        OSError: the target cannot be made.
    """
    source = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        new = os.open(target, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o755)
        try:
            try:
                fcntl.ioctl(new, 0x40049409, source)  # FICLONE: btrfs, XFS, bcachefs, NFS 4.2
                os.fchmod(new, 0o755 & ~_umask())
                return "clone"
            except OSError:
                pass
            os.unlink(target)
            try:
                os.link(path, target)
                return "link"
            except OSError:  # another file system, or another user's file
                pass
        finally:
            os.close(new)
        new = os.open(target, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o755)
        try:
            copy_bytes(source, new)
        except BaseException:
            os.unlink(target)
            raise
        finally:
            os.close(new)
        return "copy"
    finally:
        os.close(source)


def copy_bytes(source: int, target: int) -> None:
    """Copy a file to an empty one, inside the kernel where it can be done."""
    try:
        while os.copy_file_range(source, target, 1 << 30):
            pass
        return
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM):
            raise
    while os.sendfile(target, source, None, 1 << 30):  # None: from the current position
        pass


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
