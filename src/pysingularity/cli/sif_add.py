# SPDX-License-Identifier: Apache-2.0
"""`singularity sif add`: add an object to a SIF file."""

from __future__ import annotations

import hashlib
import os
import sys

from pysingularity.cli.options import TEXT, Arguments, Option
from pysingularity.cli.sif_text import FILE_SYSTEMS, HASHES, ROLES, SBOM_FORMS, opened
from pysingularity.errors import UsageError, UserError
from pysingularity.sif import layout
from pysingularity.sif.file import SifObject

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

USAGE = "FILE OBJECT"
COUNT = (2, 2)
HELP = """\
Add the content of OBJECT ("-" is standard input) to a SIF file.

    singularity sif add --datatype 1 image.sif recipe.def
    singularity sif add --datatype 4 --parttype 1 --partfs 1 --partarch 2 image.sif rootfs.squashfs
"""


def _listed(words: tuple[str, ...]) -> str:
    return ", ".join(f"{number} {word}" for number, word in enumerate(words, 1))


DATA_TYPES = (
    *("definition file", "environment variables", "labels", "partition", "signature", "JSON", "raw"),
    *("crypto message", "SBOM", "OCI root index", "OCI blob"),
)
OPTIONS = (
    Option("datatype", f"Say what the object is: {_listed(DATA_TYPES)}", kind=TEXT, metavar="N"),
    Option("partfs", f"File system of a partition: {_listed(FILE_SYSTEMS[:4])}", kind=TEXT, metavar="N"),
    Option("parttype", f"Role of a partition: {_listed(ROLES)}", kind=TEXT, metavar="N"),
    Option("partarch", f"Architecture of a partition: {_listed(layout.ARCHITECTURES)}", kind=TEXT, metavar="N"),
    Option("groupid", "Put the object into a group (0: none)", kind=TEXT, metavar="N", default="0"),
    Option("link", "Link the object to another one (0: none)", kind=TEXT, metavar="ID", default="0"),
    Option("alignment", "Align the object (4096 for partitions)", kind=TEXT, metavar="BYTES"),
    Option("filename", "Name the object (default: the name of the file)", kind=TEXT, metavar="NAME"),
    Option("signhash", f"Hash of a signature: {_listed(HASHES)}", kind=TEXT, metavar="N"),
    Option("signentity", "Fingerprint of who signed: 40 hexadecimal digits", kind=TEXT, metavar="HEX"),
    Option("sbomformat", "Format of an SBOM", kind=TEXT, metavar="FORMAT", choices=SBOM_FORMS),
)


def run(arguments: Arguments, environ: dict[str, str]) -> int:  # noqa: ARG001
    """Add the object."""
    path, source = arguments.positional
    kind = _number(arguments, "datatype", 1, len(DATA_TYPES)) + layout.DEFINITION - 1
    extra = _extra(arguments, kind)
    group = _number(arguments, "groupid", 0, 0x0FFFFFFF)
    link = _number(arguments, "link", 0, 0xFFFFFFFF)
    alignment = None if arguments.alignment is None else _number(arguments, "alignment", 0, 1 << 30)
    with opened(path, writable=True) as sif:
        if source == "-":
            data = sys.stdin.buffer.read()
            name = str(arguments.filename or "")
            sif.add(SifObject(kind, data, group=group, link=link, name=name, extra=extra(data), alignment=alignment))
            return 0
        try:
            fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise UserError("unreadable-file", f"{source}: {(error.strerror or str(error)).lower()}") from None
        with open(fd, "rb") as file:
            # Only small objects have an extra field that depends on their content.
            data = file.read() if kind in (layout.OCI_ROOT_INDEX, layout.OCI_BLOB) else b""
            one = SifObject(
                kind,
                fd=fd,
                group=group,
                link=link,
                name=str(arguments.filename or ""),
                extra=extra(data),
                alignment=alignment,
            )
            sif.add(one)
    return 0


def _number(arguments: Arguments, name: str, least: int, most: int) -> int:
    """Return the number an option gives.

    Raises:
        UsageError: it is missing, no number, or out of range.
    """
    text = getattr(arguments, name)
    if text is None:
        raise UsageError("missing-value", f"sif add: --{name} is needed", hint="see: singularity sif add --help")
    if not text.isascii() or not text.isdigit() or not least <= int(text) <= most:
        raise UsageError("bad-number", f"sif add: --{name} {text}: is no number from {least} to {most}")
    return int(text)


def _extra(arguments: Arguments, kind: int) -> Callable[[bytes], bytes]:
    """Return what makes the extra field of an object of a kind from its content."""
    made = b""
    if kind == layout.PARTITION:
        arch = layout.ARCHITECTURES[_number(arguments, "partarch", 1, len(layout.ARCHITECTURES)) - 1]
        file_system = _number(arguments, "partfs", 1, len(FILE_SYSTEMS))
        made = layout.partition_extra(file_system, _number(arguments, "parttype", 1, len(ROLES)), arch)
    elif kind == layout.SIGNATURE:
        text = str(arguments.signentity or "")
        try:
            entity = bytes.fromhex(text)
        except ValueError:
            entity = b""
        if len(entity) != 20:
            raise UsageError("bad-entity", f"sif add: --signentity {text!r}: is not 40 hexadecimal digits")
        made = layout.signature_extra(_number(arguments, "signhash", 1, len(HASHES)), entity)
    elif kind == layout.SBOM:
        if arguments.sbomformat is None:
            raise UsageError("missing-value", "sif add: --sbomformat is needed", hint=", ".join(SBOM_FORMS))
        made = layout.sbom_extra(SBOM_FORMS.index(str(arguments.sbomformat)) + 1)
    elif kind in (layout.OCI_ROOT_INDEX, layout.OCI_BLOB):
        return lambda data: b"sha256:" + hashlib.sha256(data).hexdigest().encode()
    return lambda _: made
