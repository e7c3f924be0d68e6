# SPDX-License-Identifier: Apache-2.0
"""--security: run the program as another user (root only), under an AppArmor profile, an SELinux context, or a seccomp
filter from a JSON profile as Docker's and Podman's are.

Whatever cannot be done as it was asked for ends the start: a protection that silently is not there is worse than none.
Profiles are compiled by libseccomp, which knows the system calls of every architecture. Loaded only for --security.

Formats: the OCI runtime specification ("Seccomp") with Docker's extensions (archMap, includes, excludes, names).
"""

from __future__ import annotations

import ctypes
import os

from pysingularity.errors import HostError, UserError
from pysingularity.linux import capabilities, seccomp

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

KINDS = ("seccomp", "apparmor", "selinux", "uid", "gid")
ACTIONS = {
    "SCMP_ACT_KILL": 0x00000000,
    "SCMP_ACT_KILL_THREAD": 0x00000000,
    "SCMP_ACT_KILL_PROCESS": 0x80000000,
    "SCMP_ACT_TRAP": 0x00030000,
    "SCMP_ACT_ERRNO": 0x00050000,
    "SCMP_ACT_TRACE": 0x7FF00000,
    "SCMP_ACT_LOG": 0x7FFC0000,
    "SCMP_ACT_ALLOW": 0x7FFF0000,
}
WITH_NUMBER = ("SCMP_ACT_ERRNO", "SCMP_ACT_TRACE")
OPERATORS = ("NE", "LT", "LE", "EQ", "GE", "GT", "MASKED_EQ")  # from 1 on
#: Machine → architecture as profiles name it.
NATIVE = {
    "x86_64": ("SCMP_ARCH_X86_64", "amd64"),
    "aarch64": ("SCMP_ARCH_AARCH64", "arm64"),
    "ppc64le": ("SCMP_ARCH_PPC64LE", "ppc64le"),
    "s390x": ("SCMP_ARCH_S390X", "s390x"),
    "riscv64": ("SCMP_ARCH_RISCV64", "riscv64"),
}
_EPERM = 1
_LARGEST = 4 << 20


class Security:
    """What the --security options ask for; made on the host, applied in the program's own process.

    Arguments:
        texts: the options, KIND:VALUE each.
        rights: mask of the capabilities that the program will have (profiles may depend on them).

    Raises:
        UserError, HostError: something cannot be understood, or cannot be had here.
    """

    def __init__(self, texts: Sequence[str], rights: int) -> None:
        self.uid, self.gids = -1, []  # type: int, list[int]
        self.filters: list[bytes] = []
        self.labels: list[tuple[str, bytes]] = []
        for text in texts:
            kind, colon, value = text.partition(":")
            if kind not in KINDS or not colon or not value:
                raise UserError(
                    "bad-security", f"--security {text}: not of the form KIND:VALUE", hint=f"KIND is {', '.join(KINDS)}"
                )
            if kind == "seccomp":
                self.filters.append(compile_profile(_load(value), value, rights))
            elif kind == "uid":
                self.uid = _id(text, value)
            elif kind == "gid":
                self.gids = [_id(text, one) for one in value.split(":")]
            else:
                self.labels.append(_label(kind, value))
        if (self.uid >= 0 or self.gids) and os.getuid() != 0:
            own = (self.uid in (-1, os.getuid())) and set(self.gids) <= {os.getgid(), *os.getgroups()}
            if not own:
                raise UserError(
                    "needs-root", "--security uid and gid need root", hint="--fakeroot makes you root inside"
                )
            self.uid, self.gids = -1, []

    def become_user(self) -> None:
        """Take the user and groups.

        Raises:
            HostError: they cannot be had.
        """
        try:
            if self.gids:
                os.setgroups(self.gids)
                os.setgid(self.gids[0])
            if self.uid >= 0:
                os.setuid(self.uid)
        except OSError as error:
            raise HostError("no-user", f"--security: cannot become that user: {error.strerror}") from None

    def confine(self) -> None:
        """Take the labels and filters: the last thing before the program starts.

        Raises:
            HostError: the kernel refuses them.
        """
        for path, data in self.labels:
            try:
                with open(path, "wb", buffering=0) as file:
                    file.write(data)
            except OSError as error:
                what = data.decode("utf-8", "replace").rstrip("\0")
                raise HostError("no-label", f"--security: {what}: {path}: {error.strerror}") from None
        for program in self.filters:
            try:
                seccomp.install(program)
            except OSError as error:
                raise HostError("no-seccomp", f"--security: the kernel refuses the filter: {error.strerror}") from None


