# SPDX-License-Identifier: Apache-2.0
"""Addresses of repositories that an administrator vouched for."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make the step."""
    op.add_column("collections", sa.Column("approved_url", sa.Text(), nullable=False, server_default=""))
