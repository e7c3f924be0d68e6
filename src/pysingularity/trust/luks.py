# SPDX-License-Identifier: Apache-2.0
"""Read LUKS2 volumes in user space: how root's Apptainer and SingularityCE encrypt images (partition type 5).

A volume begins with a binary header and a JSON text that says where everything lies. A keyslot holds the volume's key,
encrypted under one made of the passphrase (Argon2 or PBKDF2) and blown up to 4000 stripes so that no part of it can be
salvaged (the anti-forensic splitter); a digest tells whether it was the right one. The contents are sectors of
AES-XTS, whose tweak is the number of the sector. XTS keeps contents secret and does not authenticate them: altered
bytes come out as noise, which the squashfs inside mostly notices, as with the kernel's own dm-crypt.

Source: LUKS2 On-Disk Format Specification 1.1; LUKS1 1.2 for the splitter; the kernel's dm-crypt for "plain64".
"""

from __future__ import annotations

import binascii
import hashlib
import hmac
import json
import os
from struct import Struct

from pysingularity.errors import ImageError
from pysingularity.trust import primitives
from pysingularity.trust.gocryptfs import WrongKeyError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

MAGIC = b"LUKS\xba\xbe"
#: magic, version, size of the header, sequence number, label, checksum's algorithm, salt, UUID, subsystem, offset.
HEADER = Struct(">6sHQQ48s32s64s40s48sQ")
CHECKSUM = 0x1C0
BINARY = 4096
SECTOR = 512
#: Bounds on what a hostile header may ask for. cryptsetup takes 1 GiB for Argon2 at most by itself, and makes it last
#: two seconds; its header is at most 4 MiB long.
MOST_HEADER = 4 << 20
MOST_MEMORY = 2 << 20  # KiB
MOST_WORK = 64 << 20  # KiB times passes
MOST_ITERATIONS = 50_000_000
MOST_SLOTS = 32
STRIPES = 4000
HASHES = ("sha1", "sha256", "sha512")
CIPHER = "aes-xts-plain64"


class UnreadableError(ValueError):
    """Damaged, or of a form that is not read; the text says which."""


def open_volume(fd: int, offset: int, size: int, password: bytes, path: str, *, known: bytes = b"") -> Volume:
    """Return the contents of a volume.

    Arguments:
        fd: the file; the result takes it over.
        offset, size: where in it the volume lies, in bytes.
        password: all of it counts, also line ends.
        path: name of the image for messages.
        known: the volume's key, where somebody has remembered it.

    Raises:
        WrongKeyError: the passphrase opens no keyslot.
        UnreadableError: damaged, or of a form that is not read.
    """
    try:
        value = _metadata(fd, offset, size)
        segment, key = _unlock(fd, offset, size, value, password, known)
        start, sector = int(segment["offset"]), int(segment.get("sector_size", SECTOR))
        length = size - start if segment["size"] == "dynamic" else int(segment["size"])
        tweak = int(segment.get("iv_tweak", "0"))
        fine = segment["type"] == "crypt" and segment["encryption"] == CIPHER and sector in (512, 1024, 2048, 4096)
    except (WrongKeyError, UnreadableError):
        raise
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError):
        raise UnreadableError("its LUKS header is damaged") from None
    if not fine:
        raise UnreadableError("it is encrypted in another way than images are")
    length -= length % sector
    if not 0 < start < start + length <= size or not 0 <= tweak < 1 << 63:
        raise UnreadableError("its LUKS header names places outside")
    return Volume(fd, offset + start, length, sector, tweak, key, path)


def _metadata(fd: int, offset: int, size: int) -> dict[str, Any]:
    """Return the JSON text of a header, checked."""
    head = os.pread(fd, BINARY, offset)
    if len(head) < BINARY or not head.startswith(MAGIC):
        raise UnreadableError("it is no LUKS volume")
    _, version, length, _, _, algorithm, *_ = HEADER.unpack_from(head)
    if version != 2:
        raise UnreadableError(f"it is LUKS version {version}, only 2 can be read")
    name = algorithm.rstrip(b"\0").decode("latin-1")
    if not BINARY < length <= min(MOST_HEADER, size) or name not in HASHES:
        raise UnreadableError("its LUKS header is damaged")
    rest = os.pread(fd, length - BINARY, offset + BINARY)
    found = hashlib.new(name, head[:CHECKSUM] + bytes(64) + head[CHECKSUM + 64 :] + rest).digest()
    if not hmac.compare_digest(found, head[CHECKSUM : CHECKSUM + len(found)]):
        raise UnreadableError("its LUKS header is damaged")
    value: dict[str, Any] = json.loads(rest.partition(b"\0")[0])
    if value["config"].get("requirements"):
        raise UnreadableError("its LUKS volume is only half encrypted")
    return value


