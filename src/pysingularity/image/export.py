# SPDX-License-Identifier: Apache-2.0
"""Images for other engines: an archive that `docker load` reads, and the OCI layout as a folder or an archive.

The root file system becomes one tar layer that streams from the image's own bytes; nothing is unpacked. Compressed
layers are many small gzip members, made in parallel, so that the result does not depend on the number of threads.
Times and order are fixed: the same image gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
import time
import zlib
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

from pysingularity.image import metadata
from pysingularity.image.inside import squashfs_of
from pysingularity.image.open import open_image
from pysingularity.image.output import OutputFile, OutputFolder, epoch
from pysingularity.image.tree import FILE, Unread, open_readable, scan_directory
from pysingularity.sif.layout import host_arch

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import Any, Protocol

    from pysingularity.image.open import Image
    from pysingularity.image.tree import Owners
    from pysingularity.squashfs.inode import Inode
    from pysingularity.squashfs.node import Node
    from pysingularity.squashfs.reader import SquashfsImage
    from pysingularity.trust.encryption import Key

    class Sink(Protocol):
        """Where the bytes of a layer go."""

        def write(self, data: bytes) -> None:
            """Take some bytes."""


KINDS = {
    "file": tarfile.REGTYPE,
    "dir": tarfile.DIRTYPE,
    "symlink": tarfile.SYMTYPE,
    "char": tarfile.CHRTYPE,
    "block": tarfile.BLKTYPE,
    "fifo": tarfile.FIFOTYPE,
}
PIECE = 1 << 20
#: Uncompressed bytes in each gzip member of a layer.
MEMBER = 1 << 20
DOCKER, OCI, OCI_ARCHIVE = "docker-archive", "oci", "oci-archive"
LAYER_TYPE = "application/vnd.oci.image.layer.v1.tar+gzip"
CONFIG_TYPE = "application/vnd.oci.image.config.v1+json"
MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
INDEX_TYPE = "application/vnd.oci.image.index.v1+json"
DEFAULT_PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def export(
    source: str,
    output: str,
    kind: str,
    *,
    name: str = "",
    threads: int | None = None,
    when: int | None = None,
    force: bool = False,
    owners: Owners | None = None,
    key: Key | None = None,
) -> str:
    """Write an image as an archive for Docker, an OCI layout, or an archive of one; return the image's id.

    Arguments:
        source: path of an image of any kind.
        output: path of the archive or folder.
        kind: "docker-archive", "oci" or "oci-archive".
        name: NAME[:TAG] that the image has there; by default made from the name of the output.
        threads: of the compression.
        when: time of creation; by default SOURCE_DATE_EPOCH, else that of the newest file.
        force: replace what stands at `output`.
        owners: for sandboxes, see `scan_directory`.
        key: opens an image that is encrypted.

    Raises:
        SingularityError: the image cannot be read, or the output cannot be written.
    """
    when = epoch(os.environ) if when is None else when
    repository, tag = reference_of(name or os.path.basename(output.rstrip("/")))
    with open_image(source) as image:
        image.unlock(key)
        if image.kind != "sandbox" and image.filesystem != "squashfs":
            from pysingularity.image.convert import unpack_into

            with OutputFolder(f"{output}.tree") as unpacked:
                unpack_into(image, unpacked.partial)
                with open_image(unpacked.partial) as folder:
                    layer = Layer(folder, when, owners)
                    return _export(folder, layer, output, kind, repository, tag, threads, force)
        layer = Layer(image, when, owners)
        return _export(image, layer, output, kind, repository, tag, threads, force)


def _export(
    image: Image, layer: Layer, output: str, kind: str, repository: str, tag: str, threads: int | None, force: bool
) -> str:
    base = base_config(image)
    if kind == DOCKER:
        with OutputFile(output, force=force, mode=0o644) as file:
            identity = _docker(file.fd, layer, base, f"{repository}:{tag}")
            file.publish()
        return identity
    with OutputFolder(output if kind == OCI else f"{output}.layout", force=force and kind == OCI) as folder:
        os.chmod(folder.partial, 0o755)
        if kind == OCI:
            identity = _layout(folder.partial, layer, base, tag, threads)
            folder.publish()
            return identity
        with OutputFile(output, force=force, mode=0o644) as file:
            identity = _layout(folder.partial, layer, base, tag, threads)
            _pack(folder.partial, file.fd, layer.when)
            file.publish()
    return identity


class Layer:
    """The root file system of an image as one tar stream.

    Arguments:
        image: a sandbox or an image with a squashfs; open as long as the layer is used.
        when: time of creation; None takes the newest file's.
        owners: for sandboxes.
    """

    def __init__(self, image: Image, when: int | None, owners: Owners | None) -> None:
        self._squashfs: SquashfsImage | None = None
        self._root: Node | None = None
        self._path = image.path
        if image.kind == "sandbox":
            self._root = scan_directory(image.path, owners=owners, latest=epoch(os.environ))
            newest = max(node.mtime for _, node in self._root.walk())
        else:
            self._squashfs = squashfs_of(image)
            newest = self._squashfs.superblock.mtime
        self.when = newest if when is None else when

    def write(self, sink: Sink) -> None:
        """Write the tar stream."""
        members = self._of_squashfs(self._squashfs) if self._squashfs is not None else self._of_folder()
        for info, pieces in members:
            sink.write(info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape"))
            for piece in pieces:
                sink.write(piece)
            if info.isreg() and info.size % 512:
                sink.write(bytes(-info.size % 512))
        sink.write(bytes(1024))

    def _of_squashfs(self, squashfs: SquashfsImage) -> Iterator[tuple[tarfile.TarInfo, Iterable[bytes]]]:
        first: dict[int, bytes] = {}
        for path, inode in squashfs.walk():
            path = path.strip(b"/")
            if not path or inode.kind not in KINDS:
                continue
            info = member(path, inode)
            info.mtime = inode.mtime
            xattrs = squashfs.xattrs(inode)
            pieces: Iterable[bytes] = ()
            if inode.nlink > 1 and inode.kind != "dir":
                known = first.setdefault(inode.ref, path)
                if known != path:
                    yield _hard_link(info, known), ()
                    continue
            if inode.kind == "file":
                info.size = inode.size
                pieces = _squashfs_pieces(squashfs, inode)
            yield _with_xattrs(info, xattrs), pieces

    def _of_folder(self) -> Iterator[tuple[tarfile.TarInfo, Iterable[bytes]]]:
        if self._root is None:
            return
        first: dict[int, bytes] = {}
        top = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for path, node in self._root.walk():
                if not path:
                    continue
                info = member(path, node)
                pieces: Iterable[bytes] = ()
                known = first.setdefault(id(node), path)
                if known != path:
                    yield _hard_link(info, known), ()
                    continue
                if isinstance(node.source, Unread):
                    info.size = node.source.size
                    pieces = _file_pieces(top, path, info.size, self._path)
                yield _with_xattrs(info, node.xattrs or {}), pieces
        finally:
            os.close(top)


def member(path: bytes, node: Node | Inode) -> tarfile.TarInfo:
    """Return the tar header of an entry, without size and extended attributes."""
    info = tarfile.TarInfo(os.fsdecode(path))
    info.type = KINDS[node.kind]
    info.mode, info.uid, info.gid, info.mtime = node.mode, node.uid, node.gid, node.mtime
    if node.kind == "symlink":
        info.linkname, info.mode = os.fsdecode(node.target), 0o777
    elif node.kind in ("char", "block"):
        info.devmajor, info.devminor = os.major(node.rdev), os.minor(node.rdev)
    return info


def _hard_link(info: tarfile.TarInfo, target: bytes) -> tarfile.TarInfo:
    info.type, info.linkname = tarfile.LNKTYPE, os.fsdecode(target)
    return info


def _with_xattrs(info: tarfile.TarInfo, xattrs: dict[bytes, bytes]) -> tarfile.TarInfo:
    if xattrs:
        info.pax_headers = {
            "SCHILY.xattr." + os.fsdecode(key): value.decode("utf-8", "surrogateescape")
            for key, value in sorted(xattrs.items())
        }
    return info


def _squashfs_pieces(squashfs: SquashfsImage, inode: Inode) -> Iterator[bytes]:
    for at in range(0, inode.size, PIECE):
        yield squashfs.read(inode, at, min(PIECE, inode.size - at))


def _file_pieces(top: int, path: bytes, size: int, shown: str) -> Iterator[bytes]:
    from pysingularity.errors import UserError

    name = os.fsdecode(path)
    fd = open_readable(name, FILE, top, os.path.join(shown, name))
    try:
        left = size
        while left:
            piece = os.read(fd, min(PIECE, left))
            if not piece:
                raise UserError("file-changed", f"{os.path.join(shown, name)}: became shorter while it was read")
            left -= len(piece)
            yield piece
    finally:
        os.close(fd)


class Plain:
    """Write a layer uncompressed to a file, from its current position; `digest` and `size` afterwards."""

    def __init__(self, fd: int) -> None:
        self._fd, self._hash, self.size = fd, hashlib.sha256(), 0
        self._waiting: list[bytes] = []
        self._bytes = 0

    def write(self, data: bytes) -> None:
        """Take some bytes."""
        self._waiting.append(data)
        self._bytes += len(data)
        if self._bytes >= PIECE:
            self.flush()

    def flush(self) -> None:
        """Hand on what waits."""
        data = b"".join(self._waiting)
        self._waiting, self._bytes = [], 0
        self._hash.update(data)
        self.size += len(data)
        _write_all(self._fd, data)

    @property
    def digest(self) -> str:
        """The SHA-256 in hexadecimal digits."""
        self.flush()
        return self._hash.hexdigest()


class Gzip:
    """Write a layer as gzip members to a file; `diff_id`, `digest` and `size` after `close`."""

    def __init__(self, fd: int, threads: int | None) -> None:
        self._fd = fd
        count = threads or len(os.sched_getaffinity(0))
        self._pool = ThreadPoolExecutor(count)
        self._queue: deque[Future[bytes]] = deque()
        self._most = 4 * count
        self._plain, self._packed, self.size = hashlib.sha256(), hashlib.sha256(), 0
        self._buffer = bytearray()
        self._compress = gzip_member()

    def write(self, data: bytes) -> None:
        """Take some bytes."""
        self._buffer += data
        while len(self._buffer) >= MEMBER:
            self._send(bytes(self._buffer[:MEMBER]))
            del self._buffer[:MEMBER]

    def _send(self, data: bytes) -> None:
        self._plain.update(data)
        self._queue.append(self._pool.submit(self._compress, data))
        while len(self._queue) > self._most:
            self._take()

    def _take(self) -> None:
        data = self._queue.popleft().result()
        self._packed.update(data)
        self.size += len(data)
        _write_all(self._fd, data)

    def close(self) -> None:
        """Write everything and end the threads."""
        if self._buffer:
            self._send(bytes(self._buffer))
            self._buffer.clear()
        while self._queue:
            self._take()
        self._pool.shutdown()

    def abandon(self) -> None:
        """End the threads without writing what waits."""
        self._pool.shutdown(cancel_futures=True)

    @property
    def diff_id(self) -> str:
        """The SHA-256 of the uncompressed stream, in hexadecimal digits."""
        return self._plain.hexdigest()

    @property
    def digest(self) -> str:
        """The SHA-256 of the compressed stream, in hexadecimal digits."""
        return self._packed.hexdigest()


def gzip_member() -> Callable[[bytes], bytes]:
    """Return a function that makes a gzip member of bytes: by libdeflate where it is installed, otherwise by zlib."""
    try:
        import deflate
    except ImportError:

        def compress(data: bytes) -> bytes:
            one = zlib.compressobj(6, zlib.DEFLATED, 31)
            return one.compress(data) + one.flush()

        return compress

    def fast(data: bytes) -> bytes:
        return bytes(deflate.gzip_compress(data, 6))

    return fast


def base_config(image: Image) -> dict[str, Any]:
    """Return the OCI configuration for an image: the one it was made from, or one that starts its runscript."""
    stored = metadata.oci_config_of(image)
    config: dict[str, Any] = {}
    if stored is not None:
        try:
            found = json.loads(stored)
        except (ValueError, RecursionError):
            found = None
        config = found if isinstance(found, dict) else {}
    inner = config.get("config")
    if not isinstance(inner, dict):
        inner = {"Env": [DEFAULT_PATH], "Entrypoint": [f"/{metadata.META}/actions/run"]}
    labels = metadata.attributes_of(image).get("labels") or {}
    if labels:
        inner = {**inner, "Labels": {**(inner.get("Labels") or {}), **labels}}
    base: dict[str, Any] = {"architecture": image.arch or host_arch(), "os": "linux"}
    for key in ("architecture", "variant", "os", "author"):
        if key in config:
            base[key] = config[key]
    base["config"] = inner
    return base


def finished_config(base: dict[str, Any], diff_id: str, when: int) -> bytes:
    """Return the configuration with its one layer, as JSON."""
    created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(when))
    document = {
        "created": created,
        **base,
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{diff_id}"]},
        "history": [{"created": created, "created_by": "singularity convert"}],
    }
    return metadata.json_bytes(document)


def reference_of(text: str) -> tuple[str, str]:
    """Return name and tag that other engines accept, made from a name (of a file, or NAME:TAG)."""
    name, _, tag = text.partition(":")
    for ending in (".tar.gz", ".tar", ".sif", ".simg", ".img"):
        name = name.removesuffix(ending)
    clean = "".join(sign if sign.isascii() and (sign.isalnum() or sign in "._-/") else "-" for sign in name.lower())
    return clean.strip("._-/") or "image", tag or "latest"


def _docker(fd: int, layer: Layer, base: dict[str, Any], reference: str) -> str:
    # The layer streams into its place behind a header that is written when its size is known.
    os.lseek(fd, 512, os.SEEK_SET)
    sink = Plain(fd)
    layer.write(sink)
    diff_id = sink.digest
    config = finished_config(base, diff_id, layer.when)
    identity = hashlib.sha256(config).hexdigest()
    manifest = [{"Config": f"{identity}.json", "RepoTags": [reference], "Layers": ["layer.tar"]}]
    head = _plain_header("layer.tar", sink.size, layer.when)
    os.pwrite(fd, head, 0)
    tail = bytes(-sink.size % 512)
    for name, data in ((f"{identity}.json", config), ("manifest.json", metadata.json_bytes(manifest))):
        tail += _plain_header(name, len(data), layer.when) + data + bytes(-len(data) % 512)
    _write_all(fd, tail + bytes(1024))
    return f"sha256:{identity}"


def _plain_header(name: str, size: int, when: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mtime, info.mode = size, when, 0o644
    return info.tobuf(tarfile.GNU_FORMAT)


def _layout(folder: str, layer: Layer, base: dict[str, Any], tag: str, threads: int | None) -> str:
    blobs = os.path.join(folder, "blobs", "sha256")
    os.makedirs(blobs)
    temporary = os.path.join(blobs, "layer")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        sink = Gzip(fd, threads)
        try:
            layer.write(sink)
            sink.close()
        except BaseException:
            sink.abandon()
            raise
        os.fsync(fd)
    finally:
        os.close(fd)
    os.rename(temporary, os.path.join(blobs, sink.digest))
    config = finished_config(base, sink.diff_id, layer.when)
    config_digest = _blob(blobs, config)
    manifest = metadata.json_bytes(
        {
            "schemaVersion": 2,
            "mediaType": MANIFEST_TYPE,
            "config": {"mediaType": CONFIG_TYPE, "digest": f"sha256:{config_digest}", "size": len(config)},
            "layers": [{"mediaType": LAYER_TYPE, "digest": f"sha256:{sink.digest}", "size": sink.size}],
        }
    )
    entry = {
        "mediaType": MANIFEST_TYPE,
        "digest": f"sha256:{_blob(blobs, manifest)}",
        "size": len(manifest),
        "platform": {"architecture": base["architecture"], "os": base["os"]},
        "annotations": {"org.opencontainers.image.ref.name": tag},
    }
    index = metadata.json_bytes({"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": [entry]})
    _write_file(os.path.join(folder, "index.json"), index)
    _write_file(os.path.join(folder, "oci-layout"), b'{"imageLayoutVersion":"1.0.0"}')
    return f"sha256:{config_digest}"


def _blob(folder: str, data: bytes) -> str:
    digest = hashlib.sha256(data).hexdigest()
    _write_file(os.path.join(folder, digest), data)
    return digest


def _write_file(path: str, data: bytes) -> None:
    with open(path, "xb") as file:
        file.write(data)


def _pack(folder: str, fd: int, when: int) -> None:
    """Write an OCI layout as a tar archive."""
    names = ["oci-layout", "index.json", "blobs", "blobs/sha256"]
    names += [f"blobs/sha256/{name}" for name in sorted(os.listdir(os.path.join(folder, "blobs", "sha256")))]
    for name in names:
        path = os.path.join(folder, name)
        if os.path.isdir(path):
            info = tarfile.TarInfo(name)
            info.type, info.mode, info.mtime = tarfile.DIRTYPE, 0o755, when
            _write_all(fd, info.tobuf(tarfile.GNU_FORMAT))
            continue
        size = os.path.getsize(path)
        _write_all(fd, _plain_header(name, size, when))
        with open(path, "rb") as file:
            while piece := file.read(PIECE):
                _write_all(fd, piece)
        _write_all(fd, bytes(-size % 512))
    _write_all(fd, bytes(1024))


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
