# SPDX-License-Identifier: Apache-2.0
"""Believing an image: the hub reads and hashes every file itself before it says anything about it.

Used for results of builds and for everything that clients push. A file that comes out of a sandbox is opened without
following links, copied into the storage's folder (so that nobody can change it any more), and looked at there.
"""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pysingularity.errors import SingularityError
from pysingularity.hub.errors import Invalid, TooLarge
from pysingularity.hub.storage import Storage
from pysingularity.hub.storage.base import Digests, hash_file
from pysingularity.image.metadata import attributes_of, oci_config_of
from pysingularity.image.open import open_image
from pysingularity.sif import layout
from pysingularity.squashfs.superblock import Superblock

#: Text of an image (labels, scripts) that is kept in the database.
LONGEST = 256 << 10
CHUNK = 8 << 20


@dataclass(frozen=True)
class Facts:
    """What the hub found in a SIF file."""

    digests: Digests
    arch: str
    signed: bool
    encrypted: bool
    definition: str
    labels: dict[str, Any]
    details: dict[str, Any]


class NotBelieved(Invalid):
    """The file is no image that the hub would serve."""

    status = 422


def take_copy(source: Path, storage: Storage, *, limit: int, beat: Callable[[], None] | None = None) -> Path:
    """Copy a file out of a folder that strangers wrote to, into the storage's staging folder; returns the copy.

    Raises:
        NotBelieved: missing, or no plain file of its own.
        TooLarge: more than `limit` bytes.
    """
    try:
        handle = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise NotBelieved("no-result", f"the build left no image: {error.strerror}")
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
            raise NotBelieved("odd-result", "the build's result is no plain file of its own")
        if status.st_size > limit:
            raise TooLarge("image-too-large", f"the image has {status.st_size} bytes, more than {limit}")
        target = storage.staging() / f"image-{secrets.token_hex(8)}"
        out = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            copy(handle, out, status.st_size, beat)
        except BaseException:
            target.unlink()
            raise
        finally:
            os.close(out)
        return target
    finally:
        os.close(handle)


def copy(source: int, target: int, size: int, beat: Callable[[], None] | None = None) -> None:
    """Copy bytes between files in the kernel; shares them where the file system can."""
    done = 0
    while done < size:
        try:
            count = os.copy_file_range(source, target, min(CHUNK, size - done), done, done)
        except OSError:  # other file systems on old kernels
            count = os.pwrite(target, os.pread(source, min(CHUNK, size - done), done), done)
        if not count:
            raise NotBelieved("odd-result", "the file became shorter while it was read")
        done += count
        if beat is not None:
            beat()


def examine(path: Path, beat: Callable[[], None] | None = None, digests: Digests | None = None) -> Facts:
    """Look into a file and return what is in it.

    Raises:
        NotBelieved: it is no sound SIF with a root file system.
    """
    try:
        with open_image(str(path)) as image:
            if image.sif is None:
                raise NotBelieved("no-sif", f"the file is no SIF but {image.kind}")
            encrypted = image.filesystem in ("encrypted", "gocryptfs")
            if image.filesystem == "squashfs":
                # The table must say what the partition says, else clients would be surprised.
                Superblock(os.pread(image.fd, 96, image.offset), image.size)
            attributes = {} if encrypted else attributes_of(image)
            config = oci_config_of(image)
            definition = image.sif.of_type(layout.DEFINITION)
            text = image.sif.read(definition, LONGEST * 4) if definition is not None else b""
            signed = image.sif.of_type(layout.SIGNATURE) is not None
            arch = image.arch
    except NotBelieved:
        raise
    except SingularityError as error:
        raise NotBelieved(error.id, error.message.replace(str(path), "the image"))
    except (OSError, ValueError, RecursionError, MemoryError) as error:
        raise NotBelieved("damaged-image", f"the image cannot be read: {error}")
    details = _bounded({key: value for key, value in attributes.items() if key not in ("labels", "deffile")})
    if config is not None and len(config) <= LONGEST:
        details["oci"] = _plain(config.decode("utf-8", "replace"))
    labels = _bounded(dict(attributes.get("labels") or {}))
    deffile = attributes.get("deffile")
    definition_text = text.decode("utf-8", "replace") if text else deffile if isinstance(deffile, str) else ""
    return Facts(
        digests or hash_file(path, beat),
        arch,
        signed,
        encrypted,
        _plain(definition_text[: LONGEST * 4]),
        labels,
        details,
    )


def _bounded(value: Any, depth: int = 0) -> Any:
    """Return JSON-able values with their texts cut to what a database should hold."""
    if isinstance(value, str):
        return _plain(value[:LONGEST])
    if isinstance(value, dict) and depth < 6:
        return {_plain(str(key)[:1000]): _bounded(item, depth + 1) for key, item in list(value.items())[:2000]}
    if isinstance(value, list | tuple) and depth < 6:
        return [_bounded(item, depth + 1) for item in value[:2000]]
    return value if isinstance(value, int | float | bool) or value is None else ""


def _plain(text: str) -> str:
    return text.replace("\0", "").encode("utf-8", "replace").decode()
