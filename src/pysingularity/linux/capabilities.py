# SPDX-License-Identifier: Apache-2.0
"""Capabilities: names, the sets of this process, and giving them up (capabilities(7)). Start ring."""

from __future__ import annotations

from pysingularity.linux.libc import call

PR_CAPBSET_READ, PR_CAPBSET_DROP, PR_CAP_AMBIENT = 23, 24, 47
PR_CAP_AMBIENT_RAISE, PR_CAP_AMBIENT_CLEAR_ALL = 2, 4
_VERSION_3 = 0x20080522

NAMES = (
    "chown dac_override dac_read_search fowner fsetid kill setgid setuid setpcap linux_immutable net_bind_service "
    "net_broadcast net_admin net_raw ipc_lock ipc_owner sys_module sys_rawio sys_chroot sys_ptrace sys_pacct sys_admin "
    "sys_boot sys_nice sys_resource sys_time sys_tty_config mknod lease audit_write audit_control setfcap mac_override "
    "mac_admin syslog wake_alarm block_suspend audit_read perfmon bpf checkpoint_restore"
).split()
SYS_ADMIN = NAMES.index("sys_admin")


def number(name: str) -> int:
    """Return the number of a capability: "CAP_NET_RAW", "net_raw".

    Raises:
        ValueError: there is no such capability.
    """
    return NAMES.index(name.strip().lower().removeprefix("cap_"))


def effective() -> int:
    """Return the effective set of this process as a bit mask."""
    with open("/proc/self/status", "rb") as file:
        for line in file:
            if line.startswith(b"CapEff:"):
                return int(line[7:], 16)
    return 0


def drop_bounding(keep: int = 0) -> None:
    """Take everything but the mask `keep` out of the bounding set, for ever."""
    for bit in range(64):
        if keep >> bit & 1:
            continue
        try:
            call("prctl", PR_CAPBSET_DROP, bit, 0, 0, 0)
        except OSError as error:
            if error.errno == 22:  # the last capability this kernel knows was the one before
                return
            raise


def set_all(mask: int) -> None:
    """Make `mask` the permitted, effective and inheritable set of this process: capset(2).

    Capabilities outside the permitted set are left out rather than refused.
    """
    low, high = mask & 0xFFFFFFFF, mask >> 32
    words = (low, low, low, high, high, high)
    header = _VERSION_3.to_bytes(4, "little") + bytes(4)
    call("capset", header, b"".join(word.to_bytes(4, "little") for word in words))


def raise_ambient(mask: int) -> None:
    """Let the mask's capabilities survive execve by a user who is not root."""
    call("prctl", PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    for bit in range(64):
        if mask >> bit & 1:
            call("prctl", PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, bit, 0, 0)
