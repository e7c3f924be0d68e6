# SPDX-License-Identifier: Apache-2.0
"""A reference to a local image: the one door of the registry room, for pull, build, exec, run and shell.

`fetch_for_run` is on the way of `exec docker://…`: when a tag was seen lately and its image is in the cache, it loads
nothing heavy. Everything else goes through `fetch`: ask what the name means now, take the finished image from the
cache or make it under a lock (so that many processes make it once), remember the tag.
"""

from __future__ import annotations

import os
import time

from pysingularity import messages
from pysingularity.cache import Cache
from pysingularity.errors import HostError, RegistryError
from pysingularity.folders import temporary_folder
from pysingularity.reference import LOCAL, Reference, parse_reference

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Protocol

    from pysingularity.registry.settings import Settings

    class Progress(Protocol):
        """Told how far a fetch is; see `build.bootstrap.BootstrapRequest.progress`."""

        def __call__(self, text: str, done: int = 0, total: int = 0) -> None:
            """Say what is going on, in bytes when `total` is given."""


#: Changes when the bytes of SIF files we make change, so that old ones are not taken for new ones.
FORM = "1"
#: Schemes of images on this machine.
HERE = (*LOCAL, "docker-daemon")
#: What progress of the image in the making is called, beside that of its layers' downloads.
IMAGE = "image"
#: Seconds a tag is believed by exec, run and shell.
RUN_TAG_AGE = 3600.0


class Fetched:
    """A local image.

    Attributes:
        path: the file; a folder's path for nothing.
        temporary: whoever asked for it removes it after use.
        cached: nothing had to be fetched or made.
        digests: "image" (SHA-256 of the file), "manifest", and what else is known, as "sha256:…".
    """

    __slots__ = ("cached", "digests", "key", "path", "temporary")

    def __init__(
        self, path: str, *, key: str = "", temporary: bool = False, cached: bool = False, digests: dict[str, str]
    ) -> None:
        self.path, self.key, self.temporary, self.cached, self.digests = path, key, temporary, cached, digests


def memo_name(reference: Reference, arch: str, plain: bool, form: str) -> str:
    """Return the name under which is remembered what a reference leads to."""
    return f"{reference} {arch} {'http' if plain else 'https'} {form}"


def form_of(compression: str, level: object, when: object) -> str:
    """Return the settings that change a SIF file's bytes, as a text for keys."""
    return f"{FORM}-{compression}{'' if level is None else level}{'' if when is None else f'-{when}'}"


def fetch_for_run(text: str, arguments: object, environ: Mapping[str, str], progress: Progress | None = None) -> str:
    """Return the path of a local image for exec, run and shell.

    Arguments:
        text: a reference with a scheme.
        arguments: the command's options; those of a pull that it does not have are read from the environment.
        progress: told how far it is when something has to be fetched.

    Raises:
        RegistryError, ImageError, UserError: it cannot be had.
    """
    reference = parse_reference(text)

    def option(name: str, *variables: str) -> str:
        value = getattr(arguments, name, None)
        if isinstance(value, str) and value:
            return value
        for variable in variables:
            found = environ.get("SINGULARITY_" + variable) or environ.get("APPTAINER_" + variable)
            if found:
                return found
        return "true" if value is True else ""

    policy = option("pull", "PULL") or "missing"
    if (option("offline", "OFFLINE") or "").lower() in ("1", "t", "true", "y", "yes", "on"):
        policy = "never"
    plain = (option("no_https", "NOHTTPS", "NO_HTTPS") or "").lower() in ("1", "t", "true", "y", "yes", "on")
    disabled = getattr(arguments, "disable_cache", False) is True
    # What lies on this machine may be another image than a minute ago, and a path another one in another folder.
    if policy != "always" and not disabled and reference.scheme not in HERE:
        cache = Cache.open(environ)
        if cache is not None:
            age = option("tag_age", "TAG_AGE")
            limit = None if policy == "never" or reference.digest else float(age) if age.isdigit() else RUN_TAG_AGE
            stamp = environ.get("SOURCE_DATE_EPOCH") or None
            form = form_of(option("", "COMPRESS") or "gzip", None, stamp)
            known = cache.recall(memo_name(reference, option("arch") or _machine(), plain, form), limit)
            if known is not None and "image" in known:
                path = cache.image(known["image"])
                if path is not None:
                    return path
    names = ("arch", "authfile", "docker_username", "docker_password", "docker_host", "library")
    options: dict[str, object] = {name: getattr(arguments, name, None) for name in names}
    options |= {"no_https": plain, "pull": policy, "disable_cache": disabled}
    from pysingularity.registry.settings import settings_from  # loads the image room: only when something is fetched

    found = obtain(reference, settings_from(options, environ), progress or _say)
    if found.temporary:
        _remove_at_exit(found.path)
    return found.path


