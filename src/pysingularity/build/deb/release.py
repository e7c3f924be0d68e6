# SPDX-License-Identifier: Apache-2.0
"""A suite's Release file: what it promises, until when, and which checksums its indexes have.

Source: the wiki page "DebianRepository/Format" of Debian, as apt reads it. Fetching and checking the signature are
done with what `fetch` and `verify` give; the rest is values.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import NamedTuple

from pysingularity.build.deb.control import paragraph
from pysingularity.errors import UserError

#: The largest file of checksums, and the largest index, that we take from a mirror.
MAX_RELEASE, MAX_INDEX = 32 << 20, 1 << 30
_SUM = re.compile(r"\s*([0-9a-fA-F]{64})\s+([0-9]{1,12})\s+(\S+)\s*")


class IndexFile(NamedTuple):
    """A file that a Release file vouches for; `path` starts at the suite's folder."""

    path: str
    size: int
    sha256: str


class Release:
    """The content of a Release file that may be believed.

    Arguments:
        text: the file, after its signature was checked (or waived).
        what: its address, for messages.

    Raises:
        UserError: it is no Release file, or has no checksums that are still safe.
    """

    def __init__(self, text: bytes, what: str) -> None:
        self.what = what
        self.fields = paragraph(text.decode("utf-8", "replace").strip(), what)
        self.files: dict[str, IndexFile] = {}
        for line in self.fields.get("SHA256", "").splitlines():
            match = _SUM.fullmatch(line)
            if match is not None:
                self.files[match[3]] = IndexFile(match[3], int(match[2]), match[1].lower())
        if not self.files:
            raise UserError("bad-release", f"{what}: has no SHA256 checksums; older ones can be forged")

    def check_date(self, now: datetime, tolerance: float = 86400.0) -> None:
        """Refuse a file whose time is over, or has not come: somebody may be replaying old packages.

        Arguments:
            tolerance: seconds by which this machine's clock may be slow.

        Raises:
            UserError: it has expired, or is from the future.
        """
        made, until = self._date("Date"), self._date("Valid-Until")
        hint = "is this machine's clock right?"
        if until is not None and until < now:
            raise UserError(
                "release-expired",
                f"{self.what}: expired on {until:%Y-%m-%d %H:%M} UTC; the mirror is no longer updated, or old "
                "packages are being replayed",
                hint="use another mirror; an archived release can be had with Verify: no-date in the header",
            )
        if made is not None and (made - now).total_seconds() > tolerance:
            raise UserError("release-from-future", f"{self.what}: made on {made:%Y-%m-%d %H:%M} UTC", hint=hint)

    def check_suite(self, suite: str) -> None:
        """Refuse a Release file that belongs to another suite than the one it was fetched for.

        Raises:
            UserError: neither its Suite nor its Codename is the one wanted.
        """
        names = [self.fields[key] for key in ("Suite", "Codename") if self.fields.get(key)]
        # "stable/updates" has the codename of stable, "devel" of Ubuntu is a link to the newest codename.
        wanted = {suite, suite.partition("/")[0], suite.replace("/updates", "-security")}
        if names and not wanted.intersection(names) and suite != "devel":
            raise UserError(
                "wrong-suite",
                f"{self.what}: is for {' or '.join(names)}, not for {suite}",
                hint="a mirror in the middle of an update, or a wrong OSVersion",
            )

    def check_architecture(self, architecture: str) -> None:
        """Refuse an architecture that the mirror does not have.

        Raises:
            UserError: it has others only.
        """
        offered = self.fields.get("Architectures", "").split()
        if offered and architecture not in offered:
            raise UserError("no-architecture", f"{self.what}: has {' '.join(offered)}, but no {architecture}")

    @property
    def by_hash(self) -> bool:
        """Whether indexes can be fetched by their checksum, which no update of the mirror can disturb."""
        return self.fields.get("Acquire-By-Hash") == "yes"

    def packages(self, component: str, architecture: str) -> list[IndexFile]:
        """Return the forms of a Packages index, best first: plain has the checksum that names it in our cache.

        Raises:
            UserError: the suite has no such component, or an index of an impossible size.
        """
        base = f"{component}/binary-{architecture}/Packages"
        found = [
            self.files[base + ending] for ending in ("", ".xz", ".gz", ".zst", ".bz2") if base + ending in self.files
        ]
        if not found:
            offered = self.fields.get("Components", "")
            raise UserError(
                "no-component",
                f"{self.what}: has no packages for {component} on {architecture}",
                hint=f"its components are: {offered}" if offered else "",
            )
        if any(file.size > MAX_INDEX for file in found):
            raise UserError("bad-release", f"{self.what}: index {base} of more than {MAX_INDEX >> 20} MiB")
        return found

    def _date(self, key: str) -> datetime | None:
        text = self.fields.get(key)
        if not text:
            return None
        try:
            date = parsedate_to_datetime(text.replace("UTC", "+0000"))
        except ValueError:
            raise UserError("bad-release", f"{self.what}: {key} is no date: {text!r}") from None
        return date if date.tzinfo else date.replace(tzinfo=UTC)
