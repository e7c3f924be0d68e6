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

import os
import time

from pysingularity import messages
from pysingularity.files import (
    files_below,
    hash_file,
    identity,
    make_folders,
    read_lines,
    remove,
    size_on_disk,
    write_lines,
)
from pysingularity.folders import cache_folder, limit_of
from pysingularity.locks import Lock, held, locked

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

#: What builds keep beside images, and the folder that it is in.
FOLDERS = {"package": "packages", "mount": "mounts", "log": "logs"}
#: Kinds of entries with folders of their names, and all that `cache list` knows.
OWN = ("image", "blob", "layer", "tag", "partial")
KINDS = (*OWN, *FOLDERS)
#: Seconds that an entry in use a moment ago is safe from cleaning for space.
FRESH = 300
#: Unfinished downloads older than this are rubbish.
ABANDONED = 3 * 86400


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
                make_folders(os.path.join(cache.folder, kind))
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
        if record.get("identity") != identity(status):
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
        make_folders(os.path.dirname(final))
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
            write_lines(path[:-4] + ".record", {**facts, "identity": identity(status)})
        except OSError as error:
            messages.debug(f"{path}: record not written: {error}")

    def add_blob(self, digest: str, path: str) -> str:
        """Put a verified file in its place as a blob and return the place."""
        final = self.path("blob", digest)
        make_folders(os.path.dirname(final))
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
            return locked(entry.path + ".lock")
        if entry.kind != "partial":
            return False
        name = os.path.basename(entry.path)
        key = "image-" + name.rpartition(".sif.")[0] if name.endswith(".new") else "partial-" + name
        return held(self.path("lock", key))

    # -- cleaning ----------------------------------------------------------------------------------------------

    def entries(self, kinds: tuple[str, ...] = KINDS) -> Iterator[Entry]:
        """Yield what the cache holds."""
        names = self._names()
        for kind in kinds:
            top = os.path.join(self.folder, FOLDERS.get(kind, kind))
            if kind == "mount":
                yield from _mounts(top)
                continue
            for path in files_below(top):
                relative = os.path.relpath(path, top)
                if path.endswith((".record", ".new")) and kind == "image":
                    if path.endswith(".new") and _old(path):
                        yield Entry("partial", relative, path, size_on_disk(path), _used(path), [])
                    continue
                key = relative
                size = size_on_disk(path)
                if kind == "image":
                    key = relative.removesuffix(".sif")
                    size += size_on_disk(path[:-4] + ".record")
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
        for path in files_below(os.path.join(self.folder, "tag")):
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
        return sum(remove(path) for path in paths)

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
        freed = remove(entry.path)
        if entry.kind == "image":
            freed += remove(entry.path[:-4] + ".record")
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
        for path in files_below(self.folder):
            unfinished = path.endswith(".new") or f"{self.folder}/partial/" in path
            if unfinished and time.time() - _changed(path) > ABANDONED:
                freed += remove(path)
        return freed


def _touch(path: str, status: os.stat_result) -> None:
    """Note that a file is used now: its atime, whatever the mount does with atimes; the mtime stays."""
    if abs(time.time() - status.st_atime) > 1:
        try:
            os.utime(path, ns=(time.time_ns(), status.st_mtime_ns))
        except OSError:  # somebody else's shared cache
            pass


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
            yield Entry("mount", name, path, sum(size_on_disk(one) for one in files_below(path)), _used(path), [])


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
