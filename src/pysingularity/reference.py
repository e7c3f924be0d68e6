# SPDX-License-Identifier: Apache-2.0
"""References: the text a person types for an image, taken apart; nothing here asks a disk or a network.

A reference is `scheme:rest` or `scheme://rest`; every other text is a path (`localimage`). The known schemes are the
table SCHEMES; how an image behind it is fetched lives in `registry.fetch`. Values are plain and comparable, and
`parse_reference(str(reference)) == reference` holds for all of them.
Start ring: imports only our errors (`exec docker://…` reads its reference before anything heavy is loaded).
"""

from __future__ import annotations

from pysingularity.errors import ReferenceError_

#: scheme → whether it also works without the two slashes ("oci:dir").
SCHEMES = {
    "docker": True,
    "docker-archive": True,
    "docker-daemon": True,
    "oci": True,
    "oci-archive": True,
    "oras": True,
    "library": True,
    "shub": True,
    "http": False,
    "https": False,
    "instance": False,
}
#: Schemes whose text is a path of this machine, with something behind a colon.
LOCAL = ("docker-archive", "oci", "oci-archive")
#: What an image is called when nobody says which one.
LATEST = "latest"
#: The registry of names without one, as every client of the protocol has it.
DOCKER_HUB = "docker.io"

_LOWER = frozenset("abcdefghijklmnopqrstuvwxyz0123456789")
_WORD = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_")
_TAG = _WORD | frozenset(".-")
_HOST = _TAG | frozenset(":[]")
_HEX = frozenset("0123456789abcdef")
_DIGESTS = {"sha256": 64, "sha384": 96, "sha512": 128}


class Reference:
    """One image, named. Immutable by custom; compares by value.

    Arguments:
        scheme: a key of SCHEMES, or "localimage" for a path.
        host: registry, library or hub (with port and prefix path), "" for the default one of the scheme.
        name: repository (`library/debian`), `entity/collection/container`, `user/repo`, name of an instance, or of an
            image inside an archive.
        tag: one tag, several joined by commas (push to a library), or "".
        digest: `sha256:…` (docker, oras), `sha256.…` (library), 32 or 40 hex digits (shub), or "".
        path: file or folder (local schemes), or the whole URL (http, https).
    """

    __slots__ = ("digest", "host", "name", "path", "scheme", "tag")

    def __init__(
        self, scheme: str, *, host: str = "", name: str = "", tag: str = "", digest: str = "", path: str = ""
    ) -> None:
        self.scheme, self.host, self.name = scheme, host, name
        self.tag, self.digest, self.path = tag, digest, path

    def _key(self) -> tuple[str, str, str, str, str, str]:
        return (self.scheme, self.host, self.name, self.tag, self.digest, self.path)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Reference) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def __repr__(self) -> str:
        return f"Reference({str(self)!r})"

    def __str__(self) -> str:
        scheme = self.scheme
        if scheme in ("http", "https", "localimage"):
            return self.path
        tail = f":{self.tag}" if self.tag else ""
        if self.digest:
            tail += f"@{self.digest}"
        if scheme == "docker-archive":
            if self.digest.isdigit():
                return f"{scheme}:{self.path}:@{self.digest}"
            return f"{scheme}:{self.path}" + (f":{self.name}{tail}" if self.name or tail else "")
        if scheme in LOCAL:
            return f"{scheme}:{self.path}{tail}"
        if scheme == "docker-daemon":
            return f"{scheme}:{self.name}{tail}"
        return f"{scheme}://{self.host + '/' if self.host else ''}{self.name}{tail}"

    @property
    def repository(self) -> str:
        """Return host and name without tag and digest ("docker.io/library/debian")."""
        return f"{self.host}/{self.name}" if self.host else self.name

    def pinned(self, digest: str) -> Reference:
        """Return the same image named by a digest instead of a tag."""
        return Reference(self.scheme, host=self.host, name=self.name, digest=digest, path=self.path)

    def file_name(self) -> str:
        """Return the name that `pull` gives to the file: NAME_TAG.sif; the URL's own last part for http(s)."""
        if self.scheme in ("http", "https"):
            last = self.path.partition("?")[0].partition("#")[0].rstrip("/").rpartition("/")[2]
            return last or "image.sif"
        whole = self.path if self.scheme in LOCAL else self.name
        name = whole.rstrip("/").rpartition("/")[2] or "image"
        if self.scheme == "docker-archive" and self.name:
            name = self.name.rpartition("/")[2]
        tag = self.tag.partition(",")[0]
        if self.digest and not tag and self.scheme != "docker-archive":
            if self.scheme == "shub":
                return f"{name}@{self.digest}_{LATEST}.sif"
            return f"{name}@{self.digest.replace(':', '_', 1)}.sif"
        return f"{name}_{tag or LATEST}.sif"


