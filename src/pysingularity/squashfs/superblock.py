# SPDX-License-Identifier: Apache-2.0
"""The superblock of a squashfs as a value, checked against what the file can hold. Start ring."""

from __future__ import annotations

from . import layout


class Superblock:
    """The superblock's fields, checked.

    Attributes:
        inode_count, mtime, block_size, fragment_count, id_count, root (reference): as stored.
        compression: the compressor's name; flags: layout.FLAG_*.
        bytes_used: size of the file system without padding.
        id_table, xattr_table, inode_table, directory_table, fragment_table, export_table: positions from the start of
            the file system, or layout.NONE64 for an absent one.
    """

    __slots__ = (
        "block_size",
        "bytes_used",
        "compression",
        "compressor",
        "directory_table",
        "export_table",
        "flags",
        "fragment_count",
        "fragment_table",
        "id_count",
        "id_table",
        "inode_count",
        "inode_table",
        "mtime",
        "root",
        "xattr_table",
    )

    def __init__(self, raw: bytes, available: int) -> None:
        """Take the fields apart.

        Raises:
            ValueError: something cannot be; the text says what.
        """
        if len(raw) < layout.SUPERBLOCK_SIZE:
            raise ValueError("it is too short for a superblock")
        (
            magic,
            self.inode_count,
            self.mtime,
            self.block_size,
            self.fragment_count,
            self.compressor,
            block_log,
            self.flags,
            self.id_count,
            major,
            minor,
            self.root,
            self.bytes_used,
            self.id_table,
            self.xattr_table,
            self.inode_table,
            self.directory_table,
            self.fragment_table,
            self.export_table,
        ) = layout.SUPERBLOCK.unpack(raw)
        if magic != layout.MAGIC:
            raise ValueError("it has no squashfs magic")
        if (major, minor) != (4, 0):
            raise ValueError(f"it is squashfs version {major}.{minor}, only 4.0 can be read")
        size = self.block_size
        if not layout.MIN_BLOCK_SIZE <= size <= layout.MAX_BLOCK_SIZE or size != 1 << (block_log & 31):
            raise ValueError(f"block size {size} with logarithm {block_log} is impossible")
        if self.compressor not in layout.COMPRESSOR_NAMES:
            raise ValueError(f"compressor {self.compressor} is unknown")
        self.compression = layout.COMPRESSOR_NAMES[self.compressor]
        if self.bytes_used > available:
            raise ValueError(f"it is cut short: {self.bytes_used} bytes are needed, {available} are there")
        if not layout.SUPERBLOCK_SIZE <= self.inode_table < self.directory_table < self.id_table < self.bytes_used:
            raise ValueError("its tables are out of order")
        if not self.inode_count or not self.id_count:
            raise ValueError("it counts no inodes or owners")
        for table in (self.xattr_table, self.export_table, self.fragment_table):
            if table != layout.NONE64 and not self.directory_table <= table < self.bytes_used:
                raise ValueError("a table lies outside the image")
        if self.fragment_count and self.fragment_table == layout.NONE64:
            raise ValueError("it counts fragments but has no table of them")
