# SPDX-License-Identifier: Apache-2.0
"""Limits per time, counted in this process: a bucket of permits that fills steadily.

With several web processes everyone has his own buckets, so that a limit is reached somewhat later; it protects the
machine, it is no accounting.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict

from pysingularity.hub.errors import TooMany

#: Buckets that are remembered; the one not used for longest goes first.
MOST = 20_000


class Limiter:
    """Allows `count` deeds per `seconds` and key; 0 allows everything.

    Arguments:
        id: the error's id.
        message: the error's words.
    """

    def __init__(self, count: int, seconds: float, id: str, message: str) -> None:  # noqa: A002
        self.count, self.seconds, self.id, self.message = count, seconds, id, message
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()
        self._lock = threading.Lock()

    def take(self, key: str) -> None:
        """Use one permit.

        Raises:
            TooMany: none is left; the error says when there will be one.
        """
        if not self.count:
            return
        rate = self.count / self.seconds
        at = time.monotonic()
        with self._lock:
            left, when = self._buckets.pop(key, (float(self.count), at))
            left = min(float(self.count), left + (at - when) * rate)
            allowed = left >= 1
            self._buckets[key] = (left - 1 if allowed else left, at)
            if len(self._buckets) > MOST:
                self._buckets.popitem(last=False)
        if not allowed:
            raise TooMany(self.id, self.message, seconds=int((1 - left) / rate) + 1)
