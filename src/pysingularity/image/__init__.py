# SPDX-License-Identifier: Apache-2.0
"""What is this path? One interface over SIF, squashfs, sandboxes and archives, and the ways between them."""
