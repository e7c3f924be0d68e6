# SPDX-License-Identifier: Apache-2.0
"""What a fuzzer and the tests do with hostile bytes: use everything that a reader offers.

Each function takes the bytes of a file, and lets only the error come out that a person would see in one line.
"""

from __future__ import annotations

import os
import tempfile

from pysingularity.errors import ImageError, InternalError, RecipeError
from pysingularity.recipe.parser import parse
from pysingularity.recipe.sections import check, file_pairs
from pysingularity.recipe.writer import write
from pysingularity.sif.file import SifFile
from pysingularity.squashfs import layout
from pysingularity.squashfs.reader import SquashfsImage
from pysingularity.squashfs.writer import SquashfsWriter

#: Bytes of files that are read of one image: hostile sizes are honest as long as nobody reads them.
BUDGET = 4 << 20


def squashfs(data: bytes) -> None:
    """Walk an image, read its files, attributes and links, and take it over into another one.

    Raises:
        ImageError: it is damaged.
    """
    fd = os.memfd_create("hostile")
    try:
        os.write(fd, data)
        image = SquashfsImage(fd, name="hostile")
        budget = BUDGET
        for _, inode in image.walk():
            image.xattrs(inode)
            if inode.type == layout.FILE:
                for length, piece in image.pieces(inode):
                    assert piece is None or len(piece) == length
                    budget -= length
                    if budget < 0:
                        break
                image.read(inode, max(inode.size - 100, 0), 200)
        image.lookup("dir/../link")
        out = os.memfd_create("adopted")
        try:
            with SquashfsWriter(out, compression=image.superblock.compression, block_size=image.block_size) as writer:
                writer.finish(writer.adopt(image))
        finally:
            os.close(out)
    finally:
        os.close(fd)


def sif(data: bytes) -> None:
    """Read every object of a SIF file, then change the file.

    Raises:
        ImageError: it is damaged.
    """
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as file:
        file.write(data)
        file.flush()
        with SifFile.open(file.name) as one:
            numbers = [descriptor.id for descriptor in one.descriptors]
            for descriptor in one.descriptors:
                assert len(one.read(descriptor)) == descriptor.size
                assert descriptor.file_name is not None
                if descriptor.type == 0x4004:
                    assert len(descriptor.partition) == 3
        if numbers:
            with SifFile.open(file.name, writable=True) as one:
                one.delete(numbers[0], zero=True, compact=True)
            with SifFile.open(file.name) as one:
                assert numbers[0] not in [descriptor.id for descriptor in one.descriptors]


def recipe(data: bytes) -> None:
    """Parse a definition file and write it again.

    Raises:
        RecipeError: it cannot be understood; the line lies inside the file.
    """
    try:
        found = parse(data, "x.def", {})
        for stage in found.stages:
            file_pairs(stage, "x.def")
        check(found)
        try:
            write(found)
        except InternalError as error:
            assert error.id == "unwritable"  # the reader forgives more than the writer can say
    except RecipeError as error:
        assert error.id
        assert "\n" not in error.message
        assert 0 <= error.line <= data.count(b"\n") + data.count(b"\r") + 1
        raise


READERS = {"squashfs": (squashfs, ImageError), "sif": (sif, ImageError), "recipe": (recipe, RecipeError)}
