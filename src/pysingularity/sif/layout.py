# SPDX-License-Identifier: Apache-2.0
"""The bytes of a SIF file: the global header and the descriptors of its objects, as values without any I/O.

A SIF file is a 128-byte header at offset 0, a table of descriptors (585 bytes each, 48 by default, at offset 4096),
and the objects themselves, in any order, each described by one slot of the table. All integers are little-endian and
all structures are packed. Files and descriptors opened for reading or changing are `sif.file`.

Everything read here may be hostile: `Header.unpack` and `unpack_table` accept nothing that points outside the file,
overlaps something else or repeats an id. Start ring: imports only struct, posix and errors.
"""

from __future__ import annotations

import posix
from _struct import Struct, pack, unpack_from

from pysingularity.errors import ImageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

HEADER = Struct("<32s10s3s3s16s8q")
DESCRIPTOR = Struct("<iB3I3q2q2q128s384s")
#: What a signature covers of a descriptor: neither its place nor its modification time, so that objects may move.
SIGNED = Struct("<iB2I2q2q128s384s")

MAGIC = b"SIF_MAGIC\0"
VERSION = b"01\0"
#: Versions that are read: the C library of Singularity 3.0 wrote 00 first.
VERSIONS = (b"00\0", b"01\0")
LAUNCH = b"#!/usr/bin/env run-singularity\n"
#: Where the table stands in files that we write, and how many slots it has.
TABLE_OFFSET, SLOTS = 4096, 48
DATA_OFFSET = TABLE_OFFSET + SLOTS * DESCRIPTOR.size
#: More slots than anybody needs; bounds the memory that a hostile file can ask for (9.6 MB).
MOST_SLOTS = 16384
PARTITION_ALIGNMENT = 4096
#: Go's zero time in Unix seconds: what "no time" looks like in images made in deterministic mode.
NO_TIME = -62135596800
#: Marks a group number in the fields `group` and `link`; with number 0 it says "no group".
GROUP_MASK = 0xF0000000

# Types of objects.
DEFINITION, ENVIRONMENT, LABELS, PARTITION, SIGNATURE, JSON, RAW, CRYPTO_MESSAGE, SBOM, OCI_ROOT_INDEX, OCI_BLOB = (
    range(0x4001, 0x400C)
)
# File systems of a partition.
SQUASHFS, EXT3, ARCHIVE, RAW_FS, ENCRYPTED_SQUASHFS, GOCRYPTFS_SQUASHFS = range(1, 7)
# Roles of a partition.
SYSTEM, PRIMARY, DATA, OVERLAY = range(1, 5)
# Hashes of a signature.
SHA256, SHA384, SHA512, BLAKE2S, BLAKE2B = range(1, 6)
# Forms and kinds of a crypto message.
OPENPGP, PEM = 1, 2
CLEAR_SIGNATURE, RSA_OAEP = 0x100, 0x200

#: Names of architectures (Go's, as in OCI images) by the two digits of a SIF file, in numeric order from "01".
ARCHITECTURES = (
    *("386", "amd64", "arm", "arm64", "ppc64", "ppc64le", "mips", "mipsle", "mips64", "mips64le"),
    *("s390x", "riscv64", "loong64"),
)


def arch_code(name: str) -> bytes:
    """Return the three bytes that stand for an architecture.

    Raises:
        ImageError: SIF has no code for it.
    """
    if name in ARCHITECTURES:
        return b"%02d\0" % (ARCHITECTURES.index(name) + 1)
    raise ImageError(
        "unknown-architecture", f"SIF files have no code for the architecture {name}", hint=", ".join(ARCHITECTURES)
    )


def arch_name(code: bytes) -> str:
    """Return the name of an architecture, "unknown" for none or one that is not known."""
    digits = code[:2]
    if len(digits) == 2 and digits.isdigit() and 1 <= int(digits) <= len(ARCHITECTURES):
        return ARCHITECTURES[int(digits) - 1]
    return "unknown"


