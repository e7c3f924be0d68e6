# SPDX-License-Identifier: Apache-2.0
"""Waiting for a program: pass signals on, reap orphans, learn its true status.

Used only where a process has to stay beside the program: pid namespaces and instances. Start ring.
"""

from __future__ import annotations

import _signal
import posix

#: Signals that are passed on. SIGTSTP and SIGCONT are not: from a terminal they reach the whole group anyway.
FORWARDED = (
    _signal.SIGHUP,
    _signal.SIGINT,
    _signal.SIGQUIT,
    _signal.SIGTERM,
    _signal.SIGUSR1,
    _signal.SIGUSR2,
    _signal.SIGALRM,
    _signal.SIGWINCH,
)
_WATCHED = (*FORWARDED, _signal.SIGCHLD)
_ENDING = (_signal.SIGHUP, _signal.SIGINT, _signal.SIGQUIT, _signal.SIGTERM)
#: si_code of signals that the kernel made itself: a key on the terminal, whose whole process group has had it.
_SI_KERNEL = 0x80


def block_signals() -> set[int]:
    """Hold signals back from now on, so that none is lost between fork and `attend`; return the former mask."""
    return {int(number) for number in _signal.pthread_sigmask(_signal.SIG_BLOCK, _WATCHED)}


def restore_mask(mask: object) -> None:
    """Let signals through again, as `block_signals` found them."""
    _signal.pthread_sigmask(_signal.SIG_SETMASK, mask)


def attend(child: int, *, reap: bool = False, lingers: bool = False) -> int:
    """Wait for a child, passing signals on to it, and return its wait status. Signals must be blocked before the fork.

    Arguments:
        reap: collect other children as well (process 1).
        lingers: when the child has ended well by itself, go on until a signal asks for the end (instances, whose
            startscript may have left servers behind, or may be empty). Signals go to the child's process group, which
            it leads: a shell that waits for its foreground program ends no sooner than that.
    """
    ended = told = False
    while True:
        event = _signal.sigwaitinfo(_WATCHED)
        if event.si_signo != _signal.SIGCHLD:
            told = told or event.si_signo in _ENDING
            if event.si_code != _SI_KERNEL:
                try:
                    # Without the program, what it left behind is meant.
                    posix.kill(-1 if ended else -child if lingers else child, event.si_signo)
                except ProcessLookupError:
                    if ended and told:
                        return 0
            continue
        while True:
            try:
                pid, status = posix.waitpid(-1 if reap else child, posix.WNOHANG)
            except ChildProcessError:
                if ended and not told:
                    break
                return 0
            if pid == child:
                if not lingers or told or status:
                    return status
                ended = True
            if pid == 0:
                break
