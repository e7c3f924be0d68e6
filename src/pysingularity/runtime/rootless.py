# SPDX-License-Identifier: Apache-2.0
"""Root without root: make this process uid 0 of a user namespace in the best way that this machine offers.

In this order: real root; a range of subordinate ids, mapped by the set-user-id programs newuidmap and newgidmap, where
the kernel itself keeps every owner; one id, where a supervisor answers and records what the kernel refuses
(`runtime.emulate`); one id with a filter that only pretends. SINGULARITY_ROOTLESS=subuid|notify|bpf forces one.
Inside a container whose root is emulated already, that emulation does the work: there can be no second one.
"""

from __future__ import annotations

import os

from pysingularity import messages
from pysingularity.errors import HostError, UsageError
from pysingularity.linux import capabilities, seccomp
from pysingularity.linux.namespaces import NEWUSER, map_self, unshare
from pysingularity.linux.ownership import RealOwners, RecordedOwners

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

ROOT, SUBUID, SINGLE, OUTER = "root", "subuid", "single", "outer"
NOTIFY, BPF = "notify", "bpf"
#: Variable that forces a way, with the words it takes.
VARIABLE = "SINGULARITY_ROOTLESS"
CHOICES = (SUBUID, NOTIFY, BPF)

#: A distribution needs ids up to nobody's, 65534.
_NEEDED = 65534
#: A number that no open file has.
_NO_DESCRIPTOR = 0x5E7C1
_EPERM, _EACCES, _ENOSPC, _EINVAL, _EUSERS = 1, 13, 28, 22, 87


class Way:
    """How this process is root.

    Arguments:
        name: ROOT, SUBUID, SINGLE or OUTER.
        emulation: NOTIFY or BPF for SINGLE, "" otherwise.
        owners: how owners of files are kept (linux.ownership).
        uid, gid: who the user is outside.
        real: this is root of the machine, not of a namespace.
    """

    __slots__ = ("emulation", "gid", "name", "owners", "real", "uid")

    def __init__(self, name: str, *, emulation: str = "", uid: int, gid: int, real: bool = False) -> None:
        self.name, self.emulation, self.uid, self.gid, self.real = name, emulation, uid, gid, real
        # Plain pretending keeps no owners either, but what agents unpack is recorded all the same.
        self.owners: RealOwners | RecordedOwners
        self.owners = RecordedOwners() if name == SINGLE else RealOwners(mapped=not real and name != OUTER)

    @property
    def needs_emulation(self) -> bool:
        """Say whether programs only work as root under `runtime.emulate`."""
        return self.name == SINGLE

    def describe(self) -> str:
        """Say in one line what this way is, and what it means."""
        if self.name == ROOT:
            return "running as root"
        if self.name == SUBUID:
            return "root without root: your subordinate ids become the users of the container"
        if self.name == OUTER:
            return "root without root: the container around us records owners, modes and devices"
        if self.emulation == NOTIFY:
            return "root without root: one id; owners, modes and devices are recorded for the image"
        return "root without root: one id, pretending only; files that %post gives away stay root's in the image"

    def __repr__(self) -> str:
        return f"Way({self.name}{' ' + self.emulation if self.emulation else ''})"


def become_root(prefer: str | None = None, environ: Mapping[str, str] | None = None, *, quiet: bool = False) -> Way:
    """Make this single-threaded process uid 0 with all capabilities over its own files, and say how.

    The way is said in one INFO line. Calling it as root changes nothing.

    Arguments:
        prefer: SUBUID, NOTIFY or BPF to take that way or fail; None for what SINGULARITY_ROOTLESS says, else the best.
        environ: the caller's environment.
        quiet: say nothing: another process of this command has said it.

    Raises:
        HostError: the machine lacks what is needed, with the exact remedy.
        UsageError: an unknown way was asked for.
    """
    environ = os.environ if environ is None else environ
    asked = prefer or environ.get(VARIABLE) or environ.get(VARIABLE.replace("SINGULARITY", "APPTAINER")) or ""
    if asked and asked not in CHOICES:
        raise UsageError(
            "unknown-way", f"{VARIABLE}={asked} is not a way to be root", hint=f"one of {', '.join(CHOICES)}"
        )
    way = _become(asked)
    (messages.verbose if quiet or way.name == ROOT else messages.info)(way.describe())
    return way


