# SPDX-License-Identifier: Apache-2.0
"""The cache: blobs and finished images by digest, tags by memory, safe for many processes on one shared file system.

    $SINGULARITY_CACHEDIR/cache (else ~/.singularity/cache)
        blob/sha256/ab/abcd…      layers, manifests, configurations, exactly as the registry gave them
        image/KEY.sif             finished images; KEY names what they were made from and how
        image/KEY.record          size, sha256 and identity of that file when it was last found whole
        tag/KEY                   what a tag pointed to, and when
        layer/KEY                 where a layer's compressed files lie in which image (`registry.reuse`)
        partial/KEY               downloads that were cut; they are continued
        packages/, mounts/, logs/ packages that agents fetched, caches of RUN --mount, logs of builds
        lock/KEY                  one lock a key

Everything appears by rename, whole or not at all. A file is used when size, inode and time are those of its record;
otherwise it is hashed again, and dropped when it is not what it claims to be. The time of last use is the file's
atime, set by us. Locks are POSIX locks, which NFS passes on; where a file system has none, a hard link with a
heartbeat serves. Start ring: the way to an image that is known needs only light modules; hashing and cleaning load
more when they run.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import time

from pysingularity import messages
from pysingularity.errors import UserError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

#: What builds keep beside images, and the folder that it is in.
FOLDERS = {"package": "packages", "mount": "mounts", "log": "logs"}
#: Kinds of entries with folders of their names, and all that `cache list` knows.
OWN = ("image", "blob", "layer", "tag", "partial")
KINDS = (*OWN, *FOLDERS)
#: How long a lock made of a hard link may go without a heartbeat, in seconds.
STALE = 60.0
#: Seconds that an entry in use a moment ago is safe from cleaning for space.
FRESH = 300
#: Unfinished downloads older than this are rubbish.
ABANDONED = 3 * 86400
CHUNK = 1 << 20


def cache_folder(environ: Mapping[str, str]) -> str:
    """Return the folder of the cache: SINGULARITY_CACHEDIR (or APPTAINER_CACHEDIR) + /cache, else in the home."""
    parent = environ.get("SINGULARITY_CACHEDIR") or environ.get("APPTAINER_CACHEDIR")
    if not parent:
        parent = os.path.join(_home(environ), ".singularity")
    return os.path.join(os.path.abspath(parent), "cache")


def _home(environ: Mapping[str, str]) -> str:
    home = environ.get("HOME")
    if home:
        return home
    import pwd

    try:
        return pwd.getpwuid(os.getuid()).pw_dir
    except KeyError:
        return "/"


def temporary_folder(environ: Mapping[str, str]) -> str:
    """Return the absolute path of the folder for temporary files.

    SINGULARITY_TMPDIR when that is set (it has to exist), else the scheduler's scratch (SLURM_TMPDIR), else TMPDIR,
    else /tmp; a /tmp that lives in memory is never filled silently: then it is /var/tmp.

    Raises:
        UserError: the folder that was asked for is missing or may not be written.
    """
    for name in ("SINGULARITY_TMPDIR", "APPTAINER_TMPDIR"):
        path = environ.get(name, "")
        if path:
            if not _usable(path):
                raise UserError(
                    "no-tmpdir",
                    f"{name}={path}: is no folder that you may write to",
                    hint=f"make it (mkdir -p {path}) or unset {name}",
                )
            return os.path.abspath(path)
    for name in ("SLURM_TMPDIR", "TMPDIR"):
        path = environ.get(name, "")
        if path and _usable(path):
            return os.path.abspath(path)
    for path in ("/var/tmp", "/tmp") if in_memory("/tmp") else ("/tmp", "/var/tmp"):
        if _usable(path):
            return path
    raise UserError("no-tmpdir", "there is no folder for temporary files", hint="set SINGULARITY_TMPDIR to one")


def _usable(path: str) -> bool:
    return os.path.isdir(path) and os.access(path, os.W_OK | os.X_OK)


def in_memory(path: str) -> bool:
    """Return whether a folder lies on a tmpfs (by the mount table; the longest mount point wins)."""
    best, kind = "", ""
    try:
        with open("/proc/self/mounts", encoding="utf-8", errors="surrogateescape") as stream:
            for line in stream:
                fields = line.split(" ")
                point = fields[1]
                if (path == point or path.startswith(point.rstrip("/") + "/")) and len(point) >= len(best):
                    best, kind = point, fields[2]
    except OSError:
        return False
    return kind in ("tmpfs", "ramfs")


def size_of(text: str) -> int:
    """Return the bytes that a text such as "20G", "512MiB" or "0" means; powers of 1024.

    Raises:
        UserError: the text is no size.
    """
    word = text.strip().upper().removesuffix("IB").removesuffix("B")
    factor = 1
    if word and word[-1] in "KMGT":
        factor = 1024 ** ("KMGT".index(word[-1]) + 1)
        word = word[:-1]
    try:
        value = float(word)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1 << 50:
        raise UserError("bad-size", f"{text!r} is no size", hint="write for example 20G or 512M")
    return int(value * factor)


def limit_of(environ: Mapping[str, str]) -> int | None:
    """Return the size limit of SINGULARITY_CACHE_SIZE in bytes, or None for no limit."""
    text = environ.get("SINGULARITY_CACHE_SIZE") or environ.get("APPTAINER_CACHE_SIZE")
    return size_of(text) if text else None


class Entry:
    """One file of the cache.

    Attributes:
        kind: one of KINDS.
        key: the name below the kind's folder ("sha256:…" for blobs).
        size: bytes on the disk, of all files that belong to it.
        used: time of last use (seconds since 1970).
        names: references that led to it, if known.
    """

    __slots__ = ("key", "kind", "names", "path", "size", "used")

    def __init__(self, kind: str, key: str, path: str, size: int, used: float, names: list[str]) -> None:
        self.kind, self.key, self.path, self.size, self.used, self.names = kind, key, path, size, used, names


class Cache:
    """A cache folder; made when first needed.

    Arguments:
        folder: its path (`cache_folder`).
        limit: bytes it may hold; the least recently used entries go first.
    """

    def __init__(self, folder: str, limit: int | None = None) -> None:
        self.folder = folder
        self.limit = limit

    @classmethod
    def open(cls, environ: Mapping[str, str], *, disabled: bool = False) -> Cache | None:
        """Return the user's cache, or None when it is switched off or cannot be written (which is said)."""
        word = environ.get("SINGULARITY_DISABLE_CACHE") or environ.get("APPTAINER_DISABLE_CACHE") or ""
        if disabled or word.lower() not in ("", "0", "f", "false", "n", "no", "off"):
            return None
        cache = cls(cache_folder(environ), limit_of(environ))
        try:
            for kind in (*OWN, "lock"):
                _make_folders(os.path.join(cache.folder, kind))
        except OSError as error:
            messages.warning(f"Cache disabled - cannot make {error.filename or cache.folder}: {error.strerror}")
            return None
        if not os.access(os.path.join(cache.folder, "image"), os.W_OK | os.X_OK):
            messages.warning(f"Cache disabled - cannot write to {cache.folder}")
            return None
        return cache

    # -- places ------------------------------------------------------------------------------------------------

    def path(self, kind: str, key: str) -> str:
        """Return the place of an entry."""
        if kind == "blob":
            algorithm, _, value = key.partition(":")
            return os.path.join(self.folder, "blob", algorithm, value[:2], value)
        return os.path.join(self.folder, kind, key.replace(":", "-").replace("/", "_"))

    def image_path(self, key: str) -> str:
        """Return the place of a finished image."""
        return self.path("image", key + ".sif")

    # -- finding -----------------------------------------------------------------------------------------------

    def blob(self, digest: str, size: int | None = None) -> str | None:
        """Return the path of a blob that is there and whole.

        Blobs are verified before they get their name, so that their length tells whether a file system or a person has
        damaged them since; whoever reads one whole hashes it again on the way (`registry.oci`).
        """
        path = self.path("blob", digest)
        try:
            status = os.stat(path)
        except OSError:
            return None
        if size is not None and status.st_size != size:
            messages.warning(f"{path}: {status.st_size} bytes instead of {size}: fetched again")
            self.drop("blob", digest)
            return None
        _touch(path, status)
        return path

    def image(self, key: str) -> str | None:
        """Return the path of a finished image if it is there and is what was made; otherwise it is dropped."""
        path = self.image_path(key)
        try:
            status = os.stat(path)
        except OSError:
            return None
        record = read_lines(path[:-4] + ".record")
        if record is None or "sha256" not in record:
            self.drop("image", key)
            return None
        if record.get("identity") != _identity(status):
            if record.get("size") != str(status.st_size) or hash_file(path) != record["sha256"]:
                messages.warning(f"{path} is damaged: made anew")
                self.drop("image", key)
                return None
            self._record(path, record, status)
        _touch(path, status)
        return path

    def image_digest(self, key: str) -> str:
        """Return "sha256:…" of a finished image as recorded when it was made."""
        record = read_lines(self.image_path(key)[:-4] + ".record") or {}
        return "sha256:" + record.get("sha256", "")

    # -- adding ------------------------------------------------------------------------------------------------

    def new_file(self, kind: str, key: str) -> str:
        """Return a name for a file in the making, beside its final place."""
        final = self.path(kind, key)
        _make_folders(os.path.dirname(final))
        return f"{final}.{os.getpid()}-{os.urandom(4).hex()}.new"

    def publish_image(self, key: str, path: str, sha256: str, facts: Mapping[str, str]) -> str:
        """Put a finished image in its place by rename and return the place.

        Arguments:
            path: the finished, synced file, on the cache's file system (`new_file`).
            sha256: hex digest of its bytes.
            facts: further lines of the record ("from", "manifest").
        """
        final = self.image_path(key)
        os.chmod(path, 0o555)  # shared by hard links: changing it in place would change every pulled copy
        status = os.stat(path)
        self._record(final, {**facts, "sha256": sha256, "size": str(status.st_size)}, status)
        os.rename(path, final)
        self.shrink(keep={final})
        return final

    def _record(self, path: str, facts: Mapping[str, str], status: os.stat_result) -> None:
        try:
            write_lines(path[:-4] + ".record", {**facts, "identity": _identity(status)})
        except OSError as error:
            messages.debug(f"{path}: record not written: {error}")

    def add_blob(self, digest: str, path: str) -> str:
        """Put a verified file in its place as a blob and return the place."""
        final = self.path("blob", digest)
        _make_folders(os.path.dirname(final))
        os.chmod(path, 0o444)
        os.rename(path, final)
        return final

    def add_bytes(self, digest: str, data: bytes) -> None:
        """Keep a small blob that was verified."""
        new = self.new_file("blob", digest)
        with open(new, "wb") as file:
            file.write(data)
        self.add_blob(digest, new)

    # -- tags --------------------------------------------------------------------------------------------------

    def remember(self, name: str, facts: Mapping[str, str]) -> None:
        """Remember what a reference (with its platform) pointed to just now."""
        try:
            path = self._tag_path(name)
            write_lines(path, {"name": name, "time": str(int(time.time())), **facts})
        except OSError as error:
            messages.debug(f"tag not remembered: {error}")

    def recall(self, name: str, age: float | None = None) -> dict[str, str] | None:
        """Return what a reference pointed to, when that was asked at most `age` seconds ago (None: ever)."""
        facts = read_lines(self._tag_path(name))
        if facts is None or facts.get("name") != name:
            return None
        try:
            then = float(facts["time"])
        except (KeyError, ValueError):
            return None
        if age is not None and not 0 <= time.time() - then <= age:
            return None
        return facts

    def _tag_path(self, name: str) -> str:
        import zlib  # already loaded by the readers of images; sha256 would cost milliseconds more

        data = name.encode("utf-8", "surrogateescape")
        return os.path.join(self.folder, "tag", f"{zlib.crc32(data):08x}{zlib.adler32(data):08x}{len(data):04x}")

    # -- locks -------------------------------------------------------------------------------------------------

    def lock(self, key: str, *, waiting: Callable[[], None] | None = None) -> Lock:
        """Return a held lock for a key; `waiting` is called once when somebody else has it."""
        return Lock(self.path("lock", key), waiting)

    def lock_partial(self, key: str) -> Lock:
        """Return the held lock of an unfinished download."""
        return Lock(self.path("lock", "partial-" + key))

    def in_work(self, entry: Entry) -> bool:
        """Return whether another process is making an unfinished file right now."""
        if entry.kind == "mount":
            return _locked(entry.path + ".lock")
        if entry.kind != "partial":
            return False
        name = os.path.basename(entry.path)
        key = "image-" + name.rpartition(".sif.")[0] if name.endswith(".new") else "partial-" + name
        return _held(self.path("lock", key))

    # -- cleaning ----------------------------------------------------------------------------------------------

    def entries(self, kinds: tuple[str, ...] = KINDS) -> Iterator[Entry]:
        """Yield what the cache holds."""
        names = self._names()
        for kind in kinds:
            top = os.path.join(self.folder, FOLDERS.get(kind, kind))
            if kind == "mount":
                yield from _mounts(top)
                continue
            for path in _files(top):
                relative = os.path.relpath(path, top)
                if path.endswith((".record", ".new")) and kind == "image":
                    if path.endswith(".new") and _old(path):
                        yield Entry("partial", relative, path, _size(path), _used(path), [])
                    continue
                key = relative
                size = _size(path)
                if kind == "image":
                    key = relative.removesuffix(".sif")
                    size += _size(path[:-4] + ".record")
                elif kind == "blob":
                    parts = relative.split("/")
                    if len(parts) != 3 or "." in parts[2]:
                        if _old(path):
                            yield Entry("partial", relative, path, size, _used(path), [])
                        continue
                    key = f"{parts[0]}:{parts[2]}"
                found = names.get((kind, key), [])
                if kind == "tag":
                    found = [(read_lines(path) or {}).get("name", "")]
                elif kind == "image" and not found:
                    found = [name for name in [(read_lines(path[:-4] + ".record") or {}).get("from", "")] if name]
                yield Entry(kind, key, path, size, _used(path), found)

    def _names(self) -> dict[tuple[str, str], list[str]]:
        """Return which references lead to which entries, by the tags that are remembered."""
        found: dict[tuple[str, str], list[str]] = {}
        for path in _files(os.path.join(self.folder, "tag")):
            facts = read_lines(path) or {}
            if "image" in facts:
                found.setdefault(("image", facts["image"]), []).append(facts.get("name", ""))
            for digest in facts.get("blobs", "").split():
                found.setdefault(("blob", digest), []).append(facts.get("name", ""))
        return found

    def drop(self, kind: str, key: str) -> int:
        """Remove an entry and return the bytes that it took (0 when it was gone).

        A process that has the file open keeps what it has; one that is about to open it fetches it again.
        """
        paths = [self.path(kind, key + ".sif" if kind == "image" else key)]
        if kind == "image":
            paths.append(paths[0][:-4] + ".record")
        return sum(_remove(path) for path in paths)

    def remove(self, entry: Entry) -> int:
        """Remove an entry that `entries` yielded and return the bytes freed (none while others hold the file).

        What another process is still fetching or making stays.
        """
        if self.in_work(entry):
            return 0
        links = 0
        try:
            links = os.stat(entry.path).st_nlink
        except OSError:
            pass
        freed = _remove(entry.path)
        if entry.kind == "image":
            freed += _remove(entry.path[:-4] + ".record")
        return freed if links <= 1 else 0

    def shrink(self, *, keep: set[str] | None = None) -> int:
        """Remove the least recently used blobs and images until the limit holds; return the bytes freed."""
        if self.limit is None:
            return 0
        found = [entry for entry in self.entries(("image", "blob", "layer")) if entry.kind != "partial"]
        total = sum(entry.size for entry in found)
        freed = 0
        now = time.time()
        for entry in sorted(found, key=lambda entry: entry.used):
            if total - freed <= self.limit:
                break
            if (keep and entry.path in keep) or now - entry.used < (0 if entry.kind == "blob" else FRESH):
                continue
            self.remove(entry)
            freed += entry.size
        self.sweep()
        return freed

    def sweep(self) -> int:
        """Remove what crashed processes left, and empty lock files nobody holds; return the bytes freed."""
        freed = 0
        for path in _files(self.folder):
            unfinished = path.endswith(".new") or f"{self.folder}/partial/" in path
            if unfinished and time.time() - _changed(path) > ABANDONED:
                freed += _remove(path)
        return freed


