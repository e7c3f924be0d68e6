# SPDX-License-Identifier: Apache-2.0
"""What the dynamic linker knows: its cache of libraries, and the symbol versions that ELF files need and define.

Formats: glibc's `elf/cache.c` layout of /etc/ld.so.cache ("glibc-ld.so.cache1.1"), and the System V ABI with the GNU
symbol versioning sections (LSB Core, "Symbol Versioning"). Pure functions over bytes; loaded only for --nv and --rocm.
"""

from __future__ import annotations

from struct import error as StructError
from struct import unpack_from

CACHE_MAGIC = b"glibc-ld.so.cache1.1"
#: machine → the flags word of a cache entry that this machine's 64-bit programs may use.
CACHE_FLAGS = {"x86_64": 0x0303, "aarch64": 0x0A03, "ppc64le": 0x0503, "s390x": 0x0403, "riscv64": 0x1003}
VERNEED, VERDEF = 0x6FFFFFFE, 0x6FFFFFFD
DYNAMIC, DT_SONAME = 6, 14


def parse_cache(data: bytes, machine: str) -> dict[str, list[str]]:
    """Return soname → paths, best first, from the bytes of an ld.so.cache.

    Raises:
        ValueError: the bytes are no cache in the format of glibc 2.2 or later.
    """
    base = data.find(CACHE_MAGIC)
    if base < 0:
        raise ValueError("not a linker cache of glibc")
    wanted = CACHE_FLAGS.get(machine)
    found: dict[str, list[str]] = {}
    try:
        (count,) = unpack_from("<I", data, base + 20)
        if count * 24 > len(data):
            raise ValueError("linker cache is cut short")
        for number in range(count):
            flags, key, value = unpack_from("<iII", data, base + 48 + 24 * number)
            if wanted is not None and flags & 0xFFFF != wanted:
                continue
            found.setdefault(_text(data, base + key), []).append(_text(data, base + value))
    except StructError:
        raise ValueError("linker cache is cut short") from None
    return found


def _text(data: bytes, at: int) -> str:
    end = data.find(b"\0", at)
    if at >= len(data) or end < 0:
        raise ValueError("linker cache is cut short")
    return data[at:end].decode("utf-8", "surrogateescape")


def versions(data: bytes, kind: int) -> set[str]:
    """Return the version names that an ELF file needs (VERNEED) or defines (VERDEF), such as "GLIBC_2.34".

    Anything that is not a 64-bit little-endian ELF file with section headers has none: an empty set.
    """
    names: set[str] = set()
    try:
        if data[:6] != b"\x7fELF\x02\x01":
            return names
        (offset,) = unpack_from("<Q", data, 40)
        size, count = unpack_from("<HH", data, 58)
        sections = [unpack_from("<IIQQQQII", data, offset + size * number) for number in range(count)]
        for section in sections:
            if section[1] != kind or section[6] >= len(sections):
                continue
            strings = sections[section[6]][4]
            names.update(_needed(data, section[4], strings) if kind == VERNEED else _defined(data, section[4], strings))
    except (StructError, IndexError):
        pass  # a damaged file promises nothing
    return names


def soname(data: bytes) -> str:
    """Return the name under which programs ask for a shared library, "" when it tells none."""
    try:
        if data[:6] != b"\x7fELF\x02\x01":
            return ""
        (offset,) = unpack_from("<Q", data, 40)
        size, count = unpack_from("<HH", data, 58)
        sections = [unpack_from("<IIQQQQII", data, offset + size * number) for number in range(count)]
        for section in sections:
            if section[1] == DYNAMIC and section[6] < len(sections):
                strings = sections[section[6]][4]
                for at in range(section[4], section[4] + min(section[5], 1 << 16), 16):
                    tag, value = unpack_from("<QQ", data, at)
                    if tag == DT_SONAME:
                        return _name(data, strings + value)
    except (StructError, IndexError):
        pass  # a damaged file has no name
    return ""


def _needed(data: bytes, at: int, strings: int) -> set[str]:
    names = set()
    for _ in range(1024):  # chains in a damaged file may loop
        _, count, _, aux, following = unpack_from("<HHIII", data, at)
        entry = at + aux
        for _ in range(count):
            _, _, _, name, step = unpack_from("<IHHII", data, entry)
            names.add(_name(data, strings + name))
            entry += step
        if not following:
            break
        at += following
    return names


def _defined(data: bytes, at: int, strings: int) -> set[str]:
    names = set()
    for _ in range(4096):
        _, _, _, _, _, aux, following = unpack_from("<HHHHIII", data, at)
        (name,) = unpack_from("<I", data, at + aux)
        names.add(_name(data, strings + name))
        if not following:
            break
        at += following
    return names


def _name(data: bytes, at: int) -> str:
    return data[at : data.index(b"\0", at)].decode("ascii", "replace") if data.find(b"\0", at) >= 0 else ""


def glibc(names: set[str]) -> tuple[int, int] | None:
    """Return the highest GLIBC_x.y among version names, or None when there is none."""
    best: tuple[int, int] | None = None
    for name in names:
        prefix, _, number = name.partition("_")
        major, _, rest = number.partition(".")
        minor = rest.partition(".")[0]
        if prefix == "GLIBC" and major.isdigit() and minor.isdigit():
            best = max(best or (0, 0), (int(major), int(minor)))
    return best
