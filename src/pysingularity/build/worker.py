# SPDX-License-Identifier: Apache-2.0
"""The process that does the work, and the one that watches it.

A build runs in a worker: a forked child that becomes root in a user namespace of its own, carries out the plan and
tells its events through a pipe. The watching process keeps the caller's identity, shows the events and the output of
programs, passes signals on, and cleans up when the worker can no longer do it itself. Nothing outlives both: the worker
gets SIGTERM when the watcher dies, programs in containers get SIGKILL when the worker dies, and folders that a power
cut leaves are removed by the next build.

Two pipes carry what happened: events as JSON lines, and the raw output of programs. After an event that begins or ends
a step the worker waits for one byte in return; the watcher reads all output before it passes such an event on. So
output always belongs to the step that is running.
"""

from __future__ import annotations

import codecs
import errno
import os
import re
import select
import signal
import sys
import traceback
from collections.abc import Callable
from types import FrameType

from pysingularity import errors, events, thirdparty
from pysingularity.errors import HostError, InternalError, RecipeError, SingularityError
from pysingularity.image.output import Terminated
from pysingularity.linux.process import SIGTERM, become_subreaper, die_with_parent

#: Events after which the worker waits until everything before them has been shown.
_AWAITED = ("start", "end", "result", "failed", "ask")
#: What programs say when the network failed them and they went on all the same (apt-get update ends with 0 then).
_NETWORK = re.compile(
    r"Some index files failed to download|Temporary failure (?:in name resolution|resolving)|Could not resolve"
    r"|timed out|Network is unreachable|Connection (?:refused|reset by peer)",
    re.IGNORECASE,
)

#: What programs say whose rename a kernel refused (EXDEV).
_RENAME = re.compile(r"cross-device link|EXDEV|os error 18\b|Errno 18\b", re.IGNORECASE)

#: Answer to awaited events; to questions about the output it is the sum of what was found in it, and this.
_FINE = 64
_NETWORK_FAILED, _RENAME_FAILED = 1, 2
_HEARD = {_NETWORK_FAILED: _NETWORK, _RENAME_FAILED: _RENAME}


class Channel:
    """The worker's end: `send` for events, `output` as the descriptor programs print to."""

    def __init__(self, send: int, output: int, answer: int) -> None:
        self._send, self.output, self._answer = send, output, answer

    def __call__(self, event: events.Event) -> None:
        """Send an event."""
        data = (event.line() + "\n").encode()
        while data:
            data = data[os.write(self._send, data) :]
        if event.kind in _AWAITED:
            os.read(self._answer, 1)

    def network_failed(self) -> bool:
        """Return whether a program of this step has spoken of a network that failed, in its output so far."""
        return self._heard(_NETWORK_FAILED)

    def rename_failed(self) -> bool:
        """Return whether a program of this step has spoken of a rename from one file system to another."""
        return self._heard(_RENAME_FAILED)

    def _heard(self, what: int) -> bool:
        os.write(self._send, (events.Event("ask", {}).line() + "\n").encode())
        answer = os.read(self._answer, 1)
        return answer != b"" and bool(answer[0] & what)


def carry_out(work: Callable[[Channel], None], listen: events.Listener, clean: Callable[[], None]) -> events.Event:
    """Run `work` in a worker and return its result event.

    Arguments:
        work: what to do; gets the channel. Runs in the child.
        listen: gets every event but `failed`, and the output of programs as `log` events; where it has a method
            `tick`, that is called every second in which nothing happens.
        clean: removes what a killed worker left; called in a child that may become root, only when needed.

    Raises:
        SingularityError: what the worker raised, as the same class.
        Terminated: a signal asked us to end; everything is cleaned up.
    """
    pipes = [os.pipe() for _ in range(3)]
    (events_r, events_w), (output_r, output_w), (answer_r, answer_w) = pipes
    sys.stdout.flush()
    sys.stderr.flush()
    watch = _Watch()
    parent = os.getpid()
    become_subreaper()
    child = os.fork()
    if child == 0:
        for one in (events_r, output_r, answer_w):
            os.close(one)
        _work(work, Channel(events_w, output_w, answer_r), parent)
    for one in (events_w, output_w, answer_r):
        os.close(one)
    watch.child = child
    try:
        last = _follow(events_r, output_r, answer_w, listen)
    finally:
        for one in (events_r, output_r, answer_w):
            os.close(one)
        status = _wait(child)
        watch.restore()
    if watch.signal or not last:
        in_child(clean)
    if watch.signal:
        raise Terminated(watch.signal)
    if last is not None and last.kind == "result":
        return last
    if last is not None:
        raise error_of(last)
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        raise HostError(
            "worker-killed",
            f"the build was ended by signal {number} ({signal.Signals(number).name})",
            hint="was there too little memory? See: dmesg" if number == signal.SIGKILL else "",
        )
    raise InternalError("worker-ended", f"the build ended early with status {os.WEXITSTATUS(status)}")