def has_scheme(text: str) -> bool:
    """Return whether a text is a reference with a scheme, and not a path."""
    scheme, colon, rest = text.partition(":")
    return bool(colon) and _is_scheme(scheme) and (rest[:2] == "//" or SCHEMES.get(scheme, False))


def _is_scheme(text: str) -> bool:
    return bool(text) and all(letter in _TAG for letter in text) and "_" not in text


def parse_reference(text: str) -> Reference:
    """Return the reference that a text means.

    Raises:
        ReferenceError_: unknown scheme, or a name, tag or digest that its scheme does not allow.
    """
    if not text:
        raise ReferenceError_("empty-reference", "an empty text names no image")
    if not has_scheme(text):
        return Reference("localimage", path=text)
    scheme, _, rest = text.partition(":")
    if scheme not in SCHEMES:
        raise ReferenceError_(
            "unknown-scheme",
            f"{text}: {scheme}:// is no transport that we know",
            hint="known are " + ", ".join(f"{name}{'://' if name not in LOCAL else ':'}" for name in SCHEMES),
        )
    if scheme in ("http", "https"):
        if not rest[2:].partition("/")[0]:
            raise _wrong(text, "the address has no host")
        return Reference(scheme, path=text)
    if rest[:2] == "//":
        rest = rest[2:]
    if scheme == "instance":
        return Reference(scheme, name=rest) if rest else _refuse(text, "the instance has no name")
    if not rest:
        raise _wrong(text, "nothing behind the colon")
    if scheme in LOCAL:
        return _local(scheme, rest, text)
    if scheme == "library":
        return _library(rest, text)
    if scheme == "shub":
        return _shub(rest, text)
    return _registry(scheme, rest, text)


def _refuse(text: str, why: str) -> Reference:
    raise _wrong(text, why)


def _wrong(text: str, why: str, hint: str = "") -> ReferenceError_:
    return ReferenceError_("bad-reference", f"{text}: {why}", hint=hint)


def _local(scheme: str, rest: str, text: str) -> Reference:
    """Take PATH[:TAG] apart (docker-archive: PATH[:NAME[:TAG]] or PATH:@INDEX); a tag never holds a slash."""
    path, colon, tail = rest.partition(":")
    if not path:
        raise _wrong(text, "the path is missing")
    if scheme == "docker-archive":
        if tail[:1] == "@" and tail[1:].isdigit():
            return Reference(scheme, path=path, digest=tail[1:])
        name, digest = _split_digest(tail, text)
        name, tag = _split_tag(name)
        if tag and not _tag(tag):
            raise _wrong(text, f"{tag!r} is no tag")
        return Reference(scheme, path=path, name=name, tag=tag, digest=digest)
    if colon and "/" in tail:
        return Reference(scheme, path=rest)
    tail, digest = _split_digest(tail, text)
    if ":" in tail:
        raise _wrong(text, f"{tail!r} is no tag")
    return Reference(scheme, path=path, tag=tail, digest=digest)


def _registry(scheme: str, rest: str, text: str) -> Reference:
    """Take [host[:port]/]name[:tag][@digest] apart, with Docker Hub's defaults for docker:// alone."""
    rest, digest = _split_digest(rest, text)
    rest, tag = _split_tag(rest)
    host, slash, name = rest.partition("/")
    if not slash or not ("." in host or ":" in host or host == "localhost"):
        host, name = "", rest
    if host and not (all(letter in _HOST for letter in host) and host.strip(":.[]-")):
        raise _wrong(text, f"{host!r} is no name of a host")
    if scheme == "docker-daemon":
        if host:
            name = f"{host}/{name}"
        host = ""
    else:
        if not host:
            if scheme == "oras":
                raise _wrong(text, "oras:// wants a registry", "write oras://HOST/REPOSITORY:TAG")
            host = DOCKER_HUB
        if host in ("index." + DOCKER_HUB, "registry-1." + DOCKER_HUB):
            host = DOCKER_HUB
        if host == DOCKER_HUB and "/" not in name:
            name = "library/" + name
    _repository(name, text, host_allowed=scheme == "docker-daemon")
    if tag and not _tag(tag):
        raise _wrong(text, f"{tag!r} is no tag", "a tag has up to 128 letters, digits, _ . -")
    if not tag and not digest:
        tag = LATEST
    return Reference(scheme, host=host, name=name, tag=tag, digest=digest)


