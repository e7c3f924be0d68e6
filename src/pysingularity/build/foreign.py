# SPDX-License-Identifier: Apache-2.0
"""Building for another architecture: which programs can run here, by the processor itself or by a registered emulator.

The kernel keeps the emulators in binfmt_misc: what the first bytes of a program have to be, and which program then runs
it. What can run is found by asking those entries with the head of a program of the wanted architecture, so that it does
not matter what a distribution calls them (binfmt_misc in the kernel's documentation, elf(5)).
"""

from __future__ import annotations

import os
import struct

from pysingularity.errors import UserError

#: Names of architectures as images know them → class (32 or 64 bits), byte order, machine (elf.h).
_ELF = {
    "386": (1, "<", 3),
    "amd64": (2, "<", 62),
    "arm": (1, "<", 40),
    "arm64": (2, "<", 183),
    "mips64le": (2, "<", 8),
    "ppc64le": (2, "<", 21),
    "riscv64": (2, "<", 243),
    "s390x": (2, ">", 22),
}
#: Processors that run programs of another architecture by themselves.
_ALSO = {"amd64": ("386",)}
#: The same names in Debian's words.
DEBIAN = {"386": "i386", "arm": "armhf", "mips64le": "mips64el", "ppc64le": "ppc64el"}
FOLDER = "/proc/sys/fs/binfmt_misc"


class Emulator:
    """An entry of binfmt_misc.

    Arguments:
        interpreter: path of the emulator.
        fixed: the kernel holds it open, so that it need not be inside the container.
    """

    __slots__ = ("fixed", "interpreter")

    def __init__(self, interpreter: str, *, fixed: bool) -> None:
        self.interpreter, self.fixed = interpreter, fixed


def check(arch: str, own: str) -> None:
    """Refuse to run programs of an architecture that neither the processor nor an emulator understands.

    Raises:
        UserError: they cannot run; the message says what is missing.
    """
    if arch == own or arch in _ALSO.get(own, ()):
        return
    if arch not in _ELF:
        raise UserError(
            "foreign-architecture",
            f"--arch {arch}: there is no such architecture",
            hint="one of " + ", ".join(sorted(_ELF)),
        )
    what = f"--arch {arch}: programs of that architecture cannot run on this machine"
    hint = "administrator: install qemu-user-static (Debian, Ubuntu), or register another emulator in binfmt_misc"
    if not os.path.exists(f"{FOLDER}/status"):
        why = f"the kernel's table of emulators is not mounted ({FOLDER})"
        hint = f"administrator: mount -t binfmt_misc binfmt_misc {FOLDER}, and install qemu-user-static"
        raise UserError("foreign-architecture", f"{what}: {why}", hint=hint)
    found = emulator(arch)
    if found is None:
        raise UserError("foreign-architecture", f"{what}: no emulator is registered", hint=hint)
    if not found.fixed:
        raise UserError(
            "foreign-architecture",
            f"{what}: {found.interpreter} is registered without the flag F, and is not inside the container",
            hint="administrator: register it with flag F (fix binary), as the package qemu-user-static does",
        )


def emulator(arch: str, folder: str = FOLDER) -> Emulator | None:
    """Return the registered emulator for programs of an architecture, or None."""
    bits, order, machine = _ELF[arch]
    heads = [
        b"\x7fELF" + bytes((bits, 1 if order == "<" else 2, 1)) + bytes(9) + struct.pack(order + "HH", kind, machine)
        for kind in (2, 3)  # of a fixed place (ET_EXEC) or of any (ET_DYN)
    ]
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return None
    for name in names:
        if name in ("register", "status"):
            continue
        try:
            with open(os.path.join(folder, name), encoding="ascii", errors="replace") as file:
                lines = file.read(1 << 16).split("\n")
        except OSError:  # removed meanwhile
            continue
        fields = dict(line.partition(" ")[::2] for line in lines)
        if lines[0] != "enabled" or "magic" not in fields:
            continue
        if all(_fits(head, fields) for head in heads):
            return Emulator(fields.get("interpreter", ""), fixed="F" in fields.get("flags:", ""))
    return None


def _fits(head: bytes, fields: dict[str, str]) -> bool:
    try:
        magic = bytes.fromhex(fields["magic"])
        mask = bytes.fromhex(fields.get("mask", "ff" * len(magic)))
        offset = int(fields.get("offset", "0"))
    except ValueError:
        return False
    part = head[offset : offset + len(magic)]
    if len(part) < len(magic) or len(mask) != len(magic):
        return False
    return all((one ^ two) & three == 0 for one, two, three in zip(part, magic, mask, strict=True))