def _become(asked: str) -> Way:
    uid, gid = os.getuid(), os.getgid()
    if uid == 0 and capabilities.effective() >> capabilities.SYS_ADMIN & 1:
        reach = mapped("/proc/self/uid_map")
        if reach == 1 << 32:
            return Way(ROOT, uid=0, gid=0, real=True)
        if reach > _NEEDED:
            return Way(SUBUID, uid=0, gid=0)
        if asked != BPF and emulated_around():
            return Way(OUTER, uid=0, gid=0)
        return Way(SINGLE, emulation=_emulation(asked), uid=0, gid=0)  # root of a container with one id
    if asked in ("", SUBUID):
        try:
            _map_range(uid, gid)
            return Way(SUBUID, uid=uid, gid=gid)
        except _NoRangeError as problem:
            if asked == SUBUID:
                raise HostError(
                    "no-subordinate-ids",
                    f"no range of subordinate ids can be used: {problem}",
                    hint=f"administrator: usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {_login(uid)}"
                    "; or leave SINGULARITY_ROOTLESS unset",
                ) from None
            messages.verbose(f"no range of subordinate ids: {problem}")
            if problem.said:
                messages.warning(f"{problem}; taking one id instead")
    try:
        unshare(NEWUSER)
    except OSError as error:
        raise no_user_namespaces(error) from None
    try:
        map_self(0, 0, uid, gid)
    except OSError as error:
        raise no_user_namespaces(error) from None
    return Way(SINGLE, emulation=_emulation(asked), uid=uid, gid=gid)


def emulated_around() -> bool:
    """Say whether a supervisor around us keeps owners: a file that is given away has its new owner afterwards."""
    try:
        file = os.memfd_create("owner", os.MFD_CLOEXEC)
    except OSError:
        return False
    try:
        os.fchown(file, 1, 2)
        status = os.fstat(file)
        return (status.st_uid, status.st_gid) == (1, 2)
    except OSError:  # one id, and nobody who would pretend
        return False
    finally:
        os.close(file)


def pretended_around() -> bool:
    """Say whether a plain filter around us answers for the kernel: what it answers, no supervisor gets to see."""
    try:
        os.fchown(_NO_DESCRIPTOR, 0, 0)
    except OSError:
        return False
    return True


def _emulation(asked: str) -> str:
    if asked == BPF or pretended_around():
        return BPF
    if not seccomp.architectures():
        machine = os.uname().machine
        raise HostError(
            "unknown-architecture",
            f"root cannot be emulated on {machine}: its system calls are not known",
            hint="administrator: give this user subordinate ids (usermod --add-subuids 100000-165535 USER)",
        )
    if seccomp.listener_possible():
        return NOTIFY
    if asked == NOTIFY:
        raise HostError(
            "no-listener",
            "system calls cannot be handed to a supervisor here: Linux before 5.0, or a container around us has one",
            hint=f"use {VARIABLE}=bpf",
        )
    return BPF


def no_user_namespaces(error: OSError) -> HostError:
    """Return the error for a machine that lets this user make no user namespace, with what to do about it."""
    why, hint = error.strerror or "refused", "let the administrator allow user namespaces; see: singularity doctor"
    if error.errno == _ENOSPC or _setting("user/max_user_namespaces") == "0":
        why = f"user.max_user_namespaces is {_setting('user/max_user_namespaces') or 'too small'}"
        hint = "administrator: sysctl -w user.max_user_namespaces=15000"
    elif _setting("kernel/unprivileged_userns_clone") == "0":
        why, hint = (
            "kernel.unprivileged_userns_clone is 0",
            "administrator: sysctl -w kernel.unprivileged_userns_clone=1",
        )
    elif _setting("kernel/apparmor_restrict_unprivileged_userns") == "1":
        why = "AppArmor restricts user namespaces"
        hint = (
            "administrator: sysctl -w kernel.apparmor_restrict_unprivileged_userns=0, "
            "or an AppArmor profile with the rule `userns,` for this program"
        )
    elif error.errno == _EPERM and _filtered():
        why, hint = (
            "a seccomp filter around us forbids them",
            "start the outer container with --security-opt seccomp=unconfined",
        )
    return HostError("no-user-namespaces", f"root cannot be had without root here: {why}", hint=hint)


def _setting(name: str) -> str:
    try:
        with open(f"/proc/sys/{name}") as file:
            return file.read().strip()
    except OSError:  # a kernel without this setting
        return ""


def _filtered() -> bool:
    with open("/proc/self/status") as file:
        return any(line.split() == ["Seccomp:", "2"] for line in file)


def mapped(path: str) -> int:
    """Return how many ids, from 0 up without a gap, a map (/proc/PID/uid_map) covers; 1 << 32 for all."""
    with open(path) as file:
        ranges = sorted((int(inside), int(count)) for inside, _, count in (line.split() for line in file))
    end = 0
    for inside, count in ranges:
        if inside > end:
            break
        end = max(end, inside + count)
    return end if end < 0xFFFFFFFF else 1 << 32


class _NoRangeError(Exception):
    """Why no range of subordinate ids can be used; `said` when the user should hear it unasked."""

    def __init__(self, text: str, *, said: bool = False) -> None:
        super().__init__(text)
        self.said = said


