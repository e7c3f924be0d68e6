# SPDX-License-Identifier: Apache-2.0
"""Ordinary users of this machine, as whom tests run commands. Its own module: there are many files named conftest."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

BIN = Path(sys.executable).parent
#: Passed on to commands of the tests: how this site reaches the world.
SITE = [
    *(name.upper() if up else name for name in ("http_proxy", "https_proxy", "no_proxy") for up in (False, True)),
    *("SSL_CERT_FILE", "SSL_CERT_DIR", "PIP_CERT", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "GIT_SSL_CAINFO"),
    *("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "REFERENCE_APPTAINER", "PEERS"),
]


class User:
    """An ordinary user of this machine, as whom commands run: `user(["singularity", "version"])`."""

    def __init__(self, account: pwd.struct_passwd, base: Path, extra: dict[str, str] | None = None) -> None:
        self.name, self.uid, self.gid = account.pw_name, account.pw_uid, account.pw_gid
        self.home = Path(account.pw_dir)
        self.tmp = Path(tempfile.mkdtemp(prefix="t", dir=base))
        self.tmp.chmod(0o755)
        self.other = os.getuid() != self.uid
        if self.other:
            os.chown(self.tmp, self.uid, self.gid)
        self.environ = {
            "PATH": f"{BIN}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": str(self.home),
            "USER": self.name,
            "LOGNAME": self.name,
            "LANG": "C.UTF-8",
            "SINGULARITY_CACHEDIR": str(self.tmp / "cache"),
            "SINGULARITY_IMAGE_KEEP": "0",  # tests of warm images ask for them
            **{name: os.environ[name] for name in SITE if name in os.environ},
            **(extra or {}),
        }

    def _options(self, env: dict[str, str] | None, clean: bool) -> dict[str, object]:
        full = {} if clean else dict(self.environ)
        full.update(env or {})
        options: dict[str, object] = {"env": full}
        if self.other:
            options |= {"user": self.uid, "group": self.gid, "extra_groups": []}
        return options

    def __call__(
        self,
        argv: Sequence[str | os.PathLike[str]],
        *,
        env: dict[str, str] | None = None,
        clean: bool = False,
        cwd: str | os.PathLike[str] | None = None,
        timeout: float = 120,
        check: bool = False,
        text: bool = True,
        **options: object,
    ) -> subprocess.CompletedProcess:
        """Run a command as this user; `clean` starts from an empty environment. Output is captured by default."""
        if "stdout" not in options and "stderr" not in options:
            options["capture_output"] = True
        if "input" not in options and "stdin" not in options:
            options["stdin"] = subprocess.DEVNULL
        result = subprocess.run(
            [os.fspath(word) for word in argv],
            cwd=cwd or self.tmp,
            timeout=timeout,
            text=text,
            **self._options(env, clean),
            **options,
        )
        if check and result.returncode:
            raise AssertionError(f"{argv} ended with {result.returncode}\n{result.stdout}\n{result.stderr}")
        return result

    def popen(
        self,
        argv: Sequence[str | os.PathLike[str]],
        *,
        env: dict[str, str] | None = None,
        clean: bool = False,
        cwd: str | os.PathLike[str] | None = None,
        **options: object,
    ) -> subprocess.Popen:
        """Start a command as this user and return at once."""
        words = [os.fspath(word) for word in argv]
        return subprocess.Popen(words, cwd=cwd or self.tmp, **self._options(env, clean), **options)

    def write(self, name: str, content: str | bytes = "", mode: int = 0o644) -> Path:
        """Make a file below the user's temporary folder, owned by the user."""
        path = self.tmp / name
        for folder in reversed([parent for parent in path.parents if parent.is_relative_to(self.tmp)]):
            if not folder.exists():
                folder.mkdir()
                self.own(folder)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        path.chmod(mode)
        return self.own(path)

    def own(self, path: Path) -> Path:
        """Give a path to this user."""
        if self.other:
            os.lchown(path, self.uid, self.gid)
        return path


def has_subids(name: str) -> bool:
    try:
        lines = Path("/etc/subuid").read_text().splitlines()
    except OSError:
        return False
    return shutil.which("newuidmap") is not None and any(line.split(":")[0] == name for line in lines)
