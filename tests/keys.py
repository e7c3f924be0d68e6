# SPDX-License-Identifier: Apache-2.0
"""Throw-away OpenPGP keys, made by gpg."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest


class Key:
    """A throw-away OpenPGP key."""

    def __init__(self, home: Path, name: str) -> None:
        self.home, self.name = home, name
        home.mkdir(mode=0o700)
        self.gpg("--quick-gen-key", f"{name} <{name}@example.org>", "ed25519", "sign", "never")
        self.public = home / "public.gpg"
        self.public.write_bytes(self.gpg("--export"))

    def gpg(self, *words: str, data: bytes | None = None) -> bytes:
        argv = [
            "gpg",
            "--homedir",
            str(self.home),
            "--batch",
            "--pinentry-mode",
            "loopback",
            "--passphrase",
            "",
            *words,
        ]
        done = subprocess.run(argv, input=data, capture_output=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def clear(self, data: bytes) -> bytes:
        return self.gpg("--clearsign", data=data)

    @property
    def fingerprint(self) -> str:
        lines = self.gpg("--with-colons", "--fingerprint").decode().splitlines()
        return next(line.split(":")[9] for line in lines if line.startswith("fpr:"))

    def detached(self, data: bytes) -> bytes:
        return self.gpg("--armor", "--detach-sign", data=data)


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory):
    """Two keys: that of somebody we know, and a stranger's."""
    for program in ("gpg", "gpgv"):
        if shutil.which(program) is None:
            pytest.skip(f"needs the program {program}")
    # Short paths: the agent's socket has to fit into 107 bytes.
    base = Path(tmp_path_factory.mktemp("k"))
    yield Key(base / "a", "known"), Key(base / "s", "stranger")
    for name in ("a", "s"):
        subprocess.run(["gpgconf", "--homedir", str(base / name), "--kill", "all"], check=False, capture_output=True)
