# SPDX-License-Identifier: Apache-2.0
"""COPY and ADD: into a root file system that may be hostile, from the context or from another stage.

The content of a folder is copied, not the folder; what is new belongs to root (or to --chown), what comes from a stage
keeps its owners, attributes and hard links. Targets are resolved with the image as the root.
"""

from __future__ import annotations

import bz2
import errno
import lzma
import os
import re
import stat
import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING

from pysingularity.build.clone import CAPABILITY, SKIPPED
from pysingularity.build.dockerfile.context import Files, Found
from pysingularity.build.files import Copier
from pysingularity.errors import UserError
from pysingularity.linux.mounts import open_in_root
from pysingularity.recipe.dockerignore import Ignore

if TYPE_CHECKING:
    from pysingularity.build.bootstrap import Owners

_SYMBOLIC = re.compile(r"([ugoa]*)([-+=])([rwxXst]*)")
_BITS = {"r": 0o444, "w": 0o222, "x": 0o111}
_WHO = {"u": 0o4700, "g": 0o2070, "o": 0o1007, "a": 0o7777}


class Mode:
    """A change of permissions: octal, or symbolic as chmod(1) takes it.

    Arguments:
        text: "755", "u=rwX,go=rX", "+x" or "" for no change.

    Raises:
        UserError: it is neither.
    """

    def __init__(self, text: str) -> None:
        self.number = int(text, 8) if text and not text.strip("01234567") else None
        if self.number is not None and self.number > 0o7777:
            raise UserError("bad-mode", f"--chmod={text}: has too many digits")
        self._changes = []
        if text and self.number is None:
            for part in text.split(","):
                match = _SYMBOLIC.fullmatch(part)
                if match is None:
                    raise UserError(
                        "bad-mode", f"--chmod={text}: no mode", hint="write --chmod=755 or --chmod=u=rwX,go=rX"
                    )
                self._changes.append(match.groups())

    def __call__(self, mode: int, *, folder: bool) -> int:
        """Return the changed permissions."""
        if self.number is not None:
            return self.number
        mode = stat.S_IMODE(mode)
        for who, sign, letters in self._changes:
            mask = 0
            for one in who or "a":
                mask |= _WHO[one]
            bits = 0
            for letter in letters:
                if letter == "X":
                    bits |= 0o111 if folder or mode & 0o111 else 0
                else:
                    bits |= _BITS.get(letter, 0)
            bits &= mask
            bits |= mask & 0o6000 if "s" in letters else 0
            bits |= 0o1000 if "t" in letters else 0
            if sign == "=":
                mode = mode & ~(mask & 0o6777 if folder else mask) | bits
            else:
                mode = mode | bits if sign == "+" else mode & ~bits
        return mode


