# SPDX-License-Identifier: Apache-2.0
"""Definition files (and Dockerfiles) as values, with positions for errors."""
