# SPDX-License-Identifier: Apache-2.0
"""oras://: one SIF file as the only layer of a manifest in any OCI registry, fetched and pushed.

Media types are those that other Singularity implementations write and look for.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping

from pysingularity.errors import RegistryError
from pysingularity.reference import Reference
from pysingularity.registry import oci
from pysingularity.registry.http import Answer
from pysingularity.registry.remote import RemoteFile
from pysingularity.registry.settings import Settings

SIF_CONFIG = "application/vnd.sylabs.sif.config.v1+json"
SIF_LAYER = "application/vnd.sylabs.sif.layer.v1.sif"
#: As early versions misspelt it.
SIF_LAYER_OLD = "appliciation/vnd.sylabs.sif.layer.tar"
EMPTY = b"{}"


def look_up(reference: Reference, settings: Settings, note: Callable[[str], None]) -> RemoteFile:
    """Return the SIF file of a reference.

    Raises:
        RegistryError: there is none.
    """
    repository = oci.Repository(reference, settings, note=note)
    manifest = repository.manifest(reference.digest or reference.tag)
    if manifest.is_index:
        manifest = repository.manifest(oci.choose(manifest, settings.arch, settings.variant, str(reference)).digest)
    layers = oci.layers_of(manifest, str(reference))
    if len(layers) != 1 or layers[0].media_type not in (SIF_LAYER, SIF_LAYER_OLD):
        raise RegistryError(
            "not-a-sif",
            f"{reference}: is no SIF file ({len(layers)} layers)",
            hint=f"fetch a container image by docker://{reference.repository}",
        )
    layer = layers[0]

    def start(offset: int, validator: str) -> Answer:  # noqa: ARG001 - the digest is validator enough
        return repository.open_blob(layer, offset)

    return RemoteFile(
        str(reference),
        key=layer.digest.replace(":", "-"),
        open=start,
        size=layer.size,
        sha256=layer.digest.partition(":")[2] if layer.digest.startswith("sha256:") else "",
        facts={"manifest": manifest.digest},
        sif=True,
    )


def push(
    path: str,
    reference: Reference,
    settings: Settings,
    *,
    sha256: str,
    annotations: Mapping[str, str],
    note: Callable[[str], None],
    source: object = None,
) -> str:
    """Send a SIF file and return the manifest's digest.

    Arguments:
        sha256: hex digest of the file.
        annotations: of the manifest.
        source: what is sent instead of the opened file (one that tells how far it is).

    Raises:
        RegistryError: the registry does not take it.
    """
    repository = oci.Repository(reference, settings, actions="pull,push", note=note)
    size = os.stat(path).st_size
    config = "sha256:" + hashlib.sha256(EMPTY).hexdigest()
    layer = "sha256:" + sha256
    if not repository.has_blob(layer):
        if source is not None:
            repository.upload(layer, size, source)
        else:
            with open(path, "rb") as file:
                repository.upload(layer, size, file)
    if not repository.has_blob(config):
        repository.upload(config, len(EMPTY), EMPTY)
    manifest = {
        "schemaVersion": 2,
        "mediaType": oci.OCI_MANIFEST,
        "config": {"mediaType": SIF_CONFIG, "size": len(EMPTY), "digest": config},
        "layers": [
            {
                "mediaType": SIF_LAYER,
                "size": size,
                "digest": layer,
                "annotations": {"org.opencontainers.image.title": os.path.basename(path)},
            }
        ],
        **({"annotations": dict(annotations)} if annotations else {}),
    }
    data = json.dumps(manifest, separators=(",", ":")).encode()
    digest = "sha256:" + hashlib.sha256(data).hexdigest()
    for name in reference.tag.split(",") if reference.tag else [digest]:
        repository.put_manifest(name, data, oci.OCI_MANIFEST)
    return digest
