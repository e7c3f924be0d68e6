# SPDX-License-Identifier: Apache-2.0
"""Processes: prctl(2), descriptors, start times, and ending in the same way as a child did. Start ring."""

from __future__ import annotations

import posix

from pysingularity.linux.libc import NR_CLOSE_RANGE, NR_PIDFD_OPEN, call, function, long, syscall

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NAME = 1, 4, 15
PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 36, 38

M_ARENA_MAX = -8

SIGHUP, SIGINT, SIGQUIT, SIGKILL, SIGPIPE, SIGTERM, SIGCHLD, SIGXFSZ = 1, 2, 3, 9, 13, 15, 17, 25


def no_new_privs() -> None:
    """Give up gaining rights by execve (set-user-id programs, file capabilities), for this process and all below."""
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def die_with_parent(signal: int = SIGKILL, parent: int = 0) -> None:
    """Ask for a signal when the parent (thread) ends; end at once when `parent` is gone already.

    A change of credentials (unshare of a user namespace, setuid) cancels the wish: call this after it.

    Arguments:
        parent: the pid that the parent must have; 0 when that cannot be known (other pid namespace).
    """
    call("prctl", PR_SET_PDEATHSIG, signal, 0, 0, 0)
    if parent and posix.getppid() != parent:
        posix._exit(255)


def set_dumpable(yes: bool) -> None:
    """Say whether other processes of this user may look into this one."""
    call("prctl", PR_SET_DUMPABLE, int(yes), 0, 0, 0)


def set_name(name: str) -> None:
    """Set the name that ps and top show (15 bytes)."""
    call("prctl", PR_SET_NAME, name.encode()[:15] + b"\0", 0, 0, 0)


def share_heap() -> None:
    """Let all threads allocate from one heap: mallopt(3), M_ARENA_MAX, where the C library knows it.

    For few threads that mostly wait for each other: memory that one gives back is there for the next, instead of going
    to the kernel and coming back page by page.
    """
    try:
        function("mallopt")(long(M_ARENA_MAX), long(1))
    except OSError:  # musl
        pass


def become_subreaper() -> None:
    """Inherit the orphans of all descendants."""
    call("prctl", PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def close_range(first: int, last: int = 0x7FFFFFFF) -> None:
    """Close all descriptors from `first` to `last`."""
    if first > last:
        return
    try:
        syscall(NR_CLOSE_RANGE, first, last, 0, name="close_range")
    except OSError:  # Linux < 5.9, or a seccomp filter that does not know the call
        for name in posix.listdir("/proc/self/fd"):
            if first <= int(name) <= last:
                try:
                    posix.close(int(name))
                except OSError:  # the descriptor of the listing itself
                    pass


def close_others(keep: tuple[int, ...]) -> None:
    """Close all descriptors but those in `keep`."""
    at = 0
    for descriptor in sorted(keep):
        close_range(at, descriptor - 1)
        at = descriptor + 1
    close_range(at)


def start_time(pid: int) -> int:
    """Return when a process started, in clock ticks since boot; with the pid it names a process for ever (proc(5)).

    Raises:
        OSError: there is no such process.
    """
    return int(_stat(pid)[19])


def forget_variables(names: tuple[str, ...] | None = None) -> None:
    """Wipe variables (None: all) out of what /proc/PID/environ shows of this process and of those it forks (proc(5)).

    That file shows the memory in which the kernel put the variables at execve, whatever the process does to its
    environment later.

    Raises:
        OSError: /proc is not there or does not allow it.
    """
    fields = _stat("self")  # the number may be that of another pid namespace than /proc's
    start, end = int(fields[47]), int(fields[48])
    memory = posix.open("/proc/self/mem", posix.O_RDWR | posix.O_CLOEXEC)
    try:
        place = start
        for text in posix.pread(memory, end - start, start).split(b"\0"):
            if names is None or text.partition(b"=")[0].decode("utf-8", "surrogateescape") in names:
                posix.pwrite(memory, bytes(len(text)), place)
            place += len(text) + 1
    finally:
        posix.close(memory)


def state(pid: int) -> str:
    """Return a process's state as proc(5) has it: "R", "S", "D", "Z" for one that waits to be collected, …

    Raises:
        OSError: there is no such process.
    """
    return _stat(pid)[0].decode("ascii", "replace")


def children(parent: int) -> list[int]:
    """Return the pids of a process's children. (Not every kernel has proc(5)'s file "children".)"""
    found = []
    for name in posix.listdir("/proc"):
        if name.isdigit():
            try:
                if int(_stat(int(name))[1]) == parent:
                    found.append(int(name))
            except OSError:  # ended meanwhile
                pass
    return found


def _stat(pid: int | str) -> list[bytes]:
    """Return the fields of /proc/PID/stat from the state on."""
    descriptor = posix.open(f"/proc/{pid}/stat", posix.O_RDONLY)
    try:
        data = posix.read(descriptor, 4096)
    finally:
        posix.close(descriptor)
    # The program's name may contain blanks and brackets: fields are counted from the last bracket.
    return data[data.rindex(b")") + 2 :].split()


def pidfd_open(pid: int) -> int:
    """Return a descriptor of a process: pidfd_open(2), Linux 5.3."""
    return syscall(NR_PIDFD_OPEN, pid, 0, name="pidfd_open")


def restore_signals() -> None:
    """Undo what the interpreter did to signals: a program expects SIGPIPE and SIGXFSZ to have their default effect."""
    import _signal  # built in; not needed before

    for number in (SIGPIPE, SIGXFSZ):
        _signal.signal(number, _signal.SIG_DFL)


def leave_like(status: int) -> int:
    """End as a child did, by its wait status: return its exit status, or die by the same signal."""
    if posix.WIFEXITED(status):
        return posix.WEXITSTATUS(status)
    import _signal

    number = posix.WTERMSIG(status)
    if number != SIGKILL:
        _signal.signal(number, _signal.SIG_DFL)
        _signal.pthread_sigmask(_signal.SIG_UNBLOCK, (number,))
    # The child has left a core file if it was to; a second one of this interpreter would only mislead.
    set_dumpable(False)
    posix.kill(posix.getpid(), number)
    return 128 + number
