# SPDX-License-Identifier: Apache-2.0
"""SIF files on disk: open, read objects, create, add, delete, make another partition the primary one.

The bytes are `sif.layout`; what the objects mean is the business of `image`. Changes write the new object first, then
the table, then the header, each durable before the next, so that a crash leaves the old file. A file is locked while
it is changed. Start ring (the reading part): imports only posix, errno, time and our own modules.
"""

from __future__ import annotations

import errno
import posix as os  # the whole `os` costs a millisecond of every start
import time

from pysingularity.errors import ImageError
from pysingularity.sif import layout
from pysingularity.sif.layout import (
    DESCRIPTOR,
    GROUP_MASK,
    HEADER,
    NO_TIME,
    PARTITION,
    PRIMARY,
    SYSTEM,
    Descriptor,
    Header,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import TracebackType

#: Objects that are read into memory as a whole (metadata, signatures, definition files) may have this many bytes.
READ_LIMIT = 64 << 20
CHUNK = 1 << 20


class SifObject:
    """An object to be written.

    Arguments:
        type: one of the types of `sif.layout`.
        data: its bytes, or None.
        fd: a descriptor of a file with its bytes, read from position 0, or None.
        size: bytes of the object; needed for `fd` and for objects that stand in the file already.
        offset: where it stands already (neither `data` nor `fd` given).
        group: number of its group, 0 for none.
        link: an id, or a group number with `GROUP_MASK`.
        name: at most 127 bytes.
        extra: the type's extra field.
        alignment: 4096 by default for partitions, none for everything else.
    """

    __slots__ = ("alignment", "data", "extra", "fd", "group", "link", "name", "offset", "size", "type")

    def __init__(
        self,
        type: int,  # noqa: A002
        data: bytes | None = None,
        *,
        fd: int | None = None,
        size: int | None = None,
        offset: int | None = None,
        group: int = 1,
        link: int = 0,
        name: str | bytes = b"",
        extra: bytes = b"",
        alignment: int | None = None,
    ) -> None:
        self.type, self.data, self.fd, self.offset = type, data, fd, offset
        self.size = len(data) if data is not None else os.fstat(fd).st_size if size is None and fd is not None else size
        self.group, self.link, self.extra = group, link, extra
        self.name = name.encode("utf-8", "surrogateescape") if isinstance(name, str) else name
        self.alignment = (layout.PARTITION_ALIGNMENT if type == PARTITION else 1) if alignment is None else alignment
        if len(self.name) > 127 or len(extra) > 384:
            raise ImageError("object-name", f"the name of a SIF object may have 127 bytes: {name!r}")
        if self.alignment < 0:
            raise ImageError("object-alignment", f"an alignment of {self.alignment} bytes is not possible")

    def describe(self, number: int, end: int, when: int) -> Descriptor:
        """Return the descriptor for this object as number `number`, standing behind `end`."""
        offset = layout.align(end, self.alignment) if self.offset is None else self.offset
        size = self.size or 0
        return Descriptor(
            self.type,
            id=number,
            group=GROUP_MASK | self.group,
            link=self.link,
            offset=offset,
            size=size,
            padded=offset - end + size,
            created=when,
            modified=when,
            name=self.name,
            extra=self.extra,
        )


class SifFile:
    """An open SIF file: `header`, `descriptors` (in slot order), `fd`, `size` in bytes.

    Make one with `SifFile.open` or `create`; use it as a context manager, or close it.
    """

    def __init__(self, fd: int, path: str, *, own: bool) -> None:
        self.fd, self.path, self._own = fd, path, own
        self.size = os.fstat(fd).st_size
        self.header = Header.unpack(os.pread(fd, HEADER.size, 0), self.size, path)
        table = read_exactly(fd, self.header.total * DESCRIPTOR.size, self.header.table_offset, path)
        self.descriptors = layout.unpack_table(table, self.header, self.size, path)
        self._table = bytearray(table)

    @classmethod
    def open(cls, source: str | int, *, writable: bool = False, path: str = "") -> SifFile:
        """Open a file by its path, or look at one by a descriptor (which stays the caller's).

        Arguments:
            source: path or descriptor.
            writable: open for changes, and lock the file against others who want to change it.
            path: name for messages when `source` is a descriptor.

        Raises:
            ImageError: missing, no SIF file, damaged, or locked.
        """
        if isinstance(source, int):
            return cls(source, path or f"descriptor {source}", own=False)
        flags = (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC
        try:
            fd = os.open(source, flags)
        except OSError as error:
            raise ImageError("no-such-image", f"{source}: {(error.strerror or str(error)).lower()}") from None
        try:
            if writable:
                lock(fd, source)
            return cls(fd, source, own=True)
        except BaseException:
            os.close(fd)
            raise

    def close(self) -> None:
        """Close the file, unless it was opened by the caller."""
        if self._own and self.fd >= 0:
            os.close(self.fd)
        self.fd = -1

    def __enter__(self) -> SifFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def primary(self) -> Descriptor | None:
        """Return the primary system partition, if there is one."""
        for one in self.descriptors:
            if one.is_primary:
                return one
        return None

    def overlays(self) -> list[Descriptor]:
        """Return the overlay partitions, in order."""
        return [one for one in self.descriptors if one.type == PARTITION and one.partition[1] == layout.OVERLAY]

    def get(self, number: int) -> Descriptor:
        """Return the object with an id.

        Raises:
            ImageError: there is none.
        """
        for one in self.descriptors:
            if one.id == number:
                return one
        raise ImageError("no-such-object", f"{self.path}: no object with id {number}", hint="see: singularity sif list")

    def named(self, name: str, type: int | None = None) -> Descriptor | None:  # noqa: A002
        """Return the first object of a name (and type), if there is one."""
        for one in self.descriptors:
            if one.file_name == name and (type is None or one.type == type):
                return one
        return None

    def of_type(self, type: int) -> Descriptor | None:  # noqa: A002
        """Return the first object of a type, if there is one."""
        for one in self.descriptors:
            if one.type == type:
                return one
        return None

    def read(self, descriptor: Descriptor, limit: int = READ_LIMIT) -> bytes:
        """Return the bytes of an object.

        Raises:
            ImageError: it has more than `limit` bytes.
        """
        if descriptor.size > limit:
            raise ImageError(
                "object-too-large",
                f"{self.path}: object {descriptor.id} has {descriptor.size} bytes, more than {limit}",
            )
        return read_exactly(self.fd, descriptor.size, descriptor.offset, self.path)

    def chunks(self, descriptor: Descriptor) -> Iterator[bytes]:
        """Yield the bytes of an object piece by piece, however large it is."""
        done = 0
        while done < descriptor.size:
            piece = read_exactly(self.fd, min(CHUNK, descriptor.size - done), descriptor.offset + done, self.path)
            yield piece
            done += len(piece)

    # Changes, in place.

    def add(self, item: SifObject, *, when: int | None = None) -> Descriptor:
        """Append an object and return its descriptor. A full disk leaves the file as it was.

        Arguments:
            item: the object, with `data` or `fd`.
            when: time stamp; by default now, or none in files made without times.

        Raises:
            ImageError: no free slot, or a second primary partition.
        """
        slot = self._free_slot()
        extra_role = Descriptor(item.type, extra=item.extra).partition[1]
        if extra_role == PRIMARY and self.primary() is not None:
            raise ImageError("second-primary", f"{self.path}: has a primary partition already")
        when = self._when(when)
        end = self._end()
        new = item.describe(slot + 1, end, when)
        try:
            write_object(self.fd, item, new.offset)
            if os.fstat(self.fd).st_size < new.offset + new.size:  # an empty object behind padding
                os.ftruncate(self.fd, new.offset + new.size)
            os.fsync(self.fd)
        except BaseException:
            os.ftruncate(self.fd, self.size)
            raise
        self._set_slot(slot, new)
        if new.is_primary:
            self.header.arch = new.partition[2]
        self.header.free -= 1
        self.header.data_length = new.offset + new.size - self.header.data_offset
        self.size = max(self.size, new.offset + new.size)
        self._publish(when)
        return new

    def delete(self, number: int, *, zero: bool = False, compact: bool = False, when: int | None = None) -> None:
        """Remove an object.

        Arguments:
            number: its id.
            zero: overwrite its bytes.
            compact: cut the file behind the last object that remains.
            when: as for `add`.

        Raises:
            ImageError: there is no such object.
        """
        one = self.get(number)
        when = self._when(when)
        if one.is_primary:
            self.header.arch = b"00\0"
        self._set_slot(self._slot_of(one), None)
        self.header.free += 1
        if compact:
            last = max((other.offset + other.size for other in self.descriptors), default=0)
            self.header.data_length = max(last - self.header.data_offset, 0)
        self._publish(when)
        # Only now may the bytes go: until the table was durable somebody could still have found the object.
        if zero:
            zero_range(self.fd, one.offset, one.size)
        if compact:
            self.size = self.header.data_offset + self.header.data_length
            os.ftruncate(self.fd, self.size)
        os.fsync(self.fd)

    def set_primary(self, number: int, *, when: int | None = None) -> None:
        """Make a system partition the primary one; the former primary becomes an ordinary system partition.

        Raises:
            ImageError: the object is no system partition.
        """
        one = self.get(number)
        _, role, arch = one.partition
        if role == PRIMARY:
            return
        if role != SYSTEM:
            raise ImageError("not-system", f"{self.path}: object {number} is not a system partition")
        when = self._when(when)
        before = self.primary()
        if before is not None:
            self._change_role(before, SYSTEM, when)
        self._change_role(one, PRIMARY, when)
        self.header.arch = arch
        self._publish(when)

    def _change_role(self, one: Descriptor, role: int, when: int) -> None:
        one.extra = one.extra[:4].ljust(4, b"\0") + role.to_bytes(4, "little") + one.extra[8:]
        one.modified = when
        self._set_slot(self._slot_of(one), one)

    def _when(self, when: int | None) -> int:
        if when is not None:
            return when
        return NO_TIME if self.header.deterministic else int(time.time())

    def _end(self) -> int:
        """Return where the next object may start: behind the data region and behind every object."""
        header = self.header
        region = header.data_offset + header.data_length
        if region > max(self.size, header.data_offset):
            raise layout.damaged(self.path, "the data region reaches behind the end of the file")
        table = header.table_offset + header.total * DESCRIPTOR.size
        return max(region, table, *(one.offset + one.size for one in self.descriptors), 0)

    def _free_slot(self) -> int:
        ids = {one.id for one in self.descriptors}
        for slot in range(self.header.total):
            if not self._table[slot * DESCRIPTOR.size + 4] and slot + 1 not in ids and self.header.free:
                return slot
        raise ImageError("sif-full", f"{self.path}: all {self.header.total} slots for objects are taken")

    def _slot_of(self, one: Descriptor) -> int:
        for slot in range(self.header.total):
            found = Descriptor.unpack(bytes(self._table[slot * DESCRIPTOR.size : (slot + 1) * DESCRIPTOR.size]))
            if found is not None and found.id == one.id:
                return slot
        raise ImageError("no-such-object", f"{self.path}: no object with id {one.id}")

    def _set_slot(self, slot: int, one: Descriptor | None) -> None:
        """Change one slot of the table in memory; all other bytes stay as they were read."""
        data = bytes(DESCRIPTOR.size) if one is None else one.pack()
        self._table[slot * DESCRIPTOR.size : (slot + 1) * DESCRIPTOR.size] = data
        self.descriptors = layout.unpack_table(bytes(self._table), self.header, 1 << 62, self.path)

    def _publish(self, when: int) -> None:
        self.header.modified = when
        write_exactly(self.fd, bytes(self._table), self.header.table_offset)
        os.fsync(self.fd)
        write_exactly(self.fd, self.header.pack(), 0)
        os.fsync(self.fd)


def create(
    fd: int,
    objects: Sequence[SifObject],
    *,
    identity: bytes,
    when: int = NO_TIME,
    launch: bytes = layout.LAUNCH,
    slots: int = layout.SLOTS,
) -> list[Descriptor]:
    """Write a SIF file around the objects and return their descriptors. Nothing is made durable.

    Arguments:
        fd: a file open for reading and writing. Objects that have an `offset` stand in it already.
        objects: in the order of their ids; an object in place must stand where the order puts it, or further behind.
        identity: 16 bytes (`random_identity`, `identity_from`, or zeros for the deterministic mode).
        when: Unix seconds, for the file and all its objects.
        launch: first line of the file, at most 31 bytes.
        slots: size of the table.

    Raises:
        ImageError: more objects than slots, two primary partitions, or overlapping objects.
    """
    if len(objects) > slots or len(launch) > 31:
        raise ImageError("sif-full", f"{len(objects)} objects do not fit into {slots} slots")
    data_offset = layout.TABLE_OFFSET + slots * DESCRIPTOR.size
    end, arch, made = data_offset, b"00\0", []
    for number, item in enumerate(objects, 1):
        one = item.describe(number, end, when)
        write_object(fd, item, one.offset)
        if one.is_primary:
            if arch != b"00\0":
                raise ImageError("second-primary", "a SIF file has one primary partition")
            arch = one.partition[2]
        made.append(one)
        end = max(end, one.offset + one.size)
    layout.check_overlaps([(0, data_offset, "the table"), *((one.offset, one.size, repr(one)) for one in made)], "SIF")
    header = Header(
        launch=launch,
        arch=arch,
        identity=identity,
        created=when,
        modified=when,
        free=slots - len(objects),
        total=slots,
        table_length=slots * DESCRIPTOR.size,
        data_offset=data_offset,
        data_length=end - data_offset,
    )
    write_exactly(fd, b"".join(one.pack() for one in made).ljust(slots * DESCRIPTOR.size, b"\0"), layout.TABLE_OFFSET)
    write_exactly(fd, header.pack(), 0)
    os.ftruncate(fd, end)
    return made


def plan(objects: Sequence[SifObject], slots: int = layout.SLOTS) -> list[int]:
    """Return the offsets at which `create` will put the objects; sizes must be known of all but the last."""
    end, offsets = layout.TABLE_OFFSET + slots * DESCRIPTOR.size, []
    for item in objects:
        offset = layout.align(end, item.alignment) if item.offset is None else item.offset
        offsets.append(offset)
        end = offset + (item.size or 0)
    return offsets


def random_identity() -> bytes:
    """Return a random UUID (version 4)."""
    return _stamped(os.urandom(16), 4)


def identity_from(digest: bytes) -> bytes:
    """Return a UUID made from a digest (version 8 of RFC 9562): the same content has the same identity."""
    return _stamped(digest[:16], 8)


def _stamped(data: bytes, version: int) -> bytes:
    number = bytearray(data)
    number[6] = number[6] & 0x0F | version << 4
    number[8] = number[8] & 0x3F | 0x80
    return bytes(number)


def lock(fd: int, path: str) -> None:
    """Lock a file that will be changed; file systems without locks are taken as they are.

    Raises:
        ImageError: somebody else changes it just now.
    """
    import fcntl  # only for changes

    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise ImageError("image-busy", f"{path}: is being changed by another process") from None
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            raise


def write_object(fd: int, item: SifObject, offset: int) -> None:
    """Write an object's bytes at an offset; nothing to do for one that stands there already."""
    if item.data is not None:
        write_exactly(fd, item.data, offset)
    elif item.fd is not None:
        copy_range(item.fd, 0, fd, offset, item.size or 0)
    elif item.offset is None:
        raise ImageError("empty-object", "an object of a SIF file without content")


def copy_range(source: int, at: int, target: int, offset: int, size: int) -> None:
    """Copy bytes between files inside the kernel (sharing blocks where the file system can), or by hand.

    Raises:
        ImageError: the source is shorter than promised.
    """
    done, kernel = 0, True
    while done < size:
        if kernel:
            try:
                count = os.copy_file_range(source, target, size - done, at + done, offset + done)
            except OSError as error:
                # Older kernels refuse between file systems, some file systems always.
                if error.errno not in (errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM):
                    raise
                kernel = False
                continue
            if not count:  # also what some virtual file systems answer when they cannot
                kernel = False
                continue
        else:
            piece = os.pread(source, min(CHUNK, size - done), at + done)
            if not piece:
                raise ImageError("short-file", f"a file ended after {done} of {size} bytes while it was copied")
            write_exactly(target, piece, offset + done)
            count = len(piece)
        done += count


def zero_range(fd: int, offset: int, size: int) -> None:
    """Overwrite bytes with zeros."""
    zeros = bytes(min(size, CHUNK))
    for at in range(offset, offset + size, CHUNK):
        write_exactly(fd, zeros[: offset + size - at], at)


def read_exactly(fd: int, size: int, offset: int, path: str) -> bytes:
    """Return `size` bytes at `offset`.

    Raises:
        ImageError: the file ends before.
    """
    data = os.pread(fd, size, offset)
    while len(data) < size:
        more = os.pread(fd, size - len(data), offset + len(data))
        if not more:
            raise layout.damaged(path, f"the file ends after {offset + len(data)} bytes")
        data += more
    return data


def write_exactly(fd: int, data: bytes, offset: int) -> None:
    """Write all of `data` at `offset`."""
    view = memoryview(data)
    while view:
        count = os.pwrite(fd, view, offset)
        view, offset = view[count:], offset + count
