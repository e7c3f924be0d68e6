# SPDX-License-Identifier: Apache-2.0
"""shub://, as every client since Singularity 2.2 speaks it: one JSON answer with the address of the file.

`GET /api/container/USER/REPO[:TAG][@DIGEST]`, with a slash at the end or without. Before it may stand a prefix of any
kind, or `/t/SECRET` for private collections (see `front`). What clients need in the answer: `image` absolute, `commit`
never empty and different for different files (it is the key of their caches), `name`, `tag`, `version`, `branch`
(2.x prints it) and `size_mb`.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Depends, Request

from pysingularity.hub.accounts.rights import need_see
from pysingularity.hub.catalog import LATEST, find_image, get_collection, parse_target, tags_of
from pysingularity.hub.doors import TheHub, Who, base_url, limited
from pysingularity.hub.errors import Invalid, NotFound

router = APIRouter(prefix="/api/container", tags=["shub"], include_in_schema=False, dependencies=[Depends(limited)])


@router.get("/{target:path}")
def container(target: str, request: Request, hub: TheHub, who: Who) -> dict[str, Any]:
    """Answer a shub client; what it cannot have named does not exist."""
    try:
        name = parse_target(target.strip("/"))
    except Invalid as error:
        raise NotFound("no-such-image", error.message)
    with hub.read() as session:
        collection = get_collection(session, name.owner, name.name)
        need_see(session, who, collection)
        image = find_image(session, collection, tag=name.tag, digest=name.digest)
        if image.hidden:
            raise NotFound("no-such-image", f"{target[:200]}: there is no such image")
        tags = tags_of(session, image)
    share = request.scope.get("share", "")
    base = base_url(request) + (f"/t/{share}" if share else "")
    tag = name.tag if name.tag and (name.tag in tags or name.tag == image.tag) else image.tag or LATEST
    return {
        "id": image.id,
        "name": collection.full_name,
        "branch": image.branch,
        "commit": image.key or image.version,
        "tag": tag,
        "version": image.version,
        "size_mb": round(image.size / (1 << 20), 3),
        "image": f"{base}/api/v1/images/{image.id}/download/{image.version}.simg",
    }
