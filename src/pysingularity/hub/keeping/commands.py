# SPDX-License-Identifier: Apache-2.0
"""The administrator's commands for keeping; what their results mean is said in `administration`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pysingularity.hub.administration import opened
from pysingularity.hub.keeping import archive, backup, garbage
from pysingularity.hub.keeping.scrub import scrub as run_scrub

DAY = 86400.0


def gc(arguments: argparse.Namespace) -> dict[str, Any]:
    """Remove old images by the rules of retention, and files that nothing needs."""
    with opened(arguments) as hub:
        report = garbage.collect(hub, grace=arguments.grace, dry_run=arguments.dry_run)
    verb = "would be removed" if arguments.dry_run else "were removed"
    text = (
        f"{len(report.images)} images, {report.blobs} files ({report.bytes >> 20} MiB), {report.uploads} uploads, "
        f"{report.logs} logs and {report.deliveries} exchanges {verb}"
    )
    return {**report.view(), "dry_run": arguments.dry_run, "_alone": text}


def scrub(arguments: argparse.Namespace) -> dict[str, Any]:
    """Read stored files again; the status is 1 when one is damaged."""
    with opened(arguments) as hub:
        value = run_scrub(hub, older=arguments.older * DAY, most=arguments.most)
    damaged = value["damaged"]
    lines = [f"{value['checked']} files ({value['bytes'] >> 20} MiB) were read, {len(damaged)} are damaged"]
    lines += [f"sha256:{digest}: {problem}" for digest, problem in damaged.items()]
    return {**value, "_alone": "\n".join(lines), "_status": int(bool(damaged))}


def back_up(arguments: argparse.Namespace) -> dict[str, Any]:
    """Write a backup; the status is 1 when images' files are missing."""
    with opened(arguments) as hub:
        value = backup.back_up(hub, Path(arguments.target).absolute())
    text = f"{value['path']}: {value['blobs']} files ({value['bytes'] >> 20} MiB), {value['copied']} of them new"
    if value["missing"]:
        text += "".join(f"\nsha256:{digest}: is missing or damaged in the hub" for digest in value["missing"])
    return {**value, "_alone": text, "_status": int(bool(value["missing"]))}


def restore(arguments: argparse.Namespace) -> dict[str, Any]:
    """Make a hub of a backup."""
    value = backup.restore(Path(arguments.source).absolute(), Path(arguments.data))
    return {**value, "_alone": f"{value['data']}: restored from {value['created']}, {value['blobs']} files"}


def export(arguments: argparse.Namespace) -> dict[str, Any]:
    """Write a static archive."""
    with opened(arguments) as hub:
        value = archive.export(hub, Path(arguments.target).absolute(), arguments.url, names=arguments.name or None)
    text = f"{value['path']}: {value['collections']} collections, {value['images']} images ({value['bytes'] >> 20} MiB)"
    return {**value, "_alone": text}
