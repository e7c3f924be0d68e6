# SPDX-License-Identifier: Apache-2.0
"""Files to be put into an image, as values, and putting them into a folder or into a tree of nodes.

An `Entry` names its place inside the image. Putting entries into a folder never follows a symbolic link of the image:
a link that stands where a folder is needed is replaced when the folder is ours (`/.singularity.d`), and otherwise the
entry is left out. Reading files of an image is `image.inside`.
"""

from __future__ import annotations

import os
import stat

from pysingularity.squashfs.node import Node

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from pysingularity.squashfs.node import FileData

#: Folders in which everything is ours, so that whatever else stands there may be replaced.
OURS = (".singularity.d", "scif")


class Entry:
    """A file, folder or symbolic link of an image.

    Arguments:
        path: inside the image, without a leading slash ("etc/hosts").
        kind: "file", "dir" or "symlink".
        mode: permission bits.
        data: content of a file, target of a link.
        keep: leave alone what stands there already.
    """

    __slots__ = ("data", "keep", "kind", "mode", "path")

    def __init__(self, path: str, kind: str, mode: int, data: bytes = b"", *, keep: bool = False) -> None:
        self.path, self.kind, self.mode, self.data, self.keep = path, kind, mode, data, keep

    @classmethod
    def file(cls, path: str, content: str | bytes, mode: int = 0o644, *, keep: bool = False) -> Entry:
        """Return a file."""
        data = content.encode("utf-8", "surrogateescape") if isinstance(content, str) else content
        return cls(path, "file", mode, data, keep=keep)

    @classmethod
    def folder(cls, path: str, mode: int = 0o755) -> Entry:
        """Return a folder; one that is there keeps its mode."""
        return cls(path, "dir", mode, keep=True)

    @classmethod
    def link(cls, path: str, target: str, *, keep: bool = True) -> Entry:
        """Return a symbolic link."""
        return cls(path, "symlink", 0o777, target.encode(), keep=keep)

    def __repr__(self) -> str:
        return f"Entry({self.kind} /{self.path})"


def put_into_folder(root: str | int, entries: Iterable[Entry]) -> list[str]:
    """Put entries into a folder that is a root file system; return the paths that were written.

    Arguments:
        root: path of the folder, or a descriptor of it.
        entries: parents before children; parents that nobody names are made with mode 0755.

    Raises:
        OSError: no space, no permission.
    """
    top = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC) if isinstance(root, str) else os.dup(root)
    written = []
    try:
        for entry in entries:
            *parents, name = entry.path.encode("utf-8", "surrogateescape").split(b"/")
            folder = _enter(top, parents)
            if folder < 0:
                continue
            try:
                if _put(folder, name, entry, parents):
                    written.append(entry.path)
            finally:
                os.close(folder)
    finally:
        os.close(top)
    return written


def _enter(top: int, parents: list[bytes]) -> int:
    """Return a descriptor of the folder below `top`, made when missing; -1 when a link or file is in the way."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    folder = os.dup(top)
    try:
        for name in parents:
            try:
                deeper = os.open(name, flags, dir_fd=folder)
            except FileNotFoundError:
                os.mkdir(name, 0o755, dir_fd=folder)
                deeper = os.open(name, flags, dir_fd=folder)
                os.fchmod(deeper, 0o755)
            except OSError:
                status = os.stat(name, dir_fd=folder, follow_symlinks=False)
                if stat.S_ISDIR(status.st_mode):
                    raise
                if parents[0].decode("utf-8", "replace") not in OURS:
                    os.close(folder)
                    return -1
                os.unlink(name, dir_fd=folder)
                os.mkdir(name, 0o755, dir_fd=folder)
                deeper = os.open(name, flags, dir_fd=folder)
            os.close(folder)
            folder = deeper
    except BaseException:
        os.close(folder)
        raise
    return folder


def _put(folder: int, name: bytes, entry: Entry, parents: list[bytes]) -> bool:
    try:
        there = os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        there = None
    if entry.kind == "dir":
        if there is not None:
            ours = (parents[0] if parents else name).decode("utf-8", "replace") in OURS
            if stat.S_ISDIR(there.st_mode) or not ours:
                return False
            os.unlink(name, dir_fd=folder)
        os.mkdir(name, entry.mode, dir_fd=folder)
        os.chmod(name, entry.mode, dir_fd=folder)
        return True
    if there is not None:
        if entry.keep or stat.S_ISDIR(there.st_mode):
            return False
        # Never write through what is there: it may be a link, or one name of a file that has others.
        os.unlink(name, dir_fd=folder)
    if entry.kind == "symlink":
        os.symlink(entry.data, name, dir_fd=folder)
        return True
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(name, flags, 0o600, dir_fd=folder)
    try:
        view = memoryview(entry.data)
        while view:
            view = view[os.write(fd, view) :]
        os.fchmod(fd, entry.mode)
    finally:
        os.close(fd)
    return True


def put_into_tree(root: Node, entries: Iterable[Entry], store: Callable[[bytes], FileData], mtime: int) -> list[str]:
    """Put entries into a tree of nodes, owned by root; return the paths that were written.

    Arguments:
        root: the tree's root folder.
        entries: as for `put_into_folder`.
        store: keeps the content of a file (`SquashfsWriter.store_bytes`).
        mtime: modification time of what is made, Unix seconds.
    """
    written = []
    for entry in entries:
        *parents, name = entry.path.encode("utf-8", "surrogateescape").split(b"/")
        folder: Node | None = root
        for part in parents:
            folder = _child_folder(folder, part, parents[0], mtime) if folder is not None else None
        if folder is None or folder.children is None:
            continue
        there = folder.children.get(name)
        if there is not None:
            ours = (parents[0] if parents else name).decode("utf-8", "replace") in OURS
            if entry.kind == "dir":
                if there.kind == "dir" or not ours:
                    continue
            elif entry.keep or there.kind == "dir":
                continue
        node = Node(entry.kind, entry.mode, mtime=mtime)
        if entry.kind == "file":
            node.data = store(entry.data)
        elif entry.kind == "symlink":
            node.target = entry.data
        folder.children[name] = node
        written.append(entry.path)
    return written


def _child_folder(folder: Node, name: bytes, first: bytes, mtime: int) -> Node | None:
    if folder.children is None:
        return None
    child = folder.children.get(name)
    if child is None or (child.kind != "dir" and first.decode("utf-8", "replace") in OURS):
        child = folder.children[name] = Node("dir", 0o755, mtime=mtime)
    return child if child.kind == "dir" else None
