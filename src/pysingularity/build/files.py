# SPDX-License-Identifier: Apache-2.0
"""%files: copying into a root file system that may be hostile, from the host or from another stage.

What `cp -fLr` does, with three differences that matter: every path inside the image is resolved with the image as its
root (openat2(2) with RESOLVE_IN_ROOT), so that no link of a base image leads to the host; a link to a folder in the
target tree is followed inside the image instead of being an error; and a folder that contains itself through links is
an error instead of an endless copy. From the host links are followed; from a stage only the named source is resolved,
the links below it are kept.
"""

from __future__ import annotations

import errno
import glob
import os
import stat
from collections.abc import Callable, Iterator
from typing import Self

from pysingularity.errors import RecipeError, UserError
from pysingularity.linux.mounts import open_in_root
from pysingularity.recipe.sections import FilePair

#: Deeper folders are refused: each level holds two descriptors.
DEEPEST = 200
#: Permissions a copied file loses, whatever the caller's umask: the image does not depend on who builds it.
UMASK = 0o022
_CHUNK = 8 << 20


class Copier:
    """Copies the lines of one %files section.

    Arguments:
        root: the image's root file system, or a folder of files to be laid over one.
        directory: folder that relative sources start from.
        is_folder: says whether a path of the image is a folder, when `root` does not hold the whole image.
        progress: called with the path of each source and the bytes copied so far.
        file: name of the definition file, for messages.
    """

    def __init__(
        self,
        root: str,
        *,
        directory: str,
        is_folder: Callable[[str], bool] | None = None,
        progress: Callable[[str, int], None] | None = None,
        file: str = "",
    ) -> None:
        self._path, self._directory, self._file = root, directory, file
        self._root = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self._outside = is_folder
        self._progress = progress
        self.bytes = 0

    def close(self) -> None:
        """Let go of the root."""
        if self._root >= 0:
            os.close(self._root)
            self._root = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def copy(self, pair: FilePair, *, stage: str = "", base: str = "") -> None:
        """Copy one line.

        Arguments:
            pair: source and target.
            stage: root of the stage the source is in; "" for the host.
            base: folder of the image that relative and missing targets start from ("" is the root).

        Raises:
            RecipeError: with the line: the source is missing or unreadable, or the target cannot be made.
        """
        try:
            if stage:
                self._from_stage(pair, stage, base)
            else:
                self._from_host(pair, base)
        except (OSError, UserError) as error:
            if isinstance(error, RecipeError):
                raise
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            text = error.message if isinstance(error, UserError) else _reason(error)
            raise self._wrong(pair, text)

    def _wrong(self, pair: FilePair, text: str, hint: str = "") -> RecipeError:
        line = f"{pair.source} {pair.target}".strip()
        return RecipeError("files", text, file=self._file, line=pair.line, text=line, hint=hint)

    def _from_host(self, pair: FilePair, base: str) -> None:
        pattern = os.path.join(self._directory, pair.source)
        names = sorted(glob.glob(pattern)) if glob.has_magic(pair.source) else []
        if not names and os.path.lexists(pattern):
            names = [pattern]
        if not names:
            raise self._wrong(
                pair,
                f"there is no file {pair.source}",
                "relative names start from the folder the build is started in: " + self._directory,
            )
        for name in names:
            # Without a target the file keeps its path: /a/b stays /a/b, and ../x becomes /x as inside a root.
            own = name if os.path.isabs(pair.source) else os.path.relpath(name, self._directory)
            target = self._target(pair.target or own, base, name, len(names))
            self._entry(name, None, target, follow=True, seen=())

    def _from_stage(self, pair: FilePair, stage: str, base: str) -> None:
        root = os.open(stage, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            names = sorted(_glob_in_root(root, pair.source))
            if not names:
                raise self._wrong(pair, f'there is no file {pair.source} in the stage "{pair.stage}"')
            for name in names:
                found = open_in_root(root, name)
                try:
                    target = self._target(pair.target or name, base, name, len(names))
                    # The magic link names what the source was resolved to, without another walk through the image.
                    self._entry(f"/proc/self/fd/{found}", None, target, follow=False, seen=(), first=True)
                finally:
                    os.close(found)
        finally:
            os.close(root)

    def _target(self, target: str, base: str, source: str, count: int) -> str:
        """Return the path in the image that a source becomes, and make the folders above it."""
        path = os.path.join("/", base, target)
        folder = target.endswith("/") or count > 1
        path = os.path.normpath(path)
        if folder:
            self._make_folders(path)
        if folder or path == "/" or self._is_folder(path):
            return os.path.join(path, _name(source)).rstrip("/") or "/"
        self._make_folders(os.path.dirname(path))
        return path

    def _is_folder(self, path: str) -> bool:
        if self._outside is not None and self._outside(path):
            return True
        try:
            fd = open_in_root(self._root, path, os.O_PATH | os.O_DIRECTORY)
        except OSError:
            return False
        os.close(fd)
        return True

    def _make_folders(self, path: str) -> None:
        """Make a folder of the image and those above it."""
        done = ""
        for part in [part for part in path.split("/") if part]:
            parent, done = done, f"{done}/{part}"
            try:
                os.close(open_in_root(self._root, done, os.O_PATH | os.O_DIRECTORY))
            except FileNotFoundError:
                above = open_in_root(self._root, parent or "/", os.O_RDONLY | os.O_DIRECTORY)
                try:
                    os.mkdir(part, 0o755, dir_fd=above)
                    os.chmod(part, 0o755, dir_fd=above)
                except FileExistsError:
                    raise UserError("files", f"{done} in the image is a link that leads nowhere")
                finally:
                    os.close(above)
            except NotADirectoryError:
                raise UserError("files", f"{done} in the image is a file, not a folder")

    def _entry(
        self,
        name: str,
        folder: int | None,
        target: str,
        *,
        follow: bool,
        seen: tuple[tuple[int, int], ...],
        first: bool = False,
    ) -> None:
        """Copy one source (a name, in a folder when that is given) to a path of the image."""
        status = os.stat(name, dir_fd=folder, follow_symlinks=follow or first)
        if stat.S_ISDIR(status.st_mode):
            self._folder(name, folder, target, status, follow=follow, seen=seen, first=first)
        elif stat.S_ISREG(status.st_mode):
            self._regular(name, folder, target, status, nofollow=not (follow or first))
        elif stat.S_ISLNK(status.st_mode):
            with self._place(target) as (above, last):
                _remove(above, last)
                os.symlink(os.readlink(name, dir_fd=folder), last, dir_fd=above)
        elif stat.S_ISFIFO(status.st_mode):
            with self._place(target) as (above, last):
                _remove(above, last)
                os.mkfifo(last, stat.S_IMODE(status.st_mode) & ~UMASK, dir_fd=above)
        else:
            kind = "a socket" if stat.S_ISSOCK(status.st_mode) else "a device"
            raise UserError("files", f"{target}: {kind} cannot be copied into an image")

    def _folder(
        self,
        name: str,
        folder: int | None,
        target: str,
        status: os.stat_result,
        *,
        follow: bool,
        seen: tuple[tuple[int, int], ...],
        first: bool,
    ) -> None:
        mark = (status.st_dev, status.st_ino)
        if mark in seen:
            raise UserError("files", f"{target}: the folder contains itself through a link")
        if len(seen) >= DEEPEST:
            raise UserError("files", f"{target}: more than {DEEPEST} folders inside each other")
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | (0 if follow or first else os.O_NOFOLLOW)
        inner = os.open(name, flags, dir_fd=folder)
        try:
            made = not self._is_folder(target)
            if made:
                with self._place(target) as (above, last):
                    there = _kind(above, last)
                    if there is not None and not stat.S_ISLNK(there):
                        raise UserError("files", f"{target} in the image is a file, not a folder")
                    _remove(above, last)
                    os.mkdir(last, 0o700, dir_fd=above)
            for entry in sorted(os.listdir(inner)):
                self._entry(entry, inner, f"{target}/{entry}", follow=follow, seen=(*seen, mark))
            if made:
                # At the end: a folder without the write bit must still be filled.
                with self._place(target) as (above, last):
                    os.chmod(last, stat.S_IMODE(status.st_mode) & 0o1777 & ~UMASK | 0o100, dir_fd=above)
        finally:
            os.close(inner)

    def _regular(self, name: str, folder: int | None, target: str, status: os.stat_result, *, nofollow: bool) -> None:
        # O_NONBLOCK: what was a file a moment ago may be a pipe now.
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (os.O_NOFOLLOW if nofollow else 0)
        source = os.open(name, flags, dir_fd=folder)
        try:
            if not stat.S_ISREG(os.fstat(source).st_mode):
                raise UserError("files", f"{name}: changed while it was copied")
            mode = stat.S_IMODE(status.st_mode) & 0o777 & ~UMASK
            output = self._create(target, mode)
            try:
                self._content(source, output, target)
                os.fchmod(output, mode)
            finally:
                os.close(output)
        finally:
            os.close(source)

    def _create(self, target: str, mode: int) -> int:
        """Open a file of the image for writing; one that cannot be opened is replaced."""
        with self._place(target) as (above, last):
            there = _kind(above, last)
            if there is not None and stat.S_ISDIR(there):
                raise UserError("files", f"{target} in the image is a folder, not a file")
            if there is not None and stat.S_ISLNK(there):
                try:  # as cp does: the file behind the link gets the content, the link stays
                    return open_in_root(self._root, target, os.O_WRONLY | os.O_TRUNC | os.O_NONBLOCK)
                except OSError:
                    pass
            # A new inode: other names of the old file (hard links) and whoever has it open keep the old content.
            _remove(above, last)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            return os.open(last, flags, mode, dir_fd=above)

    def _content(self, source: int, output: int, target: str) -> None:
        fast = True
        while True:
            if fast:
                try:
                    count = os.copy_file_range(source, output, _CHUNK)
                except OSError as error:
                    if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM):
                        raise
                    fast = False
                    continue
            else:
                data = os.read(source, 1 << 20)
                count = len(data)
                view = memoryview(data)
                while view:
                    view = view[os.write(output, view) :]
            if not count:
                return
            self.bytes += count
            if self._progress is not None:
                self._progress(target, self.bytes)

    def _place(self, target: str) -> _Place:
        return _Place(self._root, target)


