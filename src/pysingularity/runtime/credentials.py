# SPDX-License-Identifier: Apache-2.0
"""Who a process believes to be: user and group ids, groups and capabilities, with the kernel's rules for changing them.

Values and functions without I/O, after credentials(7), capabilities(7) and the pages of each call. In a namespace with
one id no process can change its ids for real; `runtime.supervisor` keeps these values for it instead.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

_EPERM, _EINVAL = 1, 22
_CHOWN, _FOWNER, _SETGID, _SETUID, _MKNOD = 0, 3, 6, 7, 27
#: Every capability a kernel may know.
ALL = (1 << 41) - 1
#: Those that follow the file system uid: chown, dac_override, dac_read_search, fowner, fsetid, linux_immutable, mknod,
#: mac_override.
_FILES = sum(1 << bit for bit in (0, 1, 2, 3, 4, 9, 27, 32))


class Credentials:
    """Ids and capabilities of one thread; never changed, only replaced.

    Arguments:
        user, group: (real, effective, saved, file system) ids.
        groups: supplementary groups, as given.
        effective, permitted, inheritable: capabilities as bit masks.
        keep: PR_SET_KEEPCAPS is set.
    """

    __slots__ = ("effective", "group", "groups", "inheritable", "keep", "permitted", "user")

    def __init__(
        self,
        user: tuple[int, int, int, int] = (0, 0, 0, 0),
        group: tuple[int, int, int, int] = (0, 0, 0, 0),
        groups: tuple[int, ...] = (),
        effective: int = ALL,
        permitted: int = ALL,
        inheritable: int = 0,
        keep: bool = False,
    ) -> None:
        self.user, self.group, self.groups = user, group, groups
        self.effective, self.permitted, self.inheritable, self.keep = effective, permitted, inheritable, keep

    def key(self) -> tuple[object, ...]:
        """Return everything as a hashable value."""
        return tuple(getattr(self, name) for name in self.__slots__)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Credentials) and self.key() == other.key()

    def __hash__(self) -> int:
        return hash(self.key())

    def __repr__(self) -> str:
        return f"Credentials(user={self.user}, group={self.group}, groups={self.groups}, effective={self.effective:#x})"

    def _with(self, **changes: object) -> Credentials:
        return Credentials(**{name: changes.get(name, getattr(self, name)) for name in self.__slots__})  # type: ignore[arg-type]

    def may(self, capability: int) -> bool:
        """Say whether a capability is effective."""
        return bool(self.effective >> capability & 1)

    # Ids travel as the kernel sees them: 32 bits, and -1 for "leave it".

    def _with_user(self, user: tuple[int, int, int, int]) -> Credentials:
        """Change the user ids and let the capabilities follow."""
        effective, permitted = self.effective, self.permitted
        if 0 in self.user[:3] and 0 not in user[:3] and not self.keep:
            effective = permitted = 0
        if self.user[1] == 0 and user[1] != 0:
            effective = 0
        if self.user[1] != 0 and user[1] == 0:
            effective = permitted
        return self._with(user=user, effective=effective, permitted=permitted)

    def setuid(self, uid: int) -> Credentials:
        """Return the credentials after setuid(2).

        Raises:
            OSError: EPERM, EINVAL, as the call would fail; so for all below.
        """
        return self._with_user(self._set(self.user, uid, _SETUID))

    def setgid(self, gid: int) -> Credentials:
        """Return the credentials after setgid(2)."""
        return self._with(group=self._set(self.group, gid, _SETGID))

    def _set(self, ids: tuple[int, int, int, int], wanted: int, capability: int) -> tuple[int, int, int, int]:
        if wanted == -1:
            raise OSError(_EINVAL, "setuid")
        if self.may(capability):
            return wanted, wanted, wanted, wanted
        if wanted in (ids[0], ids[2]):
            return ids[0], wanted, ids[2], wanted
        raise OSError(_EPERM, "setuid")

    def setreuid(self, real: int, effective: int) -> Credentials:
        """Return the credentials after setreuid(2)."""
        return self._with_user(self._set_two(self.user, real, effective, _SETUID))

    def setregid(self, real: int, effective: int) -> Credentials:
        """Return the credentials after setregid(2)."""
        return self._with(group=self._set_two(self.group, real, effective, _SETGID))

    def _set_two(
        self, ids: tuple[int, int, int, int], real: int, effective: int, capability: int
    ) -> tuple[int, int, int, int]:
        free = self.may(capability)
        if not free and (real not in (-1, *ids[:2]) or effective not in (-1, *ids[:3])):
            raise OSError(_EPERM, "setreuid")
        new_real = ids[0] if real == -1 else real
        new_effective = ids[1] if effective == -1 else effective
        saved = new_effective if real != -1 or effective not in (-1, ids[0]) else ids[2]
        return new_real, new_effective, saved, new_effective

    def setresuid(self, real: int, effective: int, saved: int) -> Credentials:
        """Return the credentials after setresuid(2)."""
        return self._with_user(self._set_three(self.user, (real, effective, saved), _SETUID))

    def setresgid(self, real: int, effective: int, saved: int) -> Credentials:
        """Return the credentials after setresgid(2)."""
        return self._with(group=self._set_three(self.group, (real, effective, saved), _SETGID))

    def _set_three(
        self, ids: tuple[int, int, int, int], wanted: tuple[int, int, int], capability: int
    ) -> tuple[int, int, int, int]:
        if not self.may(capability) and any(one not in (-1, *ids[:3]) for one in wanted):
            raise OSError(_EPERM, "setresuid")
        real, effective, saved = (ids[at] if one == -1 else one for at, one in enumerate(wanted))
        if (real, effective, saved) == ids[:3] and (wanted[1] == -1 or effective == ids[3]):
            return ids  # nothing to do: then the file system id stays as well
        return real, effective, saved, effective

    def setfsuid(self, uid: int) -> Credentials:
        """Return the credentials after setfsuid(2), which never fails."""
        if uid == -1 or not (uid in self.user or self.may(_SETUID)) or uid == self.user[3]:
            return self
        effective = self.effective
        if self.user[3] == 0 and uid != 0:
            effective &= ~_FILES
        if self.user[3] != 0 and uid == 0:
            effective |= self.permitted & _FILES
        return self._with(user=(*self.user[:3], uid), effective=effective)

    def setfsgid(self, gid: int) -> Credentials:
        """Return the credentials after setfsgid(2), which never fails."""
        if gid == -1 or not (gid in self.group or self.may(_SETGID)):
            return self
        return self._with(group=(*self.group[:3], gid))

    def setgroups(self, groups: Sequence[int]) -> Credentials:
        """Return the credentials after setgroups(2)."""
        if not self.may(_SETGID):
            raise OSError(_EPERM, "setgroups")
        return self._with(groups=tuple(sorted(groups)))

    def capset(self, effective: int, permitted: int, inheritable: int) -> Credentials:
        """Return the credentials after capset(2). Bits that no kernel knows are dropped, as it does."""
        effective, permitted, inheritable = effective & ALL, permitted & ALL, inheritable & ALL
        if permitted & ~self.permitted or effective & ~permitted:
            raise OSError(_EPERM, "capset")
        return self._with(effective=effective, permitted=permitted, inheritable=inheritable)

    def keepcaps(self, yes: bool) -> Credentials:
        """Return the credentials after prctl(PR_SET_KEEPCAPS)."""
        return self._with(keep=yes)

    def execute(self, owner: int = -1, group: int = -1) -> Credentials:
        """Return the credentials after execve(2) of a program.

        Arguments:
            owner, group: the program's owner where it has the set-user-id or set-group-id bit, otherwise -1.
        """
        uid, gid = self.user[1] if owner == -1 else owner, self.group[1] if group == -1 else group
        permitted = ALL if 0 in (uid, self.user[0]) else 0
        return self._with(
            user=(self.user[0], uid, uid, uid),
            group=(self.group[0], gid, gid, gid),
            permitted=permitted,
            effective=permitted if uid == 0 else 0,
            keep=False,
        )

    def may_chown(self, owner: tuple[int, int], uid: int, gid: int) -> bool:
        """Say whether a file of this owner may be given to another: chown(2)."""
        if self.may(_CHOWN):
            return True
        mine = owner[0] == self.user[3]
        return mine and uid in (-1, owner[0]) and gid in (-1, owner[1], self.group[3], *self.groups)

    def may_chmod(self, owner: tuple[int, int]) -> bool:
        """Say whether the mode of a file of this owner may be changed: chmod(2)."""
        return self.may(_FOWNER) or owner[0] == self.user[3]

    def may_mknod(self) -> bool:
        """Say whether devices may be made."""
        return self.may(_MKNOD)


#: What the first process is: root with everything.
FIRST = Credentials()
