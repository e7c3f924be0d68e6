# SPDX-License-Identifier: Apache-2.0
"""Warm images: while containers run and for some seconds after, the mounted image waits for the user's next one.

A sleeping process, the keeper, holds a mount namespace with the image in it, as long as containers of it run and for
some seconds after. The next start joins that (and its user namespace) and takes a copy, which is as good as an own
one: no server to start, and all containers of the user share one server and one page cache. The keeper only ever lets
go of its own namespace; the file system ends with the last container. It is joined only when the host's mounts are
exactly those it saw, so nobody gets an old view. The keeper of an encrypted image also remembers what opened it
(`recall`), so that a passphrase need not be made a key again at each start, which is expensive on purpose.

A keeper is found through a small file in a folder that belongs to the user alone: pid and start time of the process,
the place of the image, and the list of mounts. A lock lets one of many first starters mount and the others wait.
Start ring.
"""

from __future__ import annotations

import posix
import time

from pysingularity import messages
from pysingularity.linux import capabilities
from pysingularity.linux.mounts import open_tree, unmount
from pysingularity.linux.namespaces import NEWNS, NEWUSER, setns, unshare
from pysingularity.linux.process import close_others, set_name, start_time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _socket import socket

    from pysingularity.runtime.spec import Layer

#: How long a start waits for another one that is mounting the same image, in seconds. Many starts at once on a busy
#: machine make the first one slow, and slower still if the others lost patience and mounted it too.
PATIENCE = 15.0
_LARGEST = 1 << 20


