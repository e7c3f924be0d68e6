# SPDX-License-Identifier: Apache-2.0
"""Keeping a hub for years: garbage and retention, scrubbing, backup and restore, and an archive of plain files."""
