# SPDX-License-Identifier: Apache-2.0
"""Squashfs 4.0 on disk: numbers and structures, nothing that reads or writes.

Source: Documentation/filesystems/squashfs.rst and fs/squashfs/squashfs_fs.h of the kernel. Everything is little-endian.

A file system is a superblock, the compressed blocks of all files in any order, and then tables: inodes, directories,
fragments, the export table (inode number to inode), owner ids and extended attributes. Tables are cut into metadata
blocks of 8 KiB, each with a two-byte header holding its stored length and a flag "stored uncompressed".
An inode is found by a *reference*: the position of its metadata block within the inode table, shifted by 16, and the
offset in the inflated block. Start ring: imports only struct.
"""

from __future__ import annotations

from _struct import Struct

MAGIC = 0x73717368
#: magic, inodes, mtime, block size, fragments, compressor, block log, flags, ids, major, minor,
#: root reference, bytes used, then the positions of: ids, xattrs, inodes, directories, fragments, export table.
SUPERBLOCK = Struct("<5I6H8Q")
SUPERBLOCK_SIZE = 96

#: Absent tables and "no fragment", "no xattr" are all ones.
NONE32 = 0xFFFFFFFF
NONE64 = 0xFFFFFFFFFFFFFFFF

METADATA_SIZE = 8192
METADATA_UNCOMPRESSED = 0x8000
BLOCK_UNCOMPRESSED = 1 << 24
BLOCK_SIZE_MASK = BLOCK_UNCOMPRESSED - 1
MIN_BLOCK_SIZE, MAX_BLOCK_SIZE, DEFAULT_BLOCK_SIZE = 4096, 1 << 20, 131072

#: Superblock flags.
FLAG_UNCOMPRESSED_INODES, FLAG_UNCOMPRESSED_DATA, FLAG_UNCOMPRESSED_FRAGMENTS = 0x1, 0x2, 0x8
FLAG_NO_FRAGMENTS, FLAG_DUPLICATES, FLAG_EXPORTABLE = 0x10, 0x40, 0x80
FLAG_NO_XATTRS, FLAG_COMPRESSOR_OPTIONS = 0x200, 0x400

#: Compressor ids by name, and back.
COMPRESSORS = {"gzip": 1, "lzma": 2, "lzo": 3, "xz": 4, "lz4": 5, "zstd": 6}
COMPRESSOR_NAMES = {number: name for name, number in COMPRESSORS.items()}

#: Kind of a node by inode type 1–7; the extended types are the same plus 7. Directory entries hold the basic type.
KINDS = ("", "dir", "file", "symlink", "block", "char", "fifo", "socket")
TYPES = {name: number for number, name in enumerate(KINDS) if name}
#: File type bits of st_mode by basic inode type.
FORMATS = (0, 0o040000, 0o100000, 0o120000, 0o060000, 0o020000, 0o010000, 0o140000)
DIR, FILE, SYMLINK, BLOCK, CHAR, FIFO, SOCKET = range(1, 8)
#: Added to a basic type for its extended form.
EXTENDED = 7

#: Every inode: type, mode, uid index, gid index, mtime, number.
INODE_HEAD = Struct("<4H2I")
#: The whole inode by type. Files are followed by one u32 per block, symlinks by their target.
#: directory: block in the directory table, nlink, listing size + 3, offset in the block, parent's number.
INODE_DIR = Struct("<4H2I2I2HI")
#: extended directory: nlink, listing size + 3, block, parent's number, index entries (see below), offset, xattr.
INODE_DIR_EXTENDED = Struct("<4H2I4I2HI")
#: file: position of the first block, fragment, offset in the fragment, size.
INODE_FILE = Struct("<4H2I4I")
#: extended file: position, size, bytes in holes, nlink, fragment, offset in the fragment, xattr.
INODE_FILE_EXTENDED = Struct("<4H2I3Q4I")
#: symlink: nlink, length of the target; an extended one has its xattr behind the target.
INODE_SYMLINK = Struct("<4H2I2I")
#: device: nlink, device number as the kernel encodes it (which is also what os.makedev gives); extended: and xattr.
INODE_DEVICE, INODE_DEVICE_EXTENDED = Struct("<4H2I2I"), Struct("<4H2I3I")
#: fifo and socket: nlink; extended: and xattr.
INODE_IPC, INODE_IPC_EXTENDED = Struct("<4H2II"), Struct("<4H2I2I")
#: Longest of the fixed parts above.
INODE_MAX = INODE_FILE_EXTENDED.size

#: A run of directory entries that share an inode block: entries - 1, inode block, base inode number.
DIR_HEADER = Struct("<3I")
#: One entry: offset of the inode in its block, inode number - base, basic type, length of the name - 1.
DIR_ENTRY = Struct("<HhHH")
#: One index entry of a large directory: offset in the listing, directory block, length of the name - 1.
DIR_INDEX = Struct("<3I")
DIR_RUN_MAX = 256
NAME_MAX = 256  # the format's limit; Linux allows 255

#: A fragment block: position, size word, unused.
FRAGMENT = Struct("<QII")
#: Head of the xattr table: position of the pairs, number of xattr ids, unused.
XATTR_TABLE = Struct("<QII")
#: One xattr id: reference of its pairs, number of pairs, size of names and values together.
XATTR_ID = Struct("<QII")
XATTR_KEY = Struct("<HH")
XATTR_VALUE = Struct("<I")
XATTR_PREFIXES = (b"user.", b"trusted.", b"security.")
#: Flag in the key's type: the value is a reference to where the same value was stored before.
XATTR_OUT_OF_LINE = 0x100
XATTR_VALUE_MAX = 65536  # the kernel's XATTR_SIZE_MAX

#: Option block that lz4 images must have behind the superblock: version 1, flags (1: high compression).
LZ4_OPTIONS = Struct("<2I")
