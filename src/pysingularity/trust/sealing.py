# SPDX-License-Identifier: Apache-2.0
"""Encrypted partitions in the making: a squashfs that is encrypted while it is written, and the one around it.

The form is that of Apptainer's unprivileged builds (partition type 6): an outer squashfs with `gocryptfs.conf` and the
encrypted file, which lies in it uncompressed and in one piece. The inner file system is never on disk in the clear.
"""

from __future__ import annotations

import os

from pysingularity.squashfs import layout
from pysingularity.squashfs.node import Node
from pysingularity.squashfs.writer import SquashfsWriter
from pysingularity.trust.gocryptfs import KEY, Conf, Sealer

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pysingularity.trust.encryption import Seal


class Sealing:
    """One partition.

    Arguments:
        fd: the image file; offset: where the partition begins in it.
        seal: what it is encrypted with.

    Attributes:
        sink: takes the bytes of the inner file system.
    """

    def __init__(self, fd: int, offset: int, seal: Seal) -> None:
        master = os.urandom(KEY)
        self._fd, self._offset, self._conf = fd, offset, Conf.make(seal.secret, master).text()
        self.sink = Sealer(fd, offset + layout.SUPERBLOCK_SIZE, master)

    def finish(self, size: int, when: int) -> int:
        """Write what surrounds an inner file system of `size` bytes; return the size of the whole partition."""
        size = self.sink.finish(size)
        with SquashfsWriter(self._fd, self._offset, threads=1, mtime=when) as writer:
            root = Node("dir", 0o755, mtime=when)
            assert root.children is not None
            # The name that Apptainer looks for begins so.
            root.children[b"squashfs-image"] = Node("file", 0o444, mtime=when, data=writer.place(size))
            root.children[b"gocryptfs.conf"] = Node("file", 0o444, mtime=when, data=writer.store_bytes(self._conf))
            return writer.finish(root)
