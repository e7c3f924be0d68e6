# SPDX-License-Identifier: Apache-2.0
"""A root file system seen from outside: every path is resolved inside it, whatever symbolic links packages brought.

Parents are opened with openat2(RESOLVE_IN_ROOT); what is done then concerns one name in one folder and follows nothing.
"""

from __future__ import annotations

import errno
import os
import stat

from pysingularity.linux.mounts import open_in_root

_FLAGS = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
#: Folders kept open; members of archives come folder by folder.
_KEPT = 256

#: Folders of the root that are links into /usr since the merge of both.
MERGED = frozenset((b"bin", b"lib", b"lib32", b"lib64", b"libo32", b"libx32", b"sbin"))


class Tree:
    """An open root file system.

    Arguments:
        root: its path.
        merged: make /bin, /lib … as links into /usr when they are first used (the merge of Debian 12 and Ubuntu 20.04).

    Raises (from all methods):
        OSError: as the kernel says; ELOOP and EXDEV for paths that try to leave.
    """

    def __init__(self, root: str, *, merged: bool = False) -> None:
        self.root = root
        self.merged = merged
        self.fd = os.open(root, _FLAGS)
        self._open: dict[bytes, tuple[int, bool]] = {}

    def close(self) -> None:
        """Close everything."""
        self.forget()
        os.close(self.fd)

    def __enter__(self) -> Tree:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def forget(self) -> None:
        """Close the folders kept open: the container may have changed what their names mean."""
        for descriptor, _ in self._open.values():
            os.close(descriptor)
        self._open.clear()

    def folder(self, path: bytes, *, make: bool = True) -> tuple[int, bool]:
        """Return a descriptor of a folder, and whether new files in it inherit its group.

        The descriptor belongs to this tree. With `make`, missing folders are made with mode 755.
        """
        found = self._open.get(path)
        if found is not None:
            return found
        try:
            descriptor = self._resolve(path)
        except FileNotFoundError:
            if not make or not path:
                raise
            above, _, name = path.rpartition(b"/")
            if not above and self.merged and name in MERGED:
                self.merge(name)
            else:
                parent, _ = self.folder(above)
                try:
                    os.mkdir(name, 0o755, dir_fd=parent)
                except FileExistsError:  # by another worker; or a dangling link, which the next line tells
                    pass
            descriptor = self._resolve(path)
        if len(self._open) >= _KEPT:
            self.forget()
        inherits = bool(os.fstat(descriptor).st_mode & stat.S_ISGID)
        self._open[path] = descriptor, inherits
        return descriptor, inherits

    def place(self, path: bytes, *, make: bool = True) -> tuple[int, bytes, bool]:
        """Return folder, name and group inheritance for a path other than the root."""
        above, _, name = path.rpartition(b"/")
        descriptor, inherits = self.folder(above, make=make)
        return descriptor, name, inherits

    def merge(self, name: bytes) -> None:
        """Make a folder of /usr and the link that stands for it in the root."""
        parent, _ = self.folder(b"usr")
        try:
            os.mkdir(name, 0o755, dir_fd=parent)
        except FileExistsError:
            pass
        try:
            os.symlink(b"usr/" + name, name, dir_fd=self.fd)
        except FileExistsError:
            pass

    def is_folder(self, path: bytes) -> bool:
        """Return whether a path leads to a folder inside the root, over links too."""
        try:
            os.close(self._resolve(path))
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                return False
            raise
        return True

    def exists(self, path: bytes) -> bool:
        """Return whether there is something by this name, be it a dangling link."""
        try:
            parent, name, _ = self.place(path, make=False)
            os.lstat(name, dir_fd=parent)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def read(self, path: bytes) -> bytes:
        """Return the content of a file, b"" when there is none."""
        try:
            parent, name, _ = self.place(path, make=False)
            descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=parent)
        except FileNotFoundError:
            return b""
        with open(descriptor, "rb") as file:
            return file.read()

    def write(self, path: bytes, data: bytes, mode: int = 0o644) -> None:
        """Put a new file in the place of whatever has this name."""
        parent, name, _ = self.place(path)
        self.remove(path)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(name, flags, 0o600, dir_fd=parent)
        with open(descriptor, "wb") as file:
            file.write(data)
            os.fchmod(descriptor, mode)

    def remove(self, path: bytes) -> None:
        """Remove a file or link; nothing happens when there is none."""
        try:
            parent, name, _ = self.place(path, make=False)
            os.unlink(name, dir_fd=parent)
        except FileNotFoundError:
            pass

    def rename(self, old: bytes, new: bytes) -> None:
        """Give a file another name."""
        source, old_name, _ = self.place(old, make=False)
        target, new_name, _ = self.place(new)
        os.rename(old_name, new_name, src_dir_fd=source, dst_dir_fd=target)

    def _resolve(self, path: bytes) -> int:
        return open_in_root(self.fd, path or b".", _FLAGS)