def _login(uid: int) -> str:
    import pwd  # a user without an entry has none by number either

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def parse_ranges(lines: Iterable[str], name: str, number: int) -> list[tuple[int, int]]:
    """Return (first id, count) of every range that /etc/subuid gives a user, by name or number (subuid(5))."""
    found = []
    for line in lines:
        parts = line.strip().split(":")
        if len(parts) != 3 or parts[0] not in (name, str(number)):
            continue
        if parts[1].isdigit() and parts[2].isdigit() and int(parts[2]) > 0:
            found.append((int(parts[1]), int(parts[2])))
    return found


def ranges(kind: str, name: str, number: int) -> list[tuple[int, int]]:
    """Return (first id, count) of this user's subordinate ids; `kind` is "uid" or "gid".

    The file comes first; where it says nothing, getsubids(1) asks what nsswitch.conf names (LDAP, sssd).
    """
    try:
        with open(f"/etc/sub{kind}", encoding="utf-8", errors="surrogateescape") as file:
            found = parse_ranges(file, name, number)
    except OSError:
        found = []
    if found:
        return found
    import shutil
    import subprocess

    program = shutil.which("getsubids")
    if program is None:
        return []
    words = [program, "-g", name] if kind == "gid" else [program, name]
    result = subprocess.run(words, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    for line in result.stdout.splitlines():  # "0: name 100000 65536"
        parts = line.split()
        if len(parts) == 4 and parts[2].isdigit() and parts[3].isdigit():
            found.append((int(parts[2]), int(parts[3])))
    return found


def map_words(own: int, found: list[tuple[int, int]]) -> list[str]:
    """Return the words for newuidmap: the user becomes 0, the ranges follow from 1 up."""
    words, inside = ["0", str(own), "1"], 1
    for first, count in found:
        words += [str(inside), str(first), str(count)]
        inside += count
    return words


def _map_range(uid: int, gid: int) -> None:
    """Enter a user namespace with this user's subordinate ids.

    Raises:
        _NoRangeError: there are none, too few, or the helpers are missing or failed.
        HostError: no user namespace can be made at all.
    """
    import shutil

    name = _login(uid)
    maps = []
    for kind, own in (("uid", uid), ("gid", gid)):
        # Both files name the user, not the group (subgid(5)).
        found = ranges(kind, name, uid)
        if not found:
            raise _NoRangeError(f"/etc/sub{kind} has none for {name}")
        if sum(count for _, count in found) < _NEEDED:
            count = sum(count for _, count in found)
            raise _NoRangeError(
                f"/etc/sub{kind} gives {name} only {count} ids, a distribution needs {_NEEDED}", said=True
            )
        program = shutil.which(f"new{kind}map", path=os.environ.get("PATH", "") + ":/usr/bin:/usr/sbin:/bin")
        if program is None:
            raise _NoRangeError(
                f"the program new{kind}map (package uidmap or shadow-utils) is not installed", said=True
            )
        maps.append([program, str(os.getpid()), *map_words(own, found)])
    problem = _unshare_mapped(maps)
    if problem:
        raise _NoRangeError(problem, said=True)
    os.setgid(0)
    os.setuid(0)
    os.setgroups([])


def _unshare_mapped(maps: list[list[str]]) -> str:
    """Unshare, with a helper outside that maps the ids; return why that cannot be, or "".

    A child tries first: a process whose map failed cannot go back, and must still be able to take another way.
    """
    out, into = os.pipe()
    trial = os.fork()
    if trial == 0:
        text = "the trial broke off"
        try:
            text = _unshare_with_helper([[words[0], str(os.getpid()), *words[2:]] for words in maps])
        except HostError as error:
            text = error.message
        finally:
            os.write(into, text.encode()[:2000])
            os._exit(0)
    os.close(into)
    text = os.read(out, 2000).decode("utf-8", "replace")
    os.close(out)
    os.waitpid(trial, 0)
    return text or _unshare_with_helper(maps)


def _unshare_with_helper(maps: list[list[str]]) -> str:
    go_read, go_write = os.pipe()
    said_read, said_write = os.pipe()
    helper = os.fork()
    if helper == 0:
        status = 1
        try:
            os.close(go_write)
            os.close(said_read)
            if os.read(go_read, 1):
                os.dup2(said_write, 2)
                os.dup2(said_write, 1)
                status = 0
                for words in maps:
                    child = os.posix_spawn(words[0], words, os.environ)
                    if os.waitpid(child, 0)[1]:
                        status = 1
                        break
        finally:
            os._exit(status)
    os.close(go_read)
    os.close(said_write)
    try:
        unshare(NEWUSER)
        os.write(go_write, b"x")
    except OSError as error:
        raise no_user_namespaces(error) from None
    finally:
        os.close(go_write)
        said = b""
        while piece := os.read(said_read, 4096):
            said += piece
        os.close(said_read)
        status = os.waitpid(helper, 0)[1]
    if status:
        return " ".join(said.decode("utf-8", "replace").split()) or "newuidmap failed"
    return ""
