# SPDX-License-Identifier: Apache-2.0
"""The JSON API under /api/v1: the twin of every page, and what scripts use. Its contract is documented."""
