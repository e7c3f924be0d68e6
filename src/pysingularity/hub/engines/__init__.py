# SPDX-License-Identifier: Apache-2.0
"""Where builds run: the job (one process per build), its sandbox, and the ways to start it."""
