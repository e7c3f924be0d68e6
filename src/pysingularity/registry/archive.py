# SPDX-License-Identifier: Apache-2.0
"""Images that lie on this machine: docker-archive files, OCI layouts and their archives, a Docker daemon.

An archive is read where it lies: its members' places are noted in one pass, and layers are read from there. One that
is compressed as a whole is first inflated into the temporary folder. Everything ends as an `Image`: configuration,
layers, and the digest it is known by.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pysingularity.errors import ImageError, RegistryError, UserError
from pysingularity.reference import Reference, is_digest, parse_reference
from pysingularity.registry import oci
from pysingularity.registry.blobs import FileLayer
from pysingularity.registry.inflate import PLAIN, Inflate
from pysingularity.registry.settings import Settings
from pysingularity.registry.tar import TarReader

MOST_JSON = 8 << 20


@dataclass
class LocalImage:
    """An image that is here: `digest` of its manifest (of its configuration in docker-archives)."""

    digest: str
    config: bytes
    layers: list[FileLayer]

    def close(self) -> None:
        """Close the layers' files."""
        for layer in self.layers:
            layer.close()


class Store:
    """Files by name: a folder, or the members of an archive."""

    def __init__(self, path: str, folder: str) -> None:
        self.path = path
        self._temporary = -1
        self._members: dict[str, tuple[int, int]] | None = None
        if not os.path.isdir(path):
            self._index(folder)

    def _index(self, folder: str) -> None:
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise UserError("no-such-image", f"{self.path}: {(error.strerror or '').lower()}") from None
        with open(fd, "rb", buffering=0, closefd=True) as file:
            plain = Inflate(file.read, self.path)
            if plain.kind != PLAIN:
                self._temporary = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
                while data := plain.read(1 << 20):
                    view = memoryview(data)
                    while view:
                        view = view[os.write(self._temporary, view) :]
                self.path = f"/proc/self/fd/{self._temporary}"
        with open(self.path, "rb", buffering=0) as file:
            source = _Seeking(file, self.path)
            links = {}
            self._members = {}
            for member in TarReader(source):
                name = member.path.decode("utf-8", "surrogateescape")
                if member.kind == "file" and member.sparse is None:
                    self._members[name] = (source.position, member.size)
                elif member.kind in ("symlink", "link"):
                    target = member.target.decode("utf-8", "surrogateescape")
                    if member.kind == "symlink":
                        target = os.path.normpath(os.path.join(os.path.dirname(name), target))
                    links[name] = target
                if len(self._members) > 200_000:
                    raise ImageError("bad-archive", f"{self.path}: far too many members")
            for name, target in links.items():  # layers that Docker kept once
                if target in self._members:
                    self._members[name] = self._members[target]

    def read(self, name: str) -> bytes | None:
        """Return a small file, None when it is not there."""
        if self._members is None:
            path = os.path.join(self.path, name)
            try:
                with open(path, "rb") as file:
                    data = file.read(MOST_JSON + 1)
            except (FileNotFoundError, NotADirectoryError):
                return None
        else:
            if name not in self._members:
                return None
            offset, size = self._members[name]
            with open(self.path, "rb") as file:
                file.seek(offset)
                data = file.read(min(size, MOST_JSON + 1))
        if len(data) > MOST_JSON:
            raise ImageError("bad-archive", f"{self.path}: {name} is too large")
        return data

    def layer(self, name: str, digest: str, size: int | None = None) -> FileLayer:
        """Return a layer.

        Raises:
            ImageError: it is missing, or of another size.
        """
        if self._members is None:
            path = os.path.join(self.path, name)
            try:
                offset, length = 0, os.stat(path).st_size
            except OSError:
                raise ImageError("bad-archive", f"{self.path}: {name} is missing") from None
        else:
            path = self.path
            if name not in self._members:
                raise ImageError("bad-archive", f"{self.path}: {name} is missing")
            offset, length = self._members[name]
        if size is not None and length != size:
            raise ImageError("bad-archive", f"{self.path}: {name} has {length} bytes instead of {size}")
        return FileLayer(path, offset, length, digest, digest[:19] + "…" if digest else name)

    def close(self) -> None:
        """Let go of an inflated copy."""
        if self._temporary >= 0:
            os.close(self._temporary)
            self._temporary = -1


class _Seeking:
    """A tar source that skips by seeking."""

    def __init__(self, file: Any, what: str) -> None:
        self._file, self.what = file, what
        self.position = 0
        self._size = os.fstat(file.fileno()).st_size

    def read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            more: bytes = os.pread(self._file.fileno(), size - len(data), self.position)
            if not more:
                break
            data += more
            self.position += len(more)
        return data

    def skip(self, size: int) -> bool:
        self.position += size
        return self.position <= self._size