class _Place:
    """The folder above a path of the image as a descriptor, and the path's last name."""

    def __init__(self, root: int, target: str) -> None:
        above, self._last = os.path.split(target)
        self._fd = open_in_root(root, above or "/", os.O_RDONLY | os.O_DIRECTORY)

    def __enter__(self) -> tuple[int, str]:
        return self._fd, self._last

    def __exit__(self, *error: object) -> None:
        os.close(self._fd)


def _name(source: str) -> str:
    """Return the name a source has inside a target folder; "" for a source that is a root itself."""
    name = os.path.basename(source.rstrip("/"))
    return "" if name in (".", "..") else name


def _kind(folder: int, name: str) -> int | None:
    try:
        return os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode
    except FileNotFoundError:
        return None


def _remove(folder: int, name: str) -> None:
    try:
        os.unlink(name, dir_fd=folder)
    except FileNotFoundError:
        pass


def _reason(error: OSError) -> str:
    where = f"{error.filename}: " if isinstance(error.filename, str) else ""
    return f"{where}{(error.strerror or str(error)).lower()}"


def _glob_in_root(root: int, pattern: str) -> Iterator[str]:
    """Yield the paths of a root file system that match a pattern, component by component inside that root."""
    import fnmatch  # only for stages

    parts = [part for part in pattern.split("/") if part and part != "."]
    found = [""]
    for part in parts:
        following: list[str] = []
        for path in found:
            if not glob.has_magic(part):
                following.append(f"{path}/{part}")
                continue
            try:
                fd = open_in_root(root, path or "/", os.O_RDONLY | os.O_DIRECTORY)
            except OSError:
                continue
            try:
                names = os.listdir(fd)
            finally:
                os.close(fd)
            hidden = part.startswith(".")
            names = [name for name in names if hidden or not name.startswith(".")]
            following += [f"{path}/{name}" for name in fnmatch.filter(names, part)]
        found = following
    for path in found:
        try:
            os.close(open_in_root(root, path or "/"))
        except OSError:
            continue
        yield path or "/"
