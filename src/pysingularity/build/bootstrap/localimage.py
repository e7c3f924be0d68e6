# SPDX-License-Identifier: Apache-2.0
"""`Bootstrap: localimage`: start from an image of this machine, of any kind (SIF, squashfs, ext3, sandbox)."""

from __future__ import annotations

import os

from pysingularity.build import space
from pysingularity.build.bootstrap import BootstrapRequest, BootstrapResult
from pysingularity.build.clone import clone
from pysingularity.image.metadata import oci_config_of
from pysingularity.image.open import open_image
from pysingularity.trust.encryption import key_in


def bootstrap(request: BootstrapRequest) -> BootstrapResult:
    """Unpack or copy the image that `From:` names.

    Raises:
        UserError: there is no From.
        ImageError: the image is missing or damaged.
    """
    path = os.path.join(request.directory, request.need("From", example="base.sif"))
    return unpack(request, path)


def _size(path: str) -> int:
    return os.path.getsize(path) if os.path.isfile(path) else 0


def unpack(request: BootstrapRequest, path: str) -> BootstrapResult:
    """Put the content of the image at `path` into the request's root."""
    from pysingularity.image.convert import unpack_into  # only when there is an image to unpack

    room = space.amount([path]) if os.path.isdir(path) else space.UNPACKED * _size(path)
    space.need(request.root, room, f"unpacking {path}")

    with open_image(path) as image:
        image.unlock(key_in(request.options))
        done = 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            request.progress("unpacking", done)

        if image.kind == "sandbox":
            clone(path, request.root, request.way.owners, advance)
            config = None
        else:
            unpack_into(image, request.root, owner=request.way.owners, progress=advance)
            config = oci_config_of(image)
        return BootstrapResult(oci_config=config, source=path)