class Warm:
    """The warm image of one start: `tree` is a copy of its mount once joined, else -1.

    Arguments:
        layer: the image.
        seconds: how long it waits for the next start.
    """

    def __init__(self, layer: Layer, seconds: int) -> None:
        self.seconds, self.tree, self.joined, self._lock = seconds, -1, False, -1
        self._holds = self._kept = False
        self.view = _read("/proc/self/mountinfo")
        self.path = place_of(layer.path, layer.offset)
        self._memory: tuple[bytes, bytes] | None = None
        self._questions = ""
        if self.path and layer.plain is not None:
            import _socket  # noqa: F401  # the keeper is made when its file may be out of sight

            self._memory, self._questions = layer.plain.memory, f"{self.path}.key"
            self.path += f"-{layer.plain.tag}"  # another key is another image

    def join(self, namespaces: int) -> bool:
        """Enter the keeper's namespaces and take a copy; return whether there was one.

        Arguments:
            namespaces: all that are to be new, mount included; made when joining succeeds.
        """
        if not self.path:
            return False
        found = self._find()
        if found is None:
            self._take_turn()
            found = self._find()
            if found is None:
                return False
        user, mnt, place = found
        try:
            setns(user, NEWUSER)
            self.joined = True
            setns(mnt, NEWNS)
            posix.statvfs(place)  # the one question that is never answered from a cache: is the server alive?
            unshare(namespaces)
            self.tree = open_tree(place, recursive=False)
            unmount(place.rpartition("/")[0])
            posix.utime(self.path)
        except OSError as error:
            messages.debug(f"warm image not usable: {error}")
            if self.tree >= 0:
                posix.close(self.tree)
            self.tree = -1
            return False
        finally:
            posix.close(user)
            posix.close(mnt)
            self.close()
        return True

    def _find(self) -> tuple[int, int, str] | None:
        """Return descriptors of the keeper's user and mount namespace, and the place of the image."""
        data = _read(self.path, mine=True)
        head, _, view = data.partition(b"\n")
        words = head.decode("utf-8", "surrogateescape").split(" ", 2)
        if len(words) != 3 or view != self.view:
            return None
        opened: list[int] = []
        try:
            for name in ("user", "mnt"):
                opened.append(posix.open(f"/proc/{words[0]}/ns/{name}", posix.O_RDONLY | posix.O_CLOEXEC))  # noqa: PERF401
            # Asked after opening: what was opened belongs to the process that began then, not to one with its number.
            if start_time(int(words[0])) == int(words[1]):
                return opened[0], opened[1], words[2]
        except (OSError, ValueError) as error:
            messages.debug(f"no warm image: {error}")
        for descriptor in opened:
            posix.close(descriptor)
        return None

    def _take_turn(self) -> None:
        """Take the lock, or wait until somebody else has mounted the image."""
        try:
            self._lock = posix.open(self.path + ".lock", posix.O_RDWR | posix.O_CREAT | posix.O_CLOEXEC, 0o600)
            deadline, pause, old = time.monotonic() + PATIENCE, 0.002, self._inode()
            while True:
                try:
                    posix.lockf(self._lock, posix.F_TLOCK, 0)
                    self._holds = True
                    return
                except OSError:
                    # A keeper that has just come is for everybody at once: nobody has to wait for the lock any more.
                    if time.monotonic() > deadline or self._inode() not in (0, old):
                        return
                time.sleep(pause)
                pause = min(pause * 1.3, 0.02)
        except OSError as error:
            messages.debug(f"{self.path}: {error}")

    def _inode(self) -> int:
        """Return the number of the keeper's file, 0 for none."""
        try:
            return posix.stat(self.path).st_ino
        except OSError:
            return 0

    def keep(self, place: str) -> None:
        """Leave a keeper behind for the image mounted at `place`, and let the others have their turn."""
        if not self.path:
            return
        wait, ready = posix.pipe()
        child = posix.fork()
        if child == 0:
            try:
                if posix.fork() == 0:
                    self._keep(place, ready)
            finally:
                posix._exit(0)
        posix.close(ready)
        posix.read(wait, 1)
        posix.close(wait)
        posix.waitpid(child, 0)
        self._kept = True
        self.close()

    def _keep(self, place: str, ready: int) -> None:
        posix.setsid()
        posix.chdir("/")
        null = posix.open("/dev/null", posix.O_RDWR)
        for number in (0, 1, 2):
            if number != ready:
                posix.dup2(null, number)
        close_others((0, 1, 2, ready))
        unshare(NEWNS)
        set_name("singularity-kp")
        capabilities.set_all(0)
        me = posix.getpid()
        draft = f"{self.path}.{me}"
        file = posix.open(draft, posix.O_WRONLY | posix.O_CREAT | posix.O_EXCL | posix.O_CLOEXEC, 0o600)
        posix.write(file, f"{me} {start_time(me)} {place}\n".encode("utf-8", "surrogateescape") + self.view)
        mine = posix.fstat(file).st_ino
        posix.close(file)
        posix.rename(draft, self.path)
        listener = self._listen()
        posix.write(ready, b"x")
        posix.close(ready)
        _sweep(self.path.rpartition("/")[0])
        left: float = self.seconds
        while left > 0:
            if listener is None:
                time.sleep(left)
            else:
                self._answer(listener, left)
            try:
                state = posix.stat(self.path)
            except OSError:
                return
            if state.st_ino != mine:  # somebody started another keeper (the host's mounts have changed)
                return
            left = state.st_mtime + self.seconds - time.time()
            if left <= 0 and _in_use():
                left = float(self.seconds)
        paths = [self.path, self.path + ".lock"]
        if listener is not None:
            paths += [self._questions, self._questions + ".lock"]
        for path in paths:
            try:
                posix.unlink(path)
            except FileNotFoundError:
                pass

    def _listen(self) -> socket | None:
        """Return the socket where the key of an encrypted image is asked for, None for other images."""
        if self._memory is None:
            return None
        from _socket import AF_UNIX, SOCK_STREAM, socket

        try:
            try:
                posix.unlink(self._questions)
            except FileNotFoundError:
                pass
            found = socket(AF_UNIX, SOCK_STREAM)
            found.bind(self._questions)
            found.listen(64)
        except OSError:  # a path that is too long for a socket
            return None
        return found

    def _answer(self, listener: socket, seconds: float) -> None:
        """Wait for one question, and answer it with the key if whoever asks gives the proof."""
        from _socket import socket

        assert self._memory is not None
        proof, key = self._memory
        try:
            listener.settimeout(seconds)
            asker = socket(fileno=listener._accept()[0])  # type: ignore[attr-defined]  # typeshed lacks it
        except OSError:  # nobody asked
            return
        try:
            asker.settimeout(1.0)  # somebody who is silent must not hold the others up for long
            if _owner(asker) == posix.getuid() and _equal(asker.recv(len(proof)), proof):
                asker.sendall(key)
        except OSError:
            pass
        asker.close()

    def close(self) -> None:
        """Give the lock back; where no keeper came of it, its file goes too."""
        if self._lock >= 0:
            if self._holds and not self._kept:
                try:
                    posix.unlink(self.path + ".lock")
                except FileNotFoundError:
                    pass
            posix.close(self._lock)
            self._lock = -1


def place_of(path: str, offset: int) -> str:
    """Return the path of the file of an image's keeper, "" when there is no folder for it."""
    folder = _folder()
    if not folder:
        return ""
    state = posix.stat(path)
    return (
        f"{folder}/{state.st_dev:x}-{state.st_ino:x}-{state.st_size:x}-{state.st_mtime_ns:x}"
        f"-{offset:x}-{posix.getgid()}"
    )


def recall(path: str, offset: int, proof: bytes) -> bytes:
    """Return the key of an encrypted image from its keeper, b"" when there is none or the proof is not the right one.

    Arguments:
        path, offset: the image.
        proof: what only those can give who could open the image themselves.
    """
    from _socket import AF_UNIX, SOCK_STREAM, socket

    asker = socket(AF_UNIX, SOCK_STREAM)
    try:
        place = place_of(path, offset)
        asker.settimeout(2.0)
        asker.connect(f"{place}.key")
        if not place or _owner(asker) != posix.getuid():
            return b""
        asker.sendall(proof)
        return asker.recv(64)
    except OSError:  # nobody there
        return b""
    finally:
        asker.close()


