# SPDX-License-Identifier: Apache-2.0
"""Passwords of local accounts: hashed with scrypt, verified in constant time."""

from __future__ import annotations

import base64
import hashlib
import hmac
import secrets

from pysingularity.hub.errors import Invalid

#: Cost of scrypt: 2^15 blocks of 8 * 128 bytes need 32 MiB and about 60 ms.
COST, BLOCK, LANES = 1 << 15, 8, 1
SHORTEST, LONGEST = 8, 1024


def hash_password(password: str) -> str:
    """Return what is stored for a password: `scrypt$N$r$p$salt$hash`.

    Raises:
        Invalid: shorter than 8 or longer than 1024 characters.
    """
    if not SHORTEST <= len(password) <= LONGEST:
        raise Invalid("weak-password", f"a password has {SHORTEST} to {LONGEST} characters")
    salt = secrets.token_bytes(16)
    digest = _scrypt(password, salt, COST, BLOCK, LANES)
    return "$".join(["scrypt", str(COST), str(BLOCK), str(LANES), _text(salt), _text(digest)])


def verify_password(password: str, stored: str | None) -> bool:
    """Return whether a password is the stored one. Without a stored one it takes the same time to say no."""
    if stored is None or len(password) > LONGEST:
        _scrypt(password[:LONGEST], b"0" * 16, COST, BLOCK, LANES)
        return False
    kind, cost, block, lanes, salt, digest = stored.split("$")
    if kind != "scrypt":
        return False
    found = _scrypt(password, base64.b64decode(salt), int(cost), int(block), int(lanes))
    return hmac.compare_digest(found, base64.b64decode(digest))


def _scrypt(password: str, salt: bytes, cost: int, block: int, lanes: int) -> bytes:
    return hashlib.scrypt(
        password.encode("utf-8", "surrogatepass"), salt=salt, n=cost, r=block, p=lanes, maxmem=64 << 20, dklen=32
    )


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()
