# SPDX-License-Identifier: Apache-2.0
"""Serve a squashfs image over FUSE: requests from a descriptor of /dev/fuse, answers out of `reader`.

Nothing is written, so nearly everything can be left to the kernel's caches: names, attributes and "no such file" are
good for ever, OPEN and OPENDIR are answered once with "not implemented" (the kernel then stops asking), and
directories are read together with the attributes of their entries. A node's number is the reference of its inode.

Most of the work is inflating, which lets other threads run. So several cores are used by threads that answer, all out
of one cache, and by one that looks ahead: it inflates the blocks that will be asked for next while the program digests
what it got. Blocks are not pushed into the page cache (FUSE_NOTIFY_STORE): the kernel would wait there, beyond the
reach of signals, for pages that are locked for a question which nobody may be left to answer (docs/decisions/0003).

Protocol: linux/fuse.h 7.31 (`linux.fuse`). Opening the device, mounting and forking the first server are the work of
`image.mount`. Start ring.
"""

from __future__ import annotations

import posix

from pysingularity.errors import SingularityError
from pysingularity.linux import fuse
from pysingularity.linux.process import share_heap

from . import layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _queue import SimpleQueue
    from collections.abc import Callable

    from .reader import Inode, SquashfsImage

_EIO, _EINTR, _EAGAIN, _ENOENT, _ENODEV, _ENOSYS, _ERANGE, _ENODATA = 5, 4, 11, 2, 19, 38, 34, 61

#: How long the kernel may believe an answer, in seconds: as long as it likes.
_FOREVER = 1 << 30
#: Bytes of one request: nothing large ever comes, since nothing is written.
_REQUEST = 64 << 10
#: Bytes of one answer to READ; the pages of it must be allowed in INIT.
_MAX_READ = 1 << 20
_PAGE = 4096

#: Caps of what one server process keeps, by count; each inode answer is 88 bytes, each name about 150.
_KEPT_ATTRIBUTES = 16384
_KEPT_NAMES = 65536
_KEPT_FILES = 256

#: Every so many READs a server looks whether somebody else's question waits already. When it did oftener than not, by
#: this many times, more threads answer. One alone serves one program best: the scheduler keeps the two together.
_SAMPLE, _CROWD = 8, 8
_MOST_WORKERS = 4

#: READs from which on a server is worth a second thread; the start of a small program has fewer.
_WARM = 64
#: Blocks inflated ahead of a file that is read on, and how many such requests may wait.
_AHEAD, _WAITING = 2, 8
#: Blocks remembered as asked for, to tell reading on from jumping about.
_KEPT_TOUCHED = 4096

_PADDING = tuple(bytes(count) for count in range(8))
_DT = (0, 4, 8, 10, 6, 2, 1, 12)  # dirent types by layout's basic types


