# SPDX-License-Identifier: Apache-2.0
"""Numbers of the system calls that a filter watches, per architecture, and the shape of its `struct stat`.

Facts of the kernel's tables (arch/*/…/syscall*.tbl, include/uapi/asm-generic/unistd.h, asm/stat.h). A program for
another architecture that the same kernel runs (32-bit programs on a 64-bit kernel) has a table of its own. x32 programs
use the numbers of x86-64 with bit 30 set.
"""

from __future__ import annotations

import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    import os

#: Columns of the table below. arm64 and riscv64 share the generic one.
_COLUMNS = ("x86_64", "i386", "generic", "arm", "ppc64", "s390x")
#: One row per call; "-" where an architecture has no such call.
_ROWS = """
chown               92  182    -  182  181  212
lchown              94   16    -   16   16  198
fchown              93   95   55   95   95  207
fchownat           260  298   54  325  289  291
chown32              -  212    -  212    -    -
lchown32             -  198    -  198    -    -
fchown32             -  207    -  207    -    -
setuid             105   23  146   23   23  213
setgid             106   46  144   46   46  214
setreuid           113   70  145   70   70  203
setregid           114   71  143   71   71  204
setresuid          117  164  147  164  164  208
setresgid          119  170  149  170  169  210
setfsuid           122  138  151  138  138  215
setfsgid           123  139  152  139  139  216
setgroups          116   81  159   81   81  206
setuid32             -  213    -  213    -    -
setgid32             -  214    -  214    -    -
setreuid32           -  203    -  203    -    -
setregid32           -  204    -  204    -    -
setresuid32          -  208    -  208    -    -
setresgid32          -  210    -  210    -    -
setfsuid32           -  215    -  215    -    -
setfsgid32           -  216    -  216    -    -
setgroups32          -  206    -  206    -    -
getuid             102   24  174   24   24  199
geteuid            107   49  175   49   49  201
getgid             104   47  176   47   47  200
getegid            108   50  177   50   50  202
getresuid          118  165  148  165  165  209
getresgid          120  171  150  171  170  211
getgroups          115   80  158   80   80  205
getuid32             -  199    -  199    -    -
geteuid32            -  201    -  201    -    -
getgid32             -  200    -  200    -    -
getegid32            -  202    -  202    -    -
getresuid32          -  209    -  209    -    -
getresgid32          -  211    -  211    -    -
getgroups32          -  205    -  205    -    -
capget             125  184   90  184  183  184
capset             126  185   91  185  184  185
prctl              157  172  167  172  171  172
getsockopt          55  365  209  295  340  365
mknod              133   14    -   14   14   14
mknodat            259  297   33  324  288  290
stat                 4    -    -    -  106  106
lstat                6    -    -    -  107  107
fstat                5    -   80    -  108  108
newfstatat         262    -   79    -  291  293
stat64               -  195    -  195    -    -
lstat64              -  196    -  196    -    -
fstat64              -  197    -  197    -    -
fstatat64            -  300    -  327    -    -
statx              332  383  291  397  383  379
open                 2    5    -    5    5    5
creat               85    8    -    8    8    8
openat             257  295   56  322  286  288
openat2            437  437  437  437  437  437
mkdir               83   39    -   39   39   39
mkdirat            258  296   34  323  287  289
symlink             88   83    -   83   83   83
symlinkat          266  304   36  331  295  297
setxattr           188  226    5  226  209  224
lsetxattr          189  227    6  227  210  225
fsetxattr          190  228    7  228  211  226
execve              59   11  221   11   11   11
execveat           322  358  281  387  362  354
fsync               74  118   82  118  118  118
fdatasync           75  148   83  148  148  148
sync               162   36   81   36   36   36
msync               26  144  227  144  144  144
sync_file_range    277  314   84  341  308  307
syncfs             306  344  267  373  348  338
keyctl             250  288  219  311  271  280
add_key            248  286  217  309  269  278
request_key        249  287  218  310  270  279
perf_event_open    298  336  241  364  319  331
bpf                321  357  280  386  361  351
userfaultfd        323  374  282  388  364  355
io_uring_setup     425  425  425  425  425  425
io_uring_enter     426  426  426  426  426  426
io_uring_register  427  427  427  427  427  427
kexec_load         246  283  104  347  268  277
kexec_file_load    320    -  294  401  382  381
init_module        175  128  105  128  128  128
finit_module       313  350  273  379  353  344
delete_module      176  129  106  129  129  129
open_by_handle_at  304  342  265  371  346  336
fanotify_init      300  338  262  367  323  332
acct               163   51   89   51   51   51
swapon             167   87  224   87   87   87
swapoff            168  115  225  115  115  115
reboot             169   88  142   88   88   88
syslog             103  103  116  103  103  103
quotactl           179  131   60  131  131  131
socket              41  359  198  281  326  359
"""