class Header:
    """The global header. `table_length` and `data_length` are bytes; times are Unix seconds and may be negative."""

    __slots__ = (
        *("launch", "version", "arch", "identity", "created", "modified", "free", "total"),
        *("table_offset", "table_length", "data_offset", "data_length"),
    )

    def __init__(
        self,
        *,
        launch: bytes = LAUNCH,
        version: bytes = VERSION,
        arch: bytes = b"00\0",
        identity: bytes = bytes(16),
        created: int = NO_TIME,
        modified: int = NO_TIME,
        free: int = SLOTS,
        total: int = SLOTS,
        table_offset: int = TABLE_OFFSET,
        table_length: int = SLOTS * DESCRIPTOR.size,
        data_offset: int = DATA_OFFSET,
        data_length: int = 0,
    ) -> None:
        self.launch, self.version, self.arch, self.identity = launch, version, arch, identity
        self.created, self.modified, self.free, self.total = created, modified, free, total
        self.table_offset, self.table_length = table_offset, table_length
        self.data_offset, self.data_length = data_offset, data_length

    @classmethod
    def unpack(cls, data: bytes, size: int, path: str = "SIF") -> Header:
        """Return the header that `data` starts with.

        Arguments:
            data: the first 128 bytes of the file.
            size: bytes in the whole file; the table must lie inside.
            path: name for messages.

        Raises:
            ImageError: this is no SIF file ("not-sif"), one of a newer version, or a damaged one ("damaged-sif").
        """
        if len(data) < HEADER.size or data[32:42] != MAGIC:
            raise ImageError("not-sif", f"{path}: not a SIF file")
        launch, _, version, arch, identity, *numbers = HEADER.unpack_from(data)
        if version not in VERSIONS:
            text = version.rstrip(b"\0").decode("ascii", "replace")
            raise ImageError("sif-version", f"{path}: SIF version {text!r} is not known here (00 and 01 are)")
        created, modified, free, total, table_offset, table_length, data_offset, data_length = numbers
        header = cls(
            launch=launch.rstrip(b"\0"),
            version=version,
            arch=arch,
            identity=identity,
            created=created,
            modified=modified,
            free=free,
            total=total,
            table_offset=table_offset,
            table_length=table_length,
            data_offset=data_offset,
            data_length=data_length,
        )
        if not 0 <= total <= MOST_SLOTS or not 0 <= free <= total:
            raise damaged(path, f"{free} free of {total} descriptors")
        if table_offset < HEADER.size or table_offset + total * DESCRIPTOR.size > size:
            raise damaged(path, "the table of descriptors lies outside the file (is it complete?)")
        if data_offset < 0 or data_length < 0 or data_offset + data_length >= 1 << 63:
            raise damaged(path, "the data region has impossible bounds")
        return header

    def pack(self) -> bytes:
        """Return the 128 bytes of the header."""
        return HEADER.pack(
            *(self.launch, MAGIC, self.version, self.arch, self.identity, self.created, self.modified),
            *(self.free, self.total, self.table_offset, self.table_length, self.data_offset, self.data_length),
        )

    def signed_bytes(self) -> bytes:
        """Return the 61 bytes that a signature covers."""
        return pack("<32s10s3s16s", self.launch, MAGIC, self.version, self.identity)

    @property
    def uuid(self) -> str:
        """The identity in its usual spelling."""
        text = self.identity.hex()
        return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"

    @property
    def deterministic(self) -> bool:
        """Whether the file was made without identity and times, so that changes should add none."""
        return self.identity == bytes(16) and self.created == NO_TIME

    def __repr__(self) -> str:
        return f"Header({arch_name(self.arch)} {self.uuid} {self.total - self.free}/{self.total} objects)"


class Descriptor:
    """One object of a SIF file.

    Attributes are the fields of the format: `group` and `link` raw (see `group_number`, `linked_group`), `offset` and
    `size` in bytes, `padded` the size with the padding before the object, `name` and `extra` without trailing NULs.
    """

    __slots__ = (
        *("type", "id", "group", "link", "offset", "size", "padded", "created", "modified", "uid", "gid"),
        *("name", "extra"),
    )

    def __init__(
        self,
        type: int,  # noqa: A002
        *,
        id: int = 0,  # noqa: A002
        group: int = GROUP_MASK | 1,
        link: int = 0,
        offset: int = 0,
        size: int = 0,
        padded: int = 0,
        created: int = NO_TIME,
        modified: int = NO_TIME,
        uid: int = 0,
        gid: int = 0,
        name: bytes = b"",
        extra: bytes = b"",
    ) -> None:
        self.type, self.id, self.group, self.link = type, id, group, link
        self.offset, self.size, self.padded = offset, size, padded
        self.created, self.modified, self.uid, self.gid = created, modified, uid, gid
        self.name, self.extra = name, extra

    @classmethod
    def unpack(cls, data: bytes, offset: int = 0) -> Descriptor | None:
        """Return the descriptor at `offset` of the table, or None for a free slot."""
        fields = DESCRIPTOR.unpack_from(data, offset)
        if not fields[1]:
            return None
        self = cls.__new__(cls)
        self.type, _, self.id, self.group, self.link, self.offset, self.size, self.padded = fields[:8]
        self.created, self.modified, self.uid, self.gid = fields[8:12]
        self.name, self.extra = fields[12].rstrip(b"\0"), fields[13].rstrip(b"\0")
        return self

    def pack(self) -> bytes:
        """Return the 585 bytes of the slot."""
        return DESCRIPTOR.pack(
            *(self.type, 1, self.id, self.group, self.link, self.offset, self.size, self.padded),
            *(self.created, self.modified, self.uid, self.gid, self.name, self.extra),
        )

    def signed_bytes(self, first: int) -> bytes:
        """Return what a signature covers; ids count from `first`, the lowest id of the group."""
        return SIGNED.pack(
            *(self.type, 1, self.id - first, self.link, self.size, self.created, self.uid, self.gid),
            *(self.name, self.extra),
        )

    @property
    def group_number(self) -> int:
        """The group the object belongs to, 0 for none."""
        return self.group & ~GROUP_MASK

    @property
    def linked_group(self) -> int | None:
        """The group that the object speaks of (a signature), or None when it names one object or nothing."""
        return self.link & ~GROUP_MASK if self.link & GROUP_MASK == GROUP_MASK else None

    @property
    def partition(self) -> tuple[int, int, bytes]:
        """File system, role and architecture code of a partition; zeros for any other object."""
        if self.type != PARTITION:
            return 0, 0, b"00\0"
        file_system, role, arch = unpack_from("<ii3s", self.extra.ljust(11, b"\0"))
        return file_system, role, arch

    @property
    def is_primary(self) -> bool:
        """Whether this is the primary system partition: the root file system of the container."""
        return self.type == PARTITION and self.partition[1] == PRIMARY

    @property
    def file_name(self) -> str:
        """The object's name as text."""
        return self.name.partition(b"\0")[0].decode("utf-8", "surrogateescape")

    def __repr__(self) -> str:
        return f"Descriptor({self.id}: {self.type:#x} {self.offset}+{self.size} {self.file_name!r})"