class TreeCopier(Copier):
    """Copies into one root.

    Arguments:
        root: the root file system.
        owners: keeps owners.
        owner: of everything that is made; None: root for what is new, a stage's own for what it brings.
        mode: changes permissions.
        progress: see `files.Copier`.
    """

    def __init__(
        self,
        root: str,
        owners: Owners,
        *,
        owner: tuple[int, int] | None = None,
        mode: Mode | None = None,
        progress: Callable[[str, int], None] | None = None,
    ) -> None:
        super().__init__(root, directory="/", progress=progress)
        self._owners, self._owner, self._mode = owners, owner, mode or Mode("")
        self._links: dict[tuple[int, int], str] = {}
        self._made: list[tuple[str, int, os.stat_result]] = []

    def target_of(self, path: str, sources: int) -> tuple[str, bool]:
        """Return a target as a clean path, and whether it is a folder to put things into."""
        folder = path.endswith(("/", "/.")) or sources > 1
        clean = os.path.normpath("/" + path)
        return clean, folder or clean == "/" or self._is_folder(clean)

    def take(self, files: Files, found: Found, target: str, *, into: bool, exclude: Ignore, parents: str = "") -> None:
        """Copy one source.

        Arguments:
            target: clean path in the image.
            into: the target is a folder for the source.
            parents: the part of the source's name that is repeated below the target.

        Raises:
            OSError, UserError: it cannot be read, or something in the image is in the way.
        """
        self._links.clear()
        if parents:
            target = f"{target.rstrip('/')}/{parents}"
        if found.is_folder:
            self.folder(target)
            for name, entry in files.below(found, exclude):
                self._one(entry.path, f"{target.rstrip('/')}/{name}", entry.stat(follow_symlinks=False), files.stage)
            self._settle()
            return
        name = os.path.basename(found.name)
        if exclude.excludes(name):
            return
        if into:
            self.folder(target)
            target = f"{target.rstrip('/')}/{name}"
        else:
            self.folder(os.path.dirname(target))
        self._one(found.path, target, found.status, files.stage)

    def folder(self, path: str) -> None:
        """Make a folder of the image and those above it."""
        done = ""
        for part in [part for part in path.split("/") if part]:
            above, done = done or "/", f"{done}/{part}"
            if self._is_folder(done):
                continue
            fd = open_in_root(self._root, above, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.mkdir(part, 0o755, dir_fd=fd)
                self._finish(fd, part, self._owner or (0, 0), 0o755)
            except FileExistsError:
                raise UserError("copy", f"{done} in the image is a file, not a folder") from None
            finally:
                os.close(fd)

    def write(self, data: bytes, target: str, mode: int = 0o644) -> None:
        """Make a file with a content."""
        self.folder(os.path.dirname(target))
        with self._place(target) as (above, last):
            self._clear(above, last, target)
            fd = os.open(last, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=above)
            with open(fd, "wb") as stream:
                stream.write(data)
            self._finish(above, last, self._owner or (0, 0), self._mode(mode, folder=False))

    def place_file(self, path: str, target: str, mode: int) -> None:
        """Copy a file of this machine that is not from a folder (a download)."""
        self.folder(os.path.dirname(target))
        with self._place(target) as (above, last):
            self._clear(above, last, target)
            self._bytes(path, above, last, target)
            self._finish(above, last, self._owner or (0, 0), self._mode(mode, folder=False))

    def _one(self, path: str, target: str, status: os.stat_result, stage: bool) -> None:
        uid, gid, mode, rdev = self._owners.get(path, status) if stage else (0, 0, status.st_mode, 0)
        owner = self._owner or (uid, gid)
        kind = stat.S_IFMT(mode)
        if kind == stat.S_IFDIR:
            if not self._is_folder(target):
                with self._place(target) as (above, last):
                    try:
                        os.mkdir(last, 0o700, dir_fd=above)
                    except FileExistsError:
                        raise UserError("copy", f"{target} in the image is a file, not a folder") from None
                    self._finish(above, last, owner, 0o700)
                    if stage:
                        _attributes(path, above, last)
                self._made.append((target, self._mode(mode, folder=True), status))
            return
        mark = (status.st_dev, status.st_ino)
        known = self._links.get(mark) if status.st_nlink > 1 else None
        with self._place(target) as (above, last):
            self._clear(above, last, target)
            if known is not None:
                with self._place(known) as (there, name):
                    os.link(name, last, src_dir_fd=there, dst_dir_fd=above, follow_symlinks=False)
                return
            if status.st_nlink > 1:
                self._links[mark] = target
            if kind == stat.S_IFLNK:
                os.symlink(os.readlink(path), last, dir_fd=above)
                self._owners.set(last, *owner, dir_fd=above)
            elif kind == stat.S_IFREG:
                self._bytes(path, above, last, target)
                self._finish(above, last, owner, self._mode(mode, folder=False))
            elif kind == stat.S_IFSOCK:
                return  # belongs to a program that is not there any more
            elif stage or kind == stat.S_IFIFO:
                self._owners.mknod(last, kind | stat.S_IMODE(mode), rdev, dir_fd=above)
                self._owners.set(last, *owner, dir_fd=above)
            else:
                raise UserError("copy", f"{path}: a device cannot be copied into an image")
            if stage and kind == stat.S_IFREG:
                _attributes(path, above, last)
            times = (status.st_atime_ns, status.st_mtime_ns)
            os.utime(last, ns=times, dir_fd=above, follow_symlinks=False)

    def _clear(self, above: int, name: str, target: str) -> None:
        try:
            os.unlink(name, dir_fd=above)
        except FileNotFoundError:
            pass
        except (IsADirectoryError, PermissionError):
            raise UserError("copy", f"{target} in the image is a folder, not a file") from None

    def _bytes(self, path: str, above: int, name: str, target: str) -> None:
        source = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            output = os.open(
                name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=above
            )
            try:
                self._content(source, output, target)
            finally:
                os.close(output)
        finally:
            os.close(source)

    def _finish(self, above: int, name: str, owner: tuple[int, int], mode: int) -> None:
        self._owners.set(name, *owner, dir_fd=above)
        os.chmod(name, stat.S_IMODE(mode), dir_fd=above)  # afterwards: a change of owner drops set-id bits

    def _settle(self) -> None:
        """Give new folders their modes and times, when everything in them is there."""
        for target, mode, status in reversed(self._made):
            with self._place(target) as (above, last):
                os.chmod(last, stat.S_IMODE(mode), dir_fd=above)
                os.utime(last, ns=(status.st_atime_ns, status.st_mtime_ns), dir_fd=above, follow_symlinks=False)
        self._made.clear()


def _attributes(path: str, above: int, name: str) -> None:
    """Copy extended attributes; those this user may not set are left out, capabilities are recorded then."""
    copy = f"/proc/self/fd/{above}/{name}"
    try:
        names = os.listxattr(path, follow_symlinks=False)
    except OSError:
        return
    for one in names:
        if (one.startswith(SKIPPED) and one != CAPABILITY) or one == "security.selinux":
            continue
        value = os.getxattr(path, one, follow_symlinks=False)
        try:
            os.setxattr(copy, one, value, follow_symlinks=False)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise


def is_archive(path: str) -> bool:
    """Return whether a file is a tar, compressed or not: then ADD unpacks it."""
    try:
        with open(path, "rb") as stream:
            head = stream.read(1 << 16)
    except OSError:
        return False
    try:
        if head[:2] == b"\x1f\x8b":
            head = zlib.decompressobj(31).decompress(head, 1024)
        elif head[:3] == b"BZh":
            with bz2.open(path) as packed:
                head = packed.read(1024)
        elif head[:6] == b"\xfd7zXZ\0":
            head = lzma.LZMADecompressor().decompress(head, 1024)
        elif head[:4] == b"\x28\xb5\x2f\xfd":
            from pysingularity import thirdparty

            thirdparty.enable()
            from pysingularity.registry.inflate import Inflate

            with open(path, "rb") as raw:
                head = Inflate(raw.read, path).read(1024)
    except (zlib.error, lzma.LZMAError, OSError, EOFError, UserError):
        return False
    return head[257:262] == b"ustar"


def names_of(text: str, passwd: str, group: str) -> tuple[int, int | None, list[int], str]:
    """Return uid, gid (None when neither given nor known), further groups, and home of a USER or --chown.

    Arguments:
        text: NAME or NUMBER, with or without :GROUP.
        passwd, group: content of the image's /etc/passwd and /etc/group.

    Raises:
        UserError: the image has no such user or group.
    """
    who, colon, whose = text.partition(":")
    people = [line.split(":") for line in passwd.splitlines() if line.count(":") >= 6]
    groups = [line.split(":") for line in group.splitlines() if line.count(":") >= 3]
    entry = next((one for one in people if one[0] == who or (who.isdigit() and one[2] == who)), None)
    if entry is None and not who.isdigit():
        known = ", ".join(one[0] for one in people[:12])
        raise UserError("unknown-user", f"the image has no user {who}", hint=f"its users: {known}" if known else "")
    uid = int(entry[2] if entry is not None else who)
    gid = int(entry[3]) if entry is not None and entry[3].isdigit() else None
    if colon:
        other = next((one for one in groups if one[0] == whose), None)
        if other is None and not whose.isdigit():
            raise UserError("unknown-group", f"the image has no group {whose}")
        gid = int(other[2] if other is not None else whose)
    name = entry[0] if entry is not None else ""
    more = [int(one[2]) for one in groups if one[2].isdigit() and name and name in one[3].split(",")]
    home = entry[5] if entry is not None else "/root" if uid == 0 else "/"
    return uid, gid, more, home or "/"


def read_inside(root: str, path: str) -> str:
    """Return the text of a small file of the image, "" when there is none."""
    from pysingularity.image.inside import FolderSource

    with FolderSource(root) as source:
        return (source.read(path) or b"").decode("utf-8", "surrogateescape")
