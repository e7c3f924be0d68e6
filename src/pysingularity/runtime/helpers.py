# SPDX-License-Identifier: Apache-2.0
"""Programs of other people that serve a file system for a container: fuse2fs for ext3, fuse-overlayfs for overlays.

The kernel mounts ext3 for real root only, and takes nobody's FUSE file system as the upper layer of an overlay. Where
these programs are installed they do both, in the foreground, as children of a process of ours that stays beside the
container: `Helpers.stop` ends them in the reverse order and waits until what they have buffered is in the image. They
are started inside the container's mount namespace while the host's files can still be seen, with the rights of its user
namespace but without changing the user, so that the owners of files stay what they are. Loaded only where needed.
"""

from __future__ import annotations

import _signal
import posix
import time

from pysingularity.errors import HostError, ImageError
from pysingularity.linux import capabilities
from pysingularity.linux.process import close_others, die_with_parent, restore_signals

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pysingularity.runtime.spec import Layer

#: How long a program may take to mount something (a journal may have to be replayed), and to write it out, in seconds.
PATIENCE, FLUSH = 60.0, 300.0
SEARCH = ("/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin")


def find(name: str, path: str = "") -> str:
    """Return the path of a program, "" when it is not installed; `path` is searched before the usual folders."""
    for folder in (*path.split(":"), *SEARCH):
        if folder.startswith("/") and posix.access(f"{folder}/{name}", posix.X_OK):
            return f"{folder}/{name}"
    return ""


def lock(path: str, writable: bool) -> int:
    """Open an image that is going to be mounted, and lock it: one writer, or any number of readers.

    Raises:
        ImageError: it cannot be opened that way, or somebody else uses it.
    """
    import fcntl

    try:
        descriptor = posix.open(path, (posix.O_RDWR if writable else posix.O_RDONLY) | posix.O_CLOEXEC)
    except OSError as error:
        raise ImageError("not-writable", f"{path}: {error.strerror}", hint="give it as PATH:ro to only read") from None
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_EX if writable else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        posix.close(descriptor)
        raise ImageError(
            "image-in-use",
            f"{path}: another container {'uses' if writable else 'writes'} it",
            hint="one container may write an ext3 image, or many may read it with :ro; use a folder to share changes"
            if writable
            else "wait until that container has ended",
        ) from None
    return descriptor