def unpack_table(table: bytes, header: Header, size: int, path: str = "SIF") -> list[Descriptor]:
    """Return the used descriptors in the order of their slots, having looked at each with suspicion.

    Arguments:
        table: the bytes of all slots.
        header: the header of the same file.
        size: bytes in the whole file.
        path: name for messages.

    Raises:
        ImageError: an object lies outside the file, overlaps another one, the header or the table, or repeats an id;
            or there are two primary partitions.
    """
    found: list[Descriptor] = []
    ids = set()
    primaries = 0
    width = DESCRIPTOR.size
    for at in range(0, header.total * width, width):
        if not table[at + 4]:
            continue
        one = Descriptor.unpack(table, at)
        if one is None:
            continue
        if one.id in ids or not one.id:
            raise damaged(path, f"two objects have the id {one.id}" if one.id else "an object has the id 0")
        ids.add(one.id)
        if one.offset < 0 or one.size < 0 or one.offset + one.size > size:
            raise damaged(path, f"object {one.id} lies outside the file (is it complete?)")
        primaries += one.is_primary
        found.append(one)
    if primaries > 1:
        raise damaged(path, "two primary partitions")
    taken = [(0, HEADER.size, "the header"), (header.table_offset, header.total * width, "the table of descriptors")]
    check_overlaps([*taken, *((one.offset, one.size, f"object {one.id}") for one in found)], path)
    return found


def check_overlaps(regions: Sequence[tuple[int, int, str]], path: str) -> None:
    """Raise when two regions (offset, size, name) share bytes.

    Raises:
        ImageError: "damaged-sif", naming both.
    """
    end, before = 0, ""
    for offset, length, name in sorted(region for region in regions if region[1]):
        if offset < end:
            raise damaged(path, f"{name} overlaps {before}")
        end, before = offset + length, name


def damaged(path: str, why: str) -> ImageError:
    """Return the error for a SIF file that cannot be trusted."""
    return ImageError(
        "damaged-sif", f"{path}: damaged SIF file: {why}", hint="fetch or build the image again; compare its checksum"
    )


def align(offset: int, alignment: int) -> int:
    """Return the next multiple of `alignment` at or after `offset`; 0 and 1 ask for none."""
    return -(-offset // alignment) * alignment if alignment > 1 else offset


def partition_extra(file_system: int, role: int, arch: str) -> bytes:
    """Return the extra field of a partition."""
    return pack("<ii3s", file_system, role, arch_code(arch))


def signature_extra(hash_type: int, fingerprint: bytes = b"") -> bytes:
    """Return the extra field of a signature; `fingerprint` is a PGP key's 20 bytes, or nothing for other keys."""
    return pack("<i256s", hash_type, fingerprint)


def crypto_message_extra(form: int, kind: int) -> bytes:
    """Return the extra field of a crypto message."""
    return pack("<ii", form, kind)


def sbom_extra(form: int) -> bytes:
    """Return the extra field of a bill of materials."""
    return pack("<i", form)


def host_arch() -> str:
    """Return this machine's architecture in OCI's words; whether SIF has a code for it, `arch_code` knows."""
    machine = posix.uname().machine
    known = {
        "x86_64": "amd64",
        "aarch64": "arm64",
        "armv7l": "arm",
        "armv6l": "arm",
        "loongarch64": "loong64",
        "i386": "386",
        "i486": "386",
        "i586": "386",
        "i686": "386",
        "mips64el": "mips64le",
        "mipsel": "mipsle",
    }
    return known.get(machine, machine)