def _id(text: str, value: str) -> int:
    if not value.isascii() or not value.isdigit() or int(value) >= 1 << 32:
        raise UserError("bad-security", f"--security {text}: {value!r} is no number of a user or group")
    return int(value)


def _label(kind: str, value: str) -> tuple[str, bytes]:
    """Return the file that sets a label for the next execve, and what to write.

    Raises:
        HostError: the kernel has no such labels.
    """
    if kind == "apparmor":
        if _read("/sys/module/apparmor/parameters/enabled") != "Y":
            raise HostError("no-apparmor", f"--security apparmor:{value}: AppArmor is not active on this machine")
        own = "/proc/self/attr/apparmor/exec"
        return own if os.path.exists(own) else "/proc/self/attr/exec", b"exec " + os.fsencode(value)
    if not os.path.exists("/sys/fs/selinux/enforce"):
        raise HostError("no-selinux", f"--security selinux:{value}: SELinux is not active on this machine")
    return "/proc/self/attr/exec", os.fsencode(value) + b"\0"


def _read(path: str) -> str:
    try:
        with open(path) as file:
            return file.read().strip()
    except OSError:
        return ""


def _load(path: str) -> object:
    import json

    try:
        with open(path, "rb") as file:
            return json.loads(file.read(_LARGEST))
    except OSError as error:
        raise UserError("no-profile", f"--security seccomp:{path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError("bad-profile", f"--security seccomp:{path}: no JSON: {error}") from None


def compile_profile(profile: object, name: str, rights: int) -> bytes:
    """Return a profile as a filter program of the kernel.

    Arguments:
        profile: the decoded JSON.
        name: what to call it in messages.
        rights: mask of the program's capabilities.

    Raises:
        UserError: the profile holds something that is not understood; none of it is ever left out silently.
        HostError: there is no libseccomp.
    """

    def wrong(what: object) -> UserError:
        return UserError("bad-profile", f"--security seccomp:{name}: {what}")

    if not isinstance(profile, dict):
        raise wrong("is no object")
    try:
        library = ctypes.CDLL("libseccomp.so.2")
    except OSError:
        raise HostError(
            "no-libseccomp", "--security seccomp needs libseccomp.so.2", hint="administrator: install libseccomp2"
        ) from None
    library.seccomp_init.restype = ctypes.c_void_p
    default = _action(profile, "defaultAction", "defaultErrnoRet", wrong)
    context = ctypes.c_void_p(library.seccomp_init(ctypes.c_uint32(default)))
    if not context:
        raise wrong("libseccomp refuses its default action")
    try:
        for architecture in _architectures(profile, wrong):
            token = library.seccomp_arch_resolve_name(architecture.encode())
            if token == 0:
                raise wrong(f"there is no architecture {architecture}")
            library.seccomp_arch_add(context, ctypes.c_uint32(token))  # one that is there already is no error for us
        entries = profile.get("syscalls") or []
        if not isinstance(entries, list):
            raise wrong("syscalls is no list")
        for entry in entries:
            if not isinstance(entry, dict):
                raise wrong(f"{entry!r} is no rule")
            if _applies(entry, rights, wrong):
                _rule(library, context, entry, default, wrong)
        return _export(library, context, wrong)
    except (TypeError, AttributeError, OverflowError) as error:
        raise wrong(error) from None
    finally:
        library.seccomp_release(context)


def _action(entry: dict[str, Any], key: str, number: str, wrong: Callable[[object], UserError]) -> int:
    word = entry.get(key)
    if word not in ACTIONS:
        raise wrong(f"{key} {word!r} is none of {', '.join(ACTIONS)}")
    if word not in WITH_NUMBER:
        return ACTIONS[word]
    value = entry.get(number)
    value = _EPERM if value is None else value
    if not isinstance(value, int) or not 0 <= value < 4096:
        raise wrong(f"{number} {value!r} is no error number")
    return ACTIONS[word] | value


def _architectures(profile: dict[str, Any], wrong: Callable[[object], UserError]) -> list[str]:
    """Return the further architectures of a profile, as libseccomp calls them."""
    machine = os.uname().machine
    if machine not in NATIVE:
        raise wrong(f"profiles for {machine} are not known")
    native = NATIVE[machine][0]
    words = [str(word) for word in profile.get("architectures") or []]
    made_for = [*words, *(one.get("architecture") for one in profile.get("archMap") or [])]
    if made_for and native not in made_for:
        raise wrong(f"is not made for {native}")
    for one in profile.get("archMap") or []:
        if one.get("architecture") == native:
            words += one.get("subArchitectures") or []
    return [str(word).removeprefix("SCMP_ARCH_").lower() for word in words if word != native]


def _applies(entry: dict[str, Any], rights: int, wrong: Callable[[object], UserError]) -> bool:
    """Say whether a rule's conditions (`includes`, `excludes`) hold here."""
    for key, wanted in (("includes", True), ("excludes", False)):
        conditions = entry.get(key) or {}
        unknown = set(conditions) - {"caps", "arches", "minKernel"}
        if unknown:
            raise wrong(f"{key}: {', '.join(sorted(unknown))} is not known")
        held = [_has(name, rights, wrong) for name in conditions.get("caps") or []]
        if held and (all(held) if wanted else any(held)) is not wanted:
            return False
        arches = conditions.get("arches") or []
        if arches and (NATIVE[os.uname().machine][1] in arches) is not wanted:
            return False
        if conditions.get("minKernel"):
            release = _version(os.uname().release)
            if (release >= _version(conditions["minKernel"])) is not wanted:
                return False
    return True


def _has(name: str, rights: int, wrong: Callable[[object], UserError]) -> bool:
    try:
        return bool(rights >> capabilities.number(name) & 1)
    except ValueError:
        raise wrong(f"there is no capability {name}") from None


def _version(text: str) -> tuple[int, ...]:
    parts = text.replace("-", ".").split(".")[:2]
    return tuple(int(part) if part.isdigit() else 0 for part in parts)


class _Comparison(ctypes.Structure):
    """struct scmp_arg_cmp of seccomp.h."""

    _fields_ = (
        ("argument", ctypes.c_uint),
        ("operator", ctypes.c_int),
        ("first", ctypes.c_uint64),
        ("second", ctypes.c_uint64),
    )


def _rule(
    library: Any, context: ctypes.c_void_p, entry: dict[str, Any], default: int, wrong: Callable[[object], UserError]
) -> None:
    """Add one entry of `syscalls`."""
    action = _action(entry, "action", "errnoRet", wrong)
    names = list(entry.get("names") or []) + ([entry["name"]] if entry.get("name") else [])
    if not names:
        raise wrong(f"a rule names no system call: {entry!r}")
    if action == default:
        return  # libseccomp refuses rules that change nothing
    comparisons = [_comparison(one, wrong) for one in entry.get("args") or []]
    numbers = [one.argument for one in comparisons]
    # Several conditions for one argument are alternatives, as runc has it.
    groups = [[one] for one in comparisons] if len(set(numbers)) < len(numbers) else [comparisons]
    for name in names:
        call = library.seccomp_syscall_resolve_name(str(name).encode())
        if call == -1:
            if action == ACTIONS["SCMP_ACT_ALLOW"]:
                continue  # what nobody here knows cannot be called either; the default stays in force
            raise wrong(f"this machine's libseccomp does not know the system call {name}, which is to be refused")
        for group in groups:
            array = (_Comparison * len(group))(*group)
            status = library.seccomp_rule_add_array(context, ctypes.c_uint32(action), call, len(group), array)
            if status:
                raise wrong(f"{name}: {os.strerror(-status)}")


def _comparison(one: dict[str, Any], wrong: Callable[[object], UserError]) -> _Comparison:
    word = str(one.get("op", "")).removeprefix("SCMP_CMP_")
    if word not in OPERATORS or not isinstance(one.get("index"), int):
        raise wrong(f"{one!r} is no condition")
    value, second = int(one.get("value", 0)), int(one.get("valueTwo") or 0)
    return _Comparison(one["index"], OPERATORS.index(word) + 1, value, second)


def _export(library: Any, context: ctypes.c_void_p, wrong: Callable[[object], UserError]) -> bytes:
    descriptor = os.memfd_create("filter")
    try:
        status = library.seccomp_export_bpf(context, descriptor)
        if status:
            raise wrong(f"libseccomp: {os.strerror(-status)}")
        size = os.fstat(descriptor).st_size
        return os.pread(descriptor, size, 0)
    finally:
        os.close(descriptor)
