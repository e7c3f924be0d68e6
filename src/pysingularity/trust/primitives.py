# SPDX-License-Identifier: Apache-2.0
"""The ciphers that Python's own library lacks, from the package `cryptography`: loaded only for encrypted images.

scrypt, HMAC and hashes come with Python; AES and RSA do not. They are imported where they are used: the package needs
some 20 ms, and running a plain image never needs it.
"""

from __future__ import annotations

import hmac

from pysingularity import thirdparty

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.padding import OAEP
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey, RSAPublicKey
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM


def tag_of(key: bytes) -> str:
    """Return what tells for one image whether two keys are the same, without telling anything about them."""
    return hmac.digest(key, b"singularity: the same key", "sha256")[:16].hex()


def gcm(key: bytes) -> AESGCM:
    """Return AES-GCM with a key: `encrypt` and `decrypt` take nonce, data and what is authenticated besides."""
    thirdparty.enable()
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    return AESGCM(key)


def forged() -> type[Exception]:
    """Return the exception that `gcm` raises for data that was not made with this key."""
    thirdparty.enable()
    from cryptography.exceptions import InvalidTag

    return InvalidTag


def private_key(pem: bytes) -> RSAPrivateKey:
    """Return the RSA key in a PEM text (PKCS #1 as OpenSSL's `genrsa -traditional`, or PKCS #8).

    Raises:
        ValueError: there is none, or it is guarded by a passphrase; the text says which.
    """
    thirdparty.enable()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        key = load_pem_private_key(pem, None)
    except TypeError:
        raise ValueError("is guarded by a passphrase of its own, which is not supported") from None
    except (ValueError, UnsupportedAlgorithm):
        raise ValueError("holds no private key in PEM form") from None
    if not isinstance(key, RSAPrivateKey):
        raise ValueError("holds a key of another kind than RSA")
    return key


def public_key(pem: bytes) -> RSAPublicKey:
    """Return the RSA public key in a PEM text (PKCS #1, or what OpenSSL calls PUBLIC KEY), also that of a private key.

    Raises:
        ValueError: there is none; the text says why.
    """
    thirdparty.enable()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    if b"PRIVATE KEY-----" in pem:
        return private_key(pem).public_key()
    try:
        key = load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm):
        raise ValueError("holds no public key in PEM form") from None
    if not isinstance(key, RSAPublicKey):
        raise ValueError("holds a key of another kind than RSA")
    return key


def oaep_decrypt(key: RSAPrivateKey, data: bytes) -> bytes:
    """Return what was encrypted for an RSA key (OAEP with SHA-256), piece by piece of the key's length.

    Raises:
        ValueError: it was encrypted for another key.
    """
    step = -(-key.key_size // 8)
    return b"".join(key.decrypt(data[at : at + step], _oaep()) for at in range(0, len(data), step))


def oaep_encrypt(key: RSAPublicKey, data: bytes) -> bytes:
    """Encrypt for an RSA key as `oaep_decrypt` reads it.

    Raises:
        ValueError: the key is too short.
    """
    step = -(-key.key_size // 8) - 2 * 32 - 2
    if step <= 0:
        raise ValueError("holds a key that is too short")
    return b"".join(key.encrypt(data[at : at + step], _oaep()) for at in range(0, len(data), step))


def _oaep() -> OAEP:
    from cryptography.hazmat.primitives.asymmetric.padding import MGF1, OAEP
    from cryptography.hazmat.primitives.hashes import SHA256

    return OAEP(MGF1(SHA256()), SHA256(), None)


def xts_decrypt(key: bytes, data: bytes, number: int, size: int) -> bytes:
    """Return sectors of AES-XTS decrypted.

    Arguments:
        key: both halves, 32 or 64 bytes.
        data: whole sectors of `size` bytes.
        number: of the first sector, in units of 512 bytes; the tweak of each is its number.
    """
    thirdparty.enable()
    from cryptography.hazmat.primitives.ciphers import Cipher
    from cryptography.hazmat.primitives.ciphers.algorithms import AES
    from cryptography.hazmat.primitives.ciphers.modes import XTS

    algorithm, step = AES(key), size // 512
    return b"".join(
        Cipher(algorithm, XTS((number + at // size * step).to_bytes(16, "little")))
        .decryptor()
        .update(data[at : at + size])
        for at in range(0, len(data), size)
    )


def argon2(kind: str, password: bytes, salt: bytes, length: int, passes: int, lanes: int, memory: int) -> bytes:
    """Return a key made of a passphrase by Argon2 (RFC 9106).

    Arguments:
        kind: "argon2i" or "argon2id".
        length: bytes of the key; `memory` is in KiB.

    Raises:
        ValueError: the parameters do not fit, or the package is too old. MemoryError: there is not so much.
    """
    thirdparty.enable()
    from cryptography.exceptions import UnsupportedAlgorithm

    try:
        from cryptography.hazmat.primitives.kdf import argon2 as module

        maker = getattr(module, {"argon2i": "Argon2i", "argon2id": "Argon2id"}[kind])
        function = maker(salt=salt, length=length, iterations=passes, lanes=lanes, memory_cost=memory)
    except (ImportError, AttributeError, UnsupportedAlgorithm):
        raise ValueError(f"its passphrase is guarded by {kind}, which needs a newer package cryptography") from None
    return bytes(function.derive(password))
