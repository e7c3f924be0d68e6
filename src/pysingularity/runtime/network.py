# SPDX-License-Identifier: Apache-2.0
"""A container's own network: its loopback interface, and a connection to the host's network by a helper program.

A new network namespace has nothing but a loopback interface that is down. An ordinary user cannot connect it to the
host's; `pasta` (or `slirp4netns`) does so in user space, from outside: it is started in the host's namespaces before
the container's are made, waits until they are there, and ends with the container. Loaded only for --net.
"""

from __future__ import annotations

import posix

from pysingularity.errors import HostError, UserError
from pysingularity.linux.libc import call
from pysingularity.linux.process import (
    SIGKILL,
    become_subreaper,
    children,
    close_others,
    die_with_parent,
    pidfd_open,
    restore_signals,
)

_AF_INET, _SOCK_DGRAM, _SIOCSIFFLAGS = 2, 2 | 0o2000000, 0x8914
_UP_AND_RUNNING = 0x41
#: Programs that connect a network namespace without root, the better one first.
HELPERS = ("pasta", "slirp4netns")
#: Both make the container's interface through this device.
TUN = "/dev/net/tun"


def loopback_up() -> None:
    """Bring the loopback interface of this network namespace up: SIOCSIFFLAGS of netdevice(7)."""
    descriptor = call("socket", _AF_INET, _SOCK_DGRAM, 0)
    try:
        request = b"lo".ljust(16, b"\0") + _UP_AND_RUNNING.to_bytes(2, "little") + bytes(22)
        call("ioctl", descriptor, _SIOCSIFFLAGS, request)
    finally:
        posix.close(descriptor)


class Connection:
    """A helper that connects the container's network to the host's.

    Arguments:
        ports: "8080:80" forwards the host's port 8080 to the container's 80, "80" the same number; "/udp" may follow.
        path: where programs are looked for.

    Raises:
        HostError: no helper is installed.
        UserError: a port mapping cannot be understood.
    """

    def __init__(self, ports: list[str], path: str) -> None:
        self.program, self.name = _find(path)
        self.forwards = [_mapping(text) for text in ports]
        if self.forwards and self.name != "pasta":
            raise HostError("no-port-forwarding", f"{self.name} cannot forward ports", hint="install passt (pasta)")
        self._go = self._ready = self._child = -1
        self._tun = posix.access(TUN, posix.R_OK | posix.W_OK)

    def outside(self) -> None:
        """Start the waiting helper process; call it before any namespace is made."""
        wait, self._go = posix.pipe()
        self._ready, ready = posix.pipe()
        target = posix.getpid()
        self._child = posix.fork()
        if self._child:
            posix.close(wait)
            posix.close(ready)
            return
        try:
            die_with_parent()
            posix.close(self._go)
            posix.close(self._ready)
            restore_signals()  # pasta refuses to start where SIGPIPE is ignored, as the interpreter has it
            if posix.read(wait, 1):
                self._attend(target, ready)
        finally:
            posix._exit(0)

    def _attend(self, target: int, ready: int) -> None:
        """Run the helper, tell whether it works, and end it with the container: not every version notices that itself.

        A process of its own does so, because the container's program must not find a child that it does not know.
        """
        end = pidfd_open(target)
        if posix.fork():
            return
        import select

        posix.setsid()  # a ^C is the program's
        become_subreaper()  # helpers go to the background: this way they become our children again
        words = self.command(target)
        status = posix.waitpid(posix.posix_spawn(words[0], words, posix.environ), 0)[1]
        posix.write(ready, b"\0" if status == 0 else b"\1")
        nowhere = posix.open("/dev/null", posix.O_RDWR)
        for standard in (0, 1, 2):  # whoever reads the program's output to its end must not wait for us
            posix.dup2(nowhere, standard)
        close_others((0, 1, 2, end))
        poll = select.poll()
        poll.register(end, select.POLLIN)
        poll.poll()
        for pid in children(posix.getpid()):
            posix.kill(pid, SIGKILL)

    def command(self, target: int) -> list[str]:
        """Return the helper's command line; both helpers go to the background once the network works."""
        if self.name == "pasta":
            words = [self.program, "--config-net", "--quiet"]
            for protocol, outside, inside in self.forwards:
                words += ["-t" if protocol == "tcp" else "-u", f"{outside}:{inside}"]
            return [*words, str(target)]
        # slirp4netns stays in the foreground: a shell puts it behind and waits until its device is there.
        script = (
            '"$0" --configure --mtu=65520 --disable-host-loopback --userns-path=/proc/"$1"/ns/user "$1" tap0 '
            ">/dev/null 2>&1 & for n in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do "
            'grep -q tap0 /proc/"$1"/net/dev && exit 0; sleep 0.1; done; exit 1'
        )
        return ["/bin/sh", "-c", script, self.program, str(target)]

    def inside(self) -> None:
        """Let the helper connect this process's network namespace, and wait until it has.

        Raises:
            HostError: it failed.
        """
        posix.write(self._go, b"x")
        answer = posix.read(self._ready, 1)
        for descriptor in (self._go, self._ready):
            posix.close(descriptor)
        posix.waitpid(self._child, 0)
        if answer != b"\0":
            hint = "" if self._tun else f"{TUN} may not be opened; administrator: chmod 666 {TUN} (modprobe tun)"
            raise HostError("no-network", f"{self.name} could not connect the container's network", hint=hint)


def _find(path: str) -> tuple[str, str]:
    for name in HELPERS:
        for folder in path.split(":"):
            if folder.startswith("/") and posix.access(f"{folder}/{name}", posix.X_OK):
                return f"{folder}/{name}", name
    raise HostError(
        "no-network-helper",
        "a private network needs pasta or slirp4netns, and neither is installed",
        hint="use --network none for no network at all; administrator: install passt",
    )


def _mapping(text: str) -> tuple[str, int, int]:
    ports, _, protocol = text.partition("/")
    outside, _, inside = ports.partition(":")
    inside = inside or outside
    numbers = outside.isdigit() and inside.isdigit() and 0 < int(outside) < 65536 and 0 < int(inside) < 65536
    if not numbers or protocol not in ("", "tcp", "udp"):
        raise UserError(
            "bad-port", f"{text!r} is not a port mapping", hint="write HOST:CONTAINER, or HOST:CONTAINER/udp"
        )
    return protocol or "tcp", int(outside), int(inside)
