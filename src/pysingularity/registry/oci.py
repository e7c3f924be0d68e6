# SPDX-License-Identifier: Apache-2.0
"""OCI registries: manifests, the choice of a platform, blobs, uploads. What a layer means is `layers`.

A `Repository` is one image's home: it knows its mirrors, logs in when asked to, and checks every manifest against its
digest. Media types are hints; what decides is the content. Source: OCI distribution and image specifications.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple
from urllib.parse import urlencode, urljoin

from pysingularity.errors import ImageError, RegistryError
from pysingularity.reference import DOCKER_HUB, Reference, is_digest
from pysingularity.registry import config, credentials
from pysingularity.registry.auth import Ask, Pass, log_in, parse_challenges
from pysingularity.registry.http import Answer, Http, place, refused
from pysingularity.registry.settings import Settings

OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
ACCEPT = f"{OCI_MANIFEST}, {DOCKER_MANIFEST}, {OCI_INDEX}, {DOCKER_LIST}"
#: The distribution specification asks registries to take manifests up to this size.
MOST_MANIFEST = 4 << 20
MOST_CONFIG = 8 << 20
MOST_LAYERS = 4096
#: Architectures with one usual variant.
USUAL_VARIANT = {"arm64": "v8"}


class Descriptor(NamedTuple):
    """What a manifest says of a blob."""

    digest: str
    size: int
    media_type: str = ""
    urls: tuple[str, ...] = ()


class Manifest(NamedTuple):
    """A manifest as it was served, checked."""

    data: bytes
    digest: str
    media_type: str
    value: dict[str, Any]

    @property
    def is_index(self) -> bool:
        """Return whether it lists other manifests instead of layers."""
        return isinstance(self.value.get("manifests"), list)


def parse_manifest(data: bytes, digest: str, media_type: str = "", what: str = "manifest") -> Manifest:
    """Return a manifest after checking that it is one.

    Raises:
        ImageError: it is none, or of the old schema 1.
    """
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        raise ImageError("bad-manifest", f"{what}: the manifest is no JSON") from None
    if not isinstance(value, dict):
        raise ImageError("bad-manifest", f"{what}: the manifest is no JSON object")
    if value.get("schemaVersion") == 1:
        raise ImageError(
            "old-manifest",
            f"{what}: the image has a manifest of the old schema 1, which names no content by digest",
            hint="push it again with any tool of this decade",
        )
    if not isinstance(value.get("manifests"), list) and not isinstance(value.get("layers"), list):
        raise ImageError("bad-manifest", f"{what}: the manifest lists neither layers nor platforms")
    return Manifest(data, digest, str(value.get("mediaType") or media_type), value)


def descriptor(value: Any, what: str) -> Descriptor:
    """Return a descriptor of a manifest.

    Raises:
        ImageError: digest or size is missing or nonsense.
    """
    if isinstance(value, dict):
        digest, size = value.get("digest"), value.get("size")
        if isinstance(digest, str) and is_digest(digest) and isinstance(size, int) and 0 <= size < 1 << 50:
            urls = tuple(url for url in value.get("urls") or () if isinstance(url, str))
            return Descriptor(digest, size, str(value.get("mediaType") or ""), urls)
    raise ImageError("bad-manifest", f"{what}: the manifest has a damaged descriptor")


def choose(index: Manifest, arch: str, variant: str, what: str) -> Descriptor:
    """Return the manifest of an index that fits a platform; attestations and other systems are passed over.

    Raises:
        ImageError: there is none; the message lists those that are there.
    """
    seen: list[str] = []
    best: tuple[int, Descriptor] | None = None
    for entry in index.value["manifests"]:
        platform = entry.get("platform") if isinstance(entry, dict) else None
        platform = platform if isinstance(platform, dict) else {}
        system, machine = platform.get("os") or "linux", platform.get("architecture") or ""
        own = str(platform.get("variant") or "")
        if system == "unknown" or machine == "unknown":
            continue
        seen.append("/".join(str(part) for part in (system, machine, own) if part))
        if system != "linux" or (machine and machine != arch):
            continue
        usual = USUAL_VARIANT.get(arch, "")
        wanted = variant or usual
        if variant and own and own != variant:
            continue
        score = 4 * (own == wanted or (not own and wanted == usual)) + 2 * bool(machine) - 1 * bool(own)
        if arch == "arm" and not variant and own:  # the newest that a usual ARM computer has
            score += {"v7": 3, "v6": 2, "v5": 1}.get(own, 0)
        if best is None or score > best[0]:
            best = (score, descriptor(entry, what))
    if best is None:
        raise ImageError(
            "no-platform",
            f"{what}: no image for linux/{arch}{'/' + variant if variant else ''}",
            hint="there are: " + ", ".join(dict.fromkeys(seen)) if seen else "the index is empty",
        )
    return best[1]


def layers_of(manifest: Manifest, what: str) -> list[Descriptor]:
    """Return the layers of a manifest, the lowest first.

    Raises:
        ImageError: a descriptor is damaged, or there are absurdly many.
    """
    layers = manifest.value.get("layers")
    if not isinstance(layers, list) or len(layers) > MOST_LAYERS:
        raise ImageError("bad-manifest", f"{what}: the manifest lists no layers, or too many")
    return [descriptor(layer, what) for layer in layers]


def check(data: bytes, digest: str, what: str) -> None:
    """Compare bytes with their digest.

    Raises:
        RegistryError: they differ.
    """
    kind, _, value = digest.partition(":")
    if hashlib.new(kind, data).hexdigest() != value:
        raise RegistryError("digest-mismatch", f"{what}: the content is not what its digest says ({digest[:19]}…)")


class Repository:
    """One repository of one registry, with its mirrors. Threads may share it.

    Arguments:
        reference: names host and repository.
        settings: credentials, plain http.
        http: the client; its `insecure` should be `insecure_hosts().__contains__`.
        actions: "pull" or "pull,push".
    """

    def __init__(
        self,
        reference: Reference,
        settings: Settings,
        *,
        actions: str = "pull",
        note: Callable[[str], None] | None = None,
    ) -> None:
        self.reference, self.settings, self.actions = reference, settings, actions
        tables = config.load(settings.environ)
        found = config.endpoints(tables, reference.host, reference.name, digest=bool(reference.digest))
        self.endpoints = [one for one in found if not one.mirror] if "push" in actions else found
        insecure = {one.host for one in self.endpoints if one.insecure}
        self.http = Http(settings.environ, insecure=insecure.__contains__, note=note or (lambda _: None))
        self._passes: dict[str, Pass] = {}
        self._lock = threading.Lock()
        self._plain: set[str] = set()

    def _bases(self, endpoint: config.Endpoint) -> list[str]:
        host = "registry-1." + DOCKER_HUB if endpoint.host == DOCKER_HUB else endpoint.host
        if (self.settings.no_https and not endpoint.mirror) or host in self._plain:
            return [f"http://{host}/v2/"]
        return [f"https://{host}/v2/", f"http://{host}/v2/"] if endpoint.insecure else [f"https://{host}/v2/"]

    def ask(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str] | None = None,
        *,
        body: Any = None,
        wanted: tuple[int, ...] = (200,),
        tolerated: tuple[int, ...] = (),
    ) -> Answer:
        """Send a request about this repository to the first endpoint that can serve it.

        Arguments:
            path: behind the repository's name ("manifests/latest").
            wanted: statuses that are an answer; `tolerated` ones are returned, too.

        Raises:
            RegistryError: nobody answers as wanted.
        """
        last: RegistryError | None = None
        for endpoint in self.endpoints:
            what = f"{endpoint.host}/{endpoint.repository}"
            bases = self._bases(endpoint)
            for base in bases:
                try:
                    answer = self._ask(endpoint, method, base + f"{endpoint.repository}/{path}", headers, body)
                except RegistryError as error:
                    last = error
                    continue
                if base.startswith("http:") and len(bases) > 1:
                    self._plain.add(endpoint.host)
                if answer.status in wanted or answer.status in tolerated:
                    return answer
                if path.startswith("manifests/"):
                    name = path.removeprefix("manifests/")
                    what += ("@" if ":" in name else ":") + name
                last = refused(answer, what)
                break
        assert last is not None
        raise last

    def _ask(
        self, endpoint: config.Endpoint, method: str, url: str, headers: Mapping[str, str] | None, body: Any
    ) -> Answer:
        tries = 2 if endpoint.mirror else None
        key = f"{endpoint.host}/{endpoint.repository}"
        for left in (2, 1, 0):  # a token of another thread may have expired meanwhile
            known = self._passes.get(key)
            secrets = {"Authorization": known.header} if known is not None and known.until > time.monotonic() else {}
            answer = self.http.request(method, url, headers, body=body, tries=tries, secrets=secrets)
            if answer.status != 401 or not left:
                return answer
            challenges = parse_challenges(answer.headers.get("WWW-Authenticate", ""))
            with self._lock:
                now = self._passes.get(key)
                if now is None or now is known or now.until <= time.monotonic():
                    try:
                        new = self._log_in(endpoint, challenges, secure=url.startswith("https:"))
                    except BaseException:
                        answer.close()
                        raise
                    if new is None:
                        return answer
                    self._passes[key] = new
            answer.close()
        raise AssertionError("unreachable")

    def _log_in(
        self, endpoint: config.Endpoint, challenges: list[Any], *, secure: bool, scopes: list[str] | None = None
    ) -> Pass | None:
        who = None
        if not endpoint.mirror:
            who = self.settings.credentials or credentials.given(self.settings.environ)
        if who is None:
            who = credentials.find(endpoint.host, endpoint.repository, self.settings.environ, self.settings.authfile)
        if scopes is None:
            scopes = [f"repository:{endpoint.repository}:{self.actions}"]
        flow = log_in(challenges, who, scopes, secure=secure)
        try:
            step: Ask = next(flow)
            while True:
                secrets = {name: value for name, value in step.headers.items() if name == "Authorization"}
                rest = {name: value for name, value in step.headers.items() if name != "Authorization"}
                answer = self.http.request(step.method, step.url, rest, body=step.body, secrets=secrets)
                step = flow.send((answer.status, answer.read()))
        except StopIteration as done:
            result: Pass | None = done.value
            return result
        except RegistryError as error:
            if error.id == "login-refused":
                error.hint = f"log in with: singularity registry login {endpoint.host}"
            raise

    def lets_in(self) -> bool:
        """Return whether the registry accepts our name and password, asked at its front door (/v2/)."""
        endpoint = self.endpoints[-1]
        url = self._bases(endpoint)[0]
        answer = self.http.request("GET", url)
        answer.close()
        if answer.status != 401:
            return answer.status == 200
        challenges = parse_challenges(answer.headers.get("WWW-Authenticate", ""))
        try:
            found = self._log_in(endpoint, challenges, secure=url.startswith("https:"), scopes=[])
        except RegistryError as error:
            if error.id == "login-refused":
                return False
            raise
        if found is None:
            return False
        answer = self.http.request("GET", url, secrets={"Authorization": found.header})
        answer.close()
        return answer.status == 200

    # -- reading -----------------------------------------------------------------------------------------------

    def digest_of_tag(self, tag: str) -> str:
        """Return the digest that a tag has now, by a HEAD request where the registry tells it ("" otherwise)."""
        answer = self.ask("HEAD", f"manifests/{tag}", {"Accept": ACCEPT}, tolerated=(405, 400))
        answer.close()
        digest = answer.headers.get("Docker-Content-Digest", "")
        return digest if answer.status == 200 and is_digest(digest) else ""

    def manifest(self, name: str) -> Manifest:
        """Return the manifest of a tag or digest.

        Raises:
            RegistryError, ImageError: it is not there, not what its digest says, or nonsense.
        """
        what = f"{self.reference.repository}{'@' if is_digest(name) else ':'}{name}"
        answer = self.ask("GET", f"manifests/{name}", {"Accept": ACCEPT})
        told, media = answer.headers.get("Docker-Content-Digest", ""), answer.headers.get("Content-Type", "")
        data = answer.read(MOST_MANIFEST)
        if is_digest(name):
            check(data, name, what)
            digest = name
        else:
            digest = "sha256:" + hashlib.sha256(data).hexdigest()
            if told.startswith("sha256:") and told != digest:
                raise RegistryError(
                    "digest-mismatch", f"{what}: the manifest is not what the registry says ({told[:19]}…)"
                )
        return parse_manifest(data, digest, media.partition(";")[0], what)

    def open_blob(self, blob: Descriptor, offset: int = 0, end: int = 0) -> Answer:
        """Return the answer with a blob's bytes from an offset (status 206), or all of them (200).

        Arguments:
            end: offset behind the last byte wanted; 0 for all that follow.

        Raises:
            RegistryError: the registry does not have it.
        """
        headers = {"Range": f"bytes={offset}-{end - 1 if end else ''}"} if offset or end else {}
        try:
            return self.ask("GET", f"blobs/{blob.digest}", headers, wanted=(200, 206), tolerated=(416,))
        except RegistryError as error:
            if error.id != "not-found" or not blob.urls:
                raise
            missing = error
        for url in blob.urls:  # foreign layers, which some registries do not keep
            if url.startswith("https://"):
                answer = self.http.request("GET", url, headers)
                if answer.status in (200, 206):
                    return answer
                answer.close()
        raise missing

    def small_blob(self, blob: Descriptor, limit: int = MOST_CONFIG) -> bytes:
        """Return a small blob, checked.

        Raises:
            RegistryError: it is missing, too large, or not what its digest says.
        """
        what = f"{self.reference.repository}: blob {blob.digest[:19]}…"
        if blob.size > limit:
            raise RegistryError("blob-too-large", f"{what}: {blob.size} bytes")
        data = self.open_blob(blob).read(limit)
        if len(data) != blob.size:
            raise RegistryError("size-mismatch", f"{what}: {len(data)} bytes instead of {blob.size}")
        check(data, blob.digest, what)
        return data

    # -- writing -----------------------------------------------------------------------------------------------

    def has_blob(self, digest: str) -> bool:
        """Return whether the registry already keeps a blob in this repository."""
        answer = self.ask("HEAD", f"blobs/{digest}", tolerated=(404,))
        answer.close()
        return answer.status == 200

    def upload(self, digest: str, size: int, source: Any) -> None:
        """Send a blob: one POST for the place, one PUT with the bytes (a file, or bytes).

        Raises:
            RegistryError: the registry does not take it.
        """
        answer = self.ask("POST", "blobs/uploads/", {"Content-Length": "0"}, body=b"", wanted=(202,))
        location = answer.headers.get("Location", "")
        start = answer.url
        answer.close()
        if not location:
            raise RegistryError("bad-answer", f"{place(start)}: the registry names no place for the upload")
        url = urljoin(start, location)
        url += ("&" if "?" in url else "?") + urlencode({"digest": digest})
        headers = {"Content-Type": "application/octet-stream", "Content-Length": str(size)}
        endpoint = self.endpoints[-1]
        answer = self._ask(endpoint, "PUT", url, headers, source)
        if answer.status != 201:
            raise refused(answer, f"{self.reference.repository}: upload")
        answer.close()

    def put_manifest(self, name: str, data: bytes, media_type: str) -> str:
        """Send a manifest under a tag or digest and return its digest."""
        headers = {"Content-Type": media_type}
        self.ask("PUT", f"manifests/{name}", headers, body=data, wanted=(201,)).close()
        return "sha256:" + hashlib.sha256(data).hexdigest()


def created(image: Mapping[str, Any]) -> int | None:
    """Return the time of an image configuration ("created", RFC 3339) in Unix seconds, None when it has none."""
    import calendar

    text = image.get("created")
    if not isinstance(text, str) or len(text) < 19:
        return None
    try:
        moment = time.strptime(text[:19], "%Y-%m-%dT%H:%M:%S")
        shift = 0
        zone = text[19:].lstrip(".0123456789")
        if zone and zone[0] in "+-" and len(zone) == 6:
            shift = (1 if zone[0] == "+" else -1) * (int(zone[1:3]) * 3600 + int(zone[4:6]) * 60)
    except ValueError:
        return None
    return min(max(calendar.timegm(moment) - shift, 0), 0xFFFFFFFF)
