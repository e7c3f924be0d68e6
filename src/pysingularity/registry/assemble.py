# SPDX-License-Identifier: Apache-2.0
"""Layers and a configuration to one SIF file: the middle of every pull from a registry, archive or layout.

The result depends on nothing but the image's content and the settings of compression: times come from the layers, the
image's own `created` or SOURCE_DATE_EPOCH, the identity from the partition's digest, the order of everything from the
layers. So one digest gives one file, on any machine.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from pysingularity.errors import ImageError
from pysingularity.image import metadata
from pysingularity.image.assemble import SifAssembly, Written
from pysingularity.image.entries import Entry
from pysingularity.image.inside import OverlaidSource
from pysingularity.registry.blobs import LayerSource
from pysingularity.registry.inflate import Inflate
from pysingularity.registry.layers import merge_layers
from pysingularity.registry.oci import created
from pysingularity.registry.reuse import Reuse
from pysingularity.registry.settings import Settings
from pysingularity.registry.tar import TarReader
from pysingularity.sif.layout import arch_code


def image_config(data: bytes, what: str) -> dict[str, Any]:
    """Return an image's configuration.

    Raises:
        ImageError: it is no JSON object, as with artefacts that are no container images.
    """
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ImageError("oci-config", f"{what}: the configuration is no JSON object; is this a container image?")
    return value


def definition_for(scheme: str, name: str) -> bytes:
    """Return the definition file that would make the image again."""
    return f"Bootstrap: {scheme}\nFrom: {name}\n".encode("utf-8", "surrogateescape")


def assemble(
    layers: Sequence[LayerSource],
    config_bytes: bytes,
    output: str,
    settings: Settings,
    *,
    definition: bytes,
    what: str,
    force: bool = False,
    done: Callable[[int], None] | None = None,
    reuse: Reuse | None = None,
) -> Written:
    """Merge layers into a new SIF file; it appears when everything in it has been verified.

    Arguments:
        layers: the lowest first.
        config_bytes: the OCI configuration, kept as it is.
        output: path of the SIF file.
        definition: for the SIF's definition object.
        what: the image's name for messages.
        done: told the number of each layer that was read.
        reuse: knows layers of other images in the cache.

    Raises:
        ImageError, RegistryError: a layer is damaged, hostile, not what its digest says, or cannot be fetched.
    """
    config = image_config(config_bytes, what)
    when = settings.when if settings.when is not None else created(config) or 0
    arch = str(config.get("architecture") or settings.arch)
    try:
        arch_code(arch)
    except ImageError:
        arch = settings.arch
    header = dict(line.split(": ", 1) for line in definition.decode("utf-8", "surrogateescape").splitlines())
    labels = {
        **metadata.oci_labels(config),
        **metadata.automatic_labels(when=when, arch=arch, header={key.lower(): text for key, text in header.items()}),
    }
    entries = [
        *metadata.base_entries(),
        *metadata.oci_entries(config),
        Entry.file(metadata.LABELS, metadata.labels_file(labels)),
        Entry.file(metadata.DEFINITION, definition),
    ]
    attributes = metadata.collect(OverlaidSource([], entries), definition=definition)

    def open_layer(number: int) -> TarReader:
        name = f"{what}: layer {number + 1} of {len(layers)}"
        return TarReader(Inflate(layers[number].open(), name))

    assembly = SifAssembly(
        output,
        definition=definition,
        attributes=attributes,
        oci_config=config_bytes,
        arch=arch,
        compression=settings.compression,
        level=settings.level,
        threads=settings.threads,
        when=when,
        force=force,
    )
    with assembly as sif:
        try:
            root, _ = merge_layers(open_layer, len(layers), sif.writer, when=when, done=done, reuse=reuse)
        except ImageError as error:
            if error.id == "bad-layer":
                # Perhaps it is not what its digest says: then that is the error, and what was kept of it goes.
                for layer in layers:
                    layer.finish()
            raise
        for layer in layers:
            layer.finish()
        sif.put(root, entries)
        return sif.finish(root)


def check_sif(path: str, what: str) -> None:
    """Look whether a fetched file is a SIF image at all.

    Raises:
        ImageError: it is not.
    """
    with open(path, "rb") as file:
        head = file.read(42)
    if head[32:41] != b"SIF_MAGIC":
        raise ImageError("not-a-sif", f"{what}: what came is no SIF file")