class Lock:
    """A held lock between processes, on whatever file system; `close` or a `with` block gives it back.

    POSIX record locks first: Linux passes them to an NFS server. They belong to the process, so that threads must not
    compete for one key (they share the download instead). Where they are not supported, a hard link is the lock: making
    it is atomic everywhere, its owner renews its time, and one without heartbeat for a minute is broken.
    """

    def __init__(self, path: str, waiting: Callable[[], None] | None = None) -> None:
        self.path = path
        self._fd = -1
        self._link: _LinkLock | None = None
        try:
            self._take(waiting)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
                raise
            self._link = _LinkLock(path + ".link", waiting)

    def _take(self, waiting: Callable[[], None] | None) -> None:
        while True:
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                try:
                    fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError as error:
                    if error.errno not in (errno.EACCES, errno.EAGAIN):
                        raise
                    if waiting is not None:
                        waiting()
                    fcntl.lockf(fd, fcntl.LOCK_EX)
                if _same(fd, self.path):
                    self._fd = fd
                    return
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)  # the last owner has removed the file meanwhile

    def close(self) -> None:
        """Give the lock back; the file goes with it."""
        if self._fd >= 0:
            _remove(self.path)
            os.close(self._fd)
            self._fd = -1
        if self._link is not None:
            self._link.close()
            self._link = None

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _held(path: str) -> bool:
    """Return whether another process holds a lock."""
    try:
        if time.time() - os.stat(path + ".link").st_mtime < STALE:
            return True
    except OSError:
        pass
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in (errno.EACCES, errno.EAGAIN)
    finally:
        os.close(fd)
    return False


