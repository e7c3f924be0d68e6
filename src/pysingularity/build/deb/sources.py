# SPDX-License-Identifier: Apache-2.0
"""Where packages come from: apt sources as values, read from a host (sources.list, *.sources), written into an image.

Sources: sources.list(5), both styles. Only binary packages over schemes that we fetch are kept; a source that apt would
refuse is passed over here, since it is not ours to mend the host.
"""

from __future__ import annotations

import os
import re
from typing import NamedTuple

from pysingularity.build.deb.control import paragraphs
from pysingularity.errors import SingularityError

SCHEMES = ("http", "https", "file", "copy")
_LINE = re.compile(r"deb\s+(?:\[([^\]]*)\]\s+)?(\S+)\s+(\S+)\s*(.*)")
_KEYRING_MARK = "archive-keyring"


class Source(NamedTuple):
    """One suite of one mirror.

    Attributes:
        url: base of the mirror, without a slash at the end.
        suite: folder below dists/.
        components: parts of it, as main or universe.
        signed_by: paths of keyrings, or a block of armoured keys; "" means any key of a distribution.
        trusted: the host's administrator said that it needs no signature.
        check_date: whether Valid-Until counts.
    """

    url: str
    suite: str
    components: tuple[str, ...]
    signed_by: str = ""
    trusted: bool = False
    check_date: bool = True

    def line(self, signed_by: str = "", *, trusted: bool = False) -> str:
        """Return the source in the one-line style of sources.list."""
        options = [f"signed-by={signed_by}"] if signed_by else []
        options += ["trusted=yes"] if trusted else []
        options += ["check-valid-until=no"] if not self.check_date else []
        middle = f"[{' '.join(options)}] " if options else ""
        return f"deb {middle}{self.url} {self.suite} {' '.join(self.components)}\n"


def codename(root: str = "/") -> tuple[str, str]:
    """Return (ID, VERSION_CODENAME) of the host's os-release, "" where it does not tell (os-release(5))."""
    values: dict[str, str] = {}
    for path in ("etc/os-release", "usr/lib/os-release"):
        try:
            with open(os.path.join(root, path), encoding="utf-8", errors="replace") as file:
                for line in file:
                    key, equals, value = line.strip().partition("=")
                    if equals:
                        values[key] = value.strip("\"'")
            break
        except OSError:
            continue
    return values.get("ID", ""), values.get("VERSION_CODENAME") or values.get("UBUNTU_CODENAME", "")


def host_sources(root: str = "/") -> list[Source]:
    """Return the apt sources of a host, in apt's order, each once."""
    found: dict[tuple[str, str], Source] = {}
    for path in _files(root):
        try:
            with open(path, encoding="utf-8", errors="replace") as file:
                text = file.read(1 << 20)
            sources = parse_deb822(text) if path.endswith(".sources") else parse_list(text)
        except (OSError, SingularityError):
            continue  # unreadable for this user, or broken: apt tells its administrator
        for source in sources:
            key = (source.url, source.suite)
            known = found.get(key)
            if known is not None:
                components = tuple(dict.fromkeys((*known.components, *source.components)))
                source = known._replace(components=components)
            found[key] = source
    return list(found.values())


def of_distribution(sources: list[Source], suite: str) -> list[Source]:
    """Return those sources that make up a release of a distribution: the suite, its updates and its security fixes.

    Others that happen to use the same name for their suite (vendors' repositories) have no component "main" or are
    signed by a key that is not a distribution's.
    """
    family = {suite, *(suite + ending for ending in ("-updates", "-security", "/updates"))}
    found = []
    for source in sources:
        if source.suite not in family or "main" not in source.components:
            continue
        by = source.signed_by
        if by.startswith("/") and _KEYRING_MARK not in by and not by.startswith("/etc/apt/trusted.gpg"):
            continue
        found.append(source)
    return found if any(source.suite == suite for source in found) else []


def parse_list(text: str) -> list[Source]:
    """Read the one-line style."""
    found = []
    for line in text.splitlines():
        match = _LINE.fullmatch(line.partition("#")[0].strip())
        if match is None:
            continue
        options = dict(word.partition("=")[::2] for word in (match[1] or "").split())
        options = {key.lower(): value for key, value in options.items()}
        found += _make(match[2], [match[3]], match[4].split(), options)
    return found


def parse_deb822(text: str) -> list[Source]:
    """Read the style of paragraphs.

    Raises:
        UserError: the text is no control data.
    """
    found = []
    for fields in paragraphs(text, "apt source"):
        options = {key.lower(): value for key, value in fields.items()}
        if "deb" not in options.get("types", "").split() or options.get("enabled", "yes").lower() in ("no", "false"):
            continue
        for url in options.get("uris", "").split():
            found += _make(url, options.get("suites", "").split(), options.get("components", "").split(), options)
    return found


def _make(url: str, suites: list[str], components: list[str], options: dict[str, str]) -> list[Source]:
    if url.partition(":")[0] not in SCHEMES:
        return []
    lines = [line.strip() for line in options.get("signed-by", "").split("\n")]
    signed_by = "\n".join("" if line == "." else line for line in lines).strip()
    return [
        Source(
            url.rstrip("/"),
            suite.rstrip("/"),
            tuple(components),
            signed_by,
            options.get("trusted", "").lower() in ("yes", "true"),
            options.get("check-valid-until", "yes").lower() not in ("no", "false"),
        )
        for suite in suites
        if not suite.endswith("/")  # flat repositories are nobody's distribution
    ]


def _files(root: str) -> list[str]:
    folder = os.path.join(root, "etc/apt")
    found = [os.path.join(folder, "sources.list")]
    try:
        names = sorted(os.listdir(os.path.join(folder, "sources.list.d")))
    except OSError:
        names = []
    return found + [
        os.path.join(folder, "sources.list.d", name) for name in names if name.endswith((".list", ".sources"))
    ]
