# SPDX-License-Identifier: Apache-2.0
"""The keys that distributions sign their archives with, as this host has them."""

from __future__ import annotations

import os

#: Where distributions keep the keys of their archives; other keys of the host do not speak for a whole distribution.
KEYRING_FOLDER = "/usr/share/keyrings"
TRUSTED_FOLDER = "/etc/apt/trusted.gpg.d"


def archive_keyrings(root: str = "/") -> list[str]:
    """Return the files with keys of distributions' archives on this host, and those that its apt trusts everywhere."""
    found = []
    for folder, endings in ((KEYRING_FOLDER, ("-archive-keyring.gpg",)), (TRUSTED_FOLDER, (".gpg", ".asc"))):
        path = os.path.join(root, folder.lstrip("/"))
        try:
            names = sorted(os.listdir(path))
        except OSError:
            continue
        found += [os.path.join(path, name) for name in names if name.endswith(endings)]
    return found
