# SPDX-License-Identifier: Apache-2.0
"""Open .deb files into a root file system: many at a time, in processes of their own, and without dpkg.

A .deb is an ar archive of `debian-binary`, `control.tar.*` and `data.tar.*` (deb(5)). The data goes into the tree, the
control files into dpkg's database. Workers write files as root does; owners other than root, and device nodes, are
reported and set by the caller, who alone knows how owners are kept (`linux.ownership`).
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from typing import IO, TYPE_CHECKING, NamedTuple

from pysingularity.build.deb.tree import MERGED, Tree
from pysingularity.errors import HostError, ImageError, UserError
from pysingularity.linux.ownership import CAPABILITY, CAPABILITY_XATTR
from pysingularity.registry.inflate import Inflate
from pysingularity.registry.tar import Member, TarReader, show

if TYPE_CHECKING:
    from pysingularity.build.bootstrap import Owners

INFO = b"var/lib/dpkg/info/"
#: The largest control archive; the largest real one (templates in all languages) has 3 MB.
MAX_CONTROL = 64 << 20
#: A package may unpack to this many times what its maker counted, plus a constant; beyond, it is a bomb.
_SLACK, _ROOM = 4, 512 << 20
_CHUNK = 1 << 20
_FULL = (errno.ENOSPC, errno.EDQUOT)
#: What a tar may inflate to; deflate reaches 1032:1, and honest trees 20:1.
_MOST_RATIO = 200
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class Job(NamedTuple):
    """A .deb to open.

    Attributes:
        path: the file.
        name: what it is called in dpkg's database ("libc6:amd64" for packages that may be there twice).
        installed_size: bytes that its maker counted, 0 when unknown.
        diversions: path → other path, for files that another package has diverted (dpkg-divert(1)).
        only: when not empty, extract just these paths and leave the database alone.
        in_place: give configuration files their final name too, before dpkg asks about them.
    """

    path: str
    name: str
    installed_size: int
    diversions: dict[bytes, bytes]
    only: frozenset[bytes]
    in_place: bool


class Owned(NamedTuple):
    """A path whose owner is not root, or that is a device: kind is "char", "block" or something else."""

    path: bytes
    uid: int
    gid: int
    mode: int
    kind: str
    rdev: int


class Opened(NamedTuple):
    """What came out of a .deb.

    Attributes:
        name: as in the job.
        control: its control paragraph.
        paths: absolute paths as dpkg lists them, "/." first.
        folders: those of `paths` that are folders.
        conffiles: absolute paths of its configuration files.
        scripts: names of its control files ("preinst", "triggers" …).
        triggers: content of its triggers file.
        owned: what is left to do for the caller.
    """

    name: str
    control: str
    paths: list[bytes]
    folders: list[bytes]
    conffiles: list[bytes]
    scripts: list[str]
    triggers: str
    owned: list[Owned]


class _Section:
    """One member of an ar archive as a stream."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self._file, self._left = file, size

    def read(self, size: int) -> bytes:
        data = self._file.read(min(size, self._left))
        self._left -= len(data)
        return data


def open_deb(job: Job, tree: Tree) -> Opened:
    """Open one package.

    Raises:
        UserError: the file is no package, is damaged, or contains what no package may.
        HostError: the tree cannot be written.
    """
    try:
        with open(job.path, "rb") as file:
            return _Deb(job, tree).open(file)
    except ImageError as error:  # from the readers that registry layers use too
        raise UserError(
            "bad-package", error.message, hint="the package is damaged; its repository should be told"
        ) from None
    except OSError as error:
        name = error.filename
        where = os.fsdecode(name) if isinstance(name, (bytes, str)) else tree.root
        hint = "make room, or set SINGULARITY_TMPDIR to a folder that has it" if error.errno in _FULL else ""
        raise HostError("cannot-unpack", f"package {job.name}: {where}: {error.strerror}", hint=hint) from None


