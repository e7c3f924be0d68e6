# SPDX-License-Identifier: Apache-2.0
"""Image to mounted root: our FUSE server in a process of its own, the kernel's squashfs for root, or unpacked files.

The server is started between two namespaces (`runtime.enter` knows when), waits for the mount, and ends by itself with
the last process of the container: the kernel then takes the mount away and answers ENODEV. Nothing has to be unmounted,
also after kill -9. Start ring.
"""

from __future__ import annotations

import posix

from pysingularity import messages
from pysingularity.errors import HostError, ImageError
from pysingularity.linux import fuse
from pysingularity.linux.loop import attach
from pysingularity.linux.mounts import MS_NODEV, MS_NOSUID, MS_RDONLY, mount
from pysingularity.linux.process import close_others, set_dumpable, set_name
from pysingularity.squashfs.reader import SquashfsImage
from pysingularity.squashfs.serve import Server

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pysingularity.trust.encryption import Plain

KIND = "singularity"
_ENOTCONN = 107


class Pending:
    """A server that waits for its file system to be mounted."""

    def __init__(self, path: str, device: int, go: int, child: int, inside: tuple[int, int]) -> None:
        self.path, self.device, self.go, self.child, self.inside = path, device, go, child, inside

    def mount(self, target: str) -> None:
        """Mount the file system and let the server begin.

        Raises:
            HostError: the server ended instead of answering.
        """
        fuse.mount_device(self.device, target, kind=KIND, uid=self.inside[0], gid=self.inside[1])
        # The server must be the only one left to hold the device: then its end is noticed at once, and nothing hangs.
        posix.close(self.device)
        self.device = -1
        posix.write(self.go, b"x")
        try:
            posix.stat(target)
        except OSError as error:
            if error.errno == _ENOTCONN:
                raise HostError("image-server", f"{self.path}: the process that reads the image has ended") from None
            raise ImageError("damaged-image", f"{self.path}: cannot read the root folder: {error.strerror}") from None

    def close(self) -> None:
        """Let go of everything; a server whose file system was not mounted ends."""
        for descriptor in (self.device, self.go):
            if descriptor >= 0:
                posix.close(descriptor)
        self.device = self.go = -1
        if self.child:
            try:
                posix.waitpid(self.child, 0)
            except ChildProcessError:  # process 1 of a pid namespace: its parent has the child
                pass
            self.child = 0


def serve(
    path: str,
    offset: int,
    size: int,
    inside: tuple[int, int],
    *,
    squash: bool = True,
    program: str = "",
    plain: Plain | None = None,
) -> Pending:
    """Start a server for the squashfs in a file.

    Arguments:
        path: the file; `offset` and `size` say where in it, in bytes (size 0: up to the end).
        inside: uid and gid of this process in its user namespace.
        squash: show all files as belonging to `inside`.
        program: path of squashfuse_ll, to be the server instead of us.
        plain: the decrypted file system, where that in the file is encrypted; its descriptor is taken over.

    Raises:
        ImageError: the file system is damaged.
        OSError: no /dev/fuse.
    """
    file = posix.open(path, posix.O_RDONLY | posix.O_CLOEXEC) if plain is None else plain.fd
    try:
        image = SquashfsImage(file, offset, size or None, source=plain, name=path)
        return serve_image(image, (file,), inside, squash=squash, program=program if plain is None else "")
    finally:
        posix.close(file)


def serve_image(
    image: SquashfsImage, files: tuple[int, ...], inside: tuple[int, int], *, squash: bool = True, program: str = ""
) -> Pending:
    """Start a server for an open image that reads from some files; arguments and errors as for `serve`."""
    device = fuse.open_device()
    wait, go = posix.pipe()
    child = posix.fork()
    if child == 0:
        # Twice: the container's program must not find a child that it did not start.
        if posix.fork() == 0:
            try:
                if program:
                    _serve_by(program, image.offset, device, files[0], wait)
                _serve(Server(image, inside if squash else None, complain=_teller()), device, files, wait)
            finally:
                posix._exit(1)
        posix._exit(0)
    posix.close(wait)
    return Pending(image.name, device, go, child, inside)


def _teller() -> Callable[[str], None] | None:
    """Return what tells of damage on the terminal, where standard error is one; it is opened anew then.

    Kept open, it would let those wait who wait for its end (a login that ends, a program that reads it), as the readers
    of pipes do. Files have a position that is shared with the program's own lines. Both get no word.
    """
    try:
        if not posix.isatty(2):
            return None
        known, path = posix.fstat(2), posix.readlink("/proc/self/fd/2")
    except OSError:  # closed
        return None

    def tell(text: str) -> None:
        try:
            voice = posix.open(path, posix.O_WRONLY | posix.O_NOCTTY | posix.O_NOFOLLOW | posix.O_CLOEXEC)
        except OSError:  # gone
            return
        found = posix.fstat(voice)
        if (found.st_dev, found.st_ino) == (known.st_dev, known.st_ino):
            silence = posix.dup(2)
            posix.dup2(voice, 2)
            messages.error(text)
            posix.dup2(silence, 2)
            posix.close(silence)
        posix.close(voice)

    return tell


def _alone(*keep: int) -> None:
    """Be alone in a process group, without a folder or anybody else's descriptors.

    A group of its own gets no key of the terminal. A session of its own would cost much on a busy machine: the kernel
    shares processor time out by sessions first (sched(7), "autogroup"), and a program and its image's server take turns
    all the time; within one session each wakes the other without waiting for its session's turn.
    """
    posix.setpgid(0, 0)
    posix.chdir("/")
    null = posix.open("/dev/null", posix.O_RDWR)
    for number in (0, 1, 2):
        if number not in keep:
            posix.dup2(null, number)
    close_others((0, 1, 2, *keep))


def _serve_by(program: str, offset: int, device: int, file: int, wait: int) -> None:
    """Become squashfuse_ll once the file system is mounted; libfuse 3 takes an open device as mount point."""
    _alone(device, file, wait)
    if posix.read(wait, 1):
        posix.set_inheritable(device, True)
        posix.set_inheritable(file, True)
        posix.close(wait)
        options = f"offset={offset}"
        posix.execv(program, [program, "-f", "-o", options, f"/proc/self/fd/{file}", f"/dev/fd/{device}"])
    posix._exit(0)


def _serve(server: Server, device: int, files: tuple[int, ...], wait: int) -> None:
    """Be the server."""
    import gc

    gc.enable()  # see `start`
    _alone(device, *files, wait)
    set_name("singularity-fs")
    # The caller's other processes could otherwise look into this one, which holds rights in the namespace.
    set_dumpable(False)
    if posix.read(wait, 1):
        posix.close(wait)
        server.run(device)
    posix._exit(0)


def kernel_squashfs(path: str, offset: int, size: int, target: str) -> bool:
    """Mount a squashfs with the kernel's own driver on a loop device (real root); return whether that worked."""
    file = posix.open(path, posix.O_RDONLY | posix.O_CLOEXEC)
    try:
        device, descriptor = attach(file, offset, size or posix.fstat(file).st_size - offset)
    except OSError:
        return False
    finally:
        posix.close(file)
    try:
        mount(device, target, "squashfs", MS_RDONLY | MS_NOSUID | MS_NODEV)
    except OSError:
        return False
    finally:
        posix.close(descriptor)  # the device frees itself together with the mount
    return True