class _LinkLock:
    """A lock that is a hard link with a heartbeat, for file systems without POSIX locks."""

    def __init__(self, path: str, waiting: Callable[[], None] | None) -> None:
        import threading

        self.path = path
        self._own = f"{path}.{os.uname().nodename}-{os.getpid()}-{os.urandom(4).hex()}"
        os.close(os.open(self._own, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666))
        try:
            self._wait(waiting)
        except BaseException:
            _remove(self._own)
            raise
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def _wait(self, waiting: Callable[[], None] | None) -> None:
        seen: tuple[int, int] | None = None
        since = time.monotonic()
        while True:
            try:
                os.link(self._own, self.path)
                return
            except FileExistsError:
                pass
            if os.stat(self._own).st_nlink == 2:  # NFS lost the answer, not the link
                return
            if waiting is not None:
                waiting()
                waiting = None
            try:
                status = os.stat(self.path)
            except OSError:
                continue
            now = (status.st_ino, status.st_mtime_ns)
            if now != seen:
                seen, since = now, time.monotonic()
            elif time.monotonic() - since > STALE:
                self._break(now)
            time.sleep(0.1)

    def _break(self, seen: tuple[int, int]) -> None:
        """Remove a lock whose owner has died: by rename, so that exactly one of the waiting does it."""
        away = self._own + ".stale"
        try:
            os.rename(self.path, away)
            status = os.stat(away)
            if (status.st_ino, status.st_mtime_ns) != seen:
                os.link(away, self.path)  # it changed hands between the look and the rename
        except OSError:
            return
        _remove(away)

    def _beat(self) -> None:
        while not self._stop.wait(STALE / 6):
            try:
                os.utime(self._own)
            except OSError:
                return

    def close(self) -> None:
        self._stop.set()
        try:
            if os.stat(self.path).st_ino == os.stat(self._own).st_ino:
                _remove(self.path)
        except OSError:
            pass
        _remove(self._own)