class _Deb:
    def __init__(self, job: Job, tree: Tree | None) -> None:
        self.job = job
        self._tree = tree
        self.what = f"package {job.name}"
        self.control: dict[str, tuple[bytes, int]] = {}
        self.conffiles: frozenset[bytes] = frozenset()
        self.paths: list[bytes] = []
        self.folders: list[bytes] = []
        self.owned: list[Owned] = []
        self.sums: list[bytes] = []
        self.room = job.installed_size * _SLACK + _ROOM

    @property
    def tree(self) -> Tree:
        assert self._tree is not None
        return self._tree

    def fail(self, why: str) -> UserError:
        return UserError("bad-package", f"{self.what}: {why}: refused")

    def members(self, file: IO[bytes]) -> Iterator[tuple[str, _Section]]:
        """Yield the members of the ar archive that count: ("control" | "data", stream), in this order."""
        if file.read(8) != b"!<arch>\n":
            raise self.fail("no Debian package")
        wanted = ["debian-binary", "control", "data"]
        while head := file.read(60):
            if len(head) != 60 or head[58:] != b"`\n" or not head[48:58].strip().isdigit():
                raise self.fail("damaged archive")
            size, name = int(head[48:58]), head[:16].rstrip(b" /").decode("ascii", "replace")
            start = file.tell()
            kind = name.partition(".tar")[0]
            if wanted and kind == wanted[0]:
                del wanted[0]
                if kind != "debian-binary":
                    yield kind, _Section(file, size)
                elif not file.read(min(size, 16)).startswith(b"2."):
                    raise self.fail("unknown version of the format")
            elif name[:1] != "_" or len(wanted) == 3:  # names with _ are for others, all else for later versions
                raise self.fail(f"unexpected member {name!r}")
            file.seek(start + size + (size & 1))
        if wanted:
            raise self.fail(f"has no {wanted[0]}")

    def read_control(self, file: IO[bytes]) -> None:
        """Read the control files only."""
        for _, section in self.members(file):
            self._control(section)
            return

    def open(self, file: IO[bytes]) -> Opened:
        """Read and unpack all."""
        for kind, section in self.members(file):
            if kind == "control":
                self._control(section)
            else:
                self.unpack_data(section.read)
        if not self.job.only:
            self._database()
        return Opened(
            self.job.name,
            self.control["control"][0].decode("utf-8", "replace"),
            self.paths,
            self.folders,
            sorted(self.conffiles),
            sorted(self.control),
            self.control.get("triggers", (b"", 0))[0].decode("utf-8", "replace"),
            self.owned,
        )

    def _control(self, section: _Section) -> None:
        reader = TarReader(Inflate(section.read, self.what))
        total = 0
        for member in reader:
            if member.kind == "dir" and member.path == b"":
                continue
            total += member.size
            if member.kind != "file" or b"/" in member.path or total > MAX_CONTROL:
                raise self.fail(f"control file {show(member.path)}")
            name = member.path.decode("ascii", "replace")
            if not all(letter.isalnum() or letter in "-_." for letter in name):
                raise self.fail(f"control file {show(member.path)}")
            self.control[name] = reader.read(member.size), member.mode
        if "control" not in self.control:
            raise self.fail("has no control file")
        lines = self.control.get("conffiles", (b"", 0))[0].split(b"\n")
        # A line may start with a flag ("remove-on-upgrade"); such a file is not in the package.
        self.conffiles = frozenset(line.strip() for line in lines if line.strip()[:1] == b"/")

    def unpack_data(self, read: Callable[[int], bytes]) -> None:
        """Unpack the tar of files."""
        reader = TarReader(Inflate(read, self.what))
        job, tree = self.job, self.tree
        sums = "md5sums" not in self.control
        for member in reader:
            path = member.path
            if job.only and path not in job.only:
                continue
            absolute = b"/" + (path or b".")
            self.paths.append(absolute)
            kind = member.kind
            if kind == "dir":
                self.folders.append(absolute)
                self._folder(member)
                continue
            if not path:
                raise self.fail("its root is no folder")
            target = job.diversions.get(absolute, absolute)[1:]
            conffile = absolute in self.conffiles
            if conffile:
                target += b".dpkg-new"
            parent, name, inherits = tree.place(target)
            if kind == "file":
                self._file(reader, member, parent, name, sums)
            elif kind == "link":
                source = b"/" + member.target
                source = job.diversions.get(source, source)[1:] + (b".dpkg-new" if source in self.conffiles else b"")
                above, old, _ = tree.place(source)
                parent, name, inherits = tree.place(target)
                self._same(above, old, parent, name)
                continue
            elif kind == "symlink":
                if not self._link(member, parent, name, target):
                    continue
            elif kind == "fifo":
                self._clear(parent, name)
                os.mkfifo(name, 0o600, dir_fd=parent)
                os.chmod(name, member.mode, dir_fd=parent)
            if inherits or member.uid or member.gid or kind in ("char", "block"):
                self.owned.append(Owned(target, member.uid, member.gid, member.mode, kind, member.rdev))
            if conffile and job.in_place:
                final = target.removesuffix(b".dpkg-new").rpartition(b"/")[2]
                self._same(parent, name, parent, final)

    def _folder(self, member: Member) -> None:
        path = member.path
        if not path:
            return
        if self.tree.merged and path in MERGED:
            self.tree.merge(path)
            return
        parent, name, inherits = self.tree.place(path)
        try:
            os.mkdir(name, member.mode & 0o777, dir_fd=parent)
        except FileExistsError:
            # The first package decides about a folder, as with dpkg; a link to a folder is as good as one.
            if not self.tree.is_folder(path):
                raise self.fail(f"/{show(path)} is a folder here and something else in another package") from None
            return
        if member.mode & 0o7000 or member.mode & ~0o777:
            os.chmod(name, member.mode, dir_fd=parent)
        if inherits or member.uid or member.gid:
            self.owned.append(Owned(path, member.uid, member.gid, member.mode, "dir", 0))

    def _file(self, reader: TarReader, member: Member, parent: int, name: bytes, sums: bool) -> None:
        self.room -= member.size
        if self.room < 0:
            raise self.fail("unpacks to far more than it says (a bomb)")
        try:
            descriptor = os.open(name, _NEW, member.mode & 0o777, dir_fd=parent)
        except FileExistsError:  # of another package: who may replace it is decided when all lists are known
            self._clear(parent, name)
            descriptor = os.open(name, _NEW, member.mode & 0o777, dir_fd=parent)
        digest = hashlib.md5(usedforsecurity=False) if sums else None
        try:
            left = member.size
            while left > 0:
                data = reader.read(min(left, _CHUNK))
                left -= len(data)
                if digest is not None:
                    digest.update(data)
                view = memoryview(data)
                while view:
                    view = view[os.write(descriptor, view) :]
            if member.mode & 0o7000:
                os.fchmod(descriptor, member.mode)
            if member.xattrs:
                _set_attributes(descriptor, member.xattrs)
            os.utime(descriptor, (member.mtime, member.mtime))
        finally:
            os.close(descriptor)
        if digest is not None and b"/" + member.path not in self.conffiles:
            self.sums.append(digest.hexdigest().encode() + b"  " + member.path + b"\n")

    def _link(self, member: Member, parent: int, name: bytes, path: bytes) -> bool:
        try:
            os.symlink(member.target, name, dir_fd=parent)
        except FileExistsError:
            found = os.lstat(name, dir_fd=parent)
            if stat.S_ISDIR(found.st_mode):  # dpkg keeps a folder that a link would hide
                return False
            if stat.S_ISLNK(found.st_mode) and os.readlink(name, dir_fd=parent) == member.target:
                return True
            if self.tree.merged and path in MERGED:
                return False
            self._clear(parent, name)
            os.symlink(member.target, name, dir_fd=parent)
        os.utime(name, (member.mtime, member.mtime), dir_fd=parent, follow_symlinks=False)
        return True

    def _same(self, source: int, old: bytes, target: int, new: bytes) -> None:
        """Make a hard link in the place of whatever has the new name."""
        try:
            os.link(old, new, src_dir_fd=source, dst_dir_fd=target, follow_symlinks=False)
        except FileExistsError:
            self._clear(target, new)
            os.link(old, new, src_dir_fd=source, dst_dir_fd=target, follow_symlinks=False)

    def _clear(self, parent: int, name: bytes) -> None:
        try:
            os.unlink(name, dir_fd=parent)
        except IsADirectoryError:
            raise self.fail(f"{show(name)} is a folder in another package and something else here") from None
        except FileNotFoundError:  # another worker was quicker
            pass

    def _database(self) -> None:
        """Write the control files where dpkg looks for them."""
        base = INFO + self.job.name.encode() + b"."
        for name, (data, mode) in self.control.items():
            if name != "control":
                self.tree.write(base + name.encode(), data, mode & 0o777)
        if "md5sums" not in self.control:  # dpkg makes them up, too, and misses the file otherwise
            self.tree.write(base + b"md5sums", b"".join(self.sums))
        self.tree.write(base + b"list", b"\n".join(self.paths) + b"\n")


