# SPDX-License-Identifier: Apache-2.0
"""The world that tests bring along: real ordinary users, the command under test, judges, and what a test must miss.

Started as root, the rootless tests run as the ordinary users that `scripts/test` made (`pysing` with a range of
subordinate ids, `pysing-plain` without); started by an ordinary user they run as that user.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from users import User, has_subids

# How busy the machine is decides no test.
settings.register_profile("workshop", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("workshop")


def _account(name: str) -> pwd.struct_passwd:
    try:
        return pwd.getpwnam(name)
    except KeyError:
        pytest.skip(f"no user {name} on this machine (scripts/test makes it when started as root)")


def _end_strays(base: Path) -> None:
    """End what tests of this session left running; another session may be running beside it as the same users."""
    mark = os.fsencode(base)
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            texts = (folder / "cmdline").read_bytes() + (folder / "environ").read_bytes()
            if mark in texts or mark in os.fsencode(os.readlink(folder / "cwd")):
                os.kill(int(folder.name), signal.SIGKILL)
        except OSError:  # gone, or not ours to look at
            continue


@pytest.fixture(scope="session")
def user_space() -> Iterator[Path]:
    """A folder that ordinary users can enter; emptied at the end, also of files that belong to subordinate ids."""
    base = Path(tempfile.mkdtemp(prefix="pysingularity-test-", dir="/var/tmp"))
    base.chmod(0o755)
    yield base
    _end_strays(base)
    subprocess.run(["chmod", "-R", "u+rwX", base], check=False, capture_output=True)
    shutil.rmtree(base, ignore_errors=True)


@pytest.fixture
def as_subuid_user(user_space: Path) -> User:
    """An ordinary user with a range of subordinate ids and newuidmap."""
    account = _account("pysing") if os.getuid() == 0 else pwd.getpwuid(os.getuid())
    if not has_subids(account.pw_name):
        pytest.skip(f"user {account.pw_name} has no range in /etc/subuid, or newuidmap is missing")
    return User(account, user_space)


@pytest.fixture
def as_plain_user(user_space: Path) -> User:
    """An ordinary user without subordinate ids (or told not to use them)."""
    if os.getuid() == 0:
        return User(_account("pysing-plain"), user_space)
    return User(pwd.getpwuid(os.getuid()), user_space, {"SINGULARITY_ROOTLESS": "notify"})


@pytest.fixture
def as_user(user_space: Path) -> User:
    """An ordinary user, whichever kind."""
    account = _account("pysing") if os.getuid() == 0 else pwd.getpwuid(os.getuid())
    return User(account, user_space)


@pytest.fixture
def root_only() -> None:
    """Skip unless the tests were started by root."""
    if os.getuid() != 0:
        pytest.skip("needs to be started as root")


@pytest.fixture
def fuse(as_user: User) -> None:
    """Skip unless an ordinary user may open /dev/fuse."""
    if as_user(["sh", "-c", "exec 3<>/dev/fuse"]).returncode:
        pytest.skip("/dev/fuse may not be opened by ordinary users (chmod 666 /dev/fuse)")


@pytest.fixture(scope="session")
def tool():
    """Return the path of a program, or skip the test and name what is missing: tool("mksquashfs")."""

    def find(name: str) -> str:
        path = shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
        if path is None:
            pytest.skip(f"needs the program {name}")
        return path

    return find


@pytest.fixture(scope="session")
def apptainer():
    """The real Apptainer as judge: apptainer("inspect", path, user=True). Its files live below /tmp."""
    command = os.environ.get("REFERENCE_APPTAINER") or shutil.which("apptainer")
    if not command or not os.access(command.split()[0], os.X_OK):
        pytest.skip("needs Apptainer (on PATH, or a command named by REFERENCE_APPTAINER)")

    def run(*words: str | os.PathLike[str], user: bool = False, **options: object) -> subprocess.CompletedProcess:
        environ = {**os.environ, **({"AS_UID": "1000"} if user else {})}
        argv = [*command.split(), *(os.fspath(word) for word in words)]
        return subprocess.run(
            argv, env=environ, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL, **options
        )

    if run("--version").returncode:
        pytest.skip(f"{command} --version does not answer")
    return run
