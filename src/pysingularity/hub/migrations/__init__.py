# SPDX-License-Identifier: Apache-2.0
"""How the schema came to be: Alembic's environment and one file per step in `versions/`."""
