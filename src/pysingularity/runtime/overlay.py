# SPDX-License-Identifier: Apache-2.0
"""The session and the root: a file system in memory that nobody else sees, and the layers put together in it.

A read-only image gets missing mount points from a skeleton: a tree of only the missing folders and files, laid over the
image by an overlay without an upper layer. Nothing is ever written into an image for that. Start ring.
"""

from __future__ import annotations

import posix

from pysingularity import messages
from pysingularity.errors import HostError, ImageError, UserError
from pysingularity.linux.mounts import (
    ATTR_NODEV,
    ATTR_NOSUID,
    ATTR_RDONLY,
    MS_NODEV,
    MS_NOSUID,
    MS_RDONLY,
    O_CLOEXEC,
    O_DIRECTORY,
    O_NOFOLLOW,
    O_PATH,
    mount,
    move_mount,
    open_in_root,
    open_tree,
    remount_bind,
    set_attributes,
)
from pysingularity.runtime.spec import BIND, EXT, SANDBOX, LaunchSpec, Layer, Mount

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

#: Folders of which one is covered by the session. Everything below them was opened before, so nothing gets lost.
PLACES = ("/mnt", "/media", "/srv", "/tmp", "/run", "/var/tmp")
_ENOENT, _ENOTDIR, _ELOOP, _ENOSYS, _EINVAL = 2, 20, 40, 38, 22
_MOST_LINKS = 40
#: The owner that is shown of files whose owner the user namespace does not have (/proc/sys/kernel/overflowuid).
_NOBODY = 65534


