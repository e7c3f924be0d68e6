# SPDX-License-Identifier: Apache-2.0
"""Settings: what an administrator or user writes into singularity.conf, over the defaults of one table.

Files, later wins: /etc/singularity/singularity.conf, then singularity.conf in SINGULARITY_CONFIGDIR or ~/.singularity,
then the one named by --config. A line is `key = value`, `#` begins a comment; keys that may be given several times add
up. Keys of the peers that mean nothing here are ignored. Start ring: without files this costs two failed opens.
"""

from __future__ import annotations

import posix

from pysingularity.errors import UserError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

SYSTEM = "/etc/singularity/singularity.conf"
FLAG, NUMBER, WORD, MANY = "flag", "number", "word", "many"

#: key → (kind, default, allowed words, what it does)
TABLE: dict[str, tuple[str, object, tuple[str, ...], str]] = {
    "image driver": (
        WORD,
        "auto",
        ("auto", "python", "squashfuse", "kernel", "unpacked"),
        (
            "How squashfs images are mounted: by our own server (python), by squashfuse_ll (which shows owners as they "
            "are stored), by the kernel (root only), or not at all but unpacked into the cache; auto is the kernel for "
            "root and our own server for others"
        ),
    ),
    "warm seconds": (
        NUMBER,
        10,
        (),
        "How long a mounted image is kept for the user's next container when none runs any more; 0 for never",
    ),
    "sessiondir max size": (NUMBER, 64, (), "Bound in MiB of what a container writes into memory"),
    "bind path": (MANY, (), (), "Bind SRC[:DST[:OPTS]] into every container that is not contained"),
    "mount proc": (FLAG, True, (), "Mount /proc"),
    "mount sys": (FLAG, True, (), "Mount /sys"),
    "mount dev": (WORD, "yes", ("yes", "no", "minimal"), "Mount the host's /dev, a minimal one, or none"),
    "mount home": (FLAG, True, (), "Mount the home directory"),
    "mount tmp": (FLAG, True, (), "Mount /tmp and /var/tmp"),
    "config passwd": (FLAG, True, (), "Give the container a passwd file with the user in it"),
    "config group": (FLAG, True, (), "Give the container a group file with the user's groups in it"),
    "config resolv_conf": (FLAG, True, (), "Give the container the host's resolv.conf"),
    "always use nv": (FLAG, False, (), "Act as if --nv was given"),
    "always use rocm": (FLAG, False, (), "Act as if --rocm was given"),
    "cdi directories": (MANY, ("/etc/cdi", "/var/run/cdi"), (), "Where Container Device Interface files lie"),
}


class Settings:
    """The settings of this start: `settings["image driver"]`."""

    def __init__(self, values: Mapping[str, object] | None = None) -> None:
        self.values = dict(values or {})

    def __getitem__(self, key: str) -> object:
        return self.values[key] if key in self.values else TABLE[key][1]

    def flag(self, key: str) -> bool:
        """Return a setting of kind FLAG."""
        return bool(self[key])

    def number(self, key: str) -> int:
        """Return a setting of kind NUMBER."""
        return int(self[key])  # type: ignore[call-overload,no-any-return]

    def many(self, key: str) -> list[str]:
        """Return a setting of kind MANY."""
        return list(self[key])  # type: ignore[call-overload,no-any-return]


def folder(environ: Mapping[str, str], home: str) -> str:
    """Return the folder of the user's own files."""
    for name in ("SINGULARITY_CONFIGDIR", "APPTAINER_CONFIGDIR"):
        if environ.get(name):
            return environ[name]
    return f"{home}/.singularity"


def load(environ: Mapping[str, str], home: str) -> Settings:
    """Return the settings of this machine and user.

    Raises:
        UserError: a file holds something that cannot be understood; the message has file and line.
    """
    values: dict[str, object] = {}
    named = environ.get("SINGULARITY_CONFIG_FILE") or environ.get("APPTAINER_CONFIG_FILE")
    for path in (SYSTEM, f"{folder(environ, home)}/singularity.conf"):
        text = _read(path)
        if text is not None:
            parse(text, path, values)
    if named:
        text = _read(named)
        if text is None:
            raise UserError("no-config", f"{named}: no such file of settings")
        parse(text, named, values)
    return Settings(values)


def _read(path: str) -> str | None:
    try:
        descriptor = posix.open(path, posix.O_RDONLY | posix.O_CLOEXEC | posix.O_NONBLOCK)
    except OSError:
        return None
    try:
        return posix.read(descriptor, 1 << 20).decode("utf-8", "surrogateescape")
    except OSError:
        return None
    finally:
        posix.close(descriptor)


def parse(text: str, path: str, values: dict[str, object]) -> None:
    """Add the settings of a file's text to `values`.

    Raises:
        UserError: a value is none of those allowed.
    """
    added: set[str] = set()
    for number, line in enumerate(text.split("\n"), 1):
        line = line.strip()
        if not line or line[0] == "#":
            continue
        key, equals, value = line.partition("=")
        key, value = " ".join(key.split()), value.strip()
        if key not in TABLE or not equals:
            continue
        kind, _, allowed, _ = TABLE[key]
        if kind == MANY:
            if key not in added:
                values[key] = []
                added.add(key)
            if value:
                values[key].append(value)  # type: ignore[attr-defined]
        elif kind == FLAG:
            if value not in ("yes", "no"):
                raise UserError("bad-setting", f"{path}:{number}: {key} = {value}: neither yes nor no")
            values[key] = value == "yes"
        elif kind == NUMBER:
            if not value.isdigit():
                raise UserError("bad-setting", f"{path}:{number}: {key} = {value}: not a number")
            values[key] = int(value)
        else:
            if value not in allowed:
                raise UserError("bad-setting", f"{path}:{number}: {key} = {value}: not one of {', '.join(allowed)}")
            values[key] = value
