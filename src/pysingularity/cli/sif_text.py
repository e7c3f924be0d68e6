# SPDX-License-Identifier: Apache-2.0
"""SIF headers and descriptors as text and as JSON: the words that `singularity sif` prints for the format's numbers."""

from __future__ import annotations

import errno
import time
from contextlib import contextmanager
from struct import unpack_from

from pysingularity.errors import HostError, SingularityError, UsageError
from pysingularity.sif import layout
from pysingularity.sif.file import SifFile

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from pysingularity.sif.layout import Descriptor, Header

TYPES = {
    layout.DEFINITION: "Def.FILE",
    layout.ENVIRONMENT: "Env.Vars",
    layout.LABELS: "JSON.Labels",
    layout.PARTITION: "FS",
    layout.SIGNATURE: "Signature",
    layout.JSON: "JSON.Generic",
    layout.RAW: "Generic/Raw",
    layout.CRYPTO_MESSAGE: "Cryptographic Message",
    layout.SBOM: "SBOM",
    layout.OCI_ROOT_INDEX: "OCI.RootIndex",
    layout.OCI_BLOB: "OCI.Blob",
}
FILE_SYSTEMS = ("Squashfs", "Ext3", "Archive", "Raw", "Encrypted squashfs", "Gocryptfs squashfs")
ROLES = ("System", "*System", "Data", "Overlay")
HASHES = ("SHA-256", "SHA-384", "SHA-512", "BLAKE2s-256", "BLAKE2b-256")
SBOM_FORMS = (
    *("cyclonedx-json", "cyclonedx-xml", "github-json", "spdx-json", "spdx-rdf", "spdx-tag-value", "spdx-yaml"),
    "syft-json",
)
CRYPTO_FORMS = {layout.OPENPGP: "OpenPGP", layout.PEM: "PEM"}
CRYPTO_KINDS = {layout.CLEAR_SIGNATURE: "Clear Signature", layout.RSA_OAEP: "RSA-OAEP"}
UNKNOWN = "Unknown"
RULE = "-" * 78


def nth(words: tuple[str, ...], number: int) -> str:
    """Return the word for a number that counts from 1."""
    return words[number - 1] if 1 <= number <= len(words) else UNKNOWN


def when(seconds: int) -> str:
    """Return a time as 2026-11-24 15:04:15 +0000 UTC."""
    try:
        now = time.gmtime(seconds)
    except (OverflowError, OSError, ValueError):
        return f"{seconds} seconds since 1970"
    date = f"{now.tm_year:04}-{now.tm_mon:02}-{now.tm_mday:02}"
    return f"{date} {now.tm_hour:02}:{now.tm_min:02}:{now.tm_sec:02} +0000 UTC"


def size_text(size: int) -> str:
    """Return a number of bytes in the largest unit that it fills, rounded to whole ones."""
    power = max(size.bit_length() - 1, 0) // 10
    return f"{size / (1 << 10 * power):.0f} {('B', 'KiB', 'MiB', 'GiB', 'TiB', 'PiB', 'EiB')[power]}"


def group_text(one: Descriptor) -> str:
    """Return the group of an object."""
    return str(one.group_number) if one.group_number else "NONE"


def link_text(one: Descriptor) -> str:
    """Return what an object is linked to."""
    group = one.linked_group
    if group:
        return f"{group} (G)"
    return str(one.link) if one.link and group is None else "NONE"


def details(one: Descriptor) -> list[tuple[str, str]]:
    """Return what the extra field of an object says, as (label, value)."""
    extra = one.extra.ljust(384, b"\0")
    if one.type == layout.PARTITION:
        file_system, role, arch = one.partition
        return [
            ("Filesystem Type", nth(FILE_SYSTEMS, file_system)),
            ("Partition Type", nth(ROLES, role)),
            ("Architecture", layout.arch_name(arch)),
        ]
    if one.type == layout.SIGNATURE:
        return [
            ("Hash Type", nth(HASHES, unpack_from("<i", extra)[0])),
            ("Entity", extra[4:24].hex().upper()),
        ]
    if one.type == layout.CRYPTO_MESSAGE:
        form, kind = unpack_from("<ii", extra)
        return [("Format Type", CRYPTO_FORMS.get(form, UNKNOWN)), ("Message Type", CRYPTO_KINDS.get(kind, UNKNOWN))]
    if one.type == layout.SBOM:
        return [("Format", nth(SBOM_FORMS, unpack_from("<i", extra)[0]))]
    if one.type in (layout.OCI_ROOT_INDEX, layout.OCI_BLOB):
        return [("Digest", one.extra.decode("utf-8", "replace"))]
    return []


def type_text(one: Descriptor) -> str:
    """Return the type of an object."""
    return TYPES.get(one.type, UNKNOWN)


