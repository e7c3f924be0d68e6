# SPDX-License-Identifier: Apache-2.0
"""The start ring in one file: compiled modules that every start needs, put together so that they are read at once.

Each module that is looked for, opened and read by itself costs a start 60 microseconds, and there are forty. The file
lies beside the compiled modules (`__pycache__`) and is made of them by the first start of somebody who may write there,
as the interpreter makes those; it holds for one version of the interpreter, and each module in it only as long as its
source has the time and size that it was compiled from (PEP 3147, PEP 552). `start` reads it.
"""

from __future__ import annotations

import marshal
import posix
import sys
from _frozen_importlib_external import MAGIC_NUMBER

#: What `exec` of a sandbox or image loads, below `pysingularity`; a test compares it with what is loaded.
NAMES = (
    "cli",
    "cli.commands",
    "cli.exec",
    "cli.main",
    "cli.options",
    "cli.run",
    "cli.scan",
    "cli.shared",
    "cli.shell",
    "cli.test",
    "config",
    "errors",
    "image",
    "image.mount",
    "image.open",
    "image.scripts",
    "linux",
    "linux.capabilities",
    "linux.fuse",
    "linux.libc",
    "linux.loop",
    "linux.mounts",
    "linux.namespaces",
    "linux.process",
    "messages",
    "runtime",
    "runtime.actions",
    "runtime.binds",
    "runtime.enter",
    "runtime.environment",
    "runtime.identity",
    "runtime.network",
    "runtime.overlay",
    "runtime.prepare",
    "runtime.spec",
    "runtime.supervise",
    "runtime.warm",
    "sif",
    "sif.file",
    "sif.layout",
    "squashfs",
    "squashfs.codecs",
    "squashfs.inode",
    "squashfs.layout",
    "squashfs.reader",
    "squashfs.serve",
    "squashfs.superblock",
    "thirdparty",
)


def write(folder: str, path: str) -> bool:
    """Write the file, when all modules have been compiled already.

    Arguments:
        folder: the package's folder.
        path: the file.
    """
    codes = {}
    for name in NAMES:
        place = f"{folder}/{name.replace('.', '/')}"
        is_package = posix.access(place + "/__init__.py", posix.F_OK)
        parent, _, last = (place + "/__init__" if is_package else place).rpartition("/")
        try:
            with open(f"{parent}/__pycache__/{last}.{sys.implementation.cache_tag}.pyc", "rb") as file:
                data = file.read()
        except OSError:
            return False
        flags, seconds, size = (int.from_bytes(data[at : at + 4], "little") for at in (4, 8, 12))
        if data[:4] != MAGIC_NUMBER or flags & 0b10:  # of another interpreter; or the source's hash is to be checked
            return False
        codes["pysingularity." + name] = (is_package, -1 if flags else seconds, size, data[16:])
    beside = f"{path}.{posix.getpid()}"
    try:
        with open(beside, "wb") as file:
            file.write(marshal.dumps((MAGIC_NUMBER, codes)))
        posix.rename(beside, path)
    except OSError:  # a full disk, or somebody else's folder after all: starts are only slower
        try:
            posix.unlink(beside)
        except OSError:
            pass
        return False
    return True
