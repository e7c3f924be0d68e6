# SPDX-License-Identifier: Apache-2.0
"""A small Debian mirror on a disk: packages made here, signed with a key that lives as long as the tests."""

from __future__ import annotations

import gzip
import hashlib
import io
import lzma
import os
import shutil
import subprocess
import tarfile
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest

from keys import Key
from pysingularity.build.bootstrap import BootstrapRequest
from pysingularity.linux.ownership import RealOwners, RecordedOwners

ARCH = "amd64"


def tar(entries: list[tuple]) -> bytes:
    """Make a tar of (path, content or kind, options) entries; content may be bytes, "dir", ("symlink", target) …"""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for path, what, *rest in entries:
            member = tarfile.TarInfo(path)
            member.mtime = 1_600_000_000
            options = rest[0] if rest else {}
            if isinstance(what, bytes):
                member.size, member.mode = len(what), 0o644
            elif what == "dir":
                member.type, member.mode = tarfile.DIRTYPE, 0o755
            elif what == "char":
                member.type, member.mode = tarfile.CHRTYPE, 0o600
            else:
                member.type = {"symlink": tarfile.SYMTYPE, "link": tarfile.LNKTYPE}[what[0]]
                member.linkname, member.mode = what[1], 0o777
            for key, value in options.items():
                setattr(member, key, value)
            archive.addfile(member, io.BytesIO(what) if isinstance(what, bytes) else None)
    return stream.getvalue()


def ar(members: list[tuple[str, bytes]]) -> bytes:
    """Make an ar archive."""
    data = b"!<arch>\n"
    for name, content in members:
        data += f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n".encode()
        data += content + b"\n" * (len(content) & 1)
    return data


def compress(data: bytes, ending: str) -> bytes:
    """Compress as the ending of a name says."""
    if ending == ".zst":
        zstd = pytest.importorskip("backports.zstd")
        return zstd.compress(data)
    if ending == ".bz2":
        import bz2

        return bz2.compress(data)
    return {".gz": gzip.compress, ".xz": lzma.compress, "": bytes}[ending](data)


def folders(paths: list[str]) -> list[tuple]:
    """Return dir entries for all parents of paths, as dpkg-deb writes them."""
    found: dict[str, None] = {"./": None}
    for path in paths:
        parts = path.removeprefix("./").split("/")[:-1]
        for end in range(1, len(parts) + 1):
            found["./" + "/".join(parts[:end]) + "/"] = None
    return [(name, "dir") for name in found]


def deb(
    name: str,
    version: str = "1.0",
    files: list[tuple] | dict[str, bytes] = (),
    *,
    ending: str = ".xz",
    scripts: dict[str, str] | None = None,
    conffiles: list[str] = (),
    data: bytes | None = None,
    **fields: str,
) -> bytes:
    """Make a .deb; `files` are tar entries, or path → content."""
    entries = [(path, content) for path, content in files.items()] if isinstance(files, dict) else list(files)
    if data is None:
        data = tar(folders([entry[0] for entry in entries]) + entries)
    control = {"Package": name, "Version": version, "Architecture": ARCH, "Maintainer": "Nobody <n@example.org>"}
    control |= {key.replace("_", "-"): value for key, value in fields.items()}
    control.setdefault("Description", "made for a test\n more lines")
    text = "".join(f"{key}: {value}\n" for key, value in control.items() if value)
    members: list[tuple] = [("./control", text.encode())]
    for script, body in (scripts or {}).items():
        members.append((f"./{script}", body.encode(), {"mode": 0o755}))
    if conffiles:
        members.append(("./conffiles", "".join(f"{path}\n" for path in conffiles).encode()))
    return ar(
        [
            ("debian-binary", b"2.0\n"),
            (f"control.tar{ending}", compress(tar([("./", "dir"), *members]), ending)),
            (f"data.tar{ending}", compress(data, ending)),
        ]
    )


