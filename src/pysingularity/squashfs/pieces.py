# SPDX-License-Identifier: Apache-2.0
"""A squashfs in pieces: a new tree whose unchanged files still lie in the files of older images.

An image can go on behind the blocks of another one (`SquashfsWriter.follow`): positions up to that one's tables mean
the same in both, so its files need not be copied, and what is written holds only the superblock, the new blocks and the
tables. Read together with all that came before, it is a squashfs as any other. A file of that kind begins like a
squashfs, and is none without the others.

    first      | superblock | blocks 1 | tables |
    second     | superblock |            blocks 2 | tables |
    is read as | superblock | blocks 1 | blocks 2 | tables |
                 of second    of first   of second
"""

from __future__ import annotations

import os
from bisect import bisect_right
from typing import TYPE_CHECKING

from pysingularity.errors import ImageError

from . import layout
from .reader import SquashfsImage
from .superblock import Superblock

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


class _Bytes:
    """The bytes of a file system that lies in several files.

    Arguments:
        files, name: as for `PiecedImage`.

    Attributes:
        size: how many there are; fd: the last file.
    """

    def __init__(self, files: Sequence[int], name: str) -> None:
        #: (first position, descriptor, what to add to a position for the place in the file), in order of positions.
        blocks: list[tuple[int, int, int]] = []
        end = self.size = 0
        for fd in files:
            try:
                # What it needs lies in other files as well: how much there is has no say.
                superblock = Superblock(os.pread(fd, layout.SUPERBLOCK_SIZE, 0), 1 << 63)
            except ValueError as error:
                raise ImageError("damaged-image", f"{name}: damaged squashfs image: {error}") from None
            # Superblock and the compressor's options are each one's own, and as long as in all the others.
            head = layout.SUPERBLOCK_SIZE
            if superblock.flags & layout.FLAG_COMPRESSOR_OPTIONS:
                head += 2 + layout.LZ4_OPTIONS.size
            end = end or head
            if superblock.inode_table < end:
                raise ImageError("damaged-image", f"{name}: damaged squashfs image: its pieces do not fit together")
            blocks.append((end, fd, head - end))
            self.size = os.fstat(fd).st_size + end - head
            end = superblock.inode_table
        self.fd = files[-1]
        self._pieces = [(0, self.fd, 0), *blocks]
        self._starts = [start for start, _, _ in self._pieces]

    def pread(self, size: int, position: int) -> bytes:
        """Return bytes from a position on, fewer at the end of a piece."""
        number = bisect_right(self._starts, position) - 1
        if number + 1 < len(self._starts):
            size = min(size, self._starts[number + 1] - position)
        _, fd, change = self._pieces[number]
        return os.pread(fd, size, position + change)

    def stretches(self, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        """Yield where the bytes between two positions are stored."""
        while start < end:
            number = bisect_right(self._starts, start) - 1
            last = min(end, self._starts[number + 1]) if number + 1 < len(self._starts) else end
            _, fd, change = self._pieces[number]
            yield fd, start + change, last - start
            start = last


class PiecedImage(SquashfsImage):
    """A squashfs whose bytes lie in several files.

    Arguments:
        files: descriptors, the oldest first: a whole squashfs, and what was written behind it. They stay the caller's.
        name: what to call the image in messages.

    Raises:
        ImageError: "damaged-image".
    """

    def __init__(self, files: Sequence[int], *, name: str = "") -> None:
        self._where = _Bytes(files, name)
        super().__init__(self._where.fd, source=self._where, name=name)

    def stretches(self, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        """Yield where the bytes between two positions are stored: descriptor of a file, place in it, length."""
        return self._where.stretches(start, end)