def open_tar(path: str, tree: Tree, what: str) -> list[Owned]:
    """Unpack a plain tar with the same care, without a database; return what is left to do for the caller.

    Raises:
        UserError: it is damaged, or contains what no tree may.
        HostError: the tree cannot be written.
    """
    deb = _Deb(Job(path, what, 0, {}, frozenset(), False), tree)
    deb.what, deb.room = what, os.stat(path).st_size * _MOST_RATIO + _ROOM
    deb.control["md5sums"] = b"", 0  # nobody will ask for them
    try:
        with open(path, "rb") as file:
            deb.unpack_data(file.read)
    except ImageError as error:
        raise UserError("bad-tarball", error.message) from None
    except OSError as error:
        raise HostError("cannot-unpack", f"{what}: {tree.root}: {error.strerror}") from None
    return deb.owned


def settle_owners(tree: Tree, owners: Owners, owned: Sequence[Owned]) -> None:
    """Give files their owners and make device nodes: what unpacking left to the caller."""
    for path, uid, gid, mode, kind, rdev in owned:
        parent, name, _ = tree.place(path)
        text = os.fsdecode(name)
        if kind in ("char", "block"):
            tree.remove(path)
            owners.mknod(text, (0o020000 if kind == "char" else 0o060000) | mode, rdev, dir_fd=parent)
        owners.set(text, uid, gid, dir_fd=parent)
        if kind != "symlink" and mode & 0o7000:  # a change of owner drops set-id bits
            os.chmod(name, mode, dir_fd=parent)