def open_local(reference: Reference, settings: Settings, folder: str) -> Iterator[LocalImage]:
    """Yield the one image behind a reference of a local scheme; what was opened is closed afterwards.

    Arguments:
        folder: for temporary files.

    Raises:
        UserError, ImageError, RegistryError: it is missing or damaged.
    """
    if reference.scheme == "docker-daemon":
        store = _from_daemon(reference, settings, folder)
        reference = Reference("docker-archive", path=store.path)
    else:
        store = Store(reference.path, folder)
    try:
        image = (
            _docker(store, reference) if reference.scheme == "docker-archive" else _layout(store, reference, settings)
        )
        try:
            yield image
        finally:
            image.close()
    finally:
        store.close()


def _json(data: bytes | None, what: str) -> Any:
    if data is None:
        raise ImageError("bad-archive", f"{what} is missing: no image of this kind")
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        raise ImageError("bad-archive", f"{what} is no JSON") from None


def _docker(store: Store, reference: Reference) -> LocalImage:
    """Read what `docker save` writes: manifest.json names configuration and layers of each image."""
    found = _json(store.read("manifest.json"), f"{reference.path}: manifest.json")
    if not isinstance(found, list) or not found or not all(isinstance(one, dict) for one in found):
        raise ImageError("bad-archive", f"{reference.path}: manifest.json lists no images")
    names = [name for one in found for name in one.get("RepoTags") or ()]
    if reference.digest.isdigit():
        if int(reference.digest) >= len(found):
            raise UserError("no-such-image", f"{reference}: the archive has {len(found)} images")
        one = found[int(reference.digest)]
    elif reference.name:
        wanted = _familiar(f"{reference.name}:{reference.tag or 'latest'}")
        matching = [one for one in found if wanted in {_familiar(str(name)) for name in one.get("RepoTags") or ()}]
        if not matching:
            raise UserError(
                "no-such-image", f"{reference}: not in the archive", hint="it has: " + (", ".join(names) or "no names")
            )
        one = matching[0]
    elif len(found) > 1:
        raise UserError(
            "which-image",
            f"{reference.path}: the archive has {len(found)} images",
            hint=f"say which one: docker-archive:{reference.path}:NAME of " + ", ".join(names),
        )
    else:
        one = found[0]
    config = store.read(os.path.normpath(str(one.get("Config") or "")))
    value = _json(config, f"{reference.path}: the configuration")
    paths = one.get("Layers")
    diffs = (value.get("rootfs") or {}).get("diff_ids") if isinstance(value, dict) else None
    if config is None or not isinstance(paths, list) or not isinstance(diffs, list) or len(paths) != len(diffs):
        raise ImageError("bad-archive", f"{reference.path}: layers and configuration do not fit together")
    layers = []
    for path, diff in zip(paths, diffs, strict=True):
        layer = store.layer(os.path.normpath(str(path)), "")
        if isinstance(diff, str) and is_digest(diff) and Inflate(layer.open(), reference.path).kind == PLAIN:
            layer.close()
            layer = store.layer(os.path.normpath(str(path)), diff)
        layers.append(layer)
    return LocalImage("sha256:" + hashlib.sha256(config).hexdigest(), config, layers)


def _familiar(name: str) -> str:
    """Return a name as Docker shortens it."""
    try:
        return str(parse_reference("docker://" + name))
    except UserError:
        return name


def _layout(store: Store, reference: Reference, settings: Settings) -> LocalImage:
    """Read an OCI image layout: index.json leads to a manifest, directly or by way of a platform index."""
    what = str(reference)
    data = store.read("index.json")
    _json(store.read("oci-layout"), f"{reference.path}: oci-layout")
    index = oci.parse_manifest(data or b"", "", oci.OCI_INDEX, what) if data is not None else None
    if index is None or not index.is_index:
        raise ImageError("bad-archive", f"{reference.path}: index.json is missing: no OCI layout")
    entries = [entry for entry in index.value["manifests"] if isinstance(entry, dict)]
    names = [str((entry.get("annotations") or {}).get("org.opencontainers.image.ref.name") or "") for entry in entries]
    if reference.digest:
        entries = [entry for entry in entries if entry.get("digest") == reference.digest]
    elif reference.tag:
        entries = [entry for entry, name in zip(entries, names, strict=True) if name == reference.tag]
    elif len(entries) > 1 and "latest" in names:
        entries = [entry for entry, name in zip(entries, names, strict=True) if name == "latest"]
    elif len({name for name in names if name}) > 1:
        raise UserError(
            "which-image",
            f"{what}: the layout has {len(entries)} images",
            hint="add :TAG of " + ", ".join(name for name in names if name),
        )
    if not entries:
        raise UserError(
            "no-such-image",
            f"{what}: not in the layout",
            hint="it has: " + (", ".join(filter(None, names)) or "no tags"),
        )
    if len(entries) == 1:
        found = oci.descriptor(entries[0], what)
    else:
        found = oci.choose(oci.Manifest(b"", "", "", {"manifests": entries}), settings.arch, settings.variant, what)
    manifest = _blob_manifest(store, found, what)
    for _ in range(3):
        if not manifest.is_index:
            break
        manifest = _blob_manifest(store, oci.choose(manifest, settings.arch, settings.variant, what), what)
    layers = oci.layers_of(manifest, what)
    config_blob = oci.descriptor(manifest.value.get("config"), what)
    config = store.read(_place(config_blob.digest))
    if config is None:
        raise ImageError("bad-archive", f"{what}: the configuration is missing")
    oci.check(config, config_blob.digest, what)
    opened = [store.layer(_place(blob.digest), blob.digest, blob.size) for blob in layers]
    return LocalImage(manifest.digest, config, opened)