def _library(rest: str, text: str) -> Reference:
    """Take [host/][entity/[collection/]]name[:tag,tag][@sha256.…] apart; a missing entity is `library/default`."""
    rest, at, digest = rest.partition("@")
    rest, tag = _split_tag(rest)
    if tag.startswith(("sha256.", "sif.")) and not at:
        tag, digest = "", tag
    if digest and not (
        digest.startswith("sha256.") and len(digest) == 71 and all(letter in _HEX for letter in digest[7:])
    ):
        raise _wrong(text, f"{digest!r} is no hash of a library", "a hash is sha256. and 64 hex digits")
    parts = rest.split("/")
    host = ""
    if len(parts) > 3 or (len(parts) > 1 and (":" in parts[0] or parts[0] == "localhost")):
        host = "/".join(parts[:-3]) if len(parts) > 3 else parts[0]
        parts = parts[-3:] if len(parts) > 3 else parts[1:]
    if len(parts) == 1:
        parts = ["library", "default", *parts]
    elif len(parts) == 2:
        parts = ["library", *parts] if host == "" and parts[0] == "default" else [parts[0], "default", parts[1]]
    for part in parts:
        if not part or not all(letter in _TAG for letter in part) or part[0] in ".-":
            raise _wrong(text, f"{part!r} is no part of a library name", "write library://entity/collection/name:tag")
    for one in tag.split(",") if tag else ():
        if not _tag(one):
            raise _wrong(text, f"{one!r} is no tag")
    return Reference("library", host=host, name="/".join(parts), tag=tag or ("" if digest else LATEST), digest=digest)


def _shub(rest: str, text: str) -> Reference:
    """Take [host[/prefix]/]user/repo[:tag][@md5 or sha1] apart."""
    rest, _, digest = rest.partition("@")
    rest, tag = _split_tag(rest)
    parts = rest.split("/")
    if len(parts) < 2 or not all(parts):
        raise _wrong(text, "a hub's name has a user and a repository", "write shub://user/repo:tag")
    user, repository = parts[-2:]
    if not (len(user) <= 39 and all(letter in _TAG for letter in user)):
        raise _wrong(text, f"{user!r} is no name of a user")
    if not (len(repository) <= 64 and all(letter in _TAG for letter in repository)):
        raise _wrong(text, f"{repository!r} is no name of a repository")
    if digest and not (len(digest) in (32, 40) and all(letter in _HEX for letter in digest)):
        raise _wrong(text, f"{digest!r} is no hash of a hub", "32 (md5) or 40 (git) lower-case hex digits")
    if tag and not (len(tag) <= 64 and all(letter in _TAG for letter in tag)):
        raise _wrong(text, f"{tag!r} is no tag")
    return Reference(
        "shub",
        host="/".join(parts[:-2]),
        name=f"{user}/{repository}",
        tag=tag or ("" if digest else LATEST),
        digest=digest,
    )


def _split_tag(text: str) -> tuple[str, str]:
    """Split at the last colon that stands behind the last slash."""
    at = text.rfind(":")
    return (text[:at], text[at + 1 :]) if at > text.rfind("/") else (text, "")


def _split_digest(rest: str, text: str) -> tuple[str, str]:
    rest, at, digest = rest.partition("@")
    if at and not is_digest(digest):
        raise _wrong(text, f"{digest!r} is no digest", "a digest is sha256: and 64 hex digits")
    return rest, digest


def is_digest(text: str) -> bool:
    """Return whether a text is a digest of a kind we can check (sha256, sha384, sha512; lower-case hex)."""
    kind, _, value = text.partition(":")
    return len(value) == _DIGESTS.get(kind, -1) and all(letter in _HEX for letter in value)


def _tag(text: str) -> bool:
    return 0 < len(text) <= 128 and text[0] in _WORD and all(letter in _TAG for letter in text)


def _repository(name: str, text: str, *, host_allowed: bool) -> None:
    """Check a repository's name (OCI distribution specification, "Pulling manifests")."""
    parts = name.split("/")
    if host_allowed and len(parts) > 1:
        parts = parts[1:]
    for part in parts:
        if part != part.lower():
            raise _wrong(text, f"{part!r} has capital letters", f"registries want lower case: {name.lower()}")
        if (
            not part
            or part[0] not in _LOWER
            or part[-1] not in _LOWER
            or not all(letter in _TAG for letter in part)
            or ".." in part
            or "___" in part
        ):
            raise _wrong(text, f"{part!r} is no name of a repository")
    if len(name) > 255:
        raise _wrong(text, "the repository's name is longer than 255 characters")