def _set_attributes(descriptor: int, attributes: dict[bytes, bytes]) -> None:
    """Set what an image keeps: file capabilities (recorded where the kernel refuses them) and attributes of users."""
    for name, value in attributes.items():
        if name == CAPABILITY:
            try:
                os.setxattr(descriptor, name, value)
            except OSError as error:
                if error.errno != errno.EPERM:
                    raise
                os.setxattr(descriptor, CAPABILITY_XATTR, value)
        elif name.startswith(b"user.") and not name.startswith(b"user.singularity."):
            os.setxattr(descriptor, name, value)


def control_members(job: Job) -> dict[str, tuple[bytes, int]]:
    """Return name → (content, mode) of a package's control files without unpacking it.

    Raises:
        UserError: the file is no package, or damaged.
    """
    deb = _Deb(job, None)
    try:
        with open(job.path, "rb") as file:
            deb.read_control(file)
    except ImageError as error:
        raise UserError("bad-package", error.message) from None
    return deb.control


def write_preinst(job: Job, tree: Tree) -> None:
    """Put a package's preinst, and what it may ask debconf, where dpkg would have it while the script runs."""
    for name, (data, mode) in control_members(job).items():
        if name in ("preinst", "config", "templates"):
            tree.write(INFO + f"{job.name}.{name}".encode(), data, mode & 0o777)