class Session:
    """What is built during one start. `place` is the folder that the session's file system covers."""

    def __init__(self, spec: LaunchSpec) -> None:
        self.spec = spec
        self.place = ""
        self.trees: dict[int, int] = {}  # id of a Mount or Layer → detached mounts
        self.attributes: dict[int, int] = {}  # those that the kernel could not set while detached
        self.failed: dict[int, OSError] = {}
        self.upper: tuple[int, int] | None = None
        self.changes = -1  # the folder of `upper`, where a helper program needs it as a path
        #: Makes an overlay in place of the kernel: (lower, upper, work, target), all paths in the session.
        self.merge: Callable[[list[str], str, str, str], None] | None = None
        self.parts: dict[int, str] = {}  # id of a Layer that binds take parts of → where it is mounted
        self._files = 0

    def open_sources(self) -> None:
        """Take hold of everything on the host that the container will see, before any of it is covered.

        Raises:
            UserError: a required source is not there (any more).
            ImageError: the sandbox is not there.
        """
        spec = self.spec
        for one in spec.mounts:
            if one.kind != BIND or one.image is not None:
                continue
            wanted = (0 if one.trusted else ATTR_NODEV | ATTR_NOSUID) | (ATTR_RDONLY if one.readonly else 0)
            try:
                self._open(one, one.source, wanted)
            except OSError as error:
                if one.required:
                    raise UserError("no-bind-source", f"cannot bind {one.source}: {error.strerror}") from None
                self.failed[id(one)] = error
        for layer in (spec.image, *spec.overlays):
            if layer.kind == SANDBOX:
                wanted = ATTR_NODEV | (ATTR_NOSUID if spec.no_new_privs else 0)
                if not (spec.writable and layer is spec.image):
                    wanted |= ATTR_RDONLY
                try:
                    self._open(layer, layer.path, wanted)
                except OSError as error:
                    raise ImageError("no-such-image", f"{layer.path}: {error.strerror}") from None
        if spec.upper and spec.upper != "tmpfs" and spec.upper_layer is None:
            try:
                folders = []
                for name in ("upper", "work"):
                    path = f"{spec.upper}/{name}"
                    try:
                        posix.mkdir(path, 0o755)
                    except FileExistsError:
                        pass
                    folders.append(posix.open(path, O_PATH | O_DIRECTORY | O_CLOEXEC))
                if "fuse-overlayfs" in spec.programs:
                    self.changes = open_tree(spec.upper)
            except OSError as error:
                raise UserError("no-overlay", f"--overlay {spec.upper}: {error.strerror}") from None
            self.upper = (folders[0], folders[1])

    def _open(self, what: Mount | Layer, path: str, wanted: int) -> None:
        tree = open_tree(path)
        self.trees[id(what)] = tree
        if wanted:
            try:
                set_attributes(tree, wanted)
            except OSError as error:
                if error.errno not in (_ENOSYS, _EINVAL):
                    raise
                self.attributes[id(what)] = wanted  # Linux 5.11: set once it is attached

    def cover(self) -> None:
        """Mount the session's file system, in memory and invisible to the rest of the machine."""
        error: OSError | None = None
        for place in PLACES:
            try:
                mount("tmpfs", place, "tmpfs", MS_NOSUID | MS_NODEV, f"mode=0755,size={self.spec.session_size + 16}m")
            except OSError as one:
                error = error if error is not None and one.errno == _ENOENT else one
                continue
            self.place = place
            return
        raise HostError("no-session", f"cannot make a place for the container: {error}")

    def folder(self, name: str, mode: int = 0o755) -> str:
        """Make a folder in the session and return its path."""
        path = f"{self.place}/{name}"
        posix.mkdir(path, mode)
        return path

    def file(self, content: bytes, mode: int = 0o644) -> str:
        """Make a file in the session and return its path."""
        self._files += 1
        path = f"{self.place}/file{self._files}"
        descriptor = posix.open(path, posix.O_WRONLY | posix.O_CREAT | posix.O_EXCL | O_CLOEXEC, mode)
        try:
            posix.write(descriptor, content)
        finally:
            posix.close(descriptor)
        return path

    def attach_tree(self, what: Mount | Layer, target: int) -> None:
        """Attach the detached mounts of a bind or sandbox on an open file or folder."""
        tree = self.trees.pop(id(what))
        move_mount(tree, target)
        late = self.attributes.pop(id(what), 0)
        if late:
            remount_bind(tree, late)
        posix.close(tree)

    def root(self, attach_layer: Callable[[Layer, str], None], wanted: list[Mount]) -> int:
        """Put the layers together; return a descriptor of the root folder, on which mount points can be made.

        Arguments:
            attach_layer: mounts a layer that lies in a file on a folder.
            wanted: what is going to be mounted, in that order; missing mount points are provided for.
        """
        spec = self.spec
        paths = []
        for number, layer in enumerate((spec.image, *spec.overlays)):
            path = self.folder(f"layer{number}")
            if layer.kind == SANDBOX:
                folder = posix.open(path, O_PATH | O_CLOEXEC)
                self.attach_tree(layer, folder)
                posix.close(folder)
            else:
                attach_layer(layer, path)
                if layer.kind == EXT and number and posix.access(f"{path}/upper", 0):
                    path += "/upper"
            paths.append(path)
        for one in wanted:
            if one.image is not None and id(one.image) not in self.parts:
                path = self.parts[id(one.image)] = self.folder(f"part{len(self.parts)}")
                attach_layer(one.image, path)
        flags = MS_NODEV | (MS_NOSUID if spec.no_new_privs else 0)
        base = paths[0]
        if len(paths) > 1:
            base = self.folder("union")
            mount("overlay", base, "overlay", flags | MS_RDONLY, f"lowerdir={':'.join(reversed(paths))}")
        root = posix.open(base, O_PATH | O_DIRECTORY | O_CLOEXEC)
        if spec.upper_layer is not None:
            attach_layer(spec.upper_layer, self.folder("changes"))
        elif self.changes >= 0:
            folder = posix.open(self.folder("changes"), O_PATH | O_CLOEXEC)
            move_mount(self.changes, folder)
            posix.close(folder)
        missing = [] if spec.writable else _missing(root, wanted)
        if not missing and not spec.upper:
            return root
        if spec.underlay and not spec.upper:
            posix.close(root)
            return self._underlay(base, missing)
        lower = list(reversed(paths))
        if missing:
            skeleton = self.folder("skeleton")
            for one, place in missing:
                _provide(skeleton, root, place, self.is_folder(one))
            lower.insert(0, skeleton)
        posix.close(root)
        path = self.folder("root")
        try:
            if posix.access(f"{self.place}/changes", 0):
                self._into_changes(path, lower, flags)
            else:
                self._overlay(path, lower, flags)
        except OSError as error:
            if spec.upper:
                hint = (
                    "the folder must lie on a local file system that stores user attributes (not NFS or Lustre); "
                    "or let the administrator install fuse-overlayfs"
                )
                raise HostError(
                    "no-overlay",
                    f"changes cannot go to {spec.upper}: the kernel refused the overlay: {error.strerror}",
                    hint="" if spec.upper == "tmpfs" else hint,
                ) from None
            messages.verbose(f"no overlay here ({error.strerror}): mount points are provided by binds")
            return self._underlay(base, missing)
        return posix.open(path, O_PATH | O_DIRECTORY | O_CLOEXEC)

    def _underlay(self, base: str, missing: list[tuple[Mount, list[str]]]) -> int:
        """Make a tree in memory with the missing mount points, and bind everything else of `base` into it, read-only.

        For kernels and file systems of which no overlay can be made: Linux before 5.11, or without the module.
        """
        wanted: dict[str, object] = {}  # name → the same for what lies below, or whether it is a folder
        for one, place in missing:
            at = wanted
            for name in place[:-1]:
                below_it = at.setdefault(name, {})
                if not isinstance(below_it, dict):  # a file is wanted here; the deeper mount will be refused
                    break
                at = below_it
            else:
                at.setdefault(place[-1], {} if self.is_folder(one) else False)
        path = self.folder("under")
        source = posix.open(base, O_PATH | O_DIRECTORY | O_CLOEXEC)
        try:
            self._fill(path, source, wanted)
        finally:
            posix.close(source)
        tree = open_tree(path)
        set_attributes(tree, ATTR_RDONLY | ATTR_NODEV | ATTR_NOSUID, recursive=False)
        root = posix.open(self.folder("root2"), O_PATH | O_DIRECTORY | O_CLOEXEC)
        move_mount(tree, root)
        posix.close(root)
        posix.close(tree)
        return posix.open(f"{self.place}/root2", O_PATH | O_DIRECTORY | O_CLOEXEC)

    def _fill(self, path: str, source: int, wanted: dict[str, object]) -> None:
        """Make a folder's entries: those that lead to a wanted place anew, the others as binds; links stay links."""
        posix.chmod(path, posix.fstat(source).st_mode & 0o7777 | 0o700)
        reader = posix.open(f"/proc/self/fd/{source}", posix.O_RDONLY | O_DIRECTORY | O_CLOEXEC)
        try:
            names = posix.listdir(reader)
        finally:
            posix.close(reader)
        for name in names:
            entry = posix.open(name, O_PATH | O_NOFOLLOW | O_CLOEXEC, dir_fd=source)
            try:
                kind = posix.fstat(entry).st_mode & 0o170000
                below_it = wanted.get(name)
                target = f"{path}/{name}"
                if kind == 0o120000:
                    posix.symlink(posix.readlink("", dir_fd=entry), target)
                    continue
                if kind == 0o040000:
                    posix.mkdir(target, 0o755)
                    if isinstance(below_it, dict) and below_it:
                        self._fill(target, entry, below_it)
                        continue
                else:
                    _touch(target)
                tree = open_tree("", directory=entry)
                place = posix.open(target, O_PATH | O_CLOEXEC)
                move_mount(tree, place)
                posix.close(place)
                posix.close(tree)
            finally:
                posix.close(entry)
        for name, below_it in wanted.items():
            if name not in names:
                _make(f"{path}/{name}", below_it)

    def _into_changes(self, target: str, lower: list[str], flags: int) -> None:
        """Lay what is mounted at `changes` over the other layers: by the kernel if it lets us, else by a program."""
        places = [f"{self.place}/changes/{name}" for name in ("upper", "work")]
        for place in places:
            try:
                posix.mkdir(place, 0o755)
            except FileExistsError:
                pass
            except PermissionError:
                raise self._foreign() from None
        if posix.stat(places[0]).st_uid == _NOBODY != posix.getuid():
            raise self._foreign()
        if self.merge is not None:
            self.merge(lower, places[0], places[1], target)
        else:
            data = f"lowerdir={':'.join(lower)},upperdir={places[0]},workdir={places[1]}"
            mount("overlay", target, "overlay", flags, data)

    def _foreign(self) -> UserError:
        return UserError(
            "foreign-overlay",
            f"{self.spec.upper}: its files belong to a user that this container does not have",
            hint="overlays for --fakeroot are made with: singularity overlay create --fakeroot; others without",
        )

    def _overlay(self, target: str, lower: list[str], flags: int) -> None:
        data = f"lowerdir={':'.join(lower)}"
        if self.spec.upper:
            if self.upper is None:
                top, work = self.folder("upper"), self.folder("work")
                posix.chmod(top, posix.stat(lower[-1]).st_mode & 0o7777)
            else:
                top, work = (f"/proc/self/fd/{one}" for one in self.upper)
            data += f",upperdir={top},workdir={work}"
            # An ordinary user cannot write trusted.* attributes: the kernel keeps its notes in user.* (Linux 5.11).
            if self.spec.identity != "keep" or not _initial_namespace():
                data += ",userxattr"
        else:
            flags |= MS_RDONLY
        mount("overlay", target, "overlay", flags, data)

    def is_folder(self, one: Mount) -> bool:
        """Return whether a mount needs a folder (or a file) to be mounted on."""
        if one.kind == "file":
            return False
        if one.kind != BIND:
            return True
        tree = self.trees.get(id(one))
        if tree is None:
            return True
        return posix.fstat(tree).st_mode & 0o170000 == 0o040000

    def close(self) -> None:
        """Close what is still open."""
        for tree in self.trees.values():
            posix.close(tree)
        for folder in (*(self.upper or ()), self.changes):
            if folder >= 0:
                posix.close(folder)
        self.changes = -1
        self.trees.clear()
        self.upper = None


