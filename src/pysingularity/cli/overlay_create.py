# SPDX-License-Identifier: Apache-2.0
"""`singularity overlay create`: make an ext3 file system for the changes of containers, by mkfs.ext3."""

from __future__ import annotations

import os
import subprocess
import tempfile

from pysingularity.cli.options import LIST, TEXT, Arguments, Option
from pysingularity.errors import HostError, ImageError, UsageError, UserError
from pysingularity.image.open import open_image
from pysingularity.runtime.helpers import find
from pysingularity.sif import layout
from pysingularity.sif.file import SifFile, SifObject

USAGE = "FILE"
COUNT = (1, 1)
HELP = """\
FILE is a new file, or a SIF file that gets the file system as a further part. Needs mkfs.ext3 (e2fsprogs). Ordinary
users mount it by fuse2fs and fuse-overlayfs; a folder for --overlay needs neither.

    singularity overlay create --size 1024 changes.img
    singularity exec --overlay changes.img image.sif touch /opt/new
    singularity overlay create image.sif
    singularity exec --writable image.sif touch /opt/new
"""
OPTIONS = (
    Option("size", "Make it so many MiB large (64 at least)", short="s", kind=TEXT, metavar="MIB", default="64"),
    Option("sparse", "Take room on the disk only for what is written", short="S"),
    Option("create-dir", "Make a folder of yours in the overlay", kind=LIST, metavar="DIR"),
    Option("fakeroot", "Make it for containers with --fakeroot", short="f"),
)
LEAST = 64
#: Partition kind of SIF.
EXT3 = 2


def run(arguments: Arguments, environ: dict[str, str]) -> int:
    """Create the file system in a new file, or in a SIF file."""
    path = arguments.positional[0]
    text = str(arguments.size)
    if not text.isascii() or not text.isdigit():
        raise UsageError("bad-number", f"overlay create: --size {text}: is no number of MiB")
    if int(text) < LEAST:
        raise UserError("too-small", f"overlay create: --size {text}: must be at least {LEAST} MiB")
    program = find("mkfs.ext3", environ.get("PATH", ""))
    if not program:
        raise HostError(
            "no-mkfs",
            "overlay create: mkfs.ext3 is not installed",
            hint="install e2fsprogs; or use a folder: mkdir DIR; singularity exec --overlay DIR ...",
        )
    folders = [str(one) for one in arguments.create_dir]  # type: ignore[attr-defined]
    if os.path.lexists(path):
        _check_sif(path)
    place = os.path.dirname(path) or "."
    try:
        draft, name = tempfile.mkstemp(prefix=f".{os.path.basename(path)}.", suffix=".partial", dir=place)
    except OSError as error:
        raise UserError("cannot-write", f"{place}: {error.strerror}") from None
    try:
        os.truncate(draft, int(text) << 20)
        if not arguments.sparse:
            os.posix_fallocate(draft, 0, int(text) << 20)
        _make(program, name, folders, root=bool(arguments.fakeroot), environ=environ)
        if os.path.lexists(path):
            with SifFile.open(path, writable=True) as sif:
                primary = sif.primary()
                assert primary is not None  # checked above
                arch = layout.arch_name(primary.partition[2])
                extra = layout.partition_extra(EXT3, layout.OVERLAY, arch)
                sif.add(SifObject(layout.PARTITION, fd=draft, group=1, name=os.path.basename(path), extra=extra))
        else:
            umask = os.umask(0o022)
            os.umask(umask)
            os.fchmod(draft, 0o666 & ~umask)
            os.link(name, path)  # unlike a rename, never over something that has appeared meanwhile
    except OSError as error:
        raise HostError("cannot-write", f"{path}: {error.strerror}") from None
    finally:
        os.close(draft)
        os.unlink(name)
    return 0


def _check_sif(path: str) -> None:
    """Refuse what cannot get an overlay.

    Raises:
        UserError, ImageError: it is no SIF file, is signed, or has an overlay already.
    """
    with open_image(path) as image:
        if image.sif is None:
            raise UserError(
                "file-exists", f"{path}: exists already, and is no SIF file", hint="name a new file, or a SIF file"
            )
        if any(part.filesystem == "ext3" for part in image.overlays):
            raise ImageError("has-overlay", f"{path}: has an overlay already", hint="see: singularity sif list")
        if any(one.type == layout.SIGNATURE for one in image.sif.descriptors):
            hint = "create the overlay in its own file"
            raise ImageError("signed", f"{path}: is signed, and an overlay would change it", hint=hint)


def _make(program: str, target: str, folders: list[str], *, root: bool, environ: dict[str, str]) -> None:
    """Make the file system with the folders that an overlay needs.

    Raises:
        UserError: a folder leads out of the overlay. HostError: the program failed.
    """
    uid, gid = (0, 0) if root else (os.getuid(), os.getgid())
    with tempfile.TemporaryDirectory(prefix="overlay-") as tree:
        names = ["upper", "work"]
        for folder in folders:
            parts = [part for part in folder.split("/") if part not in ("", ".")]
            if ".." in parts:
                raise UserError("bad-folder", f"overlay create: --create-dir {folder}: must not hold ..")
            names += ["/".join(["upper", *parts[: count + 1]]) for count in range(len(parts))]
        for name in names:
            os.makedirs(f"{tree}/{name}", 0o755, exist_ok=True)
        words = [program, "-q", "-F", "-E", f"root_owner={uid}:{gid},nodiscard", "-d", tree, target]
        _run(words, environ)
        if root:  # the folders have been copied with their owner: us
            editor = find("debugfs", environ.get("PATH", ""))
            if not editor:
                raise HostError("no-debugfs", "overlay create: debugfs is not installed", hint="install e2fsprogs")
            lines = "".join(
                f'set_inode_field "/{name}" {field} 0\n' for name in dict.fromkeys(names) for field in ("uid", "gid")
            )
            _run([editor, "-w", "-f", "-", target], environ, lines)


def _run(words: list[str], environ: dict[str, str], text: str = "") -> None:
    result = subprocess.run(words, input=text, capture_output=True, text=True, check=False, env=environ)
    if result.returncode:
        said = result.stderr.strip().splitlines()
        name = os.path.basename(words[0])
        raise HostError("helper-failed", f"{name}: {said[-1] if said else f'ended with {result.returncode}'}")
