# SPDX-License-Identifier: Apache-2.0
"""`singularity cache list`: entries with the room they really take."""

from __future__ import annotations

import os
import time

from pysingularity import messages
from pysingularity.cache import KINDS, Cache, Entry
from pysingularity.cli.options import LIST, Arguments, Option
from pysingularity.errors import UsageError
from pysingularity.folders import cache_folder, limit_of

USAGE = ""
COUNT = (0, 0)
HELP = """\
List what the cache holds. Sizes are the bytes taken on the disk; an image that was also pulled to a file of the same
file system shares its bytes with that file, and is counted here all the same.

    singularity cache list --verbose
    singularity cache list --type image,blob --json
"""
#: Names of kinds in other implementations.
OTHER_NAMES = {"oci": "image", "oci-tmp": "image", "library": "image", "shub": "image", "oras": "image"}
TYPE = Option(
    "type",
    "Only these kinds: image, blob, layer, tag, partial, package, mount, log, all",
    short="T",
    kind=LIST,
    metavar="KIND",
)
OPTIONS = (
    TYPE,
    Option("verbose", "List every entry", short="v"),
    Option("all", "List every entry", short="a", hidden=True),
    Option("json", "Print JSON", short="j"),
)


def kinds_of(words: object) -> tuple[str, ...]:
    """Return the kinds that --type asks for.

    Raises:
        UsageError: there is no such kind.
    """
    found: list[str] = []
    for word in words if isinstance(words, list) else ():
        kind = OTHER_NAMES.get(word, word)
        if word == "all":
            found += KINDS
        elif kind in KINDS:
            found.append(kind)
        else:
            raise UsageError("bad-cache-type", f"--type {word}: say {', '.join(KINDS)} or all")
    return tuple(dict.fromkeys(found)) or KINDS


def opened(environ: dict[str, str]) -> Cache:
    """Return the cache as it lies there, nothing made."""
    return Cache(cache_folder(environ), limit_of(environ))


def row(entry: Entry) -> dict[str, object]:
    """Return an entry for JSON."""
    used = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(entry.used))
    return {"type": entry.kind, "key": entry.key, "size": entry.size, "used": used, "references": entry.names}


def run(arguments: Arguments, environ: dict[str, str]) -> int:
    """List the cache."""
    from pysingularity.terminal import size

    cache = opened(environ)
    entries = list(cache.entries(kinds_of(arguments.type)))
    total = sum(entry.size for entry in entries)
    if arguments.json:
        from pysingularity.cli.results import write_json

        rows = [row(entry) for entry in entries]
        write_json({"folder": cache.folder, "limit": cache.limit, "size": total, "entries": rows})
        return 0
    if arguments.verbose or arguments.all:
        for entry in sorted(entries, key=lambda entry: (entry.kind, -entry.used)):
            used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used))
            name = ", ".join(name for name in entry.names if name)
            print(f"{entry.kind:<8} {size(entry.size):>9}  {used}  {entry.key[:26]:<26}  {name}")
    count = {kind: sum(entry.kind == kind for entry in entries) for kind in KINDS}
    parts = ", ".join(f"{number} {kind}{'s' if number != 1 else ''}" for kind, number in count.items() if number)
    limit = f", of {size(cache.limit)} allowed" if cache.limit is not None else ""
    print(f"{size(total)} in {cache.folder}{limit}: {parts or 'nothing'}")
    if not os.path.isdir(cache.folder):
        messages.verbose(f"{cache.folder}: there is no such folder yet")
    return 0