def _machine() -> str:
    machine = os.uname().machine
    return {"x86_64": "amd64", "aarch64": "arm64"}.get(machine) or _other_machine()


def _other_machine() -> str:
    from pysingularity.sif.layout import host_arch

    return host_arch()


def _say(text: str, done: int = 0, total: int = 0) -> None:
    if not total and not done:
        messages.info(text)


def _remove_at_exit(path: str) -> None:
    """Remove a file when this process has ended, whatever it becomes: a child waits for that."""
    mother = os.getpid()
    watched = os.pidfd_open(mother)
    if os.fork():
        os.close(watched)
        return
    try:
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        for number in (0, 1, 2):
            os.dup2(null, number)
        import select

        select.select([watched], [], [])
        os.unlink(path)
    finally:
        os._exit(0)


def fetch(reference: Reference, *, settings: Mapping[str, object] | Settings, progress: Progress | None = None) -> str:
    """Return the path of a local image file for a reference; see `obtain` for more of it.

    Arguments:
        settings: `Settings`, or options by name with "environ".

    Raises:
        RegistryError, ImageError, UserError: it cannot be had.
    """
    from pysingularity.registry.settings import Settings, settings_from

    whole = settings if isinstance(settings, Settings) else settings_from(settings)
    return obtain(reference, whole, progress or _say).path


def obtain(reference: Reference, settings: Settings, progress: Progress) -> Fetched:
    """Return the local image that a reference means, fetched and made when it is not in the cache.

    Raises:
        RegistryError, ImageError, UserError: it cannot be had.
        HostError: no space, no temporary folder.
    """
    from pysingularity import thirdparty

    thirdparty.enable()  # urllib3, isal, zstd
    cache = Cache.open(settings.environ, disabled=settings.disable_cache)
    form = form_of(settings.compression, settings.level, settings.when)
    arch = settings.arch + (f"/{settings.variant}" if settings.variant else "")
    memo = memo_name(reference, arch, settings.no_https, form)
    local = reference.scheme in HERE
    if cache is not None and settings.policy != "always" and not local:
        age = None if settings.policy == "never" or reference.digest else settings.tag_age
        known = cache.recall(memo, age)
        found = _known(cache, known) if known is not None else None
        if found is not None:
            return found
    if settings.policy == "never" and not local:
        raise RegistryError(
            "not-in-cache",
            f"{reference}: not in the cache, and nothing may be asked for",
            hint="leave out --offline (or --pull never) once",
        )
    job = _Job(reference, settings, cache, memo, form, progress)
    try:
        if local:
            return job.local()
        if reference.scheme == "docker":
            return job.registry()
        return job.file()
    except OSError as error:
        if error.errno in (28, 122):
            place = cache.folder if cache is not None else temporary_folder(settings.environ)
            raise HostError(
                "disk-full",
                f"{reference}: no space left in {place}",
                hint="clean the cache (singularity cache clean), or set SINGULARITY_CACHEDIR and SINGULARITY_TMPDIR",
            ) from None
        raise


