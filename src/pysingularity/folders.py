# SPDX-License-Identifier: Apache-2.0
"""Where we keep things: the folder of the cache, and the one for temporary files."""

from __future__ import annotations

import os

from pysingularity.errors import UserError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping


def cache_folder(environ: Mapping[str, str]) -> str:
    """Return the folder of the cache: SINGULARITY_CACHEDIR (or APPTAINER_CACHEDIR) + /cache, else in the home."""
    parent = environ.get("SINGULARITY_CACHEDIR") or environ.get("APPTAINER_CACHEDIR")
    if not parent:
        parent = os.path.join(_home(environ), ".singularity")
    return os.path.join(os.path.abspath(parent), "cache")


def _home(environ: Mapping[str, str]) -> str:
    home = environ.get("HOME")
    if home:
        return home
    import pwd

    try:
        return pwd.getpwuid(os.getuid()).pw_dir
    except KeyError:
        return "/"


def temporary_folder(environ: Mapping[str, str]) -> str:
    """Return the absolute path of the folder for temporary files.

    SINGULARITY_TMPDIR when that is set (it has to exist), else the scheduler's scratch (SLURM_TMPDIR), else TMPDIR,
    else /tmp; a /tmp that lives in memory is never filled silently: then it is /var/tmp.

    Raises:
        UserError: the folder that was asked for is missing or may not be written.
    """
    for name in ("SINGULARITY_TMPDIR", "APPTAINER_TMPDIR"):
        path = environ.get(name, "")
        if path:
            if not _usable(path):
                raise UserError(
                    "no-tmpdir",
                    f"{name}={path}: is no folder that you may write to",
                    hint=f"make it (mkdir -p {path}) or unset {name}",
                )
            return os.path.abspath(path)
    for name in ("SLURM_TMPDIR", "TMPDIR"):
        path = environ.get(name, "")
        if path and _usable(path):
            return os.path.abspath(path)
    for path in ("/var/tmp", "/tmp") if in_memory("/tmp") else ("/tmp", "/var/tmp"):
        if _usable(path):
            return path
    raise UserError("no-tmpdir", "there is no folder for temporary files", hint="set SINGULARITY_TMPDIR to one")


def _usable(path: str) -> bool:
    return os.path.isdir(path) and os.access(path, os.W_OK | os.X_OK)


def in_memory(path: str) -> bool:
    """Return whether a folder lies on a tmpfs (by the mount table; the longest mount point wins)."""
    best, kind = "", ""
    try:
        with open("/proc/self/mounts", encoding="utf-8", errors="surrogateescape") as stream:
            for line in stream:
                fields = line.split(" ")
                point = fields[1]
                if (path == point or path.startswith(point.rstrip("/") + "/")) and len(point) >= len(best):
                    best, kind = point, fields[2]
    except OSError:
        return False
    return kind in ("tmpfs", "ramfs")


def size_of(text: str) -> int:
    """Return the bytes that a text such as "20G", "512MiB" or "0" means; powers of 1024.

    Raises:
        UserError: the text is no size.
    """
    word = text.strip().upper().removesuffix("IB").removesuffix("B")
    factor = 1
    if word and word[-1] in "KMGT":
        factor = 1024 ** ("KMGT".index(word[-1]) + 1)
        word = word[:-1]
    try:
        value = float(word)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1 << 50:
        raise UserError("bad-size", f"{text!r} is no size", hint="write for example 20G or 512M")
    return int(value * factor)


def limit_of(environ: Mapping[str, str]) -> int | None:
    """Return the size limit of SINGULARITY_CACHE_SIZE in bytes, or None for no limit."""
    text = environ.get("SINGULARITY_CACHE_SIZE") or environ.get("APPTAINER_CACHE_SIZE")
    return size_of(text) if text else None
