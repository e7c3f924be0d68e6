# SPDX-License-Identifier: Apache-2.0
"""What root emulation leaves behind is what real root leaves: owners, modes, capabilities, devices of every path."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pysingularity.linux.ownership import RealOwners, strip

SCRIPT = Path(__file__).with_name("emulated.py")
PACKAGES = "cmake libyaml-dev wget unzip openssh-server postgresql dbus sudo nginx man-db"
JOB = f"apt-get update -q && apt-get install -qy --no-install-recommends {PACKAGES}"
CHROOT = """
for one in proc dev sys; do mount --rbind /$one $0/$one; done
for one in resolv.conf hosts; do touch $0/etc/$one; mount --bind /etc/$one $0/etc/$one; done
exec chroot $0 sh -c "$1"
"""
#: What a package's script makes or not, by the time it happens to take.
BY_CHANCE = ("/var/cache/man/", "/var/log/")


@pytest.fixture(scope="module")
def base(user_space):
    """A minimal Debian as a tar file, with the host's package sources."""
    program = shutil.which("mmdebstrap")
    if program is None or os.getuid() != 0:
        pytest.skip("needs mmdebstrap, and to be started as root")
    path = user_space / "base.tar"
    sources = Path("/etc/apt/sources.list.d/debian.sources")
    words = [program, "--quiet", "--variant=minbase", "bookworm", path, *([sources] if sources.exists() else [])]
    result = subprocess.run(words, capture_output=True, text=True, check=False)
    if result.returncode:
        pytest.skip(f"mmdebstrap: {result.stderr[-300:]}")
    path.chmod(0o644)
    return path


@pytest.fixture(scope="module")
def by_root(base, tmp_path_factory):
    """Path → what real root made, in a chroot."""
    root = tmp_path_factory.mktemp("root") / "box"
    root.mkdir()
    subprocess.run(["tar", "-xpf", base, "-C", root, "--numeric-owner"], check=True)
    env = {name: value for name, value in os.environ.items() if name.lower().endswith("_proxy")}
    env |= {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LANG": "C", "DEBIAN_FRONTEND": "noninteractive"}
    words = ["unshare", "-m", "--pid", "--fork", "sh", "-c", CHROOT, root, JOB]
    result = subprocess.run(words, env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    found = {}
    for folder, folders, files in os.walk(root):
        for name in [*folders, *files]:
            path = os.path.join(folder, name)
            uid, gid, mode, rdev = RealOwners().get(path, os.lstat(path))
            names = os.listxattr(path, follow_symlinks=False)
            kept = strip({one.encode(): os.getxattr(path, one, follow_symlinks=False) for one in names})
            words = {key.decode(): value.hex() for key, value in kept.items()}
            found[path[len(str(root)) :]] = [f"{mode:o}", uid, gid, rdev, words]
    yield found
    shutil.rmtree(root, ignore_errors=True)


@pytest.mark.long
@pytest.mark.network
@pytest.mark.root
@pytest.mark.rootless
@pytest.mark.parametrize("way", ["notify", "subuid"])
def test_every_path_is_as_root_made_it(base, by_root, as_plain_user, as_subuid_user, way):
    user = as_subuid_user if way == "subuid" else as_plain_user
    root, scan = user.tmp / "box", user.tmp / "scan.json"
    root.mkdir()
    user.own(root)
    env = {"SINGULARITY_ROOTLESS": way, "UNPACK": str(base), "SCAN": str(scan)}
    result = user([sys.executable, SCRIPT, root, "sh", "-c", JOB], env=env, timeout=600)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    found = json.loads(scan.read_text())
    user([sys.executable, "-m", "pysingularity", "rm", root])
    differences = {
        path: (by_root[path], found[path]) for path in by_root.keys() & found.keys() if by_root[path] != found[path]
    }
    assert differences == {}
    assert len(by_root.keys() & found.keys()) > 15_000
    assert [path for path in by_root.keys() ^ found.keys() if not path.startswith(BY_CHANCE)] == []
