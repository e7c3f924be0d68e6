# SPDX-License-Identifier: Apache-2.0
"""Keys to sign with."""

from containers import box, busybox, image, sing, squash
from keys import keys

__all__ = ["box", "busybox", "image", "keys", "sing", "squash"]