class _Watch:
    """Signals of the watching process: the first is passed on, a second ends the worker at once."""

    def __init__(self) -> None:
        self.child = self.signal = 0
        self._before = {
            number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        }

    def _handle(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        again, self.signal = bool(self.signal), self.signal or number
        if self.child:
            try:
                os.kill(self.child, signal.SIGKILL if again else signal.SIGTERM)
            except ProcessLookupError:
                pass

    def restore(self) -> None:
        """Give the signals back to whoever handled them before."""
        self.child = 0
        for number, handler in self._before.items():
            signal.signal(number, handler)


def _follow(events_r: int, output_r: int, answer_w: int, listen: events.Listener) -> events.Event | None:
    """Show what the worker tells until it has ended; return its last word."""
    tick: Callable[[], None] | None = getattr(listen, "tick", None)
    os.set_blocking(output_r, False)
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    poll = select.poll()
    poll.register(events_r, select.POLLIN)
    poll.register(output_r, select.POLLIN)
    pending, step = b"", 0
    last: events.Event | None = None
    tail, heard = "", 0

    def drain() -> bool:
        """Pass on all output there is; return False at its end."""
        nonlocal tail, heard
        while True:
            try:
                data = os.read(output_r, 65536)
            except BlockingIOError:
                return True
            text = decoder.decode(data, not data)
            if text:
                listen(events.Event("log", {"step": step, "text": text}))
                for what, words in _HEARD.items():
                    if not heard & what and words.search(tail + text):
                        heard |= what
                tail = text[-80:]
            if not data:
                return False

    while True:
        ready = dict(poll.poll(1000))
        if not ready and tick is not None:
            tick()
        if events_r in ready:
            data = os.read(events_r, 65536)
            if not data:
                drain()
                return last
            *lines, pending = (pending + data).split(b"\n")
            for line in lines:
                event = events.read(line)
                awaited = event.kind in _AWAITED
                if awaited:
                    drain()
                if event.kind == "start":
                    step = event.number("step")
                    tail, heard = "", 0
                if event.kind in ("result", "failed"):
                    last = event
                if event.kind not in ("failed", "ask"):  # the caller gets it as an exception, and tells it once
                    listen(event)
                if awaited:
                    try:
                        os.write(answer_w, bytes([_FINE + heard if event.kind == "ask" else _FINE]))
                    except BrokenPipeError:  # the worker was killed between its word and our answer
                        pass
        elif output_r in ready and not drain():
            poll.unregister(output_r)


def _wait(child: int) -> int:
    """Collect the worker and whatever it left to us; return the worker's status."""
    _, status = os.waitpid(child, 0)
    while True:
        try:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                return status
        except ChildProcessError:
            return status


def _work(work: Callable[[Channel], None], channel: Channel, parent: int) -> None:
    """Be the worker: never returns."""
    status = 1
    try:
        # Keys of the terminal reach the watcher alone, which asks us to end in an orderly way.
        os.setpgid(0, 0)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, _stop)
        die_with_parent(SIGTERM, parent)
        work(channel)
        status = 0
    except Terminated:
        status = 143
    except BaseException as error:
        if not isinstance(error, BrokenPipeError):
            try:
                channel(failure(error))
            except (OSError, Terminated):  # nobody listens
                pass
    finally:
        os._exit(status)


def _stop(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Terminated(number)


def still_watched(parent: int) -> None:
    """Ask again for a signal when the watcher dies; a change of identity cancelled the wish.

    Raises:
        Terminated: it is dead already.
    """
    die_with_parent(SIGTERM)
    if os.getppid() != parent:
        raise Terminated(signal.SIGTERM)


def in_child(clean: Callable[[], None]) -> None:
    """Run something that may change its identity in a child, and wait for it."""
    child = os.fork()
    if child == 0:
        try:
            clean()
        finally:
            os._exit(0)
    os.waitpid(child, 0)


def failure(error: BaseException) -> events.Event:
    """Return an error as an event that `error_of` turns back into it."""
    error = thirdparty.lacking(error) or error
    fields: dict[str, object] = {"class": "InternalError", "id": "internal", "message": str(error), "hint": ""}
    if isinstance(error, SingularityError):
        fields.update({"class": type(error).__name__, "id": error.id, "message": error.message, "hint": error.hint})
        if isinstance(error, RecipeError):
            fields.update({"file": error.file, "line": error.line, "column": error.column, "text": error.text})
    elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" ({error.filename})" if isinstance(error.filename, str) else ""
        fields.update({"class": "HostError", "id": "disk-full", "message": f"no space left on the device{where}"})
        fields["hint"] = "make room, or set SINGULARITY_TMPDIR to a folder that has it"
    else:
        fields["message"] = f"{type(error).__name__}: {error}"
        fields["trace"] = "".join(traceback.format_exception(error))
    return events.Event("failed", fields)


def error_of(event: events.Event) -> SingularityError:
    """Return the error of a `failed` event."""
    kind = getattr(errors, event.text("class"), InternalError)
    name, message, hint = event.text("id"), event.text("message"), event.text("hint")
    if kind is RecipeError:
        return RecipeError(
            name,
            message,
            file=event.text("file"),
            line=event.number("line"),
            column=event.number("column"),
            text=event.text("text"),
            hint=hint,
        )
    found: SingularityError = kind(name, message, hint=hint)
    trace = event.text("trace")
    if trace:
        found.add_note(trace)
    return found