def hash_file(path: str) -> str:
    """Return the hex SHA-256 of a file."""
    import hashlib  # 5 ms: only when something has changed

    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while data := file.read(CHUNK):
            digest.update(data)
    return digest.hexdigest()


def read_lines(path: str) -> dict[str, str] | None:
    """Read a small file of `key=value` lines; None when it is not there or is none."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        data = os.read(fd, CHUNK)
    except OSError:
        return None
    finally:
        os.close(fd)
    found = {}
    for line in data.decode("utf-8", "surrogateescape").split("\n"):
        key, equals, value = line.partition("=")
        if equals:
            found[key] = value
    return found if found.pop("end", "") == "1" else None


def write_lines(path: str, facts: Mapping[str, str]) -> None:
    """Write a small file of `key=value` lines by rename; its last line tells that it is whole."""
    lines = [f"{key}={value}".replace("\n", " ") for key, value in facts.items() if key != "end"]
    data = "\n".join([*lines, "end=1", ""]).encode("utf-8", "surrogateescape")
    new = f"{path}.{os.getpid()}-{os.urandom(4).hex()}.new"
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        os.write(fd, data)
    except OSError:
        _remove(new)
        raise
    finally:
        os.close(fd)
    os.rename(new, path)


def _identity(status: os.stat_result) -> str:
    """Return what changes when a file is replaced or written to, but not when it is linked or renamed."""
    return f"{status.st_size}-{status.st_ino}-{status.st_mtime_ns}"


def _make_folders(path: str) -> None:
    """Make a folder and its parents; the cache's own are the user's alone, parents as usual."""
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        if not os.path.isdir(path):
            raise
    except FileNotFoundError:
        _make_folders(os.path.dirname(path))
        _make_folders(path)


def _touch(path: str, status: os.stat_result) -> None:
    """Note that a file is used now: its atime, whatever the mount does with atimes; the mtime stays."""
    if abs(time.time() - status.st_atime) > 1:
        try:
            os.utime(path, ns=(time.time_ns(), status.st_mtime_ns))
        except OSError:  # somebody else's shared cache
            pass


def _locked(path: str) -> bool:
    """Return whether somebody holds flock(2) on a file."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(fd)
    return False


