# SPDX-License-Identifier: Apache-2.0
"""Plain downloads: any client that knows HTTP gets an image, resumes it, and may go on asking for parts of it."""

from __future__ import annotations

import re

from fastapi import APIRouter, Request, Response

from pysingularity.hub.api.images import seen_image
from pysingularity.hub.catalog import LATEST
from pysingularity.hub.context import Hub
from pysingularity.hub.doors import Number, TheHub, Who
from pysingularity.hub.errors import NotFound
from pysingularity.hub.models import Image
from pysingularity.hub.protocols.sending import count_pull, send_blob

router = APIRouter(prefix="/api/v1", tags=["images"])


def file_name(image: Image) -> str:
    """Return how the file of an image is called when somebody keeps it: `NAME_TAG.sif`, as clients do it."""
    name = image.container.name.replace("/", "_")
    return re.sub(r"[^-_.0-9A-Za-z]", "_", f"{name}_{image.tag or LATEST}.sif")


# The last part has no meaning to us; old clients take the name of the file from it.
@router.head("/images/{number}/download/{name}", include_in_schema=False)
@router.get("/images/{number}/download/{name}", include_in_schema=False)
@router.head("/images/{number}/download", include_in_schema=False)
@router.get(
    "/images/{number}/download",
    response_class=Response,
    responses={
        200: {"content": {"application/octet-stream": {}}, "description": "The file."},
        206: {"description": "A part of it (`Range`)."},
        302: {"description": "It is sent from elsewhere."},
        416: {"description": "It has no such part."},
    },
)
def download(number: Number, request: Request, hub: TheHub, who: Who) -> Response:
    """Send the SIF file of an image; parts with `Range`."""
    with hub.read() as session:
        image = seen_image(session, who, number)
    return image_file(request, hub, who, image)


def image_file(request: Request, hub: Hub, who: Who, image: Image, *, redirect: int = 302) -> Response:
    """Return the answer with an image's file, and count it.

    Raises:
        NotFound: it was announced but never uploaded.
    """
    if image.blob is None:
        raise NotFound("not-uploaded", f"image {image.id} has not been uploaded completely")
    headers = {"X-Checksum-Sha256": image.blob}
    answer = send_blob(request, hub, image.blob, name=file_name(image), headers=headers, redirect=redirect)
    count_pull(request, hub, who, image, answer)
    return answer
