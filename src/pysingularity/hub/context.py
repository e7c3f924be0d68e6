# SPDX-License-Identifier: Apache-2.0
"""`Hub`: one installation, opened. Everybody who does something gets it as the first argument.

It holds no state of its own besides connections, so that any number of processes can have one each.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

from sqlalchemy.orm import Session

from pysingularity.hub.database import Database
from pysingularity.hub.settings import Settings
from pysingularity.hub.storage import Storage, open_storage


class Hub:
    """Settings, database and storage of one hub.

    Arguments:
        settings: as read by `settings.load_settings`.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.database = Database(settings.database_url)
        self.storage: Storage = open_storage(settings)

    def read(self) -> AbstractContextManager[Session]:
        """Open a session that only reads."""
        return self.database.read()

    def write(self) -> AbstractContextManager[Session]:
        """Open a session that is committed at its end."""
        return self.database.write()

    def close(self) -> None:
        """Close the connections."""
        self.database.close()
