# SPDX-License-Identifier: Apache-2.0
"""A squashfs that lies in several files (`squashfs.pieces`) as an image like any other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pysingularity.image.open import Image
from pysingularity.squashfs.pieces import PiecedImage

if TYPE_CHECKING:
    from collections.abc import Sequence


class Pieces(Image):
    """An image in pieces.

    Arguments:
        files: descriptors of its files, the oldest first; they stay the caller's.
        name: what to call it in messages.

    Attributes:
        reader: reads all as one.

    Raises:
        ImageError: "damaged-image".
    """

    __slots__ = ("files",)

    reader: PiecedImage

    def __init__(self, files: Sequence[int], name: str) -> None:
        super().__init__("squashfs", name, -1, "squashfs")
        self.files = tuple(files)
        self.reader = PiecedImage(self.files, name=name)
