# SPDX-License-Identifier: Apache-2.0
"""What forges were told of builds, and when base images were looked at."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make the step."""
    op.add_column("builds", sa.Column("reported", sa.Text(), nullable=False, server_default=""))
    op.add_column("collections", sa.Column("bases_at", sa.Double(), nullable=True))
