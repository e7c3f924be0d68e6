# SPDX-License-Identifier: Apache-2.0
"""The file format of gocryptfs, as far as encrypted images use it: `gocryptfs.conf` and one file of encrypted blocks.

A passphrase becomes a key by scrypt (RFC 7914); that opens the master key in the configuration, from which HKDF-SHA256
(RFC 5869) makes the key of the contents. A file begins with 2 bytes of version and 16 of identity; then come blocks of
4096 bytes by AES-256-GCM, each behind its own nonce of 16 bytes and followed by a tag of 16, authenticated together
with its number and the file's identity. So a block that was changed, moved or taken from elsewhere is noticed, and ends
as ImageError ("damaged-image").

Source: gocryptfs, Documentation/file-format.md, MANPAGE.md, and the forward mode of its site, version 2 of the format.
Names of files are not encrypted in images ("PlaintextNames"). What surrounds the two files is `trust.encryption`.
"""

from __future__ import annotations

import binascii
import hmac
import json
import os
from hashlib import scrypt

from pysingularity.errors import ImageError
from pysingularity.trust import primitives

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    from pysingularity.squashfs.inode import Inode
    from pysingularity.squashfs.reader import SquashfsImage

VERSION = 2
BLOCK, NONCE, TAG = 4096, 16, 16
#: What a block needs in the file, and what stands before the first one.
STORED, HEADER = NONCE + BLOCK + TAG, 18
KEY = 32
#: The flags of configurations that hold everything we read; others change the cipher or hide the names.
NEEDED = {"HKDF", "GCMIV128"}
ALLOWED = NEEDED | {"PlaintextNames", "DirIV", "EMENames", "LongNames", "Raw64", "LongNameMax"}
#: Bounds on scrypt: gocryptfs itself takes N = 65536, r = 8, p = 1 (64 MiB); 16 times that is what we are willing to
#: spend on a file from somewhere. Below 1024 gocryptfs refuses as well: the passphrase would be easy to guess.
LEAST_N, MOST_MEMORY, MOST_WORK = 1 << 10, 1 << 30, 1 << 23
#: A configuration has 400 bytes.
LIMIT = 64 << 10
_INFO = b"AES-GCM file content encryption"


class WrongKeyError(ValueError):
    """The passphrase or key does not open the image."""


class Conf:
    """A configuration, checked: `salt`, `n`, `r`, `p` of scrypt and the encrypted master key `sealed`."""

    __slots__ = ("n", "p", "r", "salt", "sealed")

    def __init__(self, salt: bytes, n: int, r: int, p: int, sealed: bytes) -> None:
        self.salt, self.n, self.r, self.p, self.sealed = salt, n, r, p, sealed

    @classmethod
    def parse(cls, data: bytes) -> Conf:
        """Take a `gocryptfs.conf` apart.

        Raises:
            ValueError: it is none, needs what we have not, or asks for an absurd amount of work; the text says what.
        """
        try:
            found = json.loads(data)
            flags, params = set(found["FeatureFlags"]), found["ScryptObject"]
            salt, sealed = (_bytes(value) for value in (params["Salt"], found["EncryptedKey"]))
            version, n, r, p, length = (_number(params.get(name, found.get(name))) for name in _NUMBERS)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise ValueError("its gocryptfs.conf is damaged") from None
        if version != VERSION:
            raise ValueError(f"its gocryptfs.conf is of version {version}, only {VERSION} can be read")
        unknown = sorted(str(flag) for flag in flags - ALLOWED)
        if unknown or not flags >= NEEDED:
            raise ValueError(f"it is encrypted in another way ({', '.join(unknown) or 'an old form'}) than images are")
        if n < LEAST_N or n & (n - 1) or r < 1 or p < 1 or 128 * n * r > MOST_MEMORY or n * r * p > MOST_WORK:
            raise ValueError(
                f"its passphrase is guarded by scrypt with N={n}, r={r}, p={p}, which is out of all bounds"
            )
        if not 16 <= len(salt) <= 1024 or length != KEY or len(sealed) != NONCE + KEY + TAG:
            raise ValueError("its gocryptfs.conf has fields of impossible lengths")
        return cls(salt, n, r, p, sealed)

    @classmethod
    def make(cls, password: bytes, master: bytes, *, n: int = 1 << 16) -> Conf:
        """Return a configuration in which a passphrase opens a master key."""
        conf = cls(os.urandom(32), n, 8, 1, b"")
        nonce = os.urandom(NONCE)
        conf.sealed = nonce + _cipher(conf.derive(password)).encrypt(nonce, master, bytes(8))
        return conf

    def text(self) -> bytes:
        """Return the file's bytes."""
        fields = {
            "Creator": "pysingularity",
            "EncryptedKey": _text(self.sealed),
            "ScryptObject": {"Salt": _text(self.salt), "N": self.n, "R": self.r, "P": self.p, "KeyLen": KEY},
            "Version": VERSION,
            "FeatureFlags": ["HKDF", "GCMIV128", "PlaintextNames"],
        }
        return json.dumps(fields, indent="\t").encode() + b"\n"

    def derive(self, password: bytes) -> bytes:
        """Return the key that scrypt makes of a passphrase. gocryptfs reads one line of it."""
        memory = 128 * self.r * (self.n + self.p + 2) + (1 << 20)
        line = password.partition(b"\n")[0]
        return scrypt(line, salt=self.salt, n=self.n, r=self.r, p=self.p, maxmem=memory, dklen=KEY)

    def unlock(self, password: bytes) -> bytes:
        """Return the master key.

        Raises:
            WrongKeyError: the passphrase is another one.
        """
        try:
            return _cipher(self.derive(password)).decrypt(self.sealed[:NONCE], self.sealed[NONCE:], bytes(8))
        except primitives.forged():
            raise WrongKeyError("the passphrase is wrong") from None