def _known(cache: Cache, facts: Mapping[str, str]) -> Fetched | None:
    key = facts.get("image", "")
    path = cache.image(key) if key else None
    if path is None:
        return None
    digests = {"image": cache.image_digest(key)}
    digests |= {name: facts[name] for name in ("manifest", "config") if facts.get(name)}
    return Fetched(path, key=key, cached=True, digests=digests)


class _Job:
    """One fetch that has to do something."""

    def __init__(
        self,
        reference: Reference,
        settings: Settings,
        cache: Cache | None,
        memo: str,
        form: str,
        progress: Progress,
    ) -> None:
        self.reference, self.settings, self.cache, self.memo = reference, settings, cache, memo
        self.form, self.progress = form, progress
        self.folder = temporary_folder(settings.environ)

    def note(self, text: str) -> None:
        """Say what is being waited for."""
        self.progress(text)

    def key(self, digest: str, name: str) -> str:
        """Return the cache's key for an image: what it is made from, under which name, and how."""
        import zlib

        detail = zlib.crc32(f"{name} {self.form}".encode("utf-8", "surrogateescape"))
        return f"{digest.partition(':')[2]}-{detail:08x}"

    def place(self, key: str) -> str:
        """Return where a new image without cache goes."""
        return os.path.join(self.folder, f"singularity-{key[:12]}-{os.getpid()}-{os.urandom(3).hex()}.sif")

    def finish(self, key: str, made: Callable[[str], dict[str, str]]) -> Fetched:
        """Return the image of a key from the cache, or let `made(path)` make it there (or in a temporary place)."""
        from pysingularity.files import hash_file

        if self.cache is None:
            path = self.place(key)
            facts = made(path)
            facts.setdefault("image", "sha256:" + hash_file(path))
            return Fetched(path, temporary=True, digests=facts)
        path_known = self.cache.image(key)
        facts = {}
        cached = path_known is not None
        if path_known is None:

            def waiting() -> None:
                self.note("waiting for another process that is fetching this image")

            with self.cache.lock("image-" + key, waiting=waiting):
                path_known = self.cache.image(key)
                cached = path_known is not None
                if path_known is None:
                    new = self.cache.new_file("image", key + ".sif")
                    try:
                        facts = made(new)
                        sha256 = facts.get("image", "").removeprefix("sha256:") or hash_file(new)
                        record = {"from": str(self.reference), **facts}
                        path_known = self.cache.publish_image(key, new, sha256, record)
                    finally:
                        if os.path.exists(new):
                            os.unlink(new)
        return Fetched(path_known, key=key, cached=cached, digests={**facts, "image": self.cache.image_digest(key)})

    def remember(self, fetched: Fetched, facts: Mapping[str, str]) -> Fetched:
        """Keep in mind what the reference led to."""
        fetched.digests |= {name: value for name, value in facts.items() if name in ("manifest", "config", "top")}
        if self.cache is not None and fetched.key:
            self.cache.remember(self.memo, {"image": fetched.key, **facts})
        return fetched

    # -- registries --------------------------------------------------------------------------------------------

    def registry(self) -> Fetched:
        """Fetch an image from an OCI registry."""
        from pysingularity.registry import oci

        reference, settings = self.reference, self.settings
        repository = oci.Repository(reference, settings, note=self.note)
        name = reference.digest or reference.tag
        known = self.cache.recall(self.memo) if self.cache is not None else None
        if known is not None and not reference.digest and "top" in known:
            # Asking for the digest alone is cheap, and Docker Hub does not count it.
            same = repository.digest_of_tag(reference.tag) == known["top"]
            found = _known(self.cache, known) if same and self.cache is not None else None
            if found is not None:
                return self.remember(found, {n: v for n, v in known.items() if n not in ("name", "time")})
        manifest = top = repository.manifest(name)
        for _ in range(3):
            if not manifest.is_index:
                break
            chosen = oci.choose(manifest, settings.arch, settings.variant, str(reference))
            manifest = repository.manifest(chosen.digest)
        what = str(reference)
        layers = oci.layers_of(manifest, what)
        config_blob = oci.descriptor(manifest.value.get("config"), what)
        facts = {
            "manifest": manifest.digest,
            "top": top.digest,
            "config": config_blob.digest,
            "blobs": " ".join(dict.fromkeys([config_blob.digest, *(layer.digest for layer in layers)])),
        }
        if config_blob.media_type == "application/vnd.sylabs.sif.config.v1+json":
            raise RegistryError(
                "is-oras", f"{reference}: is a SIF file", hint=f"fetch it by oras://{reference.repository}"
            )
        pinned = f"{reference.repository}@{manifest.digest}"
        key = self.key(manifest.digest, pinned)

        def made(path: str) -> dict[str, str]:
            return self._convert(repository, layers, config_blob, path, pinned, manifest.digest, key)

        return self.remember(self.finish(key, made), facts)

    def _convert(
        self,
        repository: object,
        layers: Sequence[object],
        config_blob: object,
        path: str,
        pinned: str,
        digest: str,
        key: str,
    ) -> dict[str, str]:
        from pysingularity.registry import oci
        from pysingularity.registry.assemble import assemble, definition_for, image_config
        from pysingularity.registry.blobs import Download, Downloads
        from pysingularity.registry.reuse import Reuse

        assert isinstance(repository, oci.Repository)
        assert isinstance(config_blob, oci.Descriptor)
        what = str(self.reference)
        config = self._small(repository, config_blob)
        image_config(config, what)
        board = _Board(self.progress)
        unique: dict[str, Download] = {}
        order: list[Download] = []
        total = told = 0

        def taken(count: int) -> None:
            nonlocal told
            told += count
            self.progress(IMAGE, told, total)

        for number, layer in reversed(list(enumerate(layers))):
            assert isinstance(layer, oci.Descriptor)
            if layer.digest not in unique:
                title = f"layer {number + 1}/{len(layers)} {layer.digest[7:19]}"
                tell = board.line(title, layer.size)

                def start(offset: int, end: int, layer: oci.Descriptor = layer) -> object:
                    return repository.open_blob(layer, offset, end)

                one = unique[layer.digest] = Download(layer, start, tell)  # type: ignore[arg-type]
                total += layer.size
                one.taken = taken
            order.insert(0, unique[layer.digest])
        reuse, later = None, []
        if self.cache is not None:
            blobs = [layer for layer in layers if isinstance(layer, oci.Descriptor)]
            # The level and library of a compressor do not show in stretches of other settings.
            form = f"{FORM}-{self.settings.compression}-{self.settings.level}"
            reuse = Reuse(self.cache, [blob.digest for blob in blobs], [blob.size for blob in blobs], form)
            later = [order[number] for number in range(len(order)) if reuse.promising(number)]
        definition = definition_for("docker", pinned)
        try:
            with Downloads(list(unique.values()), self.cache, self.folder, later=later):
                written = assemble(
                    order,
                    config,
                    path,
                    self.settings,
                    definition=definition,
                    what=what,
                    reuse=reuse,
                    done=lambda number: order[number].passed(),
                )
            if reuse is not None:
                reuse.publish(key, written.partition_offset)
        finally:
            if reuse is not None:
                reuse.close()
        if reuse is not None and reuse.used:
            self.note(f"{len(reuse.used)} of {len(layers)} layers were copied from other images")
        return {"manifest": digest, "partition": written.partition_digest}

    def _small(self, repository: object, blob: object) -> bytes:
        """Return a small blob from the cache or the registry."""
        from pysingularity.registry import oci

        assert isinstance(repository, oci.Repository)
        assert isinstance(blob, oci.Descriptor)
        if self.cache is not None:
            path = self.cache.blob(blob.digest, blob.size)
            if path is not None:
                try:
                    with open(path, "rb") as file:
                        data = file.read()
                    oci.check(data, blob.digest, path)
                    return data
                except FileNotFoundError:  # cleaned away just now
                    pass
                except RegistryError:
                    self.cache.drop("blob", blob.digest)
        data = repository.small_blob(blob)
        if self.cache is not None:
            self.cache.add_bytes(blob.digest, data)
        return data

    # -- what lies here ----------------------------------------------------------------------------------------

    def local(self) -> Fetched:
        """Convert an archive, a layout, or an image of a daemon."""
        import contextlib

        from pysingularity.registry.archive import daemon_id, open_local
        from pysingularity.registry.assemble import assemble, definition_for

        what = str(self.reference)
        if self.reference.scheme == "docker-daemon" and self.cache is not None:
            # The daemon would have to pack the whole image; its id tells whether we have it.
            self.memo += " " + daemon_id(self.reference, self.settings)
            known = self.cache.recall(self.memo)
            found = _known(self.cache, known) if known is not None else None
            if found is not None:
                return found
        name = os.path.basename(self.reference.path.rstrip("/")) or self.reference.name
        with contextlib.contextmanager(open_local)(self.reference, self.settings, self.folder) as image:
            pinned = f"{name}@{image.digest}" if self.reference.scheme != "docker-daemon" else str(self.reference)[14:]
            key = self.key(image.digest, f"{self.reference.scheme}:{pinned}")

            def made(path: str) -> dict[str, str]:
                board, count = _Board(self.progress), len(image.layers)
                for number, layer in enumerate(image.layers):
                    layer.tell = board.line(f"layer {number + 1}/{count} {layer.digest[7:19]}".rstrip(), layer.size)
                written = assemble(
                    image.layers,
                    image.config,
                    path,
                    self.settings,
                    definition=definition_for(self.reference.scheme, pinned),
                    what=what,
                )
                return {"manifest": image.digest, "partition": written.partition_digest}

            return self.remember(self.finish(key, made), {"manifest": image.digest})

    # -- finished files ----------------------------------------------------------------------------------------

    def file(self) -> Fetched:
        """Fetch an image that is a file already: oras, library, shub, http."""
        scheme = self.reference.scheme
        if scheme == "oras":
            from pysingularity.registry import oras as room
        elif scheme == "library":
            from pysingularity.registry import library as room  # type: ignore[no-redef]
        elif scheme == "shub":
            from pysingularity.registry import shub as room  # type: ignore[no-redef]
        elif scheme in ("http", "https"):
            from pysingularity.registry import web as room  # type: ignore[no-redef]
        else:
            raise RegistryError("no-image-there", f"{self.reference}: {scheme}:// is nothing that can be fetched")
        remote = room.look_up(self.reference, self.settings, self.note)
        key = self.key("x:" + remote.key, scheme)
        if not remote.lasting:  # nothing would ever find it again
            self.cache = None

        def made(path: str) -> dict[str, str]:
            board = _Board(self.progress)
            tell = board.line(self.reference.file_name(), remote.size or 0)
            sha256 = remote.save(path, tell, self.cache)
            return {"image": "sha256:" + sha256}

        return self.remember(self.finish(key, made), remote.facts)


class _Board:
    """Adds up what several downloads tell, and passes it on a few times a second. Threads share it."""

    def __init__(self, progress: Progress) -> None:
        import threading

        self._progress, self._lock = progress, threading.Lock()

    def line(self, title: str, total: int) -> Callable[[int], None]:
        """Return a function that takes byte counts of one download."""
        done, last = 0, 0.0

        def tell(count: int) -> None:
            nonlocal done, last
            done += count
            now = time.monotonic()
            if now - last < 0.1 and (done < total or not total):
                return
            last = now
            with self._lock:
                self._progress(title, done, total)

        return tell