class Mirror:
    """A mirror below a folder; `publish` writes its indexes."""

    suite = "toy"
    components = ("main",)

    def __init__(self, path: Path, key: Key) -> None:
        self.path, self.key = path, key
        #: Component → paragraphs of its packages.
        self.paragraphs: dict[str, list[str]] = {}
        self.release: dict[str, str] = {}
        self.signed = "inline"
        self.endings = ("", ".xz", ".gz")
        self.valid = timedelta(days=7)
        self.now = datetime.now(UTC)

    @property
    def url(self) -> str:
        return f"file://{self.path}"

    def add(
        self,
        name: str,
        version: str = "1.0",
        files=(),
        *,
        index: dict[str, str] | None = None,
        component: str = "main",
        **options,
    ) -> Path:
        """Add a package; `index` overrides fields of its paragraph."""
        data = deb(name, version, files, **options)
        place = self.path / "pool" / f"{name}_{version.replace(':', '%3a')}_{ARCH}.deb"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(data)
        known = {"scripts", "conffiles", "ending", "data"}
        fields = {"Package": name, "Version": version, "Architecture": ARCH}
        fields |= {key.replace("_", "-"): value for key, value in options.items() if key not in known}
        fields |= {
            "Filename": f"pool/{place.name}",
            "Size": str(len(data)),
            "SHA256": hashlib.sha256(data).hexdigest(),
            "Description": "made for a test",
        }
        fields |= index or {}
        self.paragraphs.setdefault(component, []).append(
            "".join(f"{key}: {value}\n" for key, value in fields.items() if value)
        )
        return place

    def base(self) -> None:
        """Add the smallest system that has the parts we treat specially."""
        self.add("base-files", "12", [("./etc/issue", b"Toy\n"), ("./var/mail", "dir", {"mode": 0o2775, "gid": 8})],
                 Essential="yes", Priority="required", conffiles=["/etc/issue"])  # fmt: skip
        self.add("dash", "0.5", {"./bin/dash": b"shell"}, Essential="yes", Priority="required", Pre_Depends="libtoy")
        self.add("libtoy", "2.0", {"./lib/libtoy.so.2": b"library"}, Multi_Arch="same")
        self.add("dpkg", "1.21", {"./usr/sbin/start-stop-daemon": b"real"}, Essential="yes", Priority="required")

    def publish(self) -> None:
        """Write Packages and Release files and sign them."""
        dists = self.path / "dists" / self.suite
        sums = ""
        for component in self.components:
            folder = dists / f"{component}/binary-{ARCH}"
            folder.mkdir(parents=True, exist_ok=True)
            plain = "\n".join(self.paragraphs.get(component, [])).encode()
            for ending in ("", ".xz", ".gz"):
                data = compress(plain, ending)
                if ending in self.endings:
                    (folder / f"Packages{ending}").write_bytes(data)
                if ending in self.endings or not ending:
                    name = f"{component}/binary-{ARCH}/Packages{ending}"
                    sums += f" {hashlib.sha256(data).hexdigest()} {len(data)} {name}\n"
        fields = {
            "Origin": "Toy",
            "Suite": "testing",
            "Codename": self.suite,
            "Date": format_datetime(self.now),
            "Valid-Until": format_datetime(self.now + self.valid),
            "Architectures": ARCH,
            "Components": " ".join(self.components),
        } | self.release
        text = "".join(f"{key}: {value}\n" for key, value in fields.items() if value) + f"SHA256:\n{sums}"
        self.text = text.encode()
        for name in ("InRelease", "Release", "Release.gpg"):
            (dists / name).unlink(missing_ok=True)
        if self.signed == "inline":
            (dists / "InRelease").write_bytes(self.key.clear(self.text))
        else:
            (dists / "Release").write_bytes(self.text)
            if self.signed == "beside":
                (dists / "Release.gpg").write_bytes(self.key.detached(self.text))


class Bench:
    """What an agent is given in these tests: root, caches, and a `run` that lets the host's dpkg do the configuring."""

    def __init__(self, path: Path, keyring: Path) -> None:
        self.path, self.keyring = path, keyring
        self.scripts: list[str] = []
        self.said: list[tuple] = []
        self.root = path / "root"
        for name in ("root", "cache", "tmp"):
            (path / name).mkdir(exist_ok=True)
        self.owners = RealOwners() if os.getuid() == 0 else RecordedOwners()
        self.name, self.needs_emulation = "root", False

    def run(self, argv, *, env=None, binds=(), cwd="/") -> int:
        """Do what the script in the container would, from outside: its lines are `dpkg …` and `preinst …`."""
        if shutil.which("dpkg") is None:
            pytest.skip("needs the program dpkg")
        script = argv[-1]
        self.scripts.append(script)
        for line in script.splitlines():
            words = line.split()
            if words[:1] == ["dpkg"]:
                # Scripts of packages would need a chroot; these packages have none that dpkg runs.
                done = subprocess.run(
                    ["dpkg", f"--root={self.root}", "--force-not-root", "--force-bad-path", *words[1:]],
                    capture_output=True,
                    text=True,
                    env={**os.environ, **(env or {}), "LC_ALL": "C"},
                )
                self.said.append((done.returncode, done.stdout + done.stderr))
                if done.returncode:
                    return done.returncode
            elif words[:1] == ["preinst"] and words[1:] != ["{"] and len(words) == 4:
                path = self.root / "var/lib/dpkg/info" / f"{words[1]}.preinst"
                done = subprocess.run(["/bin/sh", path, "install"], env={"DPKG_ROOT": str(self.root), **os.environ})
                if done.returncode:
                    return done.returncode
        return 0

    def request(self, **header: str) -> BootstrapRequest:
        options = header.pop("options", None)
        header = {"bootstrap": "debootstrap", "osversion": Mirror.suite, "keyring": str(self.keyring), **header}
        return BootstrapRequest(
            header={key: value for key, value in header.items() if value},
            root=str(self.root),
            way=self,
            cache=str(self.path / "cache"),
            tmp=str(self.path / "tmp"),
            progress=lambda *_: None,
            run=self.run,
            arch=ARCH,
            options=options,
            environ={"PATH": os.environ["PATH"]},
            directory=str(self.path),
        )
