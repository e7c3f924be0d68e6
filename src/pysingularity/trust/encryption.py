# SPDX-License-Identifier: Apache-2.0
"""Encrypted root file systems of SIF files: which key opens them, and the plain squashfs inside as bytes to be read.

A partition of type 6 is a squashfs with two files in it: `gocryptfs.conf` and the encrypted squashfs, whose name begins
"squashfs-" (`trust.gocryptfs`). The passphrase is the user's; or it was drawn at random, and a crypto message beside
the partition holds it, encrypted for an RSA key. A partition of type 5 is a LUKS2 volume (`trust.luks`), whose key is
found in the same two ways.

Nothing here writes plain bytes anywhere: readers get them through `Plain.pread`, and a key is only ever in memory.
"""

from __future__ import annotations

import binascii
import hashlib
import os
import secrets

from pysingularity import messages
from pysingularity.errors import ImageError, UserError
from pysingularity.linux.process import forget_variables
from pysingularity.sif import layout
from pysingularity.squashfs.reader import SquashfsImage
from pysingularity.trust import gocryptfs, primitives

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Protocol

    from pysingularity.sif.file import SifFile
    from pysingularity.squashfs.reader import Source
    from pysingularity.trust.luks import Volume

    class Plain(Source, Protocol):
        """A decrypted file system: see `gocryptfs.Plain`."""

        @property
        def tag(self) -> str:
            """Tells whether two keys of one image are the same."""

        memory: tuple[bytes, bytes]


PREFIXES = ("SINGULARITY_", "APPTAINER_")
#: The passphrase that somebody has typed, from a command to the same one started again.
ANSWER = "SINGULARITY_ENCRYPTION_ANSWER"
PASSPHRASE, PEM_PATH, PEM_DATA = "ENCRYPTION_PASSPHRASE", "ENCRYPTION_PEM_PATH", "ENCRYPTION_PEM_DATA"
#: Bounds on what is read of hostile files: crypto messages and keys.
LIMIT = 64 << 10
_BEGIN, _END = b"-----BEGIN MESSAGE-----", b"-----END MESSAGE-----"


class Key:
    """A passphrase, or the text of a PEM file with an RSA key.

    Arguments:
        passphrase: as it was given; or
        pem: the text, and
        origin: where it comes from, for messages.
    """

    __slots__ = ("origin", "passphrase", "pem")

    def __init__(self, *, passphrase: bytes = b"", pem: bytes | None = None, origin: str = "") -> None:
        self.passphrase, self.pem, self.origin = passphrase, pem, origin

    def __repr__(self) -> str:
        return f"Key({'passphrase' if self.pem is None else 'PEM'} of {self.origin})"

    def proof(self) -> bytes:
        """Return what only those can make who have this key."""
        return hashlib.sha256(b"p" + self.passphrase if self.pem is None else b"k" + self.pem).digest()

    def wrong(self, path: str) -> UserError:
        """Return the error for an image that this key does not open."""
        what = "with this passphrase" if self.pem is None else f"with the key of {self.origin}"
        hint = "the image was encrypted with another key"
        if self.pem is None:
            hint = "an image that was encrypted with an RSA key is opened with --pem-path"
        return UserError("wrong-key", f"{path}: cannot be decrypted {what}", hint=hint)


def key_of(environ: Mapping[str, str], *, pem_path: str = "", ask: Callable[[], bytes] | None = None) -> Key | None:
    """Return the key that was given, None for none. The order is Apptainer's.

    Arguments:
        environ: variables (SINGULARITY_ or APPTAINER_)ENCRYPTION_PEM_PATH, then …_PEM_DATA, then …_PASSPHRASE.
            The process shows them to nobody afterwards (/proc/PID/environ).
        pem_path: --pem-path; before all others.
        ask: asks for the passphrase, where --passphrase was given; before all variables.

    Raises:
        UserError: the PEM file cannot be read, the passphrase is empty.
    """
    try:
        forget_variables((ANSWER, *(prefix + name for prefix in PREFIXES for name in (PASSPHRASE, PEM_DATA))))
    except OSError as error:  # no /proc: then nobody sees them there either
        messages.debug(f"variables stay visible: {error}")
    if pem_path:
        return _from_file(pem_path, "--pem-path")
    if ask is not None:
        passphrase = ask()
        if not passphrase:
            raise UserError("no-key", "the passphrase is empty")
        return Key(passphrase=passphrase, origin="--passphrase")
    name, path = _variable(environ, PEM_PATH)
    if path:
        return _from_file(path, name)
    name, text = _variable(environ, PEM_DATA)
    if text:
        return Key(pem=os.fsencode(text), origin=name)
    name, text = _variable(environ, PASSPHRASE)
    return Key(passphrase=os.fsencode(text), origin=name) if text else None


