# SPDX-License-Identifier: Apache-2.0
"""Read files of an image without running anything in it: one `Source` over folders, squashfs and SIF files.

Symbolic links are resolved inside the image only, and every file has a bound on its size. Writing into an image is
`image.entries`.
"""

from __future__ import annotations

import errno
import os
import stat

from pysingularity.errors import HostError, ImageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType
    from typing import Protocol

    from pysingularity.image.entries import Entry
    from pysingularity.image.open import Image
    from pysingularity.squashfs.reader import SquashfsImage

    class Source(Protocol):
        """Files of an image, by paths without a leading slash."""

        def read(self, path: str, limit: int = ...) -> bytes | None:
            """Return the bytes of a regular file, None when there is none."""

        def names(self, path: str) -> list[str]:
            """Return the sorted names in a folder, nothing when there is none."""

        def is_folder(self, path: str) -> bool:
            """Return whether a folder stands there."""

        def close(self) -> None:
            """Let go of everything."""

        def __enter__(self) -> Source: ...

        def __exit__(
            self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
        ) -> None: ...


#: Scripts, labels and help texts are small; more than this is refused.
LIMIT = 16 << 20
MOST_LINKS = 40


class FolderSource:
    """Files of a sandbox, walked with one descriptor per folder so that no link leads outside."""

    def __init__(self, root: str | int) -> None:
        self._root = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC) if isinstance(root, str) else os.dup(root)

    def read(self, path: str, limit: int = LIMIT) -> bytes | None:
        """Return the bytes of a regular file, None when there is none.

        Raises:
            ImageError: it has more than `limit` bytes, or may not be read.
        """
        handle = open_inside(self._root, path)
        if handle is None:
            return None
        try:
            status = os.fstat(handle)
            if not stat.S_ISREG(status.st_mode):
                return None
            if status.st_size > limit:
                raise ImageError("file-too-large", f"/{path} in the image has {status.st_size} bytes (limit {limit})")
            fd = os.open(f"/proc/self/fd/{handle}", os.O_RDONLY | os.O_CLOEXEC)
        except PermissionError:
            raise ImageError("unreadable-file", f"/{path} in the image may not be read") from None
        finally:
            os.close(handle)
        with open(fd, "rb") as file:
            return file.read(limit)

    def names(self, path: str) -> list[str]:
        """Return the sorted names in a folder, nothing when there is none."""
        handle = open_inside(self._root, path)
        if handle is None:
            return []
        try:
            return sorted(os.listdir(f"/proc/self/fd/{handle}"))
        except (NotADirectoryError, PermissionError):
            return []
        finally:
            os.close(handle)

    def is_folder(self, path: str) -> bool:
        """Return whether a folder stands there."""
        handle = open_inside(self._root, path)
        if handle is None:
            return False
        try:
            return stat.S_ISDIR(os.fstat(handle).st_mode)
        finally:
            os.close(handle)

    def close(self) -> None:
        """Let go of the folder."""
        if self._root >= 0:
            os.close(self._root)
        self._root = -1

    def __enter__(self) -> FolderSource:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_inside(root: int, path: str) -> int | None:
    """Return an O_PATH descriptor of what stands at `path` below the folder `root`, links followed inside it only.

    Works without openat2(2), which came with Linux 5.6. Returns None when there is nothing.
    """
    names = [name for name in path.split("/") if name not in ("", ".")]
    names.reverse()
    flags = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
    trail = [os.dup(root)]
    links = 0
    try:
        while names:
            name = names.pop()
            if name == "..":
                if len(trail) > 1:
                    os.close(trail.pop())
                continue
            try:
                found = os.open(name, flags, dir_fd=trail[-1])
            except OSError as error:
                if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.ENAMETOOLONG, errno.ELOOP):
                    return None
                raise
            status = os.fstat(found)
            if not stat.S_ISLNK(status.st_mode):
                trail.append(found)
                continue
            links += 1
            target = os.readlink("", dir_fd=found)
            os.close(found)
            if links > MOST_LINKS:
                return None
            if target.startswith("/"):
                while len(trail) > 1:
                    os.close(trail.pop())
            names += [part for part in reversed(target.split("/")) if part not in ("", ".")]
        return trail.pop()
    finally:
        for fd in trail:
            os.close(fd)


