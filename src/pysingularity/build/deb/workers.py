# SPDX-License-Identifier: Apache-2.0
"""A few forked processes that take jobs from a queue: unpacking is half Python, and threads would share one core.

Children are made by fork alone: jobs, open trees and namespaces are inherited, nothing is imported anew. Results come
back marshalled. A failing job ends the others, and an interrupted parent leaves no child behind.
"""

from __future__ import annotations

import marshal
import os
import selectors
import signal
import struct
from collections.abc import Callable, Sequence
from typing import Any

from pysingularity import errors
from pysingularity.errors import InternalError, SingularityError
from pysingularity.linux.process import die_with_parent

_HEAD = struct.Struct("=II")
#: The number under which a child reports an error.
_FAILED = 0xFFFFFFFF


def run(
    work: Callable[[int], Any],
    count: int,
    *,
    order: Sequence[int] | None = None,
    workers: int | None = None,
    done: Callable[[int], None] | None = None,
) -> list[Any]:
    """Return [work(0), …, work(count - 1)], computed in several processes.

    Arguments:
        work: the job by number; its result must be of marshal's kinds (tuples, lists, bytes, text, numbers).
        order: in which order jobs are handed out (large ones first).
        workers: processes; the processors that we may use when None.
        done: called here with the number of each job that is finished.

    Raises:
        SingularityError: the first one that a job raised.
        InternalError: a worker died.
    """
    workers = max(1, min(workers or len(os.sched_getaffinity(0)), 8, count))
    if count == 0:
        return []
    queue_out, queue_in = os.pipe()
    me = os.getpid()
    children: dict[int, int] = {}
    results: list[Any] = [None] * count
    try:
        for _ in range(workers):
            out, into = os.pipe()
            pid = os.fork()
            if pid == 0:
                status = 1
                try:
                    os.close(queue_in)
                    os.close(out)
                    for other in children:
                        os.close(other)
                    signal.signal(signal.SIGINT, signal.SIG_DFL)
                    signal.signal(signal.SIGTERM, signal.SIG_DFL)
                    die_with_parent(parent=me)
                    os.umask(0)
                    status = _serve(work, queue_out, into)
                finally:
                    os._exit(status)
            os.close(into)
            children[out] = pid
        os.close(queue_out)
        queue_out = -1
        numbers = b"".join(number.to_bytes(4, "little") for number in (order or range(count)))
        os.set_blocking(queue_in, False)
        _collect(children, queue_in, numbers, results, done)
        return results
    finally:
        for descriptor in (queue_in, queue_out):
            if descriptor >= 0:
                try:
                    os.close(descriptor)
                except OSError:  # closed when all jobs were handed out
                    pass
        for out, pid in children.items():
            os.close(out)
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            os.waitpid(pid, 0)


def _collect(
    children: dict[int, int], queue: int, numbers: bytes, results: list[Any], done: Callable[[int], None] | None
) -> None:
    buffers: dict[int, bytearray] = {out: bytearray() for out in children}
    finished = 0
    with selectors.DefaultSelector() as selector:
        for out in children:
            selector.register(out, selectors.EVENT_READ)
        selector.register(queue, selectors.EVENT_WRITE)
        while finished < len(results):
            for key, _ in selector.select():
                if key.fd == queue:
                    numbers = numbers[os.write(queue, numbers[:4096]) :]
                    if not numbers:
                        selector.unregister(queue)
                        os.close(queue)
                    continue
                data = os.read(key.fd, 1 << 20)
                buffer = buffers[key.fd]
                buffer += data
                if not data:
                    selector.unregister(key.fd)
                    if buffer or not any(other in selector.get_map() for other in children):
                        raise InternalError("worker-died", "a process that unpacks packages died; out of memory?")
                while len(buffer) >= _HEAD.size:
                    number, size = _HEAD.unpack_from(buffer)
                    if len(buffer) < _HEAD.size + size:
                        break
                    value = marshal.loads(bytes(buffer[_HEAD.size : _HEAD.size + size]))
                    del buffer[: _HEAD.size + size]
                    if number == _FAILED:
                        raise _rebuilt(value)
                    results[number] = value
                    finished += 1
                    if done is not None:
                        done(number)


def _serve(work: Callable[[int], Any], queue: int, into: int) -> int:
    """Work off the queue in a child; an error travels to the parent and ends this worker."""
    while word := os.read(queue, 4):
        number = int.from_bytes(word, "little")
        try:
            data = marshal.dumps(work(number))
        except SingularityError as error:
            _send(into, _FAILED, marshal.dumps((type(error).__name__, error.id, error.message, error.hint)))
            return 1
        except Exception as error:
            message = f"{type(error).__name__}: {error}"
            _send(into, _FAILED, marshal.dumps(("InternalError", "worker-failed", f"unpacking failed: {message}", "")))
            return 1
        _send(into, number, data)
    return 0


def _send(into: int, number: int, data: bytes) -> None:
    view = memoryview(_HEAD.pack(number, len(data)) + data)
    while view:
        view = view[os.write(into, view) :]


def _rebuilt(value: tuple[str, str, str, str]) -> SingularityError:
    name, id_, message, hint = value
    kind = getattr(errors, name, InternalError)
    found = kind(id_, message, hint=hint)
    assert isinstance(found, SingularityError)
    return found
