# SPDX-License-Identifier: Apache-2.0
"""Small real images, and putting them into a hub's store without a build."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import sqlalchemy as sa

from pysingularity.hub.accounts.people import add_user
from pysingularity.hub.accounts.rights import ALL_SCOPES, Principal
from pysingularity.hub.builds.accept import examine
from pysingularity.hub.builds.publish import add_image
from pysingularity.hub.catalog import add_collection, find_collection
from pysingularity.hub.context import Hub
from pysingularity.hub.models import Image, User
from pysingularity.sif import layout
from pysingularity.sif.file import SifObject, create, random_identity


def make_sif(
    path: Path, text: str = "hello", *, pad: int = 0, arch: str = "amd64", files: dict[str, bytes] | None = None
) -> Path:
    """Write a SIF whose root holds one file; `pad` bytes that cannot be compressed make it large."""
    tree = path.with_suffix(".tree")
    tree.mkdir()
    (tree / "text").write_text(text)
    for name, content in (files or {}).items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes(content)
    if pad:
        (tree / "pad").write_bytes(os.urandom(pad))
    squashfs = path.with_suffix(".squashfs")
    subprocess.run(["mksquashfs", tree, squashfs, "-quiet", "-no-progress", "-noappend"], check=True, stdout=2)
    recipe = f"Bootstrap: scratch\n\n%labels\n    TEXT {text}\n"
    document = {"data": {"attributes": {"deffile": recipe, "labels": {"TEXT": text}}}, "type": "container"}
    root = os.open(squashfs, os.O_RDONLY)
    target = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o755)
    create(
        target,
        [
            SifObject(layout.DEFINITION, recipe.encode()),
            SifObject(layout.JSON, json.dumps(document).encode(), name="inspect-metadata.json"),
            SifObject(layout.PARTITION, fd=root, extra=layout.partition_extra(layout.SQUASHFS, layout.PRIMARY, arch)),
        ],
        identity=random_identity(),
        when=int(time.time()),
    )
    return path


def put_image(
    hub: Hub, path: Path, name: str, *, tags: list[str], commit: str = "", private: bool = False, **more: object
) -> Image:
    """Publish a file as an image of OWNER/NAME, both made when missing."""
    facts = examine(path)
    copy = hub.storage.staging() / f"put-{path.name}"
    copy.write_bytes(path.read_bytes())
    hub.storage.take(copy, facts.digests.sha256)
    owner, _, part = name.partition("/")
    with hub.write() as session:
        user = session.scalar(sa.select(User).where(User.name == owner)) or add_user(session, owner)
        collection = find_collection(session, owner, part)
        if collection is None:
            collection = add_collection(session, Principal(user, ALL_SCOPES), name, private=private)
        return add_image(session, collection, facts, tags=tags, by=owner, commit=commit, **more)


def run(*words: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    """Run a client's command and return how it ended."""
    environment = {**os.environ, **dict(options.pop("env", {}))}  # type: ignore[call-overload]
    options.setdefault("timeout", 120)
    return subprocess.run(
        [str(word) for word in words],
        env=environment, capture_output=True, text=True, check=False, **options,
    )  # fmt: skip


SINGULARITY = [sys.executable, "-m", "pysingularity"]