class SquashfsSource:
    """Files of a squashfs, read from its bytes."""

    def __init__(self, squashfs: SquashfsImage) -> None:
        self._squashfs = squashfs

    def read(self, path: str, limit: int = LIMIT) -> bytes | None:
        """Return the bytes of a regular file, None when there is none.

        Raises:
            ImageError: it has more than `limit` bytes, or the image is damaged.
        """
        inode = self._squashfs.lookup(path)
        if inode is None or inode.kind != "file":
            return None
        if inode.size > limit:
            raise ImageError("file-too-large", f"/{path} in the image has {inode.size} bytes (limit {limit})")
        return self._squashfs.read(inode)

    def names(self, path: str) -> list[str]:
        """Return the sorted names in a folder, nothing when there is none."""
        inode = self._squashfs.lookup(path)
        if inode is None or inode.kind != "dir":
            return []
        return sorted(os.fsdecode(name) for name, _, _ in self._squashfs.entries(inode))

    def is_folder(self, path: str) -> bool:
        """Return whether a folder stands there."""
        inode = self._squashfs.lookup(path)
        return inode is not None and inode.kind == "dir"

    def close(self) -> None:
        """Nothing to let go of: the file is the caller's."""

    def __enter__(self) -> SquashfsSource:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class OverlaidSource:
    """Files of several sources, the first one that has a file wins, with entries to be written on top of all.

    The sources stay the caller's.
    """

    def __init__(self, layers: Sequence[Source], entries: Sequence[Entry] = ()) -> None:
        self._layers = layers
        self._files: dict[str, bytes] = {}
        for entry in entries:
            if entry.kind == "file" and not (entry.keep and self._below(entry.path) is not None):
                self._files[entry.path] = entry.data

    def _below(self, path: str, limit: int = LIMIT) -> bytes | None:
        for layer in self._layers:
            data = layer.read(path, limit)
            if data is not None:
                return data
        return None

    def read(self, path: str, limit: int = LIMIT) -> bytes | None:
        """Return the bytes of a regular file, None when there is none."""
        data = self._files.get(path)
        return data if data is not None else self._below(path, limit)

    def names(self, path: str) -> list[str]:
        """Return the sorted names in a folder, nothing when there is none."""
        start = path.rstrip("/") + "/" if path else ""
        found = {name for layer in self._layers for name in layer.names(path)}
        found.update(file[len(start) :].partition("/")[0] for file in self._files if file.startswith(start))
        return sorted(found)

    def is_folder(self, path: str) -> bool:
        """Return whether a folder stands there."""
        start = path.rstrip("/") + "/"
        return any(layer.is_folder(path) for layer in self._layers) or any(f.startswith(start) for f in self._files)

    def close(self) -> None:
        """Nothing to let go of."""

    def __enter__(self) -> OverlaidSource:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def source_of(image: Image) -> Source:
    """Return the files of an open image.

    Raises:
        HostError: the file system is one that cannot be read without a tool (ext3, encrypted).
        ImageError: the image is damaged.
    """
    if image.kind == "sandbox":
        return FolderSource(image.fd)
    if image.filesystem == "squashfs":
        return SquashfsSource(squashfs_of(image))
    if image.filesystem == "ext3":
        from pysingularity.image.ext3 import Ext3Source  # only old images need the tool's wrapper

        return Ext3Source(image)
    if image.locked:
        image.unlock(None)  # says what is needed
    raise HostError(
        "unreadable-filesystem", f"{image.path}: its root file system is {image.filesystem} and cannot be read here"
    )


def squashfs_of(image: Image) -> SquashfsImage:
    """Return a reader of an image's squashfs partition.

    Raises:
        ImageError: the root file system is not squashfs, or it is damaged.
    """
    if image.reader is not None:
        return image.reader
    from pysingularity.squashfs.reader import SquashfsImage  # the reader with its codecs: only when files are read

    if image.locked:
        image.unlock(None)  # says what is needed
    if image.filesystem != "squashfs":
        raise ImageError("not-squashfs", f"{image.path}: its root file system is {image.filesystem}, not squashfs")
    return SquashfsImage(image.fd, image.offset, image.size, source=image.plain, name=image.path)
