# SPDX-License-Identifier: Apache-2.0
"""Short-lived passes that the registry's token endpoint gives to its clients: signed, not stored.

A pass says only who somebody is: a user who showed his password, or nobody (OCI clients want a pass for public images
too). Clients with one of our tokens keep using that, so that taking it back works at once.
"""

from __future__ import annotations

import hashlib
import hmac

from pysingularity.hub.models import now

PREFIX = "hubpass_"
#: Seconds for which a pass is valid; long uploads go on, since it is looked at when a request begins.
LIFETIME = 900


def make_pass(key: bytes, user_id: int) -> str:
    """Return a pass for a user; 0 is for strangers."""
    text = f"{user_id}.{int(now()) + LIFETIME}"
    return f"{PREFIX}{text}.{_sign(key, text)}"


def read_pass(key: bytes, secret: str) -> int | None:
    """Return the number of the user a pass was made for (0: a stranger), or None when it is expired or not ours."""
    text, _, proof = secret.removeprefix(PREFIX).rpartition(".")
    if not hmac.compare_digest(_sign(key, text).encode(), proof.encode("utf-8", "surrogatepass")):
        return None
    user, _, until = text.partition(".")
    return int(user) if int(until) > now() else None


def _sign(key: bytes, text: str) -> str:
    return hmac.new(key, b"registry pass\0" + text.encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()
