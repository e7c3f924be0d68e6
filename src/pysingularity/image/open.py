# SPDX-License-Identifier: Apache-2.0
"""What is this path? One `Image` over SIF files, bare squashfs and ext3 images (`.simg`, `.img`) and sandboxes.

Content decides, never the name: images of Singularity 2.x may begin with a line that makes them programs, and their
file system starts behind it. Nothing is mounted and nothing inside the file system is read here; that is `image.mount`,
`squashfs.reader` and `image.metadata`. Start ring: imports only posix, stat and struct; `sif` for SIF files.
"""

from __future__ import annotations

import posix as os  # the whole `os` costs a millisecond of every start
import stat
from _struct import unpack_from

from pysingularity.errors import ImageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Self

    from pysingularity.sif.file import SifFile
    from pysingularity.sif.layout import Descriptor
    from pysingularity.squashfs.reader import SquashfsImage
    from pysingularity.trust.encryption import Key, Plain

#: Names of the file systems that a partition can hold, by SIF's numbers.
FILE_SYSTEMS = {1: "squashfs", 2: "ext3", 3: "archive", 4: "raw", 5: "encrypted", 6: "gocryptfs"}
#: What stands at byte 32 of a SIF file; `sif` itself is loaded when it does.
SIF_MAGIC = b"SIF_MAGIC\0"
HEAD = 4096
#: How far the line that starts `run-singularity` may reach in an image of Singularity 2.x.
LAUNCH_REACH = 2048
LAUNCH_WORD = b" run-singularity\n"
SQUASHFS_MAGIC, SQUASHFS_BIG_ENDIAN, EXT_MAGIC = b"hsqs", b"sqsh", 0xEF53
EXT_SUPERBLOCK = 1024
# Feature bits of ext2/3/4 (kernel: fs/ext4/ext4.h). More than these is ext4, which these images never were.
EXT_HAS_JOURNAL = 0x4
EXT_INCOMPATIBLE_ALLOWED = 0x2 | 0x4 | 0x10  # file types in directories, needs recovery, meta block groups
EXT_READ_ONLY_ALLOWED = 0x1 | 0x2 | 0x4  # sparse superblocks, large files, b-tree directories


class Partition:
    """A stretch of an image file that holds a file system: `offset` and `size` in bytes, `filesystem` by name."""

    __slots__ = ("filesystem", "id", "offset", "size")

    def __init__(self, filesystem: str, offset: int, size: int, id: int = 0) -> None:  # noqa: A002
        self.filesystem, self.offset, self.size, self.id = filesystem, offset, size, id

    def __repr__(self) -> str:
        return f"Partition({self.filesystem} {self.offset}+{self.size})"


class Image:
    """An open image.

    Attributes:
        kind: "sif", "squashfs", "ext3" or "sandbox".
        path: as it was given.
        fd: the file, open for reading; for a sandbox the folder, open as a path only.
        filesystem: what the root file system is: "squashfs", "ext3", "encrypted" (LUKS), "gocryptfs", "directory".
            An encrypted one is "squashfs" once a key has opened it.
        offset, size: where the root file system stands in the file, in bytes; zeros for a sandbox.
        arch: name of the architecture as in OCI images, "" when the image does not tell.
        overlays: overlay partitions of a SIF, in order.
        sif: the SIF file itself, None for other kinds.
        plain: where the bytes of a root file system come from that a key has opened, else None.
        reader: reads the root file system where that lies in more than one file (`image.pieces`), else None.
    """

    __slots__ = ("arch", "fd", "filesystem", "kind", "offset", "overlays", "path", "plain", "reader", "sif", "size")

    def __init__(
        self,
        kind: str,
        path: str,
        fd: int,
        filesystem: str,
        *,
        offset: int = 0,
        size: int = 0,
        arch: str = "",
        overlays: tuple[Partition, ...] = (),
        sif: SifFile | None = None,
    ) -> None:
        self.kind, self.path, self.fd, self.filesystem = kind, path, fd, filesystem
        self.offset, self.size, self.arch, self.overlays, self.sif = offset, size, arch, overlays, sif
        self.plain: Plain | None = None
        self.reader: SquashfsImage | None = None

    @property
    def locked(self) -> bool:
        """Whether a key is needed to read the root file system."""
        return self.filesystem in ("encrypted", "gocryptfs")

    def unlock(self, key: Key | None, *, recall: Callable[[bytes], bytes] | None = None) -> None:
        """Open an encrypted root file system with a key; any other image is left as it is.

        Arguments:
            recall: see `trust.encryption.open_partition`.

        Raises:
            UserError: "needs-key", "wrong-key". ImageError: damaged.
        """
        if self.locked:
            from pysingularity.trust.encryption import open_partition  # loads ciphers

            where = (self.fd, self.offset, self.size, self.sif)
            self.use(open_partition(*where, self.filesystem, key, self.path, recall=recall))

    def use(self, plain: Plain) -> None:
        """Take the opened root file system of this image."""
        self.plain, self.filesystem, self.offset, self.size = plain, "squashfs", 0, plain.size

    def close(self) -> None:
        """Close the file or folder."""
        if self.plain is not None:
            os.close(self.plain.fd)
            self.plain = None
        if self.fd >= 0:
            os.close(self.fd)
        self.fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Image({self.kind} {self.path!r} {self.filesystem} {self.offset}+{self.size})"