def _touch(path: str) -> None:
    posix.close(posix.open(path, posix.O_WRONLY | posix.O_CREAT | posix.O_EXCL | O_CLOEXEC, 0o644))


def _make(path: str, wanted: object) -> None:
    """Make an empty file (False), or a folder with what is wanted in it."""
    if not isinstance(wanted, dict):
        _touch(path)
        return
    posix.mkdir(path, 0o755)
    for name, below_it in wanted.items():
        _make(f"{path}/{name}", below_it)


def _initial_namespace() -> bool:
    with open("/proc/self/uid_map", "rb") as file:
        return file.read().split() == [b"0", b"0", b"4294967295"]


def below(path: str, folder: str) -> bool:
    """Return whether `path` is `folder` or lies below it, by components."""
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def _missing(root: int, wanted: list[Mount]) -> list[tuple[Mount, list[str]]]:
    """Return the mounts whose targets are not in the root, each with the components of the place to provide."""
    found = []
    covered: list[str] = []
    for one in wanted:
        if not any(below(one.target, other) for other in covered):
            try:
                posix.close(open_in_root(root, one.target))
            except OSError as error:
                if error.errno == _ENOENT:
                    place = locate(root, one.target)
                    if place is not None:
                        found.append((one, place))
        covered.append(one.target)
    return found


