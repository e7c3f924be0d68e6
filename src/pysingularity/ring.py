# SPDX-License-Identifier: Apache-2.0
"""The start ring in one file: the compiled modules that starts need, put together so that they are read at once.

A module that is looked for, opened, read and made known by itself costs a start 60 microseconds and more, and there
are forty. The file lies beside the compiled modules (`__pycache__`) and is made by the first start of somebody who may
write there, as the interpreter makes those; it holds for one version of the interpreter, and a part of it only as long
as the sources of that part have the times and sizes that they were compiled from (PEP 3147). `start` reads it.

The file: the interpreter's magic number (4 bytes), the length of each part (4 bytes each, little-endian), the parts. A
part is a marshalled pair: modules in the order in which they can be run (full name, source below the package's folder,
time in seconds, size, code), and what the other parts hold (full name → number of the part; empty but in the first).
Docstrings and assertions are left out of the code (`python -OO`), and so is the import of `__future__`, one more file.
"""

from __future__ import annotations

import marshal
import posix
from _frozen_importlib_external import MAGIC_NUMBER

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import CodeType

#: What is loaded below `pysingularity`, in its order: by every start; by starts of image files; by who serves an image.
#: A test compares the names with what is loaded.
PARTS = (
    (
        *("cli", "errors", "messages", "thirdparty", "cli.commands", "cli.options", "cli.scan", "cli.main"),
        *("cli.shared", "cli.exec", "cli.run", "cli.shell"),
        *("runtime", "linux", "linux.libc", "linux.capabilities", "linux.mounts"),
        *("linux.namespaces", "linux.process", "runtime.actions", "runtime.spec", "runtime.overlay", "runtime.binds"),
        *("image", "image.scripts", "runtime.environment", "runtime.enter", "config", "image.open", "runtime.identity"),
        "runtime.prepare",
    ),
    ("sif", "sif.layout", "sif.file", "linux.fuse", "runtime.layers", "runtime.warm"),
    (
        *("linux.loop", "squashfs", "squashfs.layout", "squashfs.codecs", "squashfs.inode", "squashfs.superblock"),
        *("squashfs.reader", "squashfs.serve", "image.mount"),
    ),
)
_FUTURE = b"\nfrom __future__ import annotations\n"
_ANNOTATIONS = 0x1000000  # CO_FUTURE_ANNOTATIONS


def write(folder: str, path: str) -> bool:
    """Write the file.

    Arguments:
        folder: the package's folder.
        path: the file.
    """
    beside = f"{path}.{posix.getpid()}"
    try:
        later = {f"pysingularity.{name}": number for number, names in enumerate(PARTS) for name in names if number}
        parts = [
            marshal.dumps((tuple(_compiled(folder, name) for name in names), {} if number else later))
            for number, names in enumerate(PARTS)
        ]
        with open(beside, "wb") as file:
            file.write(MAGIC_NUMBER + b"".join(len(part).to_bytes(4, "little") for part in parts) + b"".join(parts))
        posix.rename(beside, path)
    except OSError:  # no sources, a full disk, or somebody else's folder after all: starts are only slower
        try:
            posix.unlink(beside)
        except OSError:
            pass
        return False
    return True


def _compiled(folder: str, name: str) -> tuple[str, str, int, int, CodeType]:
    """Return one module of a part."""
    source = name.replace(".", "/") + ".py"
    if posix.access(f"{folder}/{source[:-3]}/__init__.py", posix.F_OK):
        source = source[:-3] + "/__init__.py"
    with open(f"{folder}/{source}", "rb") as file:
        status, text = posix.fstat(file.fileno()), file.read()
    flags = _ANNOTATIONS if _FUTURE in text else 0
    code = compile(text.replace(_FUTURE, b"\n\n"), f"{folder}/{source}", "exec", flags, dont_inherit=True, optimize=2)
    return f"pysingularity.{name}", source, int(status.st_mtime), status.st_size, code
