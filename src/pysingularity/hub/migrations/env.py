# SPDX-License-Identifier: Apache-2.0
"""What Alembic runs: the hub's models on the connection that `database.Database.migrate` hands over.

Without one (a developer who makes a new step by hand) the URL of the configuration is opened.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import context

from pysingularity.hub.models import Base


def run(connection: sa.Connection) -> None:
    """Run the migrations in one transaction. SQLite changes tables by copying them (batch mode)."""
    context.configure(connection=connection, target_metadata=Base.metadata, render_as_batch=True)
    with context.begin_transaction():
        context.run_migrations()
    connection.commit()


given = context.config.attributes.get("connection")
if given is not None:
    run(given)
else:
    with sa.create_engine(context.config.get_main_option("sqlalchemy.url") or "").connect() as opened:
        run(opened)
