# SPDX-License-Identifier: Apache-2.0
"""`singularity convert`: turn an image of any kind into one of another kind."""

from __future__ import annotations

import os

from pysingularity import messages
from pysingularity.cli import results
from pysingularity.cli.options import TEXT, Arguments, Option
from pysingularity.errors import UsageError, UserError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pysingularity.trust.encryption import Key

USAGE = "IN OUT"
COUNT = (2, 2)
HELP = """\
Turn the image IN (a SIF file, a bare squashfs or ext3 image, a sandbox, or a reference such as docker-archive:FILE or
oci:FOLDER) into OUT, which is a SIF file unless you say otherwise. A squashfs whose compression stays is copied block
by block, so that this takes a second. OUT is never encrypted; see: singularity build --encrypt.

    singularity convert image.simg image.sif
    singularity convert --to sandbox image.sif folder
    singularity convert --to docker-archive image.sif image.tar      # then: docker load -i image.tar
    singularity convert docker-archive:image.tar image.sif
    singularity convert --compress zstd --level 6 image.sif smaller.sif
"""
TARGETS = ("sif", "sandbox", "squashfs", "docker-archive", "oci", "oci-archive")
COMPRESSIONS = ("gzip", "zstd", "xz", "lz4")
OPTIONS = (
    Option("to", "Make this kind of image", kind=TEXT, metavar="KIND", choices=TARGETS, default="sif"),
    Option("force", "Replace what exists at OUT", short="F"),
    Option("compress", "Compress with this method", kind=TEXT, metavar="METHOD", choices=COMPRESSIONS),
    Option("level", "Compress with this effort", kind=TEXT, metavar="N"),
    Option("threads", "Use this many threads", kind=TEXT, metavar="N"),
    Option("name", "Name the image NAME[:TAG] in an archive or layout", kind=TEXT, metavar="NAME"),
    Option("passphrase", "Ask for the passphrase of an encrypted IN (or set SINGULARITY_ENCRYPTION_PASSPHRASE)"),
    Option("pem-path", "Open an encrypted IN with the private RSA key in FILE", kind=TEXT, metavar="FILE"),
    Option("json", "Print what was written, with digests, as JSON", short="j"),
)


def run(arguments: Arguments, environ: dict[str, str]) -> int:
    """Convert the image."""
    from pysingularity.reference import has_scheme

    source, target = arguments.positional
    if not has_scheme(source):
        return _convert(arguments, source, target)
    from pysingularity.cli.transfer import Display
    from pysingularity.image.output import Orderly, check_target
    from pysingularity.reference import parse_reference
    from pysingularity.registry.fetch import obtain
    from pysingularity.registry.settings import settings_from

    check_target(target, force=bool(arguments.force), folder=arguments.to in ("sandbox", "oci"))
    with Orderly(), Display() as display:
        found = obtain(parse_reference(source), settings_from({"threads": arguments.threads}, environ), display)
        try:
            return _convert(arguments, found.path, target)
        finally:
            if found.temporary:
                os.unlink(found.path)


def _convert(arguments: Arguments, source: str, target: str) -> int:
    """Convert a local image."""
    from pysingularity.image.output import Orderly

    kind = str(arguments.to)
    level, threads = _number(arguments.level, "level"), _number(arguments.threads, "threads")
    if (arguments.compress or level is not None) and kind not in ("sif", "squashfs"):
        raise UsageError("compress-archive", f"--compress and --level are for SIF files and squashfs, not for {kind}")
    if level is not None and not arguments.compress:
        raise UsageError("level-alone", "--level needs --compress", hint="for example: --compress zstd --level 6")
    if os.path.exists(target) and os.path.exists(source) and os.path.samefile(source, target):
        raise UserError("same-file", f"{target}: is the image itself", hint="choose another name for the result")
    from pysingularity.terminal import ask_passphrase
    from pysingularity.trust.encryption import key_of

    ask = ask_passphrase if arguments.passphrase else None
    key = key_of(os.environ, pem_path=str(arguments.pem_path or ""), ask=ask)
    with Orderly():
        if kind == "sandbox":
            written = _sandbox(source, target, bool(arguments.force), threads, key)
        elif kind in ("sif", "squashfs"):
            from pysingularity.image.convert import to_file

            made = to_file(
                source,
                target,
                bare=kind == "squashfs",
                compression=str(arguments.compress or ""),
                level=level,
                threads=threads,
                force=bool(arguments.force),
                key=key,
                say=messages.warning,
            )
            written = {"size": made.size, "id": made.identity, "partitionDigest": made.partition_digest}
        else:
            from pysingularity.image.export import export

            identity = export(
                source,
                target,
                kind,
                name=str(arguments.name or ""),
                threads=threads,
                force=bool(arguments.force),
                key=key,
            )
            written = {"imageId": identity}
    if arguments.json:
        if os.path.isfile(target):
            written["digest"] = _digest(target)
        results.write_json({"path": target, "kind": kind, **written})
    else:
        messages.info(f"Image written: {target}")
    return 0


def _sandbox(source: str, target: str, force: bool, workers: int | None, key: Key | None) -> dict[str, Any]:
    from pysingularity.image.convert import to_sandbox
    from pysingularity.image.open import open_image

    with open_image(source) as image:
        image.unlock(key)
        made = to_sandbox(image, target, workers=workers, force=force)
    if made.devices:
        messages.info(f"{len(made.devices)} device nodes were left out: only root may make them")
    if made.xattrs:
        names = ", ".join(sorted(os.fsdecode(name) for name in made.xattrs))
        messages.info(f"extended attributes that this file system or user cannot set were left out: {names}")
    return {"entries": made.entries, "size": made.size}


def _digest(path: str) -> str:
    import hashlib

    with open(path, "rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


def _number(text: object, name: str) -> int | None:
    """Return the number an option gives.

    Raises:
        UsageError: it is none.
    """
    if text is None:
        return None
    word = str(text)
    if not word.isascii() or not word.isdigit() or not int(word):
        raise UsageError("bad-number", f"--{name} {word}: is no number from 1")
    return int(word)