def open_image(path: str) -> Image:
    """Open an image of any kind.

    Raises:
        ImageError: "no-such-image" (missing), "unreadable-image" (permission, or neither file nor folder),
            "unknown-format", "no-partition" (a SIF file without a root file system), "damaged-sif".
    """
    # A fifo must not block, and a sandbox may be enterable without being readable.
    try:
        fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except NotADirectoryError:
        pass
    except OSError as error:
        raise _cannot_open(path, error) from None
    else:
        return Image("sandbox", path, fd, "directory")
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError as error:
        raise _cannot_open(path, error) from None
    try:
        return _recognize(path, fd)
    except BaseException:
        os.close(fd)
        raise


def _cannot_open(path: str, error: OSError) -> ImageError:
    if isinstance(error, (FileNotFoundError, NotADirectoryError)):
        return ImageError("no-such-image", f"{path}: no such image file or folder")
    return ImageError("unreadable-image", f"{path}: cannot be read: {error.strerror}")


def _recognize(path: str, fd: int) -> Image:
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise ImageError("unreadable-image", f"{path}: neither a file nor a folder")
    size = status.st_size
    head = os.pread(fd, HEAD, 0)
    if head[32:42] == SIF_MAGIC:
        return _sif(path, fd)
    offset = launch_length(head)
    if head[offset : offset + 4] == SQUASHFS_MAGIC:
        return Image("squashfs", path, fd, "squashfs", offset=offset, size=size - offset)
    if len(head) >= offset + EXT_SUPERBLOCK + 104 and unpack_from("<H", head, offset + 1080)[0] == EXT_MAGIC:
        check_ext3(head, offset, path)
        return Image("ext3", path, fd, "ext3", offset=offset, size=size - offset)
    raise ImageError("unknown-format", f"{path}: image format not recognized", hint=_guess(head, offset))


def launch_length(head: bytes) -> int:
    """Return how long the line is that makes an image of Singularity 2.x a program; 0 when there is none."""
    at = head[:LAUNCH_REACH].find(LAUNCH_WORD)
    return at + len(LAUNCH_WORD) if at > 0 else 0


def check_ext3(head: bytes, offset: int, path: str) -> None:
    """Refuse ext file systems with features that ext3 does not have.

    Raises:
        ImageError: "unknown-format".
    """
    compatible, incompatible, read_only = unpack_from("<3I", head, offset + EXT_SUPERBLOCK + 92)
    if not compatible & EXT_HAS_JOURNAL:
        raise ImageError("unknown-format", f"{path}: an ext file system without journal is no image")
    if incompatible & ~EXT_INCOMPATIBLE_ALLOWED or read_only & ~EXT_READ_ONLY_ALLOWED:
        raise ImageError("unknown-format", f"{path}: an ext4 file system is no image", hint="make it with mkfs.ext3")


def _sif(path: str, fd: int) -> Image:
    from pysingularity.sif import layout  # a millisecond that sandboxes and bare squashfs do without
    from pysingularity.sif.file import SifFile

    sif = SifFile.open(fd, path=path)
    primary = sif.primary()
    if primary is None:
        if any(one.type == layout.OCI_ROOT_INDEX for one in sif.descriptors):
            raise ImageError(
                "no-partition",
                f"{path}: holds OCI layers and no root file system",
                hint="pull the image again from its registry",
            )
        raise ImageError(
            "no-partition",
            f"{path}: SIF file without a root file system",
            hint=f"list its parts with: singularity sif list {path}",
        )
    filesystem, _, arch = primary.partition
    name = FILE_SYSTEMS.get(filesystem, "")
    if name not in ("squashfs", "ext3", "encrypted", "gocryptfs"):
        raise ImageError(
            "unknown-format", f"{path}: its root file system is of kind {name or filesystem}, which cannot be mounted"
        )
    arch_text = layout.arch_name(arch)
    return Image(
        "sif",
        path,
        fd,
        name,
        offset=primary.offset,
        size=primary.size,
        arch="" if arch_text == "unknown" else arch_text,
        overlays=tuple(_partition(one) for one in sif.overlays()),
        sif=sif,
    )


def _partition(one: Descriptor) -> Partition:
    return Partition(FILE_SYSTEMS.get(one.partition[0], "unknown"), one.offset, one.size, one.id)


def _guess(head: bytes, offset: int) -> str:
    """Return a hint about a file that is no image."""
    start = head.lstrip()[:64].lower()
    if not head:
        return "the file is empty"
    if start.startswith((b"bootstrap", b"#bootstrap")) or b"\nbootstrap:" in head.lower():
        return "this looks like a definition file; build it first: singularity build IMAGE.sif FILE"
    if head[:4] == b"\x7fELF":
        return "this is a program, not an image"
    if head[offset : offset + 4] == SQUASHFS_BIG_ENDIAN:
        return "this is a squashfs of another byte order; make it again with a squashfs 4 tool"
    if head[257:262] == b"ustar":
        return "this is an archive; if it holds a container image, name it docker-archive:FILE or oci-archive:FILE"
    return ""