def key_in(options: Mapping[str, object]) -> Key | None:
    """Return the key among the options of a build."""
    key = options.get("key")
    return key if isinstance(key, Key) else None


def _variable(environ: Mapping[str, str], name: str) -> tuple[str, str]:
    for prefix in PREFIXES:
        value = environ.get(prefix + name, "")
        if value:
            return prefix + name, value
    return "", ""


def _from_file(path: str, origin: str) -> Key:
    try:
        with open(path, "rb") as file:
            return Key(pem=file.read(LIMIT), origin=path)
    except OSError as error:
        raise UserError("no-key-file", f"{origin} {path}: {(error.strerror or 'cannot be read').lower()}") from None


# -- opening ---------------------------------------------------------------------------------------------------------


def open_partition(
    fd: int,
    offset: int,
    size: int,
    sif: SifFile | None,
    kind: str,
    key: Key | None,
    path: str,
    *,
    recall: Callable[[bytes], bytes] | None = None,
) -> Plain:
    """Return the plain squashfs in an encrypted partition.

    Arguments:
        fd: the image file; stays the caller's, the result has its own.
        offset, size: where the partition lies in it.
        sif: the SIF file, for its crypto messages.
        kind: "gocryptfs" or "encrypted" (LUKS).
        key: what the user gave.
        path: name of the image for messages.
        recall: returns the innermost key of the image for a proof that whoever asks has the outer one, b"" where nobody
            remembers it. Making the one of the other is expensive on purpose.

    Raises:
        UserError: "needs-key", "wrong-key".
        ImageError: damaged, or encrypted in another way than images are.
    """
    if key is None:
        raise UserError(
            "needs-key",
            f"{path}: is encrypted, and no key was given",
            hint="give --passphrase or --pem-path FILE, or set SINGULARITY_ENCRYPTION_PASSPHRASE",
        )
    own = os.dup(fd)
    try:
        proof = key.proof()
        inner = recall(proof) if recall is not None else b""
        secret = b"" if inner else _secret(sif, key, path)
        plain: gocryptfs.Plain | Volume
        if kind == "gocryptfs":
            plain = _gocryptfs(own, offset, size, key, secret, path, inner)
        else:
            plain = _luks(own, offset, size, key, secret, path, inner)
        plain.memory = proof, plain.memory[1]
        return plain
    except BaseException:
        os.close(own)
        raise


def _luks(fd: int, offset: int, size: int, key: Key, secret: bytes, path: str, inner: bytes) -> Volume:
    from pysingularity.trust.luks import open_volume  # images that root made

    try:
        return open_volume(fd, offset, size, secret, path, known=inner)
    except gocryptfs.WrongKeyError:
        raise key.wrong(path) from None
    except ValueError as error:
        raise ImageError("unsupported-encryption", f"{path}: cannot be decrypted: {error}") from None


def _gocryptfs(fd: int, offset: int, size: int, key: Key, secret: bytes, path: str, inner: bytes) -> gocryptfs.Plain:
    outer = SquashfsImage(fd, offset, size, name=path)
    files = {}
    for name, ref, kind in outer.entries(outer.root):
        # Links lead nowhere: what is no regular file of the root folder is not looked at.
        if kind == "file":
            inode = outer.inode(ref)
            if inode.kind == "file":
                files[name] = inode
    conf = files.pop(b"gocryptfs.conf", None)
    if conf is None:
        raise outer.damaged("an encrypted image without gocryptfs.conf")
    found = [name for name in files if name.startswith(b"squashfs-")] or [
        name for name in files if name != b"gocryptfs.diriv"
    ]
    if len(found) != 1:
        raise outer.damaged(f"an encrypted image with {len(found)} files of contents")
    if conf.size > gocryptfs.LIMIT:
        raise outer.damaged(f"a gocryptfs.conf of {conf.size} bytes")
    try:
        master = inner or gocryptfs.Conf.parse(outer.read(conf)).unlock(secret)
    except gocryptfs.WrongKeyError:
        raise key.wrong(path) from None
    except ValueError as error:
        raise ImageError("unsupported-encryption", f"{path}: cannot be decrypted: {error}") from None
    return gocryptfs.Plain(outer, files[found[0]], master)