class Helpers:
    """The programs of one container, in the order in which they were started."""

    def __init__(self) -> None:
        self.children: list[tuple[int, str]] = []
        self.images: dict[int, int] = {}  # id of a Layer → descriptor of its locked file

    @property
    def locks(self) -> list[int]:
        """Descriptors that hold locks, and have to stay open as long as the container runs."""
        return list(self.images.values())

    def hold(self, layer: Layer) -> None:
        """Open and lock the file of a layer, while its path can still be seen."""
        self.images[id(layer)] = lock(layer.path, layer.writable)

    def start(self, argv: list[str], target: str, keep: int = -1) -> None:
        """Start a program that mounts something on the folder `target` and stays; return once it has.

        Arguments:
            keep: a descriptor that it inherits; -1 for none.

        Raises:
            HostError: it ended instead; the message is its own last line.
        """
        before = posix.stat(target).st_dev
        # A file rather than a pipe: nobody will read what the program says at its end, and that must not kill it.
        complaints = posix.memfd_create("complaints", posix.MFD_CLOEXEC)
        parent = posix.getpid()
        child = posix.fork()
        if child == 0:
            try:
                self._become(argv, complaints, parent, keep)
            finally:
                posix._exit(127)
        self.children.append((child, argv[0]))
        deadline = time.monotonic() + PATIENCE
        while posix.stat(target).st_dev == before:
            if posix.waitpid(child, posix.WNOHANG)[0] or time.monotonic() > deadline:
                self.children.pop()
                lines = posix.pread(complaints, 65536, 0).decode("utf-8", "replace").strip().splitlines()
                posix.close(complaints)
                name = argv[0].rpartition("/")[2]
                raise HostError("helper-failed", f"{name}: {lines[-1] if lines else 'did not mount anything'}")
            time.sleep(0.002)
        posix.close(complaints)

    @staticmethod
    def _become(argv: list[str], complaints: int, parent: int, keep: int) -> None:
        posix.setpgid(0, 0)  # a Ctrl-C is for the container's program
        null = posix.open("/dev/null", posix.O_RDWR)
        for number, descriptor in ((0, null), (1, null), (2, complaints)):
            posix.dup2(descriptor, number)
        if keep >= 0:
            posix.set_inheritable(keep, True)
        close_others((0, 1, 2, keep) if keep >= 0 else (0, 1, 2))
        restore_signals()
        _signal.pthread_sigmask(_signal.SIG_SETMASK, ())
        try:
            own = capabilities.effective()
            capabilities.set_all(own)
            capabilities.raise_ambient(own)
        except OSError:  # as root nothing needs raising
            pass
        # Not SIGKILL: what is buffered has to be written even when we are killed.
        die_with_parent(_signal.SIGTERM, parent)
        posix.execv(argv[0], argv)

    def stop(self) -> None:
        """End the programs, the last one first, and wait for each."""
        for child, _ in reversed(self.children):
            deadline = time.monotonic() + FLUSH
            try:
                posix.kill(child, _signal.SIGTERM)
                while posix.waitpid(child, posix.WNOHANG)[0] == 0 and time.monotonic() < deadline:
                    time.sleep(0.002)
            except (ProcessLookupError, ChildProcessError):
                continue
        self.children.clear()
        for descriptor in self.locks:
            posix.close(descriptor)
        self.images.clear()


def mount_ext(helpers: Helpers, layer: Layer, target: str, *, program: str, kernel: bool) -> None:
    """Mount the ext3 file system of a layer that `helpers` hold.

    Arguments:
        program: path of fuse2fs, "" when there is none.
        kernel: the kernel's own driver may be used (real root: the image is root's own word).

    Raises:
        ImageError: the image is damaged or in use.
        HostError: nothing here can mount it.
    """
    descriptor = helpers.images[id(layer)]
    if kernel and _by_kernel(descriptor, layer, target):
        return
    if not program:
        raise HostError(
            "no-fuse2fs",
            f"{layer.path}: its ext3 file system needs the program fuse2fs, which is not installed",
            hint="administrator: install fuse2fs; or use a folder: --overlay DIR",
        )
    options = f"{'rw' if layer.writable else 'ro,norecovery'},allow_other"
    if layer.offset:
        options += f",offset={layer.offset}"
    # By descriptor: the session may lie over the folder with the image. One thread: with more, version 1.47.0 loses a
    # change of owner when the file is being closed at the same time.
    words = [program, "-f", "-s", "-o", options, f"/proc/self/fd/{descriptor}", target]
    try:
        helpers.start(words, target, descriptor)
        posix.listdir(target)
    except (HostError, OSError) as error:
        reason = error.message if isinstance(error, HostError) else error.strerror
        raise ImageError(
            "damaged-image", f"{layer.path}: cannot be mounted: {reason}", hint="check it: e2fsck -f FILE"
        ) from None


def _by_kernel(descriptor: int, layer: Layer, target: str) -> bool:
    from pysingularity.linux.loop import attach
    from pysingularity.linux.mounts import MS_NODEV, MS_NOSUID, MS_RDONLY, mount

    size = layer.size or posix.fstat(descriptor).st_size - layer.offset
    try:
        device, loop = attach(descriptor, layer.offset, size, readonly=not layer.writable, block=512)
    except OSError:
        return False
    try:
        flags = MS_NOSUID | MS_NODEV | (0 if layer.writable else MS_RDONLY)
        mount(device, target, "ext4", flags, None if layer.writable else "noload")
    except OSError:
        return False
    finally:
        posix.close(loop)  # the device frees itself together with the mount
    return True
