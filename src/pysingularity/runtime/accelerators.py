# SPDX-License-Identifier: Apache-2.0
"""From what `gpu` found to mounts and variables, and the words about what is missing. Loaded only for GPUs."""

from __future__ import annotations

import os

from pysingularity import messages
from pysingularity.errors import SingularityError
from pysingularity.image.inside import SquashfsSource, source_of
from pysingularity.image.open import open_image
from pysingularity.runtime import gpu
from pysingularity.runtime.spec import BIND, Layer, Mount
from pysingularity.squashfs.reader import SquashfsImage

#: Where an image's C library may be, by the machine's name in Debian's and others' ways.
LIBC = (
    "/lib/{machine}-linux-gnu/libc.so.6",
    "/usr/lib/{machine}-linux-gnu/libc.so.6",
    "/lib64/libc.so.6",
    "/usr/lib64/libc.so.6",
    "/lib/libc.so.6",
    "/usr/lib/libc.so.6",
)


def mounts_for(
    kinds: list[str], devices: list[str], folders: list[str], layer: Layer, *, own_dev: bool
) -> tuple[list[Mount], dict[str, str]]:
    """Return the mounts and variables for accelerators.

    Arguments:
        kinds: "nvidia", "rocm".
        devices: names of CDI devices; folders: where their specifications lie.
        layer: the image, for a look at its C library.
        own_dev: the container has a /dev of its own, so that device nodes have to be bound.
    """
    found = [gpu.nvidia() if kind == "nvidia" else gpu.rocm() for kind in kinds]
    if devices:
        found.append(gpu.cdi(devices, folders))
    mounts: list[Mount] = []
    variables: dict[str, str] = {}
    for one in found:
        if one.libraries:
            one.for_image(_libc(layer))
        flag = f"--{'nv' if one.kind == 'nvidia' else one.kind}"
        for reason in one.missing:
            messages.warning(f"{flag}: {reason}")
        for name, reason in one.left_out:
            messages.verbose(f"{flag}: {name} is left out: {reason}")
        if one.left_out:
            name, reason = one.left_out[0]
            more = f" and {len(one.left_out) - 1} more (--verbose names them)" if len(one.left_out) > 1 else ""
            messages.warning(f"{flag}: {name}{more} left out: {reason}")
        for name, path in one.libraries:
            mounts.append(Mount(BIND, f"{gpu.LIBRARIES}/{name}", source=path, readonly=True))
        for source, target in one.files:
            mounts.append(Mount(BIND, target, source=source, readonly=True))
        if own_dev:
            mounts += [Mount(BIND, path, source=path, trusted=True) for path in one.devices]
        variables.update(one.environment)
    return mounts, variables


def decrypted(layer: Layer) -> SquashfsSource:
    """Return the files of an encrypted image; what it is read from stays the layer's."""
    assert layer.plain is not None
    return SquashfsSource(SquashfsImage(layer.plain.fd, source=layer.plain, name=layer.path))


def _libc(layer: Layer) -> bytes | None:
    """Return the bytes of the image's C library."""
    machine = os.uname().machine
    try:
        with open_image(layer.path) as image, source_of(image) if layer.plain is None else decrypted(layer) as source:
            for path in LIBC:
                data = source.read(path.format(machine=machine), 8 << 20)
                if data:
                    return data
    except SingularityError as error:
        messages.verbose(f"cannot look at the image's C library: {error.message}")
    return None
