# SPDX-License-Identifier: Apache-2.0
"""Pages that show things: home, search, collection, build, image, comparison; badges; our own style and script.

Each asks the same questions as its twin of the API, and gives that twin's answer to whoever wants JSON.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlencode

import sqlalchemy as sa
from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.responses import JSONResponse, RedirectResponse
from markupsafe import Markup
from sqlalchemy.orm import Session, defer

from pysingularity.hub.accounts.rights import Principal, may_change, need_see, visible
from pysingularity.hub.api import builds as build_api
from pysingularity.hub.api import collections as collection_api
from pysingularity.hub.api import images as image_api
from pysingularity.hub.api.inside import folder_of, folder_view, two_images
from pysingularity.hub.api.views import build_view, collection_view, public_url
from pysingularity.hub.builds.log import STEP, log_path
from pysingularity.hub.builds.states import FINAL
from pysingularity.hub.catalog import (
    find_image,
    get_collection,
    parse_name,
    parse_target,
    search,
    tags_by_image,
    tags_of,
)
from pysingularity.hub.context import Hub
from pysingularity.hub.doors import Number, TheHub, Who, base_url, limited
from pysingularity.hub.errors import NotFound
from pysingularity.hub.inside import NoListing, compare, environment_of, listing
from pysingularity.hub.models import Build, Collection, Container, Delivery, Group, Image, Recipe, Star, User
from pysingularity.hub.pages.pictures import badge, human_size, treemap
from pysingularity.hub.pages.site import HERE, for_people, prefix_of, render, wants_json

router = APIRouter(include_in_schema=False, dependencies=[Depends(for_people), Depends(limited)])
STATIC = {
    "hub.css": "text/css",
    "hub.js": "text/javascript",
    "log.js": "text/javascript",
    "htmx.js": "text/javascript",
    "icon.svg": "image/svg+xml",
}
#: Rows of a table on a page, rows of a folder, and bytes of a log.
MOST_ROWS, MOST_FILES, MOST_LOG = 50, 300, 1 << 20
#: Parts of what an image says about itself that are shown as text.
SCRIPTS = (("runscript", "Runscript"), ("startscript", "Startscript"), ("test", "Test"), ("helpfile", "Help"))


@router.get("/static/{name}")
def static(name: str, request: Request) -> Response:
    """Send a style or script of ours."""
    path = HERE / "static" / name
    if name not in STATIC:
        raise NotFound("no-such-page", "there is no such file")
    data, tag = _static(path)
    headers = {"Cache-Control": "public, max-age=3600", "ETag": tag}
    if request.headers.get("if-none-match") == tag:
        return Response(None, 304, headers=headers)
    return Response(data, media_type=STATIC[name], headers=headers)


@functools.cache
def _static(path: Path) -> tuple[bytes, str]:
    data = path.read_bytes()
    return data, f'"{hashlib.sha256(data).hexdigest()[:32]}"'


@router.get("/")
def home(request: Request, hub: TheHub, who: Who) -> Response:
    """Show what is new."""
    if wants_json(request):
        return JSONResponse(collection_api.index(request, hub, who, "", "", MOST_ROWS, 0))
    with hub.read() as session:
        found = search(session, who, "", limit=10)
        newest = list(
            session.scalars(
                sa.select(Build)
                .join(Collection, Collection.id == Build.collection_id)
                .where(visible(who))
                .order_by(Build.id.desc())
                .limit(10)
            )
        )
    base = base_url(request)
    scheme, _, host = base.partition("://")
    plain = " --no-https" if scheme == "http" else ""
    lines = [("Pull", f"singularity pull{plain} shub://{host}/OWNER/NAME:TAG")]
    running = any(one.state not in FINAL for one in newest)
    return render(request, who, "home.html", found=found, builds=newest, pulls=lines, running=running)


#: What the page of a person says and a search does not.
NOBODY: dict[str, Any] = {"display": "", "kind": "", "about": ""}


@router.get("/search")
def find(
    request: Request,
    hub: TheHub,
    who: Who,
    q: Annotated[str, Query(max_length=200)] = "",
    offset: Annotated[int, Query(ge=0, le=1 << 31)] = 0,
) -> Response:
    """Search collections."""
    if wants_json(request):
        return JSONResponse(collection_api.index(request, hub, who, q, "", MOST_ROWS, offset))
    with hub.read() as session:
        found = search(session, who, q, limit=MOST_ROWS, offset=offset)
    twin = "/api/v1/collections?" + urlencode({"q": q, "offset": offset})
    return render(
        request,
        who,
        "search.html",
        found=found,
        query=q,
        owner="",
        offset=offset,
        limit=MOST_ROWS,
        json=twin,
        **NOBODY,
    )


@router.get("/badge/{owner}/{file}")
def picture(owner: str, file: str, hub: TheHub, who: Who, show: str = "state") -> Response:
    """Draw a badge: the state of the newest build (of a tag), or `show` = `size` or `pulls` of its image."""
    if not file.endswith(".svg"):
        raise NotFound("no-such-badge", "badges are named OWNER/NAME[:TAG].svg")
    name = parse_target(f"{owner}/{file[:-4]}")
    with hub.read() as session:
        collection = get_collection(session, name.owner, name.name)
        need_see(session, who, collection)
        left, state = name.tag or collection.name, ""
        if show == "pulls" and not name.tag:
            right = f"{collection.pulls} pulls"
        elif show in ("size", "pulls"):
            try:
                image = find_image(session, collection, tag=name.tag, digest=name.digest)
                right = human_size(image.size) if show == "size" else f"{image.pulls} pulls"
            except NotFound:  # where a badge is shown, a broken picture helps nobody
                right, state = "no image", "unknown"
        else:
            query = sa.select(Build.state).where(Build.collection_id == collection.id, Build.publish)
            if name.tag:
                query = query.where(Build.tag == name.tag)
            state = session.scalar(query.order_by(Build.id.desc()).limit(1)) or ""
            right, state = state.replace("_", " ") or "no builds", state or "unknown"
    scope = "private" if collection.private else "public"
    headers = {"Cache-Control": f"{scope}, max-age=60"}
    return Response(badge(left, right, state), media_type="image/svg+xml", headers=headers)


def seen(session: Session, who: Principal, owner: str, name: str) -> Collection:
    """Return a collection that somebody may see, by its present or an earlier name."""
    collection = get_collection(session, *parse_name(f"{owner}/{name}"))
    need_see(session, who, collection)
    return collection


def pull_lines(request: Request, collection: Collection, container: str, tag: str, sha256: str = "") -> list[Any]:
    """Return (title, command) of every way to pull, as the hub is called by whoever asks."""
    base = base_url(request)
    scheme, _, host = base.partition("://")
    plain = " --no-https" if scheme == "http" else ""
    name, share = collection.full_name, request.scope.get("share", "")
    lines = []
    if container == collection.name:
        prefix = f"{host}/t/{share}" if share else host
        lines.append(("shub", f"singularity pull{plain} shub://{prefix}/{name}:{tag}"))
    path = name if container == collection.name else f"{name}/{container}"
    lines += [
        ("library", f"singularity pull --library {base} library://{name}/{container}:{tag}"),
        ("oras", f"singularity pull{plain} oras://{host}/{path}:{tag}"),
    ]
    if sha256:
        lines.append(("Check", f"echo '{sha256}  {collection.name}_{tag}.sif' | sha256sum --check"))
    return lines


@router.get("/{owner:owner}")
def person(owner: str, request: Request, hub: TheHub, who: Who) -> Response:
    """Show the collections of a user or group."""
    lower = owner.lower()
    with hub.read() as session:
        user = session.scalar(sa.select(User).where(User.name == lower))
        group = session.scalar(sa.select(Group).where(Group.name == lower))
        query = sa.select(Collection).where(visible(who), Collection.owner == lower).order_by(Collection.name)
        found = list(session.scalars(query.limit(500)))
    # Whether somebody without a visible collection exists is nobody's business but his own.
    if (user is None and group is None) or (not found and who.name != lower):
        raise NotFound("no-such-page", "there is no such page")
    if wants_json(request):
        base = base_url(request)
        return JSONResponse({"collections": [collection_view(one, base) for one in found]})
    twin = f"/api/v1/collections?owner={lower}"
    if group is not None:
        about: dict[str, Any] = {"display": "", "kind": "Group", "about": group.description}
    else:
        assert user is not None
        about = {"display": user.display_name, "kind": "Robot" if user.kind == "robot" else "User", "about": ""}
    return render(
        request, who, "search.html", found=found, query="", owner=lower, offset=0, limit=501, json=twin, **about
    )


@router.get("/{owner:owner}/{name}")
def collection_page(
    owner: str,
    name: str,
    request: Request,
    hub: TheHub,
    who: Who,
    images_before: Annotated[int, Query(alias="images", ge=0, le=1 << 62)] = 0,
    rows: Annotated[int, Query(ge=1, le=500)] = MOST_ROWS,
) -> Response:
    """Show a collection: how to pull, images, builds, recipes."""
    with hub.read() as session:
        one = seen(session, who, owner, name)
        if one.full_name != f"{owner}/{name}":
            return RedirectResponse(f"{prefix_of(who)}/{one.full_name}", 307)
        if wants_json(request):
            return JSONResponse(collection_api.show(owner, name, request, hub, who))
        insider = may_change(session, who, one, "build")
        query = sa.select(Image).join(Container, Container.id == Image.container_id)
        query = query.where(Container.collection_id == one.id, Image.blob.is_not(None))
        if not insider:
            query = query.where(Image.hidden.is_(False))
        if images_before:
            query = query.where(Image.id < images_before)
        query = query.options(defer(Image.definition), defer(Image.details), defer(Image.provenance))
        images = list(session.scalars(query.order_by(Image.id.desc()).limit(rows)))
        tags = tags_by_image(session, images)
        numbers = [image.id for image in images]
        builds = list(
            session.scalars(
                sa.select(Build).where(Build.collection_id == one.id).order_by(Build.id.desc()).limit(MOST_ROWS)
            )
        )
        recipes = list(
            session.scalars(
                sa.select(Recipe).where(Recipe.collection_id == one.id).order_by(Recipe.branch, Recipe.path).limit(1000)
            )
        )
        deliveries = []
        if insider:
            known = sa.select(Delivery).where(Delivery.collection_id == one.id)
            known = known.options(defer(Delivery.body), defer(Delivery.headers))
            deliveries = list(session.scalars(known.order_by(Delivery.id.desc()).limit(10)))
        starred = who.user is not None and session.get(Star, (who.user.id, one.id)) is not None
        admin = may_change(session, who, one, "admin")
    earlier: dict[int, int] = {}
    last: dict[tuple[int, str, str], int] = {}
    for image in reversed(images):
        key = (image.container_id, image.tag, image.arch)
        if key in last:
            earlier[image.id] = last[key]
        last[key] = image.id
    names = next((tags[number] for number in numbers if number in tags), ["latest"])
    box = next((image.container.name for image in images if image.id in tags), one.name)
    base = base_url(request)
    return render(
        request,
        who,
        "collection.html",
        one=one,
        images=images,
        tags=tags,
        earlier=earlier,
        builds=builds,
        recipes=recipes,
        deliveries=deliveries,
        starred=starred,
        may_build=insider,
        most=rows,
        most_builds=MOST_ROWS,
        older=bool(images_before),
        running=any(build.state not in FINAL for build in builds),
        odd_port=":" in base.partition("://")[2].rpartition("]")[2],
        base=base,
        git_url=public_url(one.git_url),
        pulls=pull_lines(request, one, box, names[0]),
        webhook=f"{base}/api/v1/hooks/{one.hook}" if admin else "",
    )


def log_steps(hub: Hub, number: int) -> tuple[list[tuple[str, str]], int, int]:
    """Return (title, text) of the steps of a log, the offset behind them, and how many bytes are shown if not all."""
    path = log_path(hub.settings.folder("logs"), number)
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            start = file.seek(max(0, size - MOST_LOG))
            data = file.read(MOST_LOG)
    except FileNotFoundError:
        return [], 0, 0
    if start:
        skip = data.find(b"\n") + 1
        start, data = start + skip, data[skip:]
    end = data.rfind(b"\n") + 1
    steps: list[tuple[str, list[str]]] = []
    for line in data[:end].split(b"\n")[:-1]:
        text = line.decode("utf-8", "replace")
        if line.startswith(STEP):
            steps.append((text[len(STEP) :], []))
        else:
            if not steps:
                steps.append(("Log", []))
            steps[-1][1].append(text)
    return [(title, "\n".join(lines)) for title, lines in steps], start + end, len(data) if start else 0


@router.get("/{owner:owner}/{name}/builds/{number}")
def build_page(owner: str, name: str, number: Number, request: Request, hub: TheHub, who: Who) -> Response:
    """Show a build with its log."""
    one = build_api.get_build(hub, who, number)
    with hub.read() as session:
        if seen(session, who, owner, name).id != one.collection_id:
            raise NotFound("no-such-build", f"build {number}: there is no such build")
        may_build = may_change(session, who, one.collection, "build")
    if wants_json(request):
        return JSONResponse(build_view(one, base_url(request)))
    steps, offset, cut = log_steps(hub, number)
    took = one.finished_at - one.claimed_at if one.finished_at and one.claimed_at else None
    return render(
        request,
        who,
        "build.html",
        one=one,
        running=one.state not in FINAL,
        final=" ".join(FINAL),
        may_build=may_build,
        steps=steps,
        offset=offset,
        cut=cut,
        took=took,
    )


@router.get("/{owner:owner}/{name}/images/{number}")
def image_page(
    owner: str,
    name: str,
    number: Number,
    request: Request,
    hub: TheHub,
    who: Who,
    path: Annotated[str, Query(max_length=8192)] = "",
) -> Response:
    """Show an image: definition, labels, environment, apps, how to pull, and what fills it."""
    with hub.read() as session:
        one = image_api.seen_image(session, who, number)
        collection = one.container.collection
        if seen(session, who, owner, name).id != collection.id:
            raise NotFound("no-such-image", f"image {number}: there is no such image")
        if wants_json(request):
            return JSONResponse(image_api.by_number(number, request, hub, who))
        tags = tags_of(session, one)
        may = may_change(session, who, collection, "admin")
        made_by = session.scalar(sa.select(Build.id).where(Build.image_id == one.id).order_by(Build.id).limit(1))
        before = session.scalar(
            sa.select(Image.id)
            .where(Image.container_id == one.container_id, Image.tag == one.tag, Image.arch == one.arch)
            .where(Image.id < one.id, Image.blob.is_not(None), Image.hidden.is_(False))
            .order_by(Image.id.desc())
            .limit(1)
        )
    values: dict[str, Any] = {"problem": "", "shown": MOST_FILES}
    inside = path.strip("/")
    try:
        known = listing(hub, one)
        root, entries = folder_of(known, inside)
        values["folder"] = folder_view(root, entries, complete=known.complete)
        prefix = f"{inside}/" if inside else ""
        # The picture escapes every name by itself.
        values["picture"] = Markup(treemap(root, link="?path=", below=prefix, after="#files"))
        values["inside"] = prefix
        parts = inside.split("/") if inside else []
        values["crumbs"] = [(part, "/".join(parts[: at + 1])) for at, part in enumerate(parts)]
    except NoListing as error:
        values["problem"] = error.message
    apps = one.details.get("apps")
    scripts = [(title, one.details[key]) for key, title in SCRIPTS if isinstance(one.details.get(key), str)]
    return render(
        request,
        who,
        "image.html",
        one=one,
        collection=collection,
        tags=tags,
        may_change=may,
        build=made_by,
        earlier=before,
        environment=environment_of(one),
        apps=apps if isinstance(apps, dict) else {},
        scripts=[(title, text) for title, text in scripts if text],
        pulls=pull_lines(request, collection, one.container.name, tags[0] if tags else one.tag or "latest", one.sha256),
        **values,
    )


@router.get("/{owner:owner}/{name}/compare/{pair}")
def compare_page(owner: str, name: str, pair: str, request: Request, hub: TheHub, who: Who) -> Response:
    """Show what differs between two images of a collection, named by number, tag or digest: `A...B`."""
    first, dots, second = pair.partition("...")
    if not dots:
        raise NotFound("no-such-page", "a comparison is named A...B")
    with hub.read() as session:
        collection = seen(session, who, owner, name)
        numbers = [_number(session, collection, text) for text in (first, second)]
    before, after = two_images(hub, who, *numbers)
    if any(image.container.collection_id != collection.id for image in (before, after)):
        raise NotFound("no-such-image", f"{pair[:200]}: there is no such image in this collection")
    value = compare(hub, before, after)
    if wants_json(request):
        return JSONResponse({"before": before.id, "after": after.id, **value})
    return render(request, who, "compare.html", collection=collection, before=before, after=after, value=value)


def _number(session: Session, collection: Collection, text: str) -> int:
    """Return the number of an image named by number, tag or digest."""
    if text.isascii() and text.isdigit() and len(text) < 19:
        image = session.get(Image, int(text))
        if image is not None and image.container.collection_id == collection.id:
            return image.id  # else it may be a tag, which may be a number as well
    if len(text) in (32, 40, 64) and all(letter in "0123456789abcdef" for letter in text):
        return find_image(session, collection, digest=text).id
    return find_image(session, collection, tag=text).id


@router.get("/{owner:owner}/{rest:path}")
def nothing(rest: str) -> Response:
    """Tell people that there is no such page."""
    raise NotFound("no-such-page", f"{rest[:200]}: there is no such page")
