# SPDX-License-Identifier: Apache-2.0
"""Images as unpacked folders in the cache, for machines where nothing can mount them (no /dev/fuse) or nobody wants to.

A folder is made once per image file (by device, inode, size, time and place of the file system), appears by rename, and
is used by any number of containers. Folders that have not been used for a day go when there are too many. Loaded only
where it is needed. Encrypted images never are: their files are unpacked into memory, for one container.
"""

from __future__ import annotations

import os
import shutil
import time
from hashlib import sha256

from pysingularity import messages
from pysingularity.errors import HostError
from pysingularity.folders import cache_folder
from pysingularity.linux import mounts
from pysingularity.locks import Lock
from pysingularity.squashfs.reader import SquashfsImage
from pysingularity.squashfs.unpack import unpack

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from pysingularity.trust.encryption import Plain

#: Folders that are kept, and how long one may be in use after its last start before it may go, in seconds.
KEPT, SAFE = 4, 86400


def unpacked(path: str, offset: int, size: int, environ: Mapping[str, str]) -> str:
    """Return the folder with the unpacked files of a squashfs, making it first when it is not there.

    Arguments:
        path: the image file; `offset` and `size` say where in it (size 0: up to the end).

    Raises:
        HostError: there is no room, or the cache cannot be written.
        ImageError: the image is damaged.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        state = os.fstat(descriptor)
        identity = f"{state.st_dev}:{state.st_ino}:{state.st_size}:{state.st_mtime_ns}:{offset}"
        key = sha256(identity.encode()).hexdigest()[:32]
        top = os.path.join(cache_folder(environ), "unpacked")
        target = os.path.join(top, key)
        if not os.path.isdir(os.path.join(target, "root")):
            _make(descriptor, offset, size, path, top, target)
        _touch(target)
        return os.path.join(target, "root")
    except OSError as error:
        where = error.filename or top
        raise HostError(
            "cannot-unpack",
            f"{path}: cannot be unpacked: {where}: {error.strerror}",
            hint="set SINGULARITY_CACHEDIR to a folder with room on a local disk",
        ) from None
    finally:
        os.close(descriptor)


def in_memory(plain: Plain, path: str) -> Callable[[str], None]:
    """Return what unpacks a decrypted squashfs into memory: nothing of it must ever reach a disk.

    The result takes an empty folder of the container's own mount namespace; everything in it belongs to the caller, is
    read-only, and ends with the last process of the container.

    Raises:
        ImageError: the image is damaged.
    """
    image = SquashfsImage(plain.fd, source=plain, name=path)

    def fill(target: str) -> None:
        flags = mounts.MS_NOSUID | mounts.MS_NODEV
        mounts.mount("tmpfs", target, "tmpfs", flags, "mode=0755")
        try:
            unpack(image, target, owner=_Nobodys())
        except OSError as error:
            raise HostError(
                "no-memory",
                f"{path}: its files cannot be unpacked into memory: {error.strerror}",
                hint="mounting needs no memory: let the administrator open /dev/fuse",
            ) from None
        mounts.mount(None, target, None, mounts.MS_REMOUNT | mounts.MS_BIND | mounts.MS_RDONLY | flags)

    return fill


class _Nobodys:
    """Owners that are not kept."""

    def set(self, path: bytes, uid: int, gid: int, *, dir_fd: int | None = None) -> None:
        """Leave the owner as it is."""

    def mknod(self, path: bytes, mode: int, rdev: int, *, dir_fd: int | None = None) -> None:
        """Make no device."""


def _make(descriptor: int, offset: int, size: int, path: str, top: str, target: str) -> None:
    os.makedirs(top, 0o700, exist_ok=True)

    def waiting() -> None:
        messages.info(f"waiting: {path} is being unpacked by another process")

    with Lock(target + ".lock", waiting):
        if os.path.isdir(os.path.join(target, "root")):
            return
        _clean(top)
        draft = f"{target}.partial"
        _remove(draft)
        os.makedirs(draft, 0o700)
        try:
            unpack(SquashfsImage(descriptor, offset, size or None, name=path), os.path.join(draft, "root"))
            os.rename(draft, target)
        except BaseException:
            _remove(draft)
            raise


def _clean(top: str) -> None:
    """Remove folders beyond the newest few that nobody has started from for a day."""
    with os.scandir(top) as entries:
        found = [
            (entry.stat(follow_symlinks=False).st_mtime, entry.path)
            for entry in entries
            if entry.is_dir(follow_symlinks=False) and not entry.name.endswith(".partial")
        ]
    for used, path in sorted(found, reverse=True)[KEPT - 1 :]:
        if time.time() - used > SAFE:
            _remove(path)


def _touch(path: str) -> None:
    try:
        os.utime(path)
    except OSError as error:
        messages.debug(f"{path}: {error.strerror}")


def _remove(path: str) -> None:
    """Remove a folder, also one with folders that their modes close."""
    if not os.path.lexists(path):
        return
    for folder, _, _ in os.walk(path):
        try:
            os.chmod(folder, 0o700)
        except OSError as error:
            messages.debug(f"{folder}: {error.strerror}")
    shutil.rmtree(path, ignore_errors=True)
