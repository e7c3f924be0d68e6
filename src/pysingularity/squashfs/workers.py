# SPDX-License-Identifier: Apache-2.0
"""Work for several processors: how many we may use, and a line of threads that compress blocks.

Compressors release the interpreter lock, so threads are enough; results are taken in the order in which blocks were
given, which is what makes an image the same whatever the number of threads.
"""

from __future__ import annotations

import os
from _queue import SimpleQueue
from threading import Thread

from . import layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .codecs import Compress

_CGROUPS = "/sys/fs/cgroup"
#: Raw bytes that may wait in a pipeline, whatever the number of threads.
_WAITING_BYTES = 32 << 20


def processors() -> int:
    """Return how many processors this process may keep busy: by affinity and by the limits of its control groups."""
    count = len(os.sched_getaffinity(0))
    try:
        with open("/proc/self/cgroup") as groups:
            lines = groups.read().split("\n")
    except OSError:
        return count
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and "cpu" not in controllers.split(","):
            continue
        folder = f"{_CGROUPS}/{controllers}{path}" if controllers else _CGROUPS + path
        while folder.startswith(_CGROUPS):
            limit = _limit(folder, legacy=bool(controllers))
            if limit:
                count = min(count, limit)
            folder = folder.rpartition("/")[0]
    return max(count, 1)


def _limit(folder: str, *, legacy: bool) -> int:
    """Return a control group's limit in whole processors, rounded up; 0 for none."""
    try:
        if legacy:
            with open(folder + "/cpu.cfs_quota_us") as quota, open(folder + "/cpu.cfs_period_us") as period:
                words = [quota.read().strip(), period.read().strip()]
        else:
            with open(folder + "/cpu.max") as limit:
                words = limit.read().split()
        if words[0] in ("max", "-1"):
            return 0
        return -(-int(words[0]) // int(words[1]))
    except (OSError, ValueError, IndexError, ZeroDivisionError):  # no such controller here: no limit
        return 0


class Block:
    """A block on its way through the pipeline.

    Attributes:
        raw: the bytes to compress; None when taken, or when nobody wants the result any more.
        stored, word: what to write, and its size word for the tables.
        owner, index: free for whoever gave the block.
    """

    __slots__ = ("error", "index", "owner", "raw", "ready", "stored", "word")

    def __init__(self, raw: bytes | memoryview, owner: object, index: int) -> None:
        self.raw: bytes | memoryview | None = raw
        self.owner, self.index = owner, index
        self.stored: bytes | bytearray | memoryview = b""
        self.word = 0
        self.ready = False
        self.error: BaseException | None = None


class Pipeline:
    """Threads that compress blocks.

    Arguments:
        compress: over one block; releases the interpreter lock.
        threads: how many; with one, blocks are compressed at once in the caller's own thread.
        block_size: the largest block, to bound what waits.
    """

    def __init__(self, compress: Compress, threads: int, block_size: int) -> None:
        self._compress, self._threads = compress, threads
        #: Blocks that may wait; the caller takes results before it gives more.
        self.depth = 1 if threads == 1 else max(2, min(8 * threads, _WAITING_BYTES // block_size))
        self._todo: SimpleQueue[Block | None] = SimpleQueue()
        self._done: SimpleQueue[None] = SimpleQueue()
        self._running: list[Thread] = []

    def give(self, block: Block) -> None:
        """Let a block be compressed."""
        if self._threads == 1:
            self._squeeze(block)
            return
        if not self._running:
            for number in range(self._threads):
                # A daemon: an interpreter that ends after an error must not wait for a thread nobody stopped.
                thread = Thread(target=self._work, name=f"squashfs-{number}", daemon=True)
                self._running.append(thread)
                thread.start()
        self._todo.put(block)

    def wait(self, block: Block) -> None:
        """Return when a block is compressed.

        Raises:
            whatever the compressor raised.
        """
        while not block.ready:
            self._done.get()
        if block.error is not None:
            raise block.error

    def stop(self) -> None:
        """End the threads; blocks that still wait are dropped."""
        while not self._todo.empty():
            self._todo.get()
        for _ in self._running:
            self._todo.put(None)
        for thread in self._running:
            thread.join()
        self._running.clear()

    def _squeeze(self, block: Block) -> None:
        raw = block.raw
        if raw is not None:
            stored = self._compress(raw)
            if len(stored) < len(raw):
                block.stored, block.word = stored, len(stored)
            else:
                block.stored, block.word = raw, len(raw) | layout.BLOCK_UNCOMPRESSED
            block.raw = None
        block.ready = True

    def _work(self) -> None:
        while True:
            block = self._todo.get()
            if block is None:
                return
            try:
                self._squeeze(block)
            except BaseException as error:
                block.error = error
                block.ready = True
            self._done.put(None)
