# SPDX-License-Identifier: Apache-2.0
"""The supervisor: a process that answers the system calls which one id cannot do, so that programs are root.

It sits beside the container, in the container's user namespace and in the host's mount and pid namespaces, and is not
under the filter. Two tricks make its answers cheap and right:

- Its root directory is the container's root and its working directory the host's /proc. So "/etc/x" is the container's
  file, "123/cwd/x" a path as process 123 means it, "123/fd/4" an open file of it, and nothing outside the container can
  be named at all: the kernel's own path walk does the containing. A process that has changed its root since is met by
  changing ours for the moment.
- What a process believes its ids to be (`runtime.credentials`) is a number in a table; the number is kept in the
  process's timer slack (prctl(2), nanoseconds around the usual 50,000), which the kernel hands down over fork and
  execve and drops with the process. No bookkeeping of pids can go wrong.

Questions are answered from memory that the caller could change meanwhile. That cannot hurt: the supervisor has no more
rights than the caller, and records are advice about files that the caller may change anyway. What is answered
to which call is in `runtime.answers_files` and `runtime.answers_ids`.
"""

from __future__ import annotations

import os
import select
import struct

from pysingularity import messages
from pysingularity.linux import remote
from pysingularity.linux.ownership import RealOwners, RecordedOwners, SideTable
from pysingularity.linux.seccomp import Listener, Notification, architectures
from pysingularity.linux.statx import AT_FDCWD, BASIC, MNT_ID, mount_id, statx
from pysingularity.linux.syscalls import Architecture
from pysingularity.runtime.credentials import FIRST, Credentials

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Handler = Callable[["Supervisor", "Question"], "int | None"]

#: Timer slack of a process with the first entry of the table; the kernel's default is 50,000.
_SLACK, _DEFAULT_SLACK = 70_001, 50_000
_MOST_CREDENTIALS = 100_000
_ENOENT, _ESRCH, _EIO, _EBADF, _EFAULT, _ELOOP = 2, 3, 5, 9, 14, 40
_MOST_LINKS = 8
_STANDARD = (b"/dev/stdin", b"/dev/stdout", b"/dev/stderr")

#: A handler's result when the answer has been given already.
ANSWERED = -(1 << 20)
#: File descriptor of the greeting: a call with it says that the filter and the supervisor work.
GREETING = 0x5E7C0


class Question:
    """One call that waits: who, what, and how its architecture writes numbers.

    Arguments:
        pid: thread that asks.
        arguments: six numbers.
        architecture: the caller's.
        wide: ids have 32 bits (16 in old calls of 32-bit architectures).
        notification: the kernel's question.
    """

    __slots__ = ("architecture", "arguments", "notification", "pid", "wide")

    def __init__(self, notification: Notification, architecture: Architecture, wide: bool) -> None:
        self.notification, self.architecture, self.wide = notification, architecture, wide
        self.pid, self.arguments = notification.pid, notification.arguments

    def id(self, number: int) -> int:
        """Return an argument that is a user or group id; -1 for "leave it"."""
        value = self.arguments[number] & (0xFFFFFFFF if self.wide else 0xFFFF)
        return -1 if value == (0xFFFFFFFF if self.wide else 0xFFFF) else value

    def signed(self, number: int) -> int:
        """Return an argument that is a C int."""
        value = self.arguments[number] & 0xFFFFFFFF
        return value - (1 << 32) if value & 0x80000000 else value

    def ids(self, *values: int) -> bytes:
        """Return ids as the caller's memory holds them."""
        if self.wide:
            return struct.pack(f"{self.architecture.order}{len(values)}I", *(value & 0xFFFFFFFF for value in values))
        # What the kernel writes where an id does not fit: the overflow id (user_namespaces(7)).
        small = (value if 0 <= value < 0x10000 else 65534 for value in values)
        return struct.pack(f"{self.architecture.order}{len(values)}H", *small)


