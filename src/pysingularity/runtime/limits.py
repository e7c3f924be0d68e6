# SPDX-License-Identifier: Apache-2.0
"""Limits of a container: --memory, --cpus and so on as values of a control group (cgroup v2). Loaded only for these.

An ordinary user may set limits where somebody has delegated a subtree to him. Such a subtree is looked for from our own
group upwards; a group with processes of its own cannot hand controllers to its children, so a group in which we are
alone is made free by moving ourselves into the new one. Where systemd keeps the groups it is asked for a scope instead:
`systemd-run --scope` starts this very command again, in the same process. The group is removed by a helper
that outlives the program; those that a killed helper has left are swept up by the next start.

Source: Documentation/admin-guide/cgroup-v2.rst of the kernel; systemd.resource-control(5).
"""

from __future__ import annotations

import os

from pysingularity.errors import HostError, UserError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from pysingularity.cli.options import Arguments

MOUNTS = ("/sys/fs/cgroup", "/sys/fs/cgroup/unified")
PREFIX = "singularity-"
#: Tells the command that systemd-run has started again that its limits are set.
DONE = "SINGULARITY_LIMITS_SET"
_UNITS = {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_PERIOD = 100_000
_EBUSY, _EOPNOTSUPP = 16, 95


def wanted(options: Arguments) -> list[tuple[str, str]]:
    """Return the files of the control group and what to write into them.

    Raises:
        UserError: a value cannot be understood, or needs the first version of control groups.
    """
    values: list[tuple[str, str]] = []
    if options.apply_cgroups:
        values += _from_file(str(options.apply_cgroups))
    memory = _bytes("--memory", options.memory) if options.memory else 0
    if memory:
        values.append(("memory.max", str(memory)))
    if options.memory_reservation:
        values.append(("memory.low", str(_bytes("--memory-reservation", options.memory_reservation))))
    if options.memory_swap:
        values.append(("memory.swap.max", _swap(str(options.memory_swap), memory)))
    if options.cpus:
        values.append(("cpu.max", f"{max(1000, int(_number('--cpus', options.cpus) * _PERIOD))} {_PERIOD}"))
    if options.cpu_shares:
        values.append(("cpu.weight", str(_weight("--cpu-shares", options.cpu_shares, 2, 262144))))
    for name, file in (("cpuset_cpus", "cpuset.cpus"), ("cpuset_mems", "cpuset.mems")):
        if getattr(options, name):
            values.append((file, str(getattr(options, name))))
    if options.pids_limit:
        text = str(options.pids_limit)
        values.append(("pids.max", "max" if text == "-1" else str(int(_number("--pids-limit", text)))))
    if options.blkio_weight:
        values.append(("io.weight", f"default {_weight('--blkio-weight', options.blkio_weight, 10, 1000)}"))
    for text in options.blkio_weight_device:  # type: ignore[attr-defined]
        path, _, weight = str(text).rpartition(":")
        try:
            device = os.stat(path).st_rdev
        except OSError as error:
            raise UserError("bad-limit", f"--blkio-weight-device {text}: {error.strerror}") from None
        number = _weight("--blkio-weight-device", weight, 10, 1000)
        values.append(("io.weight", f"{os.major(device)}:{os.minor(device)} {number}"))
    if options.oom_kill_disable:
        raise UserError("bad-limit", "--oom-kill-disable: control groups of version 2 have no such switch")
    return values


def _bytes(flag: str, text: object) -> int:
    word = str(text).lower()
    digits = word.rstrip("bkmgti")
    unit = word[len(digits) :]
    if len(unit) > 1:
        unit = unit.removesuffix("b").removesuffix("i")
    if unit not in _UNITS:
        raise UserError("bad-limit", f"{flag} {text}: not a size", hint="for example 512M or 4G")
    return int(_number(flag, digits, text) * _UNITS[unit])


def _number(flag: str, text: object, shown: object = None) -> float:
    try:
        value = float(str(text))
    except ValueError:
        value = -1
    if not 0 < value < 1 << 62:
        raise UserError("bad-limit", f"{flag} {text if shown is None else shown}: not a number above 0")
    return value


def _weight(flag: str, text: object, least: int, most: int) -> int:
    """Return a weight of the first version's scale on that of the second (1 to 10000)."""
    value = int(_number(flag, text))
    if not least <= value <= most:
        raise UserError("bad-limit", f"{flag} {text}: must lie between {least} and {most}")
    return 1 + (value - least) * 9999 // (most - least)


def _swap(text: str, memory: int) -> str:
    """Return the bound of swap alone: --memory-swap counts memory and swap together, -1 means no bound."""
    if text == "-1":
        return "max"
    both = _bytes("--memory-swap", text)
    if not memory or both < memory:
        raise UserError(
            "bad-limit", f"--memory-swap {text}: is memory and swap together, and needs a --memory that is no larger"
        )
    return str(both - memory)


def _from_file(path: str) -> list[tuple[str, str]]:
    """Return the values of an --apply-cgroups file: TOML with [memory], [cpu], [pids], [blockIO] and [unified]."""
    import tomllib

    try:
        with open(path, "rb") as file:
            table = tomllib.load(file)
    except OSError as error:
        raise UserError("bad-limit", f"--apply-cgroups {path}: {error.strerror}") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError("bad-limit", f"--apply-cgroups {path}: {error}") from None
    values: list[tuple[str, str]] = []
    for section, content in table.items():
        if not isinstance(content, dict):
            raise UserError("bad-limit", f"--apply-cgroups {path}: {section} is no table")
        if section == "unified":
            values += [(str(name), str(value)) for name, value in content.items()]
            continue
        values += _section(path, section, content)
    return values


def _section(path: str, section: str, content: dict[str, object]) -> list[tuple[str, str]]:
    values: list[tuple[str, str]] = []
    limit = content.get("limit", 0)
    for name, value in content.items():
        key = f"{section}.{name}"
        shown = f"--apply-cgroups {path}: {key}"
        if key in ("memory.limit", "memory.reservation", "pids.limit"):
            file = {"memory.limit": "memory.max", "memory.reservation": "memory.low", "pids.limit": "pids.max"}[key]
            values.append((file, "max" if value == -1 else str(int(_number(shown, value)))))
        elif key == "memory.swap":
            values.append(("memory.swap.max", _swap(str(value), int(str(limit)))))
        elif key == "cpu.shares":
            values.append(("cpu.weight", str(_weight(shown, value, 2, 262144))))
        elif key == "cpu.quota":
            values.append(("cpu.max", f"{int(_number(shown, value))} {content.get('period', _PERIOD)}"))
        elif key in ("cpu.cpus", "cpu.mems"):
            values.append((f"cpuset.{name}", str(value)))
        elif key == "blockIO.weight":
            values.append(("io.weight", f"default {_weight(shown, value, 10, 1000)}"))
        elif key != "cpu.period":
            raise UserError("bad-limit", f"{shown} is not known", hint="give it as a file of version 2 under [unified]")
    return values


class Group:
    """A control group to be made for this process: `Group(values, environ)()` makes it and moves this process there.

    Arguments:
        values: of `wanted`.
        environ: the caller's environment.
        words: the command line to start again under systemd.
        mounts: where control groups of version 2 may be mounted.
        own: this process's group, below the mount; None for what the kernel says.
    """

    def __init__(
        self,
        values: list[tuple[str, str]],
        environ: Mapping[str, str],
        words: list[str],
        *,
        mounts: tuple[str, ...] = MOUNTS,
        own: str | None = None,
    ) -> None:
        self.values, self.environ, self.words = values, environ, words
        self.mounts, self.own = mounts, own

    def __call__(self) -> None:
        """Limit this process from here on; under systemd this starts the command again and does not return.

        Raises:
            HostError: nothing here lets this user set limits.
        """
        base = next((one for one in self.mounts if os.path.exists(f"{one}/cgroup.controllers")), "")
        if not base:
            raise HostError(
                "no-limits",
                "limits (--memory, --cpus ...) need control groups of version 2, which this machine does not have",
                hint="inside a batch job the scheduler's limits hold anyway",
            )
        own = _own_group() if self.own is None else self.own
        reason = ""
        folder = (base + own).rstrip("/")
        while len(folder) >= len(base):
            try:
                self._make(base, own, folder)
                return
            except OSError as error:
                reason = reason or f"{error.filename or folder}: {error.strerror}"
            folder = folder.rpartition("/")[0]
        self._systemd()
        raise HostError(
            "no-limits",
            f"cannot set limits: no control group is delegated to this user ({reason})",
            hint="systemd-run --user --scope -p Delegate=yes singularity ...; see: singularity doctor",
        )

    def _make(self, base: str, own: str, folder: str) -> None:
        """Make the group below `folder` and go there.

        Raises:
            OSError: it is not ours, or has not the controllers; nothing is left behind.
        """
        needed = sorted({file.partition(".")[0] for file, _ in self.values} - {"cgroup"})
        lacking = set(needed) - set(_words(f"{folder}/cgroup.controllers"))
        if lacking:
            raise OSError(_EOPNOTSUPP, f"has no controller {', '.join(sorted(lacking))}", folder)
        _sweep(folder)
        path = f"{folder}/{PREFIX}{os.getpid()}"
        os.mkdir(path)
        moved = False
        try:
            for name in sorted(set(needed) - set(_words(f"{folder}/cgroup.subtree_control"))):
                try:
                    _write(f"{folder}/cgroup.subtree_control", f"+{name}")
                except OSError as error:
                    if error.errno != _EBUSY or moved or folder != (base + own).rstrip("/"):
                        raise
                    moved = True  # only groups without processes of their own hand controllers on: leave it
                    _write(f"{path}/cgroup.procs", str(os.getpid()))
                    _write(f"{folder}/cgroup.subtree_control", f"+{name}")
            for name, value in self.values:
                _write(f"{path}/{name}", value)
            if not moved:
                _enter_and_remove_later(path)
        except OSError:
            if moved:
                _write(f"{folder}/cgroup.procs", str(os.getpid()))
            os.rmdir(path)
            raise

    def _systemd(self) -> None:
        """Start this command again in a scope of systemd, where there is one that listens to us."""
        if self.environ.get(DONE):
            raise HostError("no-limits", "systemd gave a scope, but its control group could not be used")
        program = next(
            (
                f"{folder}/systemd-run"
                for folder in self.environ.get("PATH", "/usr/bin:/bin").split(":")
                if os.access(f"{folder}/systemd-run", os.X_OK)
            ),
            "",
        )
        user = os.getuid() != 0
        bus = self.environ.get("XDG_RUNTIME_DIR", "") + "/systemd/private" if user else "/run/systemd/private"
        if not program or not os.path.exists(bus):
            return
        # The scope is ours and we are alone in it: the values are written into a group below it.
        environ = {**self.environ, DONE: "1"}
        command = [program, "--scope", "--quiet", "--collect", "-p", "Delegate=yes"]
        if user:
            command.insert(1, "--user")
        os.execve(program, [*command, "--", *self.words], environ)


def _own_group() -> str:
    with open("/proc/self/cgroup") as file:
        for line in file:
            if line.startswith("0::"):
                return line[3:].rstrip("\n")
    return ""


def _words(path: str) -> list[str]:
    with open(path) as file:
        return file.read().split()


def _write(path: str, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(descriptor, text.encode())
    except OSError as error:
        raise OSError(error.errno, f"{text}: {error.strerror}", path) from None
    finally:
        os.close(descriptor)


def _sweep(folder: str) -> None:
    """Remove groups whose process has ended (the kernel refuses to remove one that is in use)."""
    for name in os.listdir(folder):
        number = name.removeprefix(PREFIX)
        if name.startswith(PREFIX) and number.isdigit() and not os.path.exists(f"/proc/{number}"):
            try:
                os.rmdir(f"{folder}/{name}")
            except OSError:  # somebody else was quicker, or a program of it goes on
                continue


def _enter_and_remove_later(path: str) -> None:
    """Go into a group, and leave a process outside it that removes it when it has become empty."""
    import select

    waits, moved = os.pipe()
    child = os.fork()
    if child:
        os.close(waits)
        os.waitpid(child, 0)
        _write(f"{path}/cgroup.procs", str(os.getpid()))
        os.close(moved)
        return
    try:
        os.setsid()
        if os.fork():
            os._exit(0)
        # Nothing of the caller's may be held open by somebody that nobody knows: pipes would never end.
        keep = sorted((waits, os.open(f"{path}/cgroup.events", os.O_RDONLY)))
        os.closerange(0, keep[0])
        os.closerange(keep[0] + 1, keep[1])
        os.closerange(keep[1] + 1, 65536)
        os.read(waits, 1)
        events = keep[1] if keep[0] == waits else keep[0]
        watch = select.poll()
        watch.register(events, select.POLLPRI)
        while b"populated 1" in os.pread(events, 4096, 0):
            watch.poll()
        os.rmdir(path)
    finally:
        os._exit(0)
