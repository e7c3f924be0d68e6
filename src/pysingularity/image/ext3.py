# SPDX-License-Identifier: Apache-2.0
"""Images of Singularity 2.x whose root file system is ext3: read through `debugfs`, the tool of e2fsprogs.

The tool needs neither root nor a mount. It is asked for numbers only: entries are found by inode, contents are dumped
into a scratch folder under names of ours, so that no name or link of the image ever reaches this machine's file system.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile

from pysingularity.errors import HostError, ImageError
from pysingularity.image.inside import LIMIT
from pysingularity.squashfs.node import Node

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import TracebackType

    from pysingularity.image.open import Image
    from pysingularity.squashfs.writer import SquashfsWriter

ROOT = 2
#: One line of `ls -p`: inode, mode in octal, owner, group, name, size.
LINE = re.compile(rb"/(\d+)/(\d{6})/(\d+)/(\d+)/([^/]*)/(\d*)/")
MTIME = re.compile(rb"^ *mtime: 0x([0-9a-f]{8})", re.MULTILINE)
DEVICE = re.compile(rb"^Device major/minor number: (\d+):(\d+)", re.MULTILINE)
LINK = re.compile(rb'^Fast link dest: "(.*)"', re.MULTILINE | re.DOTALL)
KINDS = {0o10: "file", 0o04: "dir", 0o12: "symlink", 0o02: "char", 0o06: "block", 0o01: "fifo"}
#: Commands given to one run of the tool.
BATCH = 2000
MOST_ENTRIES = 20_000_000


class Listed:
    """An entry of a folder as the tool lists it."""

    __slots__ = ("gid", "inode", "mode", "name", "size", "uid")

    def __init__(self, inode: int, mode: int, uid: int, gid: int, name: bytes, size: int) -> None:
        self.inode, self.mode, self.uid, self.gid, self.name, self.size = inode, mode, uid, gid, name, size

    @property
    def kind(self) -> str:
        """The kind of node, "" for one that an image does not hold."""
        return KINDS.get(self.mode >> 12, "")


class Ext3:
    """The file system of an image, asked through the tool.

    Arguments:
        image: an open image whose root file system is ext3.

    Raises:
        HostError: the tool is not installed.
    """

    def __init__(self, image: Image) -> None:
        program = shutil.which("debugfs", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
        if program is None:
            raise HostError(
                "no-debugfs",
                f"{image.path}: reading an ext3 image needs the program debugfs",
                hint="install e2fsprogs, or convert the image where it is installed",
            )
        self._program, self._fd, self.path = program, image.fd, image.path
        self._device = f"/proc/self/fd/{image.fd}" + (f"?offset={image.offset}" if image.offset else "")

    def ask(self, commands: Iterable[str], folder: str | None = None) -> list[bytes]:
        """Return the tool's answer to each command; files are dumped into `folder`."""
        answers: list[bytes] = []
        asked = list(commands)
        for at in range(0, len(asked), BATCH):
            part = asked[at : at + BATCH]
            with tempfile.NamedTemporaryFile("w", prefix="debugfs-") as script:
                script.write("\n".join(part) + "\n")
                script.flush()
                result = subprocess.run(
                    [self._program, "-f", script.name, self._device],
                    pass_fds=[self._fd],
                    stdin=subprocess.DEVNULL,
                    capture_output=True,
                    cwd=folder,
                    check=False,
                )
            rest = result.stdout
            for number, command in enumerate(part):
                answer, found, rest = rest.partition(b"debugfs: " + command.encode() + b"\n")
                if not found:
                    words = result.stderr.decode("utf-8", "replace").strip().splitlines() or ["no answer"]
                    raise self.damaged(words[-1])
                if number:  # what stands before a prompt answers the command before it
                    answers.append(answer)
            answers.append(rest)
        return answers

    def damaged(self, why: str) -> ImageError:
        """Return the error for a file system that cannot be trusted."""
        return ImageError("damaged-ext3", f"{self.path}: damaged ext3 file system: {why}", hint="try: e2fsck -n FILE")

    def folders(self, inodes: list[int]) -> list[list[Listed]]:
        """Return the entries of each of some folders, without `.` and `..`."""
        found = []
        for answer in self.ask(f"ls -p <{inode}>" for inode in inodes):
            entries = []
            for line in answer.splitlines():
                if not line:
                    continue
                match = LINE.fullmatch(line)
                if match is None:
                    raise self.damaged(f"an entry that cannot be: {line[:80]!r}")
                inode, mode, uid, gid, name, size = match.groups()
                if name in (b".", b"..") or not int(inode):
                    continue
                entries.append(Listed(int(inode), int(mode, 8), int(uid), int(gid), name, int(size or 0)))
            found.append(entries)
        return found


