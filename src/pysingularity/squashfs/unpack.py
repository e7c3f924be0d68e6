# SPDX-License-Identifier: Apache-2.0
"""Unpack a squashfs image into a folder, with several processes and without ever leaving that folder.

One process walks the image, makes the folders and cuts the rest into portions; workers, forked then, take portions and
make files, links and special files; at the end hard links are made and the folders get their owners, modes and times,
from the deepest up, so that a folder nobody may enter does not lock us out. Processes and not threads, because making
many small files is mostly interpreter work.

Nothing is ever opened by a path: names are single components (the reader refuses others), folders are opened one below
the other without following links, and every file is made anew. So links in a hostile image lead nowhere.
"""

from __future__ import annotations

import errno
import fcntl
import marshal
import os
import select
import stat
from struct import pack, unpack_from

from pysingularity import errors
from pysingularity.errors import HostError, InternalError, SingularityError
from pysingularity.linux.ownership import CAPABILITY, CAPABILITY_XATTR

from . import layout
from .workers import processors

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator
    from typing import Any, Protocol

    from .reader import Inode, SquashfsImage

    class Owners(Protocol):
        """How owners and devices are kept (linux.ownership)."""

        def set(self, path: bytes, uid: int, gid: int, *, dir_fd: int | None = None) -> None:
            """Give or record an owner."""

        def mknod(self, path: bytes, mode: int, rdev: int, *, dir_fd: int | None = None) -> None:
            """Make or record a special file."""


_FOLDER = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_OPEN_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
#: A portion of work: as many entries, or bytes; files above the size are portions of their own and come first.
_PORTION_ENTRIES, _PORTION_BYTES = 96, 4 << 20
_LARGE_FILE = 16 << 20
#: Bytes between two reports of a worker.
_REPORT_BYTES = 1 << 20
_MAX_WORKERS = 16
_MAX_DEPTH = 2000
_REFUSED = (errno.EPERM, errno.EOPNOTSUPP, errno.EACCES, errno.EINVAL)


class Unpacked:
    """What became of an image.

    Attributes:
        entries: files of all kinds that were made; size: bytes in regular files.
        devices: paths of device nodes that we may not make, and nobody recorded.
        xattrs: names of extended attributes that were refused.
    """

    __slots__ = ("devices", "entries", "size", "xattrs")

    def __init__(self) -> None:
        self.entries = self.size = 0
        self.devices: list[bytes] = []
        self.xattrs: set[bytes] = set()

    def __repr__(self) -> str:
        return f"Unpacked(entries={self.entries}, size={self.size}, devices={self.devices}, xattrs={self.xattrs})"


def unpack(
    image: SquashfsImage,
    destination: str,
    *,
    owner: Owners | None = None,
    workers: int | None = None,
    progress: Callable[[int], None] | None = None,
    only: Collection[int] | None = None,
) -> Unpacked:
    """Unpack an image.

    Arguments:
        destination: an empty folder; made when it is not there. Its mode and owner become those of the image's root.
        owner: keeps owners and makes special files (linux.ownership). None: root keeps the image's owners and makes
            devices; for anybody else everything belongs to the user, and devices are left out.
        workers: processes that make files; default: one per processor that we may use.
        progress: called with the number of bytes written since the last call.
        only: references of the inodes that are wanted, with the folders above them; None for all.

    Returns:
        what was made, and what could not be kept.

    Raises:
        ImageError: the image is damaged.
        OSError: the destination cannot be written; a name in it is taken.
    """
    _allow_many_files()
    try:
        os.mkdir(destination, 0o700)
    except FileExistsError:
        pass
    top = os.open(destination, _OPEN_FOLDER & ~os.O_NOFOLLOW)
    try:
        job = _Unpacking(image, top, owner, progress, only)
        job.plan()
        count = min(workers or processors(), _MAX_WORKERS, max(len(job.portions), 1))
        job.run(count)
        job.links()
        job.folders()
        return job.result
    finally:
        os.close(top)


class _Folders:
    """Open folders from the destination down to the one in use."""

    def __init__(self, top: int) -> None:
        self.names: list[bytes] = []
        self.fds = [top]

    def open(self, path: bytes) -> int:
        """Return a descriptor (O_PATH) of a folder; it stays open while folders below it are asked for."""
        parts = path.split(b"/") if path else []
        names, fds = self.names, self.fds
        if parts == names:
            return fds[-1]
        same = 0
        for mine, wanted in zip(names, parts, strict=False):
            if mine != wanted:
                break
            same += 1
        self._shrink(same)
        for part in parts[same:]:
            fds.append(os.open(part, _FOLDER, dir_fd=fds[-1]))
            names.append(part)
        return fds[-1]

    def _shrink(self, depth: int) -> None:
        while len(self.names) > depth:
            self.names.pop()
            os.close(self.fds.pop())

    def close(self) -> None:
        """Close all but the destination."""
        self._shrink(0)