def _unlock(
    fd: int, offset: int, size: int, value: dict[str, Any], password: bytes, known: bytes
) -> tuple[dict[str, Any], bytes]:
    """Return the segment with the contents, and its key."""
    slots, digests = value["keyslots"], value["digests"]
    if len(value["segments"]) != 1:
        raise UnreadableError(f"its LUKS volume has {len(value['segments'])} segments")
    ((number, segment),) = value["segments"].items()
    if known:
        return segment, known
    if not isinstance(slots, dict):
        raise TypeError
    if len(slots) > MOST_SLOTS:
        raise UnreadableError(f"its LUKS header has {len(slots)} keyslots")
    digest = next((one for one in digests.values() if number in one["segments"]), None)
    if digest is None:
        raise UnreadableError("its LUKS header is damaged")
    for name in sorted(slots):
        if name in digest["keyslots"] and slots[name]["type"] == "luks2":
            key = _slot(fd, offset, size, slots[name], password)
            made = hashlib.pbkdf2_hmac(
                _hash(digest["hash"]), key, _base64(digest["salt"]), _bounded(digest["iterations"], MOST_ITERATIONS)
            )
            wanted = _base64(digest["digest"])
            if len(wanted) >= 20 and hmac.compare_digest(made[: len(wanted)], wanted):
                return segment, key
    raise WrongKeyError("the passphrase is wrong")


def _slot(fd: int, offset: int, size: int, slot: dict[str, Any], password: bytes) -> bytes:
    """Return the key that a keyslot holds for a passphrase; another passphrase gives another key."""
    area, af, length = slot["area"], slot["af"], _bounded(slot["key_size"], 64)
    if length not in (32, 64) or af["stripes"] != STRIPES or area["encryption"] != CIPHER:
        raise UnreadableError("it is encrypted in another way than images are")
    outer = _derive(slot["kdf"], password, _bounded(area["key_size"], 64))
    place, count = int(area["offset"]), length * STRIPES
    if len(outer) not in (32, 64) or not 0 < place < place + count <= size:
        raise UnreadableError("its LUKS header names places outside")
    stored = os.pread(fd, count, offset + place)
    if len(stored) != count:
        raise UnreadableError("it is cut short")
    return merge(primitives.xts_decrypt(outer, stored, 0, SECTOR), length, _hash(af["hash"]))


def _derive(kdf: dict[str, Any], password: bytes, length: int) -> bytes:
    kind, salt = kdf["type"], _base64(kdf["salt"])
    if kind == "pbkdf2":
        rounds = _bounded(kdf["iterations"], MOST_ITERATIONS)
        return hashlib.pbkdf2_hmac(_hash(kdf["hash"]), password, salt, rounds, length)
    if kind not in ("argon2i", "argon2id"):
        raise UnreadableError(f"its passphrase is guarded by {str(kind)[:20]!r}, which is unknown")
    passes, memory = _bounded(kdf["time"], MOST_WORK), _bounded(kdf["memory"], MOST_MEMORY)
    if passes * memory > MOST_WORK:
        raise UnreadableError(
            f"its passphrase is guarded by {passes} passes over {memory >> 10} MiB: out of all bounds"
        )
    try:
        return primitives.argon2(kind, password, salt, length, passes, _bounded(kdf["cpus"], 64), memory)
    except MemoryError:
        raise UnreadableError(
            f"its passphrase is guarded by {memory >> 10} MiB of memory, which are not to be had"
        ) from None


def _bounded(value: object, most: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError
    if not 0 < value <= most:
        raise UnreadableError(f"its LUKS header asks for {value}, which is out of all bounds")
    return value


def _hash(name: object) -> str:
    if name not in HASHES:
        raise UnreadableError(f"its LUKS header names a hash that is not supported: {str(name)[:20]!r}")
    return str(name)


def _base64(value: object) -> bytes:
    if not isinstance(value, str) or len(value) > 4096:
        raise TypeError
    return binascii.a2b_base64(value.encode())


def merge(stripes: bytes, length: int, name: str) -> bytes:
    """Put a key together of its stripes: XOR of all, with a hash between each two."""
    total = 0
    for at in range(0, len(stripes) - length, length):
        total ^= int.from_bytes(stripes[at : at + length], "big")
        total = int.from_bytes(_diffuse(total.to_bytes(length, "big"), name), "big")
    return (total ^ int.from_bytes(stripes[-length:], "big")).to_bytes(length, "big")


def _diffuse(block: bytes, name: str) -> bytes:
    step = hashlib.new(name).digest_size
    parts = [
        hashlib.new(name, number.to_bytes(4, "big") + block[at : at + step]).digest()
        for number, at in enumerate(range(0, len(block), step))
    ]
    return b"".join(parts)[: len(block)]


class Volume:
    """The decrypted contents of a volume: see `gocryptfs.Plain`."""

    __slots__ = ("_key", "_offset", "_path", "_sector", "_tweak", "fd", "memory", "size", "tag")

    def __init__(self, fd: int, offset: int, size: int, sector: int, tweak: int, key: bytes, path: str) -> None:
        self.fd, self.size, self._offset, self._sector, self._tweak = fd, size, offset, sector, tweak
        self._key, self._path = key, path
        self.memory = b"", key
        self.tag = primitives.tag_of(key)

    def pread(self, size: int, position: int) -> bytes:
        """Return contents from a position on, fewer at the end.

        Raises:
            ImageError: the file ends early.
        """
        end = min(position + size, self.size)
        if position >= end:
            return b""
        sector = self._sector
        first, last = position // sector, -(-end // sector)
        stored = os.pread(self.fd, (last - first) * sector, self._offset + first * sector)
        if len(stored) < (last - first) * sector:
            raise ImageError(
                "damaged-image", f"{self._path}: the file ends early", hint="fetch or build the image again"
            )
        # Sectors count in units of 512 bytes whatever their size is (dm-crypt without "iv_large_sectors").
        number = self._tweak + first * (sector // SECTOR)
        return primitives.xts_decrypt(self._key, stored, number, sector)[
            position - first * sector : end - first * sector
        ]