def store_ext3(image: Image, writer: SquashfsWriter, progress: Callable[[int], None] | None = None) -> Node:
    """Give the contents of an ext3 image to a squashfs writer and return the tree, with owners and devices.

    Raises:
        HostError: the tool is not installed. ImageError: the file system is damaged.
    """
    ext3 = Ext3(image)
    root = Node("dir", 0o755)
    nodes: dict[int, Node] = {ROOT: root}
    sizes: dict[int, int] = {}
    level, count = [(ROOT, root)], 0
    while level:
        deeper = []
        for (_, folder), entries in zip(level, ext3.folders([inode for inode, _ in level]), strict=True):
            for entry in entries:
                count += 1
                if count > MOST_ENTRIES:
                    raise ext3.damaged("too many entries")
                if not entry.kind or folder.children is None or (folder is root and entry.name == b"lost+found"):
                    continue
                node = nodes.get(entry.inode)
                if node is None:
                    node = nodes[entry.inode] = Node(entry.kind, entry.mode & 0o7777, entry.uid, entry.gid)
                    sizes[entry.inode] = entry.size
                    if entry.kind == "dir":
                        deeper.append((entry.inode, node))
                elif node.kind == "dir":
                    raise ext3.damaged("a folder in two places")
                folder.children[entry.name] = node
        level = deeper
    numbers = list(nodes)
    links = []
    for number, answer in zip(numbers, ext3.ask(f"stat <{number}>" for number in numbers), strict=True):
        node = nodes[number]
        time, device, link = MTIME.search(answer), DEVICE.search(answer), LINK.search(answer)
        node.mtime = int(time[1], 16) if time else 0
        if device and node.kind in ("char", "block"):
            node.rdev = os.makedev(int(device[1]), int(device[2]))
        if node.kind == "symlink":
            if link:
                node.target = link[1]
            else:
                links.append(number)
    for number in links:
        # The target of a long link lies in a block of its own.
        node = nodes[number]
        node.target = _dumped(ext3, number, sizes[number])
    _store_files(ext3, writer, [n for n in numbers if nodes[n].kind == "file"], nodes, sizes, progress)
    return root


def _dumped(ext3: Ext3, number: int, size: int) -> bytes:
    with tempfile.TemporaryDirectory(prefix="ext3-") as folder:
        ext3.ask([f"dump <{number}> content"], folder)
        with open(os.path.join(folder, "content"), "rb") as file:
            return file.read(size)


def _store_files(
    ext3: Ext3,
    writer: SquashfsWriter,
    numbers: list[int],
    nodes: dict[int, Node],
    sizes: dict[int, int],
    progress: Callable[[int], None] | None,
) -> None:
    """Store contents, dumped in groups so that little lies on the disk at once."""
    at = 0
    while at < len(numbers):
        group: list[int] = []
        total = 0
        while at < len(numbers) and (not group or (total < 256 << 20 and len(group) < BATCH)):
            group.append(numbers[at])
            total += sizes[numbers[at]]
            at += 1
        with tempfile.TemporaryDirectory(prefix="ext3-") as folder:
            ext3.ask((f"dump <{number}> {number}" for number in group), folder)
            for number in group:
                dump = os.path.join(folder, str(number))
                if not os.path.exists(dump):
                    raise ext3.damaged(f"inode {number} cannot be read")
                with open(dump, "rb") as file:
                    size = os.fstat(file.fileno()).st_size
                    nodes[number].data = writer.store(file.read, size)
                if progress is not None:
                    progress(size)


class Ext3Source:
    """Files of an ext3 image; symbolic links are not followed."""

    def __init__(self, image: Image) -> None:
        self._ext3 = Ext3(image)
        self._known: dict[int, list[Listed]] = {}

    def _entries(self, inode: int) -> list[Listed]:
        if inode not in self._known:
            self._known[inode] = self._ext3.folders([inode])[0]
        return self._known[inode]

    def _find(self, path: str) -> Listed | None:
        found = Listed(ROOT, 0o040755, 0, 0, b"", 0)
        for part in os.fsencode(path).split(b"/"):
            if not part:
                continue
            if found.kind != "dir":
                return None
            for entry in self._entries(found.inode):
                if entry.name == part:
                    found = entry
                    break
            else:
                return None
        return found

    def read(self, path: str, limit: int = LIMIT) -> bytes | None:
        """Return the bytes of a regular file, None when there is none.

        Raises:
            ImageError: it has more than `limit` bytes, or the image is damaged.
        """
        found = self._find(path)
        if found is None or found.kind != "file":
            return None
        if found.size > limit:
            raise ImageError("file-too-large", f"/{path} in the image has {found.size} bytes (limit {limit})")
        return _dumped(self._ext3, found.inode, limit)

    def names(self, path: str) -> list[str]:
        """Return the sorted names in a folder, nothing when there is none."""
        found = self._find(path)
        if found is None or found.kind != "dir":
            return []
        return sorted(os.fsdecode(entry.name) for entry in self._entries(found.inode))

    def is_folder(self, path: str) -> bool:
        """Return whether a folder stands there."""
        found = self._find(path)
        return found is not None and found.kind == "dir"

    def close(self) -> None:
        """Nothing to let go of."""

    def __enter__(self) -> Ext3Source:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