def _place(digest: str) -> str:
    return "blobs/" + digest.replace(":", "/")


def _blob_manifest(store: Store, blob: oci.Descriptor, what: str) -> oci.Manifest:
    data = store.read(_place(blob.digest))
    if data is None:
        raise ImageError("bad-archive", f"{what}: manifest {blob.digest[:19]}… is missing")
    oci.check(data, blob.digest, what)
    return oci.parse_manifest(data, blob.digest, blob.media_type, what)


def daemon_id(reference: Reference, settings: Settings) -> str:
    """Return the id that a Docker daemon has for an image.

    Raises:
        RegistryError: it does not have it, or does not answer.
    """
    with _Daemon(reference, settings) as daemon:
        value = _json(daemon.get("json").read(MOST_JSON), f"{reference}: the daemon's answer")
    return str(value.get("Id") if isinstance(value, dict) else "")


class _Daemon:
    """A connection to a Docker daemon, for one question about one image (Docker Engine API, "Images")."""

    def __init__(self, reference: Reference, settings: Settings) -> None:
        import http.client
        from urllib.parse import quote, urlsplit

        self._reference = reference
        self._address = settings.docker_host or "unix:///var/run/docker.sock"
        name = f"{reference.name}:{reference.tag}" if not reference.digest else f"{reference.name}@{reference.digest}"
        self._name = quote(name, safe="/:@")
        parts = urlsplit(self._address)
        self._path = parts.path if parts.scheme == "unix" else ""
        if parts.scheme not in ("unix", "tcp", "http"):
            raise UserError("bad-docker-host", f"{self._address}: only unix:// and tcp:// are understood")
        self._failures = (OSError, http.client.HTTPException)
        self._connection = http.client.HTTPConnection(parts.netloc or "docker", timeout=300)

    def get(self, what: str) -> Any:
        """Ask for `/images/NAME/WHAT` and return the answer when it is one."""
        import socket

        if self._path:
            self._connection.sock = socket.socket(socket.AF_UNIX)
            self._connection.sock.connect(self._path)
        self._connection.request("GET", f"/images/{self._name}/{what}")
        answer = self._connection.getresponse()
        if answer.status != 200:
            try:
                words = str(json.loads(answer.read(1 << 16))["message"])
            except (ValueError, KeyError, TypeError):
                words = str(answer.status)
            clean = "".join(letter for letter in words if letter.isprintable())[:200]
            raise RegistryError("no-such-image", f"{self._reference}: the Docker daemon answers: {clean}")
        return answer

    def __enter__(self) -> _Daemon:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._connection.close()
        if isinstance(error, self._failures):
            reason = error.strerror.lower() if isinstance(error, OSError) and error.strerror else str(error)
            raise RegistryError(
                "no-docker-daemon", f"{self._address}: {reason}", hint="is Docker running, and may you use its socket?"
            ) from None


def _from_daemon(reference: Reference, settings: Settings, folder: str) -> Store:
    """Ask a Docker daemon for an image, as `docker save` does, into an unnamed temporary file."""
    fd = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        with open(fd, "wb", buffering=0, closefd=False) as file, _Daemon(reference, settings) as daemon:
            answer = daemon.get("get")
            while data := answer.read(1 << 18):
                view = memoryview(data)
                while view:
                    view = view[file.write(view) :]
        store = Store(f"/proc/self/fd/{fd}", folder)
    except BaseException:
        os.close(fd)
        raise
    os.close(store._temporary) if store._temporary >= 0 else None
    store._temporary = fd
    return store