_NUMBERS = ("Version", "N", "R", "P", "KeyLen")


def _number(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError
    return value


def _bytes(value: object) -> bytes:
    if not isinstance(value, str):
        raise TypeError
    return binascii.a2b_base64(value.encode(), strict_mode=True)


def _text(value: bytes) -> str:
    return binascii.b2a_base64(value, newline=False).decode()


def _cipher(key: bytes) -> AESGCM:
    """Return AES-GCM with the contents' key of a master key (or of a passphrase's): HKDF-SHA256 of 32 bytes."""
    extracted = hmac.digest(bytes(32), key, "sha256")
    return primitives.gcm(hmac.digest(extracted, _INFO + b"\x01", "sha256"))


def plain_size(size: int) -> int:
    """Return the bytes of contents in a file of `size` bytes.

    Raises:
        ValueError: a file cannot have that size.
    """
    blocks, rest = divmod(size - HEADER, STORED)
    if size <= HEADER or 0 < rest <= NONCE + TAG:
        raise ValueError(f"an encrypted file of {size} bytes is cut short")
    return blocks * BLOCK + max(rest - NONCE - TAG, 0)


class Plain:
    """The decrypted contents of one file, for any number of readers; what is read is never kept.

    Arguments:
        outer: the squashfs that holds the file.
        inode: the file.
        master: the master key.

    Attributes:
        fd: descriptor that is read from; `size`: bytes of contents.
        tag: tells for one image whether two keys are the same, without telling anything about them.
        memory: a proof that somebody has the user's key, and the key inside that it leads to.

    Raises:
        ImageError: the file is damaged.
    """

    __slots__ = ("_open", "_prefix", "_read", "damaged", "fd", "memory", "size", "tag")

    def __init__(self, outer: SquashfsImage, inode: Inode, master: bytes) -> None:
        self.fd, self.damaged = outer.fd, outer.damaged
        try:
            self.size = plain_size(inode.size)
        except ValueError as error:
            raise self.damaged(str(error)) from None
        start = outer.stretch(inode)
        self._read: Callable[[int, int], bytes]
        if start is None:
            self._read = lambda offset, size: outer.read(inode, offset, size)
        else:  # as everybody writes it
            total = inode.size
            self._read = lambda offset, size: outer.raw(start + offset, min(size, total - offset))
        header = self._read(0, HEADER)
        if header[:2] != VERSION.to_bytes(2, "big"):
            raise self.damaged("an encrypted file of an unknown version")
        self._prefix = header[2:]
        self._open = _cipher(master).decrypt
        self.memory = b"", master
        self.tag = primitives.tag_of(master)

    def pread(self, size: int, position: int) -> bytes:
        """Return contents from a position on, fewer at the end.

        Raises:
            ImageError: a block was altered.
        """
        end = min(position + size, self.size)
        if position >= end:
            return b""
        first, last = position // BLOCK, (end - 1) // BLOCK
        stored = self._read(HEADER + first * STORED, (last - first + 1) * STORED)
        identity, decrypt, parts = self._prefix, self._open, []
        forged = primitives.forged()
        try:
            # Slices are copies, and still a third faster here than views are.
            for number in range(first, last + 1):
                at = (number - first) * STORED
                text, nonce = stored[at + NONCE : at + STORED], stored[at : at + NONCE]
                parts.append(decrypt(nonce, text, number.to_bytes(8, "big") + identity))
        except forged:
            raise self.damaged(f"an encrypted block was altered ({number} of {self.size // BLOCK})") from None
        # Cut before they are joined: large pieces of memory are what costs most here.
        parts[-1] = parts[-1][: end - last * BLOCK]
        parts[0] = parts[0][position - first * BLOCK :]
        return b"".join(parts)


class Sealer:
    """A file that is encrypted while it is written, mostly from its beginning to its end.

    Takes the place of a descriptor for `squashfs.writer`, which writes the first bytes last and sometimes takes back
    what it wrote last: the first block is kept, and a block that is begun again in its middle is read back.

    Arguments:
        fd: where the file is written; offset: where in it the file begins.
        master: the master key.
    """

    def __init__(self, fd: int, offset: int, master: bytes) -> None:
        self.fd, self.offset = fd, offset
        self._identity, self._cipher = os.urandom(16), _cipher(master)
        self._first = bytearray()
        self._tail = bytearray()  # plain bytes of the block being filled
        self._number = 1  # the block that `_tail` belongs to

    def pwrite(self, data: bytes | bytearray | memoryview, position: int) -> int:
        """Write bytes at a position that is not behind the end of what is there; return how many (all)."""
        view = memoryview(data)
        if position < BLOCK:
            part = view[: BLOCK - position]
            if len(self._first) < position + len(part):
                self._first += bytes(position + len(part) - len(self._first))
            self._first[position : position + len(part)] = part
            view, position = view[len(part) :], position + len(part)
        if view:
            number, begin = divmod(position, BLOCK)
            if number != self._number:
                self._number, self._tail = number, bytearray(self._back(number, begin))
            del self._tail[begin:]
            self._tail += view
            self._drain()
        return len(data)

    def _drain(self) -> None:
        """Encrypt and write the blocks that are full."""
        count = len(self._tail) // BLOCK
        if count:
            self._put(self._number, memoryview(self._tail)[: count * BLOCK])
            self._tail = self._tail[count * BLOCK :]
            self._number += count

    def _put(self, number: int, view: memoryview | bytearray) -> None:
        """Encrypt blocks from a number on and write them; only the last of the file may be short."""
        parts = []
        nonces = os.urandom(NONCE * -(-len(view) // BLOCK))
        for at in range(0, len(view), BLOCK):
            nonce, nonces = nonces[:NONCE], nonces[NONCE:]
            data = number + at // BLOCK
            parts += [
                nonce,
                self._cipher.encrypt(nonce, bytes(view[at : at + BLOCK]), data.to_bytes(8, "big") + self._identity),
            ]
        self._write(b"".join(parts), HEADER + number * STORED)

    def _back(self, number: int, count: int) -> bytes:
        """Return the first bytes of a block that was written before."""
        if not count:
            return b""
        stored = os.pread(self.fd, STORED, self.offset + HEADER + number * STORED)
        data = number.to_bytes(8, "big") + self._identity
        return bytes(self._cipher.decrypt(stored[:NONCE], stored[NONCE:], data)[:count])

    def _write(self, data: bytes, position: int) -> None:
        view = memoryview(data)
        while view:
            count = os.pwrite(self.fd, view, self.offset + position)
            view, position = view[count:], position + count

    def finish(self, size: int) -> int:
        """Write what is missing of a file with `size` bytes of contents; return the bytes of the encrypted file.

        Raises:
            ImageError: fewer bytes were given.
        """
        number, begin = divmod(size, BLOCK)
        if number and begin and number != self._number:
            self._number, self._tail = number, bytearray(self._back(number, begin))
        if number and begin:
            self._put(number, self._tail[:begin])
        if len(self._first) < min(size, BLOCK) or not size:
            raise ImageError("short-file", f"{len(self._first)} bytes were given of {size}")
        self._write(VERSION.to_bytes(2, "big") + self._identity, 0)
        self._put(0, self._first[:size])
        return HEADER + size + -(-size // BLOCK) * (NONCE + TAG)