class _Unpacking:
    """One image on its way into one folder."""

    def __init__(
        self,
        image: SquashfsImage,
        top: int,
        owner: Owners | None,
        progress: Callable[[int], None] | None,
        only: Collection[int] | None,
    ) -> None:
        self.image, self.top, self.owner, self.progress, self.only = image, top, owner, progress, only
        self.root = os.geteuid() == 0
        self.result = Unpacked()
        #: Portions are lists of (folder, its entries to be made).
        self.portions: list[list[tuple[bytes, list[tuple[bytes, Inode]]]]] = []
        self.again: list[tuple[bytes, bytes]] = []  # hard links: first path, other path
        self.made: list[tuple[bytes, Inode]] = []  # folders, parents first
        self.pending = 0
        # A default ACL overrules the mode that a file is made with.
        self.exact = False
        try:
            os.getxattr(top, "system.posix_acl_default")
            self.exact = True
        except OSError as error:
            if error.errno not in (errno.ENODATA, errno.EOPNOTSUPP):
                raise

    # -- the first process -------------------------------------------------------------------------------------------

    def plan(self) -> None:
        """Walk the image, make its folders, cut the rest into portions."""
        folders = _Folders(self.top)
        first: dict[int, bytes] = {}
        large: list[list[tuple[bytes, list[tuple[bytes, Inode]]]]] = []
        waiting: dict[bytes, list[tuple[bytes, Inode]]] = {}
        try:
            for path, inode in self.image.walk() if self.only is None else self._wanted(self.only):
                parent, _, name = path.rpartition(b"/")
                if inode.type == layout.DIR:
                    if path:
                        if path.count(b"/") > _MAX_DEPTH:
                            raise self.image.damaged(f"folders are nested deeper than {_MAX_DEPTH} levels")
                        os.mkdir(name, 0o700, dir_fd=folders.open(parent))
                    self.made.append((path, inode))
                    continue
                known = first.setdefault(inode.ref, path)
                if known is not path:
                    self.again.append((known, path))
                    continue
                if inode.type == layout.FILE and inode.size >= _LARGE_FILE:
                    large.append([(parent, [(name, inode)])])
                    continue
                waiting.setdefault(parent, []).append((name, inode))
        finally:
            folders.close()
        large.sort(key=lambda portion: -portion[0][1][0][1].size)
        self.portions = large
        portion: list[tuple[bytes, list[tuple[bytes, Inode]]]] = []
        entries = size = 0
        for parent, listed in waiting.items():
            part: list[tuple[bytes, Inode]] = []
            portion.append((parent, part))
            for entry in listed:
                part.append(entry)
                entries += 1
                size += entry[1].size
                if entries >= _PORTION_ENTRIES or size >= _PORTION_BYTES:
                    self.portions.append(portion)
                    part = []
                    portion = [(parent, part)]
                    entries = size = 0
        if entries:
            self.portions.append(portion)

    def _wanted(self, only: Collection[int]) -> Iterator[tuple[bytes, Inode]]:
        """Walk the image, and yield what is wanted with the folders above it."""
        above: list[tuple[bytes, Inode]] = []  # folders on the way to where the walk is, that were not yielded yet
        for path, inode in self.image.walk():
            while above and path and not path.startswith(above[-1][0] + b"/"):
                above.pop()
            if inode.type == layout.DIR:
                above.append((path, inode))
            if not path or inode.ref in only:
                yield from above
                above.clear()
                if inode.type != layout.DIR:
                    yield path, inode

    def run(self, count: int) -> None:
        """Let workers make everything but folders and hard links.

        Raises:
            whatever the first worker in trouble met.
        """
        if not self.portions:
            return
        # Processes share the position in an open file, so each read takes the next number; see `_next`.
        numbers = os.memfd_create("squashfs-portions")
        os.write(numbers, b"".join(pack("<I", number) for number in range(len(self.portions))))
        os.lseek(numbers, 0, os.SEEK_SET)
        listening: dict[int, bytes] = {}  # a pipe per worker, and what of its next report has come
        pids: list[int] = []
        try:
            for _ in range(count):
                reports, report = os.pipe()
                listening[reports] = b""
                try:
                    pid = os.fork()
                    if not pid:
                        for mine in listening:
                            os.close(mine)
                        self._worker(numbers, report)
                finally:
                    os.close(report)
                pids.append(pid)
            self._listen(listening)
        except BaseException:
            for pid in pids:
                os.kill(pid, 9)
            raise
        finally:
            os.close(numbers)
            for reports in listening:
                os.close(reports)
            bad = [pid for pid in pids if os.waitpid(pid, 0)[1]]
        if bad:
            raise HostError("worker-died", "a process that unpacked the image was killed", hint="is memory short?")

    def _listen(self, listening: dict[int, bytes]) -> None:
        """Take the workers' reports until all have ended."""
        poll = select.poll()
        for reports in listening:
            poll.register(reports, select.POLLIN)
        left = len(listening)
        while left:
            for reports, _ in poll.poll():
                more = os.read(reports, 65536)
                if not more:
                    poll.unregister(reports)
                    left -= 1
                    continue
                data = listening[reports] + more
                while len(data) >= 4:
                    (size,) = unpack_from("<I", data)
                    if len(data) < 4 + size:
                        break
                    self._report(marshal.loads(data[4 : 4 + size]))
                    data = data[4 + size :]
                listening[reports] = data

    def _report(self, words: tuple[Any, ...]) -> None:
        if words[0] == "done":
            _, entries, size, devices, xattrs = words
            self.result.entries += entries
            self.result.size += size
            self.result.devices += devices
            self.result.xattrs.update(xattrs)
            if self.progress is not None and size:
                self.progress(size)
        elif words[0] == "system":
            raise OSError(*words[1:])
        else:
            kind = getattr(errors, words[1], InternalError)
            raise kind(words[2], words[3], hint=words[4])

    def links(self) -> None:
        """Make the further names of files that have several."""
        here, there = _Folders(self.top), _Folders(self.top)
        try:
            for first, other in self.again:
                source, _, name = first.rpartition(b"/")
                folder, _, link = other.rpartition(b"/")
                os.link(name, link, src_dir_fd=here.open(source), dst_dir_fd=there.open(folder), follow_symlinks=False)
                self.result.entries += 1
        finally:
            here.close()
            there.close()

    def folders(self) -> None:
        """Give folders their owners, attributes, modes and times, the deepest first."""
        folders = _Folders(self.top)
        try:
            for path, inode in reversed(self.made):
                parent, _, name = path.rpartition(b"/")
                above = folders.open(parent) if path else -1
                fd = os.open(name, _OPEN_FOLDER, dir_fd=above) if path else os.dup(self.top)
                try:
                    if self.owner is not None:
                        if path:
                            self.owner.set(name, inode.uid, inode.gid, dir_fd=above)
                        else:
                            self.owner.set(b".", inode.uid, inode.gid, dir_fd=self.top)
                    elif self.root:
                        os.fchown(fd, inode.uid, inode.gid)
                    if inode.xattr != layout.NONE32:
                        self._attributes(fd, inode)
                    os.fchmod(fd, inode.mode)
                    os.utime(fd, ns=(inode.mtime * 1000000000, inode.mtime * 1000000000))
                finally:
                    os.close(fd)
                self.result.entries += 1
        finally:
            folders.close()

    # -- the workers -------------------------------------------------------------------------------------------------

    def _worker(self, numbers: int, report: int) -> None:
        """Make portions until none is left, then end this process."""
        status = 1
        try:
            os.umask(0)
            self._make(numbers, report)
            status = 0
        except SingularityError as error:
            _send(report, "error", type(error).__name__, error.id, error.message, error.hint)
            status = 0
        except OSError as error:
            name = error.filename
            _send(report, "system", error.errno, error.strerror, os.fsdecode(name) if name else None)
            status = 0
        except KeyboardInterrupt:
            pass
        except BaseException as error:
            _send(report, "error", "InternalError", "unpacking", f"unpacking failed: {error!r}", "")
            status = 0
        finally:
            os._exit(status)

    def _make(self, numbers: int, report: int) -> None:
        folders = _Folders(self.top)
        result = self.result
        self.report = report
        while number := _next(numbers):
            for parent, entries in self.portions[unpack_from("<I", number)[0]]:
                fd = folders.open(parent)
                for name, inode in entries:
                    try:
                        if inode.type == layout.FILE:
                            self._file(fd, name, inode)
                        elif inode.type == layout.SYMLINK:
                            os.symlink(inode.target, name, dir_fd=fd)
                            self._named(fd, name, inode)
                        else:
                            self._special(fd, parent, name, inode)
                    except OSError as error:
                        # Which file it was; calls on descriptors do not know.
                        path = parent + b"/" + name if parent else name
                        raise OSError(error.errno, error.strerror, os.fsdecode(path)) from None
                    result.entries += 1
            self._tell()
        self._tell()

    def _tell(self) -> None:
        result = self.result
        if result.entries or result.size:
            _send(self.report, "done", result.entries, result.size, result.devices, list(result.xattrs))
            self.result.__init__()  # type: ignore[misc]

    def _file(self, folder: int, name: bytes, inode: Inode) -> None:
        mode = inode.mode
        fd = os.open(name, _NEW_FILE, mode & 0o777, dir_fd=folder)
        try:
            if inode.size:
                self._contents(fd, inode)
            if self.owner is not None:
                self.owner.set(name, inode.uid, inode.gid, dir_fd=folder)
            elif self.root:
                os.fchown(fd, inode.uid, inode.gid)
            if inode.xattr != layout.NONE32:
                os.fchmod(fd, 0o600)  # who may not write a file may not give it attributes either
                self._attributes(fd, inode)
                os.fchmod(fd, mode)
            elif mode > 0o777 or self.exact:  # setuid comes behind chown, which takes it away
                os.fchmod(fd, mode)
            os.utime(fd, ns=(inode.mtime * 1000000000, inode.mtime * 1000000000))
        finally:
            os.close(fd)

    def _contents(self, fd: int, inode: Inode) -> None:
        image = self.image
        size = inode.size
        if size <= image.block_size:
            data = image.read_block(inode, 0)
            if os.write(fd, data) != size:
                _write(fd, data, 0)
            self.result.size += size
            return
        place = 0
        hole = False
        for length, piece in image.pieces(inode):
            hole = piece is None
            if piece is not None:
                _write(fd, piece, place)
                self.result.size += length
                if self.result.size >= _REPORT_BYTES:
                    self._tell()
            place += length
        if hole:
            os.ftruncate(fd, size)

    def _named(self, folder: int, name: bytes, inode: Inode) -> None:
        """Owner, attributes and time of something that is not opened."""
        if self.owner is not None:
            self.owner.set(name, inode.uid, inode.gid, dir_fd=folder)
        elif self.root:
            os.chown(name, inode.uid, inode.gid, dir_fd=folder, follow_symlinks=False)
        if inode.xattr != layout.NONE32:
            self._attributes(b"/proc/self/fd/%d/%s" % (folder, name), inode)
        times = (inode.mtime * 1000000000, inode.mtime * 1000000000)
        os.utime(name, ns=times, dir_fd=folder, follow_symlinks=False)

    def _special(self, folder: int, parent: bytes, name: bytes, inode: Inode) -> None:
        """Make a device, fifo or socket."""
        mode = inode.mode | layout.FORMATS[inode.type]
        if self.owner is not None:
            self.owner.mknod(name, mode, inode.rdev, dir_fd=folder)
        else:
            try:
                os.mknod(name, mode, inode.rdev, dir_fd=folder)  # our umask is 0
            except PermissionError:
                if not stat.S_ISCHR(mode) and not stat.S_ISBLK(mode):
                    raise
                self.result.devices.append(parent + b"/" + name if parent else name)
                return
        self._named(folder, name, inode)

    # -- both --------------------------------------------------------------------------------------------------------

    def _attributes(self, place: int | bytes, inode: Inode) -> None:
        """Set extended attributes of an open file, or of a name in /proc itself; note those that are refused."""
        options: dict[str, Any] = {} if isinstance(place, int) else {"follow_symlinks": False}
        for name, value in self.image.xattrs(inode).items():
            try:
                os.setxattr(place, name, value, **options)
                continue
            except OSError as error:
                if error.errno not in _REFUSED:
                    raise
            if name == CAPABILITY and self.owner is not None:
                try:
                    os.setxattr(place, CAPABILITY_XATTR, value, **options)
                    continue
                except OSError as error:
                    if error.errno not in _REFUSED:
                        raise
            self.result.xattrs.add(name)


def _write(fd: int, data: bytes, place: int) -> None:
    done = os.pwrite(fd, data, place)
    while done < len(data):
        done += os.pwrite(fd, data[done:], place + done)


def _next(numbers: int) -> bytes:
    """Take the next number from the shared list, b"" at its end.

    The kernel guards a shared position against two readers only in files that were opened by a path; memfd_create(2)
    makes one that is not (no FMODE_ATOMIC_POS, seen on Linux 6.18: two workers took one number).
    """
    fcntl.lockf(numbers, fcntl.LOCK_EX)
    try:
        return os.read(numbers, 4)
    finally:
        fcntl.lockf(numbers, fcntl.LOCK_UN)


def _send(report: int, *words: Any) -> None:
    """Send one report: its length, and its words."""
    data = marshal.dumps(words)
    data = pack("<I", len(data)) + data
    while data:
        data = data[os.write(report, data) :]


def _allow_many_files() -> None:
    """Let this process open as many files as folders may be nested."""
    import resource  # only for unpacking

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 4 * _MAX_DEPTH if hard == resource.RLIM_INFINITY else min(hard, 4 * _MAX_DEPTH)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