def recall_or_make(path: str, offset: int, proof: bytes) -> bytes:
    """Do the same; where there is no keeper, let one of many first starters make the key and the others wait for it.

    Only for starts that leave a keeper: the turn of this one ends when it becomes its program.
    """
    found, place = recall(path, offset, proof), place_of(path, offset)
    if found or not place:
        return found
    try:
        turn = posix.open(f"{place}.key.lock", posix.O_RDWR | posix.O_CREAT | posix.O_NOFOLLOW | posix.O_CLOEXEC, 0o600)
    except OSError as error:
        messages.debug(f"no turns: {error}")
        return b""
    deadline = time.monotonic() + PATIENCE
    mine = False
    while not mine and not found and time.monotonic() < deadline:
        try:
            posix.lockf(turn, posix.F_TLOCK, 0)
            mine = True
        except OSError:
            time.sleep(0.02)
        found = recall(path, offset, proof)
    if found or not mine:
        posix.close(turn)
    return found


def _owner(peer: socket) -> int:
    """Return the uid of the process at the other end: SO_PEERCRED, unix(7)."""
    from _socket import SO_PEERCRED, SOL_SOCKET

    return int.from_bytes(peer.getsockopt(SOL_SOCKET, SO_PEERCRED, 12)[4:8], "little")


def _equal(one: bytes, other: bytes) -> bool:
    from _operator import _compare_digest  # in constant time

    return _compare_digest(one, other)


def _in_use() -> bool:
    """Return whether a container of this keeper's user namespace still runs (programs, not the server, can be seen)."""
    mine, me = posix.readlink("/proc/self/ns/user"), str(posix.getpid())
    for name in posix.listdir("/proc"):
        if name.isdigit() and name != me:
            try:
                if posix.readlink(f"/proc/{name}/ns/user") == mine:
                    return True
            except OSError:  # gone, or somebody else's
                continue
    return False


def _sweep(folder: str) -> None:
    """Remove what killed keepers have left: their files, and locks that nobody holds."""
    for name in posix.listdir(folder):
        path = f"{folder}/{name}"
        try:
            if name.endswith(".lock"):
                if name.removesuffix(".lock") not in posix.listdir(folder):
                    lock = posix.open(path, posix.O_RDWR | posix.O_CLOEXEC | posix.O_NOFOLLOW)
                    try:
                        posix.lockf(lock, posix.F_TLOCK, 0)  # refused: somebody is mounting that image just now
                        posix.unlink(path)
                    finally:
                        posix.close(lock)
            elif name.endswith(".key"):
                from _socket import AF_UNIX, SOCK_STREAM, socket

                asker = socket(AF_UNIX, SOCK_STREAM)
                asker.setblocking(False)
                try:
                    asker.connect(path)
                except ConnectionRefusedError:  # its keeper was killed
                    posix.unlink(path)
            elif not _alive(_read(path, mine=True)):
                posix.unlink(path)
                posix.unlink(path + ".lock")
        except OSError:  # in use, or another keeper was quicker
            continue


def _alive(data: bytes) -> bool:
    """Return whether the keeper of a file is still there; an empty file is being written."""
    if not data:
        return True
    words = data.partition(b"\n")[0].split(b" ", 2)
    try:
        return start_time(int(words[0])) == int(words[1])
    except (OSError, ValueError, IndexError):
        return False


def _folder() -> str:
    """Return the folder of this user's keepers, "" when there is none that nobody else can write."""
    uid = posix.getuid()
    for path in (f"/run/user/{uid}/singularity", f"/dev/shm/singularity-{uid}", f"/tmp/.singularity-{uid}"):
        try:
            posix.mkdir(path, 0o700)
        except FileExistsError:
            pass
        except OSError:
            continue
        state = posix.lstat(path)
        if state.st_mode & 0o170077 == 0o040000 and state.st_uid == uid:
            return path
    return ""


def _read(path: str, *, mine: bool = False) -> bytes:
    """Return the content of a file; nothing when it is not there, or (mine) not this user's own regular file."""
    try:
        descriptor = posix.open(path, posix.O_RDONLY | posix.O_CLOEXEC | posix.O_NOFOLLOW)
    except OSError:
        return b""
    try:
        if mine and posix.fstat(descriptor).st_uid != posix.getuid():
            return b""
        data = b""
        while len(data) < _LARGEST and (part := posix.read(descriptor, _LARGEST)):
            data += part
        return data
    finally:
        posix.close(descriptor)