class Supervisor:
    """Answers questions until the last process under the filter has ended.

    Arguments:
        listener: where questions come from.
        root: descriptor of the container's root folder.
        owners: keeps owners and devices.
        handlers: name of a call → its handler.
        also: paths of the container where other trees are bound whose owners count as well.
    """

    def __init__(
        self,
        listener: Listener,
        root: int,
        owners: RecordedOwners | RealOwners,
        handlers: dict[str, Handler],
        also: Sequence[str] = (),
    ) -> None:
        self.listener, self.owners = listener, owners
        #: Owners of files that are not the image's (other mounts): consistent answers, nothing written to the disk.
        self.elsewhere = SideTable()
        self.asked: dict[str, int] = {}
        self._table: dict[tuple[int, int], tuple[Handler, Architecture, bool, str]] = {}
        for architecture in architectures():
            for name, number in architecture.calls.items():
                handler = handlers.get(name.removesuffix("32"))
                if handler is not None:
                    wide = architecture.pointer == 8 or name.endswith("32") or name == "fchownat"
                    self._table[architecture.audit, number] = handler, architecture, wide, name
        self._credentials: list[Credentials] = []
        self._numbers: dict[Credentials, int] = {}
        self._complained = False
        self._user_namespace = os.stat("/proc/self/ns/user").st_ino
        # The order matters: afterwards absolute paths are the container's.
        os.umask(0)
        os.chdir("/proc")
        os.chroot(f"self/fd/{root}")
        raw = statx("/", mask=BASIC | MNT_ID)
        self._root = self._mount_key(raw)
        self._image_mounts = {mount_id(raw), *(mount_id(statx(path, mask=BASIC | MNT_ID)) for path in also)}
        self._image_device = os.stat("/").st_dev
        self._mounts = 0

    def serve(self) -> None:
        """Answer until nobody is left who could ask."""
        poll = select.poll()
        poll.register(self.listener.descriptor, select.POLLIN)
        listener, table = self.listener, self._table
        release = os.uname().release.split(".")
        # From Linux 6.11 on receiving ends with the last process; before, only polling tells.
        wakes = (int(release[0]), int(release[1].partition("-")[0])) >= (6, 11)
        listener.stay_on_one_processor()
        while True:
            if not wakes and not poll.poll()[0][1] & select.POLLIN:
                return
            notification = listener.receive()
            if notification is None:
                events = poll.poll(0)
                if events and events[0][1] & select.POLLHUP and not events[0][1] & select.POLLIN:
                    return
                continue
            entry = table.get((notification.architecture, notification.number))
            if entry is None:
                listener.let_pass(notification)
                continue
            handler, architecture, wide, name = entry
            self.asked[name] = self.asked.get(name, 0) + 1
            try:
                result = handler(self, Question(notification, architecture, wide))
            except OSError as error:
                result = -(error.errno or _EIO)
            except Exception as error:  # a mistake of ours must not stop the whole build without a word
                if not self._complained:
                    self._complained = True
                    messages.error(f"root emulation: {name}: {type(error).__name__}: {error}")
                result = -_EIO
            if result is None:
                listener.let_pass(notification)
            elif result != ANSWERED:
                listener.answer(notification, result)

    # ---- files as the caller names them ------------------------------------------------------------------------------

    @staticmethod
    def _mount_key(raw: bytes) -> bytes:
        """Return inode, device and mount of a folder."""
        return raw[32:40] + raw[136:152]

    def _meet(self, question: Question) -> None:
        """Take the caller's root folder as ours: it may have changed it since (chroot, own mount namespace)."""
        key = self._mount_key(statx(b"%d/root" % question.pid, mask=BASIC | MNT_ID))
        if key != self._root:
            # A pid that was given out again could lead anywhere: only believe a caller that still waits.
            if not self.listener.valid(question.notification):
                raise OSError(_ESRCH, "the caller is gone")
            os.chroot(b"%d/root" % question.pid)
            self._root = key

    @staticmethod
    def _as_seen_by(question: Question, path: bytes) -> bytes:
        """Return a path whose "self" means the caller, relative to the host's /proc where that matters."""
        if path.startswith(b"/proc/self"):
            rest = path[10:]
            if not rest or rest[:1] == b"/":
                return b"%d%s" % (question.pid, rest)
        elif path.startswith(b"/proc/thread-self/"):
            return b"%d/%s" % (question.pid, path[18:])
        elif path.startswith(b"/dev/fd/"):
            return b"%d/fd/%s" % (question.pid, path[8:])
        elif path in _STANDARD:
            return b"%d/fd/%d" % (question.pid, _STANDARD.index(path))
        return path

    def name(self, question: Question, folder: int, path: bytes) -> bytes:
        """Return our name for what a path means to the caller.

        Arguments:
            folder: the caller's descriptor that a relative path starts from, or AT_FDCWD.
            path: the caller's words; empty for the descriptor itself.
        """
        if not path:
            return b"%d/cwd" % question.pid if folder == AT_FDCWD else b"%d/fd/%d" % (question.pid, folder)
        self._meet(question)
        if path[:1] == b"/":
            return self._as_seen_by(question, path) if path[:3] in (b"/pr", b"/de") else path
        if folder == AT_FDCWD:
            return b"%d/cwd/%s" % (question.pid, path)
        return b"%d/fd/%d/%s" % (question.pid, folder, path)

    def open(self, question: Question, folder: int, path: bytes, *, follow: bool = True) -> int:
        """Return an O_PATH descriptor of what a path means to the caller, who is known to wait still.

        Raises:
            OSError: as open(2); ELOOP for a way through the descriptors of a process other than the caller.
        """
        try:
            found = self._open(question, folder, path, follow)
        except OSError as error:
            own = self._own_file_behind(question, folder, path) if follow and error.errno in (_ENOENT, _ELOOP) else b""
            if not own:
                raise
            found = os.open(own, os.O_PATH | os.O_CLOEXEC)
        if not self.listener.valid(question.notification):
            os.close(found)
            raise OSError(_ESRCH, "the caller is gone")
        return found

    def _open(self, question: Question, folder: int, path: bytes, follow: bool) -> int:
        flags = os.O_PATH | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
        name = self.name(question, folder, path)
        if not path:
            try:
                return os.open(name, os.O_PATH | os.O_CLOEXEC)
            except FileNotFoundError:
                raise OSError(_EBADF, "no such descriptor") from None
        if name[:1] == b"/":
            return remote.open_without_magic(AT_FDCWD, name, flags)
        if path[:1] == b"/":  # /proc/self/…: the caller's own, and meant so
            return os.open(name, flags)
        start = os.open(self.name(question, folder, b""), os.O_PATH | os.O_CLOEXEC)
        try:
            return remote.open_without_magic(start, path, flags)
        finally:
            os.close(start)

    def _own_file_behind(self, question: Question, folder: int, path: bytes) -> bytes:
        """Return our name for an open file of the caller that links lead to, such as a log that is /dev/stdout; or b"".

        For us the same links would end at our own files, or nowhere.
        """
        for _ in range(_MOST_LINKS):
            name = self.name(question, folder, path)
            if path[:1] == b"/" and name[:1] != b"/":
                return name
            try:
                target = os.readlink(name)
            except OSError:  # no link: nothing leads on
                return b""
            path = target if target[:1] == b"/" else path.rpartition(b"/")[0] + b"/" + target
        return b""

    def in_image(self, question: Question, name: str, device: int) -> bool:
        """Say whether a file lies in the image, and not on something that was mounted over it."""
        raw = statx(name, mask=BASIC | MNT_ID)
        if mount_id(raw) in self._image_mounts:
            return True
        if device != self._image_device:
            return False
        # A process with mounts of its own sees the image under another number.
        return os.stat(b"%d/ns/mnt" % question.pid).st_ino != self._mounts

    def greet(self, question: Question) -> None:
        """Meet the container's first process, whose mounts are the container's."""
        self._mounts = os.stat(b"%d/ns/mnt" % question.pid).st_ino

    # ---- the caller's memory -----------------------------------------------------------------------------------------

    def string(self, question: Question, number: int) -> bytes:
        """Return the string that an argument points to; "" for NULL.

        Raises:
            OSError: EFAULT, ENAMETOOLONG.
        """
        address = question.arguments[number]
        return remote.read_string(question.pid, address) if address else b""

    def write(self, question: Question, *parts: tuple[int, bytes]) -> None:
        """Write (address, bytes) into the caller's memory.

        Raises:
            OSError: EFAULT for a bad address, ESRCH when the caller is gone.
        """
        memory = os.open(b"%d/mem" % question.pid, os.O_WRONLY | os.O_CLOEXEC)
        try:
            if not self.listener.valid(question.notification):
                raise OSError(_ESRCH, "the caller is gone")
            for address, data in parts:
                try:
                    if os.pwrite(memory, data, address) == len(data):
                        continue
                except (OSError, OverflowError):
                    pass
                raise OSError(_EFAULT, "bad address")
        finally:
            os.close(memory)

    # ---- who the caller believes to be -------------------------------------------------------------------------------

    def foreign(self, question: Question) -> bool:
        """Say whether the caller has gone into a user namespace of its own, where the kernel knows its ids."""
        return os.stat(b"%d/ns/user" % question.pid).st_ino != self._user_namespace

    def credentials(self, question: Question) -> Credentials:
        """Return who the caller believes to be."""
        return self.credentials_of(question.pid) if self._credentials else FIRST

    def credentials_of(self, pid: int) -> Credentials:
        """Return who a process believes to be."""
        descriptor = os.open(b"%d/timerslack_ns" % pid, os.O_RDONLY | os.O_CLOEXEC)
        try:
            number = int(os.read(descriptor, 32)) - _SLACK
        finally:
            os.close(descriptor)
        return self._credentials[number] if 0 <= number < len(self._credentials) else FIRST

    @property
    def anybody_changed(self) -> bool:
        """Say whether any process has ever been anybody but root."""
        return bool(self._credentials)

    def become(self, question: Question, new: Credentials) -> None:
        """Let the caller believe to be somebody from now on.

        Raises:
            OSError: the kernel refuses (EAGAIN when the table is full).
        """
        if new == FIRST:
            slack = _DEFAULT_SLACK
        else:
            number = self._numbers.get(new)
            if number is None:
                if len(self._credentials) >= _MOST_CREDENTIALS:
                    raise OSError(11, "too many different credentials")
                number = self._numbers[new] = len(self._credentials)
                self._credentials.append(new)
            slack = _SLACK + number
        descriptor = os.open(b"%d/timerslack_ns" % question.pid, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(descriptor, b"%d" % slack)
        finally:
            os.close(descriptor)