class Server:
    """The answers for one image.

    Arguments:
        image: the opened image.
        owner: (uid, gid) that every file is shown to belong to; None shows the stored ones.
        workers: how many threads may answer, once there is enough to do; with one, nothing is done ahead either. 0
            suits the machine.
        complain: called with the first damage that is met; the programs themselves only see an input/output error.
    """

    def __init__(
        self,
        image: SquashfsImage,
        owner: tuple[int, int] | None = None,
        *,
        workers: int = 0,
        complain: Callable[[str], None] | None = None,
    ) -> None:
        self.image, self.owner, self.complain = image, owner, complain
        self.workers = workers or min(len(posix.sched_getaffinity(0)), _MOST_WORKERS)
        self.has_xattrs = image.superblock.xattr_table != layout.NONE64
        self._attributes: dict[int, bytes] = {}
        self._names: dict[int, dict[bytes, int]] = {}
        self._listings: dict[int, list[tuple[bytes, int, int]]] = {}
        self._name_count = 0
        self._files: dict[int, Inode] = {}
        #: The directory asked for last and its READDIRPLUS records: the kernel asks in pieces, once more at the end.
        self._records: tuple[int, list[bytes]] = (-1, [])
        self._reads = 0
        #: READs after which to look whether there is enough to do for another thread.
        self._look_at = 2 * _WARM if self.workers > 1 else 1 << 62
        self._crowd = self._asker = 0
        #: File, first and last block wanted next, for the thread that looks ahead.
        self._wanted: SimpleQueue[tuple[Inode, int, int]] | None = None
        #: By (node, block): whether it was asked for; False is wanted so far.
        self._touched: dict[tuple[int, int], bool] = {}
        self._operations = {
            fuse.LOOKUP: self._lookup,
            fuse.GETATTR: self._getattr,
            fuse.READLINK: self._readlink,
            fuse.READ: self._read,
            fuse.READDIR: self._readdir,
            fuse.READDIRPLUS: self._readdirplus,
            fuse.GETXATTR: self._getxattr,
            fuse.LISTXATTR: self._listxattr,
            fuse.STATFS: self._statfs,
            fuse.INIT: self._init,
            fuse.RELEASE: self._nothing,
            fuse.RELEASEDIR: self._nothing,
            fuse.DESTROY: self._nothing,
        }

    def run(self, device: int) -> None:
        """Answer on a mounted descriptor of /dev/fuse until the file system is unmounted."""
        buffer = bytearray(_REQUEST)
        buffers = [buffer]
        view = memoryview(buffer)
        unpack_header, pack_answer = fuse.IN_HEADER.unpack_from, fuse.OUT_HEADER.pack
        operations = self._operations
        readv, writev = posix.readv, posix.writev
        while True:
            try:
                size = readv(device, buffers)
            except OSError as error:
                if error.errno in (_ENOENT, _EINTR, _EAGAIN):  # the asker went away, or a signal came
                    continue
                return  # ENODEV: unmounted
            _, code, unique, node, _, _, asker, _ = unpack_header(buffer)
            if code == fuse.FORGET or code == fuse.BATCH_FORGET or code == fuse.INTERRUPT:
                continue  # these have no answer
            operation = operations.get(code)
            status = -_ENOSYS
            parts: tuple[bytes | memoryview, ...] = ()
            if operation is not None:
                try:
                    answer = operation(node, view[40:size])
                except SingularityError as error:  # the image is damaged there
                    answer = -_EIO
                    if self.complain is not None:
                        self.complain(str(error))
                        self.complain = None
                except OSError as error:
                    answer = -(error.errno or _EIO)
                except (ValueError, LookupError, ArithmeticError, MemoryError, TypeError):
                    answer = -_EIO  # hostile bytes that the reader did not name; the server must live on
                if isinstance(answer, int):
                    status = answer
                else:
                    status, parts = 0, answer
            length = 16
            for part in parts:
                length += len(part)
            try:
                writev(device, (pack_answer(length, status, unique), *parts))
            except OSError as error:
                if error.errno == _ENODEV:
                    return
                # Any other refusal concerns this answer only (the asker was interrupted).
            if code == fuse.DESTROY:
                return
            if self._reads >= self._look_at:
                self._share(device, asker)

    def _share(self, device: int, asker: int) -> None:
        """Let more threads answer when questions have to wait."""
        from select import POLLIN, poll

        waiting = poll()
        waiting.register(device, POLLIN)
        crowded = asker != self._asker and waiting.poll(0)
        self._asker, self._crowd = asker, max(self._crowd + (1 if crowded else -1), 0)
        self._look_at = self._reads + _SAMPLE
        if self._crowd >= _CROWD:
            self._look_at = 1 << 62
            for _ in range(self.workers - 1):
                self._thread(self._help, device)

    @staticmethod
    def _thread(work: Callable[..., None], *arguments: object) -> bool:
        """Start a thread; return whether there may be one more."""
        from _thread import start_new_thread

        share_heap()
        try:
            start_new_thread(work, arguments)
        except RuntimeError:  # this user's processes are too many: those threads that are there are enough
            return False
        return True

    def _help(self, device: int) -> None:
        """Answer as well. A thread that ended otherwise than with its mount would leave somebody waiting for ever."""
        try:
            self.run(device)
        finally:
            posix._exit(1)  # the kernel then answers ENOTCONN

    def _look_ahead(self, wanted: SimpleQueue[tuple[Inode, int, int]]) -> None:
        """Inflate into the cache what will be asked for next, for ever."""
        while True:
            inode, first, last = wanted.get()
            try:
                for index in range(first, last + 1):
                    self.image.read_block(inode, index, keep=True)
            except (SingularityError, OSError, ValueError, LookupError, ArithmeticError, MemoryError, TypeError):
                pass  # whoever asks for that block is told

    # -- what the operations share -----------------------------------------------------------------------------------

    def _ref(self, node: int) -> int:
        return self.image.root.ref if node == fuse.ROOT_NODE else node - 2

    def _node(self, ref: int) -> int:
        return fuse.ROOT_NODE if ref == self.image.root.ref else ref + 2

    def _inode(self, ref: int) -> Inode:
        return self.image.root if ref == self.image.root.ref else self.image.inode(ref)

    def _file(self, node: int) -> Inode:
        """Return a file's inode, kept together with the list of its blocks."""
        inode = self._files.get(node)
        if inode is None:
            inode = self._inode(self._ref(node))
            if len(self._files) >= _KEPT_FILES:
                self._files.clear()
            self._files[node] = inode
        return inode

    def _attribute(self, ref: int) -> bytes:
        """Return an inode's fuse_attr."""
        found = self._attributes.get(ref)
        if found is None:
            number, mode, nlink, uid, gid, rdev, size, mtime = self.image.status(ref)
            uid, gid = self.owner or (uid, gid)
            unit = self.image.block_size
            times = (mtime, mtime, mtime, 0, 0, 0)
            found = fuse.ATTR.pack(number, size, (size + 511) >> 9, *times, mode, nlink, uid, gid, rdev, unit, 0)
            if len(self._attributes) >= _KEPT_ATTRIBUTES:
                self._attributes.clear()
            self._attributes[ref] = found
        return found

    def _entry(self, ref: int) -> bytes:
        """Return an inode's fuse_entry_out."""
        return fuse.ENTRY.pack(self._node(ref), 0, _FOREVER, _FOREVER, 0, 0) + self._attribute(ref)

    def _directory(self, ref: int) -> list[tuple[bytes, int, int]]:
        """Return (name, reference, basic type) of a directory's entries, kept."""
        found = self._listings.get(ref)
        if found is None:
            entries = self.image.entries(self._inode(ref))
            found = [(name, target, layout.TYPES[kind]) for name, target, kind in entries]
            self._name_count += len(found)
            if self._name_count > _KEPT_NAMES:
                self._listings.clear()
                self._names.clear()
                self._name_count = len(found)
            self._listings[ref] = found
        return found

    # -- operations: (node, the request behind its header) → parts of the answer, or a negative errno ----------------

    def _nothing(self, _node: int, _request: memoryview) -> tuple[bytes, ...]:
        return ()

    def _init(self, _node: int, request: memoryview) -> tuple[bytes, ...]:
        _, _, readahead, offered = fuse.INIT_IN.unpack_from(request)
        wanted = (
            fuse.ASYNC_READ
            | fuse.EXPORT_SUPPORT
            | fuse.PARALLEL_DIROPS
            | fuse.DO_READDIRPLUS
            | fuse.NO_OPEN_SUPPORT
            | fuse.NO_OPENDIR_SUPPORT
            | fuse.CACHE_SYMLINKS
            | fuse.MAX_PAGES
        )
        return (
            fuse.INIT_OUT.pack(
                7, 31, max(readahead, _MAX_READ), offered & wanted, 64, 48, _PAGE, 1, _MAX_READ // _PAGE, 0, 0
            ),
        )

    def _lookup(self, node: int, request: memoryview) -> tuple[bytes, ...]:
        ref = self._ref(node)
        names = self._names.get(ref)
        if names is None:
            names = {name: target for name, target, _ in self._directory(ref)}
            self._names[ref] = names
        target = names.get(bytes(request[:-1]))
        if target is None:
            # Node 0: there is no such name, and the kernel may remember that.
            return (fuse.ENTRY.pack(0, 0, _FOREVER, _FOREVER, 0, 0) + bytes(fuse.ATTR.size),)
        return (self._entry(target),)

    def _getattr(self, node: int, _request: memoryview) -> tuple[bytes, ...]:
        return (fuse.ATTR_OUT.pack(_FOREVER, 0, 0), self._attribute(self._ref(node)))

    def _readlink(self, node: int, _request: memoryview) -> tuple[bytes, ...]:
        return (self._inode(self._ref(node)).target,)

    def _read(self, node: int, request: memoryview) -> tuple[bytes | memoryview, ...]:
        self._reads += 1
        _, offset, size = fuse.READ_IN.unpack_from(request)
        inode = self._file(node)
        end = min(inode.size, offset + min(size, _MAX_READ))
        unit = self.image.block_size
        if offset < end:
            self._foresee(node, inode, offset // unit, (end - 1) // unit)
        parts: list[bytes | memoryview] = []
        while offset < end:
            index, begin = divmod(offset, unit)
            last = end <= (index + 1) * unit
            data = self.image.read_block(inode, index, keep=begin != 0 or (last and end % unit != 0))
            piece = data if not begin and not last else memoryview(data)[begin : end - index * unit]
            parts.append(piece)
            offset += len(piece)
        return tuple(parts)

    def _foresee(self, node: int, inode: Inode, first: int, last: int) -> None:
        """Have the next blocks inflated where a READ of the blocks `first` to `last` reads on.

        Pages of a mapped file are asked for in windows around each fault, forwards at several places in turn as well as
        crosswise: a file is read on where the block before was asked for, whatever else of it was in between. The next
        ones are wanted two at a time, since waking the other thread is not cheap.
        """
        touched = self._touched
        fresh = not touched.get((node, last))
        reads_on = fresh and (touched.get((node, first - 1)) or touched.get((node, first)))
        if len(touched) >= _KEPT_TOUCHED:
            touched.clear()
        for index in range(first, last + 1):
            touched[node, index] = True
        end = (inode.size - 1) // self.image.block_size
        if not reads_on or last >= end or (node, last + 1) in touched:
            return
        if self.workers < 2 or self._reads < _WARM:
            return
        wanted = self._wanted
        if wanted is None:
            from _queue import SimpleQueue

            wanted = SimpleQueue()
            if not self._thread(self._look_ahead, wanted):
                self.workers = 1
                return
            self._wanted = wanted
        if wanted.qsize() < _WAITING:
            end = min(last + _AHEAD, end)
            wanted.put((inode, last + 1, end))
            for index in range(last + 1, end + 1):
                touched.setdefault((node, index), False)

    def _readdir(self, node: int, request: memoryview) -> tuple[bytes, ...]:
        """Return as many names as fit, from the place the kernel names; "." and ".." stand at places 0 and 1."""
        _, place, room = fuse.READ_IN.unpack_from(request)
        ref = self._ref(node)
        inode, entries = self._inode(ref), self._directory(ref)
        own = ((b".", inode.number, layout.DIR), (b"..", inode.parent, layout.DIR))
        out = []
        while place < len(entries) + 2:
            if place < 2:
                name, number, kind = own[place]
            else:
                name, target, kind = entries[place - 2]
                number = target + 2
            record = fuse.DIRENT.pack(number or 1, place + 1, len(name), _DT[kind]) + name
            record += bytes(-len(record) % 8)
            room -= len(record)
            if room < 0:
                break
            out.append(record)
            place += 1
        return (b"".join(out),)

    def _readdirplus(self, node: int, request: memoryview) -> tuple[bytes, ...]:
        """Return as many names with their attributes as fit."""
        _, place, room = fuse.READ_IN.unpack_from(request)
        ref = self._ref(node)
        known, records = self._records
        if known != ref:
            records = self._plus(ref)
            self._records = ref, records
        out = []
        for record in records[place:] if place else records:
            room -= len(record)
            if room < 0:
                break
            out.append(record)
        return (b"".join(out),)

    def _plus(self, ref: int) -> list[bytes]:
        """Return the fuse_direntplus records of a directory."""
        image, owner, pack = self.image, self.owner, fuse.DIRENT_PLUS.pack
        status, unit, root = image.status, image.block_size, image.root.ref
        inode = self._inode(ref)
        # The kernel wants no attributes for these two: all zeros.
        head, dot = bytes(fuse.ENTRY.size + fuse.ATTR.size), fuse.DIRENT.pack
        records = [
            head + dot(inode.number or 1, 1, 1, _DT[layout.DIR]) + b".\0\0\0\0\0\0\0",
            head + dot(inode.parent or 1, 2, 2, _DT[layout.DIR]) + b"..\0\0\0\0\0\0",
        ]
        place = 2
        for name, target, kind in self._directory(ref):
            place += 1
            number, mode, nlink, uid, gid, rdev, size, mtime = status(target)
            if owner:
                uid, gid = owner
            long = len(name)
            records.append(
                pack(
                    # fuse_entry_out
                    fuse.ROOT_NODE if target == root else target + 2,
                    *(0, _FOREVER, _FOREVER, 0, 0),
                    # fuse_attr
                    *(number, size, (size + 511) >> 9, mtime, mtime, mtime, 0, 0, 0),
                    *(mode, nlink, uid, gid, rdev, unit, 0),
                    # fuse_dirent
                    *(number or 1, place, long, _DT[kind]),
                )
                + name
                + _PADDING[-long & 7]
            )
        return records

    def _getxattr(self, node: int, request: memoryview) -> tuple[bytes, ...] | int:
        if not self.has_xattrs:
            return -_ENOSYS  # the kernel stops asking
        size, _ = fuse.XATTR.unpack_from(request)
        name = bytes(request[fuse.XATTR.size : -1])
        value = self.image.xattrs(self._inode(self._ref(node))).get(name)
        return -_ENODATA if value is None else self._sized(value, size)

    def _listxattr(self, node: int, request: memoryview) -> tuple[bytes, ...] | int:
        if not self.has_xattrs:
            return -_ENOSYS
        size, _ = fuse.XATTR.unpack_from(request)
        names = b"".join(name + b"\0" for name in self.image.xattrs(self._inode(self._ref(node))))
        return self._sized(names, size)

    @staticmethod
    def _sized(value: bytes, size: int) -> tuple[bytes, ...] | int:
        """Answer a question for a value: its length when no room was offered, else the value if it fits."""
        if not size:
            return (fuse.XATTR.pack(len(value), 0),)
        return -_ERANGE if len(value) > size else (value,)

    def _statfs(self, _node: int, _request: memoryview) -> tuple[bytes, ...]:
        superblock = self.image.superblock
        blocks = -(-superblock.bytes_used // _PAGE)
        return (fuse.STATFS_OUT.pack(blocks, 0, 0, superblock.inode_count, 0, _PAGE, 255, _PAGE, 0),)