def _mounts(top: str) -> Iterator[Entry]:
    """Yield the folders that programs of builds keep things in: each is one entry."""
    try:
        names = sorted(os.listdir(top))
    except OSError:
        return
    for name in names:
        path = os.path.join(top, name)
        if not name.endswith(".lock") and os.path.isdir(path):
            # What belongs to other ids may not be looked into, and is not counted.
            yield Entry("mount", name, path, sum(_size(one) for one in _files(path)), _used(path), [])


def _files(top: str) -> Iterator[str]:
    """Yield the plain files below a folder, in order of names; what vanishes meanwhile is left out."""
    stack = [top]
    while stack:
        folder = stack.pop()
        try:
            names = sorted(os.listdir(folder))
        except OSError:
            continue
        for name in names:
            path = os.path.join(folder, name)
            try:
                mode = os.lstat(path).st_mode
            except OSError:
                continue
            if stat.S_ISDIR(mode):
                stack.append(path)
            elif stat.S_ISREG(mode):
                yield path


def _size(path: str) -> int:
    """Return the bytes that a file takes on its disk."""
    try:
        return os.lstat(path).st_blocks * 512
    except OSError:
        return 0


def _used(path: str) -> float:
    try:
        status = os.lstat(path)
    except OSError:
        return 0.0
    return max(status.st_atime, status.st_mtime)


