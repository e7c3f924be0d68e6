# SPDX-License-Identifier: Apache-2.0
"""Instances: containers that go on without a terminal, found again by name.

Each has a small text file with what is needed to find and join it: process 1 and its start time (together they name a
process for ever), the image, the logs. Files lie below the user's configuration folder by host and user, as the peers
lay them, so that nodes which share a home do not see each other's. An entry whose process has gone is removed by
whoever notices. Start ring: `exec instance://NAME` reads one such file.
"""

from __future__ import annotations

import _signal
import posix
import time

from pysingularity.errors import HostError, UserError
from pysingularity.linux import namespaces
from pysingularity.linux.process import start_time, state
from pysingularity.runtime.enter import enter

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pysingularity.runtime.spec import LaunchSpec

_FIELDS = ("name", "user", "host", "pid", "started", "image", "command", "out", "err", "ip", "since")
_NAME_CHARACTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-"


class Instance:
    """One instance.

    Attributes:
        name, user, host: what it is called, whose it is, where it runs.
        pid: its process 1, as the host sees it; started: that process's start time in ticks since boot.
        image: path of its image; command: what it runs ("start", "run").
        out, err: paths of its logs.
        ip: address in its own network, or "".
        since: Unix time of its start.
    """

    __slots__ = ("command", "err", "host", "image", "ip", "name", "out", "pid", "since", "started", "user")

    name: str
    user: str
    host: str
    pid: str
    started: str
    image: str
    command: str
    out: str
    err: str
    ip: str
    since: str

    def __init__(self, **values: str) -> None:
        for field in _FIELDS:
            setattr(self, field, values.get(field, ""))

    def __repr__(self) -> str:
        return f"Instance({self.name}, pid {self.pid})"

    def alive(self) -> bool:
        """Return whether process 1 is still the same process, and not merely waiting to be collected."""
        try:
            return start_time(int(self.pid)) == int(self.started) and state(int(self.pid)) not in ("Z", "X")
        except (OSError, ValueError):
            return False

    def json(self) -> dict[str, object]:
        """Return the instance as `instance list --json` shows it."""
        return {
            "instance": self.name,
            "pid": int(self.pid),
            "img": self.image,
            "ip": self.ip,
            "logErrPath": self.err,
            "logOutPath": self.out,
        }


def check_name(name: str) -> str:
    """Return a name that can be a file's.

    Raises:
        UserError: it holds other characters than letters, digits, dots, dashes and underscores.
    """
    if not name or name[0] in ".-" or any(letter not in _NAME_CHARACTERS for letter in name):
        raise UserError(
            "bad-instance-name", f"{name!r} cannot be an instance's name", hint="use letters, digits, dots, - and _"
        )
    return name


def folder(environ: dict[str, str], kind: str = "app", user: str = "") -> str:
    """Return the folder of this host's and user's entries ("app") or logs ("logs")."""
    base = environ.get("SINGULARITY_CONFIGDIR") or environ.get("APPTAINER_CONFIGDIR")
    if not base:
        import pwd

        home = environ.get("HOME") or pwd.getpwuid(posix.getuid()).pw_dir
        base = home + "/.singularity"
    return f"{base}/instances/{kind}/{posix.uname().nodename}/{user or _user()}"


def _user() -> str:
    import pwd

    try:
        return pwd.getpwuid(posix.getuid()).pw_name
    except KeyError:
        return str(posix.getuid())


def make_folders(path: str) -> None:
    """Make a folder for this user alone, with what is missing above it."""
    at = ""
    for part in path.split("/")[1:]:
        at += "/" + part
        try:
            posix.mkdir(at, 0o700)
        except FileExistsError:
            pass
        except OSError:
            try:
                posix.stat(at)
            except OSError as error:
                raise HostError(
                    "no-state-folder", f"{at}: {error.strerror}", hint="set SINGULARITY_CONFIGDIR"
                ) from None


def save(instance: Instance, path: str) -> None:
    """Write an entry beside its place and move it there."""
    lines = "".join(f"{field} {getattr(instance, field)}\n" for field in _FIELDS)
    place, _, name = path.rpartition("/")
    draft = f"{place}/.{name}.{posix.getpid()}"
    descriptor = posix.open(draft, posix.O_WRONLY | posix.O_CREAT | posix.O_TRUNC | posix.O_CLOEXEC, 0o600)
    try:
        posix.write(descriptor, lines.encode("utf-8", "surrogateescape"))
    finally:
        posix.close(descriptor)
    posix.rename(draft, path)


def load(path: str) -> Instance | None:
    """Return the instance of an entry; None (and no entry any more) when it has ended."""
    try:
        descriptor = posix.open(path, posix.O_RDONLY | posix.O_CLOEXEC | posix.O_NOFOLLOW)
    except OSError:
        return None
    try:
        state = posix.fstat(descriptor)
        text = posix.read(descriptor, 65536).decode("utf-8", "surrogateescape")
    finally:
        posix.close(descriptor)
    if state.st_uid != posix.getuid() and posix.getuid() != 0:
        return None  # somebody else's word about a process is not to be joined
    values = {}
    for line in text.splitlines():
        field, _, value = line.partition(" ")
        values[field] = value
    found = Instance(**{field: values.get(field, "") for field in _FIELDS})
    if found.host == posix.uname().nodename and not found.alive():
        try:
            posix.unlink(path)
        except OSError:  # another one of ours was quicker
            pass
        return None
    return found


def find(name: str, environ: dict[str, str], user: str = "") -> Instance:
    """Return the running instance of a name.

    Raises:
        UserError: there is none.
    """
    found = load(f"{folder(environ, user=user)}/{check_name(name)}")
    if found is None:
        raise UserError("no-instance", f"no instance found with name {name}", hint="see: singularity instance list")
    return found