def _secret(sif: SifFile | None, key: Key, path: str) -> bytes:
    """Return what opens the partition: the passphrase, or what the crypto message holds for an RSA key."""
    if key.pem is None:
        return key.passphrase
    try:
        private = primitives.private_key(key.pem)
    except ValueError as error:
        hint = "the private key opens an image; the public one is for building"
        raise UserError("no-private-key", f"{key.origin} {error}", hint=hint) from None
    message = _message(sif)
    if not message:
        raise UserError(
            "wrong-key",
            f"{path}: was encrypted with a passphrase, not with an RSA key",
            hint="give --passphrase, or set SINGULARITY_ENCRYPTION_PASSPHRASE",
        )
    try:
        return primitives.oaep_decrypt(private, unwrap(message))
    except ValueError:
        raise key.wrong(path) from None


def _message(sif: SifFile | None) -> bytes:
    """Return the crypto message of the primary partition, b"" for none."""
    primary = sif.primary() if sif is not None else None
    wanted = layout.crypto_message_extra(layout.PEM, layout.RSA_OAEP)
    if sif is not None and primary is not None:
        for one in sif.descriptors:
            if (
                one.type == layout.CRYPTO_MESSAGE
                and one.link == primary.id
                and one.extra.ljust(8, b"\0") == wanted
                and one.size <= LIMIT
            ):
                return sif.read(one, LIMIT)
    return b""


# -- closing ---------------------------------------------------------------------------------------------------------


class Seal:
    """What a new image is encrypted with.

    Attributes:
        secret: the passphrase of the partition.
        message: the crypto message that holds it for an RSA key; b"" where the user knows the passphrase.
    """

    __slots__ = ("message", "secret")

    def __init__(self, key: Key) -> None:
        """Make ready.

        Raises:
            UserError: the PEM text holds no RSA key.
        """
        self.message = b""
        self.secret = key.passphrase
        if key.pem is not None:
            self.secret = secrets.token_hex(16).encode()
            try:
                self.message = wrap(primitives.oaep_encrypt(primitives.public_key(key.pem), self.secret))
            except ValueError as error:
                raise UserError(
                    "no-public-key",
                    f"{key.origin} {error}",
                    hint="openssl rsa -in key.pem -RSAPublicKey_out -out pub.pem",
                ) from None

    def __repr__(self) -> str:
        return f"Seal({'RSA' if self.message else 'passphrase'})"


def wrap(data: bytes) -> bytes:
    """Return bytes as Apptainer keeps them in a crypto message: a DER OCTET STRING in a PEM block MESSAGE."""
    length = len(data).to_bytes((len(data).bit_length() + 7) // 8 or 1, "big")
    head = length if len(data) < 0x80 else bytes([0x80 | len(length)]) + length
    text = binascii.b2a_base64(b"\x04" + head + data, newline=False)
    lines = [text[at : at + 64] for at in range(0, len(text), 64)]
    return b"\n".join([_BEGIN, *lines, _END, b""])


def unwrap(message: bytes) -> bytes:
    """Return the bytes in a crypto message.

    Raises:
        ValueError: it does not have that form.
    """
    start, end = message.find(_BEGIN), message.find(_END)
    if not 0 <= start < end:
        raise ValueError("no MESSAGE in PEM form")
    data = binascii.a2b_base64(message[start + len(_BEGIN) : end])
    if data[:1] != b"\x04" or len(data) < 2:
        raise ValueError("no OCTET STRING")
    count, at = data[1], 2
    if count & 0x80:
        at += count & 0x7F
        count = int.from_bytes(data[2:at], "big")
    if len(data) != at + count:
        raise ValueError("an OCTET STRING of another length")
    return data[at:]
