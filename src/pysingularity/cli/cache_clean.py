# SPDX-License-Identifier: Apache-2.0
"""`singularity cache clean`: remove entries by kind, age, or the references that led to them."""

from __future__ import annotations

import sys
import time

from pysingularity import messages
from pysingularity.cli.cache_list import TYPE, kinds_of, opened, row
from pysingularity.cli.options import TEXT, Arguments, Option
from pysingularity.errors import UsageError, UserError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pysingularity.cache import Cache, Entry

USAGE = "[REFERENCE…]"
COUNT = (0, None)
HELP = """\
Remove what the cache holds: all of it, some kinds, what has not been used for some days, or what belongs to references.
Processes that use an image meanwhile keep it until they end; what is missing later is fetched again.

    singularity cache clean --force
    singularity cache clean --days 30 --type blob
    singularity cache clean docker://debian:12
"""
OPTIONS = (
    TYPE,
    Option("days", "Only what was not used for N days", short="D", kind=TEXT, metavar="N"),
    Option("dry-run", "Only say what would be removed", short="n"),
    Option("force", "Do not ask", short="f"),
    Option("json", "Print JSON", short="j"),
)


def run(arguments: Arguments, environ: dict[str, str]) -> int:
    """Clean the cache."""
    from pysingularity.reference import parse_reference
    from pysingularity.terminal import size

    cache = opened(environ)
    chosen = list(cache.entries(kinds_of(arguments.type)))
    if arguments.days is not None:
        if not str(arguments.days).isdigit():
            raise UsageError("bad-number", f"--days {arguments.days}: wants a whole number")
        before = time.time() - 86400 * int(str(arguments.days))
        chosen = [entry for entry in chosen if entry.used < before]
    if arguments.positional:
        names = {str(parse_reference(text)) for text in arguments.positional}
        others = {
            (entry.kind, entry.key)
            for entry in cache.entries()
            if any(name.split(" ")[0] not in names for name in entry.names)
        }
        mine = [entry for entry in chosen if any(name.split(" ")[0] in names for name in entry.names)]
        if not mine:
            raise UserError("not-in-cache", f"{', '.join(sorted(names))}: the cache has nothing of it")
        # A layer or image that another reference needs as well stays.
        chosen = [entry for entry in mine if (entry.kind, entry.key) not in others]
    total = sum(entry.size for entry in chosen)
    if not arguments.force and not arguments.dry_run and chosen:
        if not sys.stdin.isatty() and not sys.stdin.readable():
            raise UsageError("not-confirmed", "cache clean: use --force when nobody can be asked")
        print(f"Remove {len(chosen)} entries ({size(total)}) of {cache.folder}? [N/y] ", end="", flush=True)
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            messages.info("nothing was removed")
            return 0
    freed = 0
    for entry in chosen:
        if arguments.dry_run:
            messages.info(f"would remove {entry.kind} {entry.key} ({size(entry.size)})")
        else:
            freed += _remove(cache, entry, environ)
    if not arguments.dry_run:
        cache.sweep()
    if arguments.json:
        from pysingularity.cli.results import write_json

        write_json({"removed": [row(entry) for entry in chosen], "freed": freed, "dryRun": bool(arguments.dry_run)})
    else:
        verb = "would be removed" if arguments.dry_run else "removed"
        messages.info(f"{len(chosen)} entries {verb}, {size(total if arguments.dry_run else freed)} freed")
    return 0


def _remove(cache: Cache, entry: Entry, environ: dict[str, str]) -> int:
    """Remove an entry; the caches of RUN --mount may belong to subordinate ids."""
    if entry.kind != "mount":
        return cache.remove(entry)
    if cache.in_work(entry):
        return 0
    from pysingularity.cli.rm import remove

    remove(entry.path, environ)
    return entry.size
