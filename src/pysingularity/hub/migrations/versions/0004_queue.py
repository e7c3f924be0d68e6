# SPDX-License-Identifier: Apache-2.0
"""The queue's index in the order in which it is walked, so that a claim sorts nothing."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make the step."""
    op.drop_index("ix_builds_queue", table_name="builds")
    op.create_index("ix_builds_queue", "builds", ["state", sa.text("priority DESC"), "turn", "id"])