def _changed(path: str) -> float:
    try:
        return os.lstat(path).st_mtime
    except OSError:
        return time.time()


def _old(path: str) -> bool:
    return time.time() - _changed(path) > FRESH


def _remove(path: str) -> int:
    """Remove a file and return the bytes that it took; 0 when it was gone already."""
    size = _size(path)
    try:
        os.unlink(path)
    except FileNotFoundError:
        return 0
    except OSError as error:
        messages.debug(f"{path}: {error.strerror}")
        return 0
    return size


def _same(fd: int, path: str) -> bool:
    """Return whether a name still leads to an open file."""
    try:
        mine, now = os.fstat(fd), os.stat(path)
    except OSError:
        return False
    return (mine.st_dev, mine.st_ino) == (now.st_dev, now.st_ino)


def hand_out(path: str, target: str) -> str:
    """Give the user a file of the cache: as a clone, else as a hard link, else as a copy; return which.

    `target` must not exist. A clone shares blocks and nothing else; a hard link shares the file, which is read-only.

    Raises:
        OSError: the target cannot be made.
    """
    source = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        new = os.open(target, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o755)
        try:
            try:
                fcntl.ioctl(new, 0x40049409, source)  # FICLONE: btrfs, XFS, bcachefs, NFS 4.2
                os.fchmod(new, 0o755 & ~_umask())
                return "clone"
            except OSError:
                pass
            os.unlink(target)
            try:
                os.link(path, target)
                return "link"
            except OSError:  # another file system, or another user's file
                pass
        finally:
            os.close(new)
        new = os.open(target, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o755)
        try:
            copy_bytes(source, new)
        except BaseException:
            os.unlink(target)
            raise
        finally:
            os.close(new)
        return "copy"
    finally:
        os.close(source)


def copy_bytes(source: int, target: int) -> None:
    """Copy a file to an empty one, inside the kernel where it can be done."""
    try:
        while os.copy_file_range(source, target, 1 << 30):
            pass
        return
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM):
            raise
    while os.sendfile(target, source, None, 1 << 30):  # None: from the current position
        pass


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