def locate(root: int, path: str) -> list[str] | None:
    """Return the components of where `path` leads inside `root`, all links resolved, also where nothing is there yet.

    None when it leads nowhere (a file in the middle of the path, a loop of links).
    """
    todo = [part for part in path.split("/") if part not in ("", ".")]
    real: list[str] = []
    links = 0
    while todo:
        name = todo.pop(0)
        if name == "..":
            real = real[:-1]
            continue
        try:
            descriptor = open_in_root(root, "/".join([*real, name]), O_PATH | O_NOFOLLOW)
        except OSError as error:
            if error.errno != _ENOENT or ".." in todo:
                return None
            return [*real, name, *todo]
        try:
            kind = posix.fstat(descriptor).st_mode & 0o170000
            if kind == 0o120000:
                links += 1
                if links > _MOST_LINKS:
                    return None
                target = posix.readlink("", dir_fd=descriptor)
                if target.startswith("/"):
                    real = []
                todo = [part for part in target.split("/") if part not in ("", ".")] + todo
                continue
        finally:
            posix.close(descriptor)
        if kind != 0o040000 and todo:
            return None
        real.append(name)
    return real


def _provide(skeleton: str, root: int, place: list[str], folder: bool) -> None:
    """Make a mount point in the skeleton; folders that the image has too get the image's mode."""
    path, inside = skeleton, ""
    for number, name in enumerate(place):
        path, inside = f"{path}/{name}", f"{inside}/{name}"
        last = number == len(place) - 1
        if last and not folder:
            try:
                posix.close(posix.open(path, posix.O_WRONLY | posix.O_CREAT | posix.O_EXCL | O_CLOEXEC, 0o644))
            except FileExistsError:
                pass
            return
        mode = 0o755
        try:
            descriptor = open_in_root(root, inside, O_PATH | O_NOFOLLOW)
        except OSError:
            status = None
        else:
            status = posix.fstat(descriptor)
            mode = status.st_mode & 0o7777
            posix.close(descriptor)
        try:
            posix.mkdir(path, 0o755)
        except FileExistsError:
            continue
        if status is not None:
            try:
                posix.chown(path, status.st_uid, status.st_gid)
            except OSError:  # somebody else's: an ordinary user cannot give files away, and nobody will notice
                pass
            posix.chmod(path, mode)


def ensure(root: int, path: str, folder: bool) -> int:
    """Open a mount point inside `root`, making it (and folders on the way) where it is missing; for writable roots."""
    try:
        return open_in_root(root, path)
    except OSError as error:
        if error.errno != _ENOENT:
            raise
    place = locate(root, path)
    if place is None:
        raise OSError(_ENOTDIR, posix.strerror(_ENOTDIR), path)
    inside = ""
    for number, name in enumerate(place):
        parent, inside = inside, f"{inside}/{name}"
        try:
            posix.close(open_in_root(root, inside, O_PATH | O_NOFOLLOW))
            continue
        except OSError as error:
            if error.errno != _ENOENT:
                raise
        descriptor = open_in_root(root, parent or "/", O_PATH | O_DIRECTORY)
        try:
            if number == len(place) - 1 and not folder:
                flags = posix.O_WRONLY | posix.O_CREAT | posix.O_EXCL | O_NOFOLLOW | O_CLOEXEC
                posix.close(posix.open(name, flags, 0o644, dir_fd=descriptor))
            else:
                posix.mkdir(name, 0o755, dir_fd=descriptor)
        finally:
            posix.close(descriptor)
    return open_in_root(root, path)