def list_text(sif: SifFile) -> str:
    """Return the table of a file's objects."""
    lines = [RULE, f"{'ID':<4} {'|GROUP':<8} {'|LINK':<8} {'|SIF POSITION (start-end)':<26} |TYPE", RULE]
    for one in sif.descriptors:
        position = f"|{one.offset}-{one.offset + one.size}"
        kind = type_text(one)
        if one.type in (layout.PARTITION, layout.CRYPTO_MESSAGE, layout.SBOM):
            kind += f" ({'/'.join(value for _, value in details(one))})"
        elif one.type == layout.SIGNATURE:
            kind += f" ({details(one)[0][1]})"
        lines.append(f"{one.id:<4} |{group_text(one):<7} |{link_text(one):<7} {position:<26} |{kind}")
    return "\n".join(lines) + "\n"


def header_text(header: Header) -> str:
    """Return the global header, one field a line."""
    rows = []
    launch = header.launch.decode("utf-8", "replace").rstrip("\n")
    if launch:
        rows.append(("Launch Script", launch))
    rows.append(("Version", header.version.rstrip(b"\0").decode("ascii", "replace")))
    if header.arch[:2] != b"00":
        rows.append(("Primary Architecture", layout.arch_name(header.arch)))
    rows += [
        ("ID", header.uuid),
        ("Created At", when(header.created)),
        ("Modified At", when(header.modified)),
        ("Descriptors Free", str(header.free)),
        ("Descriptors Total", str(header.total)),
        ("Descriptors Offset", str(header.table_offset)),
        ("Descriptors Size", size_text(header.table_length)),
        ("Data Offset", str(header.data_offset)),
        ("Data Size", size_text(header.data_length)),
    ]
    return table(rows, gap=1)


def info_text(one: Descriptor) -> str:
    """Return everything about an object, one field a line."""
    rows = [
        ("Data Type", type_text(one)),
        ("ID", str(one.id)),
        ("Group ID", group_text(one)),
        ("Linked ID", link_text(one)),
        ("Offset", str(one.offset)),
        ("Size", str(one.size)),
        ("Created At", when(one.created)),
        ("Modified At", when(one.modified)),
    ]
    if one.name:
        rows.append(("Name", one.file_name))
    return table([*rows, *details(one)], gap=2, indent="  ")


def table(rows: list[tuple[str, str]], *, gap: int, indent: str = "") -> str:
    """Return labels and values in two columns."""
    width = max(len(label) for label, _ in rows) + 1 + gap
    return "".join(f"{indent}{label + ':':<{width}}{value}\n" for label, value in rows)


def header_json(header: Header) -> dict[str, Any]:
    """Return the global header for JSON; times are Unix seconds, sizes bytes."""
    return {
        "launch": header.launch.decode("utf-8", "replace").rstrip("\n"),
        "version": header.version.rstrip(b"\0").decode("ascii", "replace"),
        "architecture": "" if header.arch[:2] == b"00" else layout.arch_name(header.arch),
        "id": header.uuid,
        "created": header.created,
        "modified": header.modified,
        "descriptorsFree": header.free,
        "descriptorsTotal": header.total,
        "descriptorsOffset": header.table_offset,
        "descriptorsSize": header.table_length,
        "dataOffset": header.data_offset,
        "dataSize": header.data_length,
    }


def object_json(one: Descriptor) -> dict[str, Any]:
    """Return an object for JSON; times are Unix seconds, sizes bytes."""
    found: dict[str, Any] = {
        "id": one.id,
        "type": type_text(one),
        "group": one.group_number or None,
        "link": one.link if one.link and one.linked_group is None else None,
        "linkedGroup": one.linked_group or None,
        "offset": one.offset,
        "size": one.size,
        "created": one.created,
        "modified": one.modified,
        "name": one.file_name,
    }
    names = {"Filesystem Type": "filesystem", "Partition Type": "partition", "Hash Type": "hash"}
    for label, value in details(one):
        key = names.get(label, label.lower().replace(" ", ""))
        found[key] = value
    if one.type == layout.PARTITION:
        found["partition"] = found["partition"].lstrip("*")
        found["primary"] = one.is_primary
    return found


def number(text: str) -> int:
    """Return an object's id from the command line.

    Raises:
        UsageError: it is no number.
    """
    if not text.isascii() or not text.isdigit():
        raise UsageError("bad-id", f"{text}: is no id of an object", hint="ids are numbers; see: singularity sif list")
    return int(text)


@contextmanager
def status_one() -> Iterator[None]:
    """Let errors of this block end with status 1, as sub-commands of `sif` do in Singularity."""
    try:
        yield
    except SingularityError as error:
        error.exit_code = 1
        raise


@contextmanager
def opened(path: str, *, writable: bool = False) -> Iterator[SifFile]:
    """Open a SIF file for a sub-command; errors, also those of the block, end with status 1.

    Raises:
        ImageError: missing, no SIF file, damaged or locked. HostError: the disk is full.
    """
    with status_one():
        try:
            with SifFile.open(path, writable=writable) as sif:
                yield sif
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise HostError("disk-full", f"{path}: no space left", hint="the file is as it was before") from None
