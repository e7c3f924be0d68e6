# SPDX-License-Identifier: Apache-2.0
"""Containers to run: a small root file system as a sandbox and as an image."""

from containers import box, busybox, image, sing, squash

__all__ = ["box", "busybox", "image", "sing", "squash"]
