# SPDX-License-Identifier: Apache-2.0
"""Builds: rows with a state, a log and an image; from a changed recipe to a verified file."""