def listing(environ: dict[str, str], pattern: str = "*", user: str = "") -> list[Instance]:
    """Return the running instances whose names match a shell pattern, by name."""
    import fnmatch

    place = folder(environ, user=user)
    try:
        names = sorted(posix.listdir(place))
    except OSError:
        return []
    names = [name for name in names if name[0] != "." and fnmatch.fnmatchcase(name, pattern)]
    found = [load(f"{place}/{name}") for name in names]
    return [one for one in found if one is not None]


def start(spec: LaunchSpec, name: str, environ: dict[str, str], *, image: str, command: str) -> Instance:
    """Start a container that goes on without this process, and return it as soon as its program runs.

    Arguments:
        spec: has a pid namespace; its program's output goes to the logs.
        image: what to call the image in listings; command: "start" or "run".

    Raises:
        UserError: the name is taken.
        HostError: the container could not be started; the message is that of the container.
    """
    place, logs = folder(environ), folder(environ, "logs")
    path = f"{place}/{check_name(name)}"
    make_folders(place)
    make_folders(logs)
    if load(path) is not None:
        raise UserError("instance-exists", f"instance {name} already exists", hint=f"singularity instance stop {name}")
    instance = Instance(name=name, user=_user(), host=posix.uname().nodename, image=image, command=command)
    instance.out, instance.err = f"{logs}/{name}.out", f"{logs}/{name}.err"
    instance.since = str(int(time.time()))
    if spec.hostname == "" and spec.namespaces & namespaces.NEWUTS:
        spec.hostname = name
    began, begun = posix.pipe()  # closed by execve: nothing to read means that the program runs

    def started(pid: int) -> None:
        instance.pid, instance.started = str(pid), str(start_time(pid))
        save(instance, path)
        posix.close(begun)

    if posix.fork() == 0:
        try:
            posix.close(began)
            _leave_terminal(instance)
            spec.started = started
            spec.keep_descriptors, spec.failure, spec.lingers = (begun,), begun, True
            enter(spec)
        except BaseException as error:
            posix.write(2, f"FATAL:   {error}\n".encode("utf-8", "surrogateescape"))
        finally:
            posix._exit(255)
    posix.close(begun)
    failed = posix.read(began, 1) != b""
    posix.close(began)
    while failed and load(path) is not None:  # its process 1 is about to notice
        time.sleep(0.005)
    found = load(path)
    if found is None:
        raise HostError(
            "instance-not-started",
            f"instance {name} ended at once{_last_line(instance.err)}",
            hint=f"see: {instance.err}",
        )
    return found


def _last_line(path: str) -> str:
    try:
        with open(path, errors="replace") as file:
            lines = file.read()[-2000:].strip().splitlines()
    except OSError:
        return ""
    return ": " + lines[-1].removeprefix("FATAL:").strip() if lines else ""


def _leave_terminal(instance: Instance) -> None:
    """Become a session of its own whose output goes to the logs, and let this process's parent go on."""
    posix.setsid()
    flags = posix.O_WRONLY | posix.O_CREAT | posix.O_TRUNC
    for number, path in ((0, "/dev/null"), (1, instance.out), (2, instance.err)):
        descriptor = posix.open(path, posix.O_RDONLY if number == 0 else flags, 0o600)
        if descriptor != number:
            posix.dup2(descriptor, number)
            posix.close(descriptor)


def stop(
    instance: Instance,
    *,
    signal: int = _signal.SIGINT,
    timeout: float = 10,
    force: bool = False,
    tick: Callable[[], None] = lambda: time.sleep(0.02),
) -> bool:
    """Ask an instance to end, and make it end; return whether it ended by itself.

    Arguments:
        signal: what process 1 passes on to the program first.
        timeout: seconds until it is killed; force: kill it at once.
    """
    pid = int(instance.pid)
    if not force:
        _send(pid, signal)
        deadline = time.monotonic() + timeout
        while instance.alive():
            if time.monotonic() >= deadline:
                break
            tick()
        else:
            return True
    _send(pid, _signal.SIGKILL)
    deadline = time.monotonic() + 5
    while instance.alive() and time.monotonic() < deadline:
        tick()
    return False


def _send(pid: int, signal: int) -> None:
    try:
        posix.kill(pid, signal)
    except ProcessLookupError:
        pass
    except PermissionError:
        raise UserError("not-yours", f"process {pid} belongs to another user") from None


def join(instance: Instance) -> None:
    """Enter the namespaces and the root of an instance. Children of this process then live in its pid namespace.

    Raises:
        HostError: it cannot be joined.
    """
    base = f"/proc/{instance.pid}"
    try:
        root = posix.open(base + "/root", posix.O_RDONLY | posix.O_DIRECTORY | posix.O_CLOEXEC)
        spaces = []
        for name, flag in namespaces.FLAGS.items():
            # Joining the own user namespace again is an error, the others are merely useless.
            if posix.stat(f"{base}/ns/{name}").st_ino != posix.stat(f"/proc/self/ns/{name}").st_ino:
                spaces.append((posix.open(f"{base}/ns/{name}", posix.O_RDONLY | posix.O_CLOEXEC), flag))
        if not instance.alive():  # everything above may have been of another process with the same number
            raise UserError("no-instance", f"instance {instance.name} has just ended")
        for descriptor, flag in spaces:
            namespaces.setns(descriptor, flag)
            posix.close(descriptor)
        posix.fchdir(root)
        posix.chroot(".")
        posix.close(root)
    except OSError as error:
        raise HostError("cannot-join", f"cannot join instance {instance.name}: {error}") from None
