# SPDX-License-Identifier: Apache-2.0
"""Where image files live: blobs named by their SHA-256, on a disk or in an object store, behind one interface.

A blob never changes. It is put in whole, after its bytes were hashed, or not at all; what the database says about it
comes afterwards, and garbage collection takes what nothing speaks of.
"""

from __future__ import annotations

from pysingularity.hub.settings import Settings
from pysingularity.hub.storage.base import Storage
from pysingularity.hub.storage.files import FileStorage

__all__ = ["Storage", "open_storage"]


def open_storage(settings: Settings) -> Storage:
    """Return the storage that the settings name."""
    if settings.storage.url:
        from pysingularity.hub.storage.objects import ObjectStorage  # obstore is an extra of its own

        return ObjectStorage(
            settings.storage.url,
            dict(settings.storage.options),
            settings.folder("blobs"),
            public=settings.storage.public,
        )
    return FileStorage(settings.folder("blobs"))