#: `struct stat` of each architecture (asm/stat.h), of `struct stat64` where pointers have 32 bits: the format and what
#: its values are. d device, i inode, l links, m mode, u uid, g gid, r rdev, s size, k block size, b blocks, A M C
#: seconds and a n c nanoseconds of the three times; I the lower half of the inode number.
_TIMES = "AaMnCc"
_X86_64 = ("<QQQIII4xQqqq6Q24x", "dilmugrskb" + _TIMES)
_GENERIC = ("<QQIIIIQ8xqi4xqqQqQqQ8x", "dimlugrskb" + _TIMES)
_POWER = ("<QQQIII4xQqQQ6Q24x", "dilmugrskb" + _TIMES)
_S390X = (">QQQIII4xQQ6QQq24x", "dilmugrs" + _TIMES + "kb")
_I386 = ("<Q4xIIIIIQ4xqIQ6IQ", "dImlugrskb" + _TIMES + "i")  # packed
_ARM = ("<Q4xIIIIIQ8xqI4xQ6IQ", "dImlugrskb" + _TIMES + "i")  # 64-bit fields are aligned


class Architecture:
    """What a filter and its supervisor need to know of one architecture.

    Arguments:
        name: as uname -m says it, or the name of a 32-bit companion.
        audit: AUDIT_ARCH value that the kernel reports with a call (linux/audit.h).
        column: column of the table of numbers.
        layout: format and fields of `struct stat`.
        pointer: bytes of a pointer.
    """

    __slots__ = ("audit", "calls", "fields", "name", "order", "pointer", "stat")

    def __init__(self, name: str, audit: int, column: str, layout: tuple[str, str], pointer: int = 8) -> None:
        place = _COLUMNS.index(column) + 1
        rows = [line.split() for line in _ROWS.strip().splitlines()]
        self.calls = {row[0]: int(row[place]) for row in rows if row[place] != "-"}
        self.name, self.audit, self.pointer = name, audit, pointer
        self.stat, self.fields = struct.Struct(layout[0]), layout[1]
        self.order = layout[0][0]

    def __repr__(self) -> str:
        return f"Architecture({self.name})"

    def pack_stat(self, status: os.stat_result, uid: int, gid: int, mode: int, rdev: int) -> bytes:
        """Return a file's status as programs of this architecture read it, with another owner, type and device.

        Raises:
            struct.error: a value does not fit (a 32-bit program and a far away time).
        """
        times = [divmod(value, 1_000_000_000) for value in (status.st_atime_ns, status.st_mtime_ns, status.st_ctime_ns)]
        values = {
            "d": status.st_dev,
            "i": status.st_ino,
            "I": status.st_ino & 0xFFFFFFFF,
            "l": status.st_nlink,
            "m": mode,
            "u": uid,
            "g": gid,
            "r": rdev,
            "s": status.st_size,
            "k": status.st_blksize,
            "b": status.st_blocks,
            **dict(zip("AMC", (time[0] for time in times), strict=True)),
            **dict(zip("anc", (time[1] for time in times), strict=True)),
        }
        return self.stat.pack(*[values[letter] for letter in self.fields])


def _architectures() -> dict[str, tuple[Architecture, ...]]:
    arm = Architecture("arm", 0x40000028, "arm", _ARM, 4)
    i386 = Architecture("i386", 0x40000003, "i386", _I386, 4)
    return {
        "x86_64": (Architecture("x86_64", 0xC000003E, "x86_64", _X86_64), i386),
        "aarch64": (Architecture("aarch64", 0xC00000B7, "generic", _GENERIC), arm),
        "ppc64le": (Architecture("ppc64le", 0xC0000015, "ppc64", _POWER),),
        "riscv64": (Architecture("riscv64", 0xC00000F3, "generic", _GENERIC),),
        "s390x": (Architecture("s390x", 0x80000016, "s390x", _S390X),),
    }


#: uname's machine → the architectures whose programs its kernel runs, its own first.
ARCHITECTURES = _architectures()
