# SPDX-License-Identifier: Apache-2.0
"""The doors that clients of containers knock at: shub, library, OCI distribution, and plain downloads."""
