# SPDX-License-Identifier: Apache-2.0
"""A package installation as root without root: each way against a chroot of real root.

    python bench/rootless.py TREE.tar [--runs N] [--packages "WORDS"]

Start as root: the ways run as the ordinary users that `scripts/test` makes. TREE.tar is a Debian root file system with
package sources, for example from mmdebstrap --variant=minbase. Every run starts from a freshly unpacked tree, in turn
(root, subuid, notify, bpf, root, ...), so that a slow minute slows all of them.
"""

from __future__ import annotations

import argparse
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from common import Series, interleave, table

SCRIPT = Path(__file__).parent.parent / "tests/runtime/emulated.py"
PACKAGES = "cmake libyaml-dev wget unzip openssh-server postgresql dbus sudo nginx man-db"
CHROOT = """
for one in proc dev sys; do mount --rbind /$one $0/$one; done
for one in resolv.conf hosts; do touch $0/etc/$one; mount --bind /etc/$one $0/etc/$one; done
exec env -i $PROXIES PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C DEBIAN_FRONTEND=noninteractive \\
    chroot $0 sh -c "$1"
"""


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tar", type=Path)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--packages", default=PACKAGES)
    parser.add_argument("--with-range", default="pysing", help="user with subordinate ids")
    parser.add_argument("--without", default="pysing-plain", help="user without")
    arguments = parser.parse_args()
    if os.getuid() != 0:
        sys.exit("start as root: one of the ways is real root")
    job = f"apt-get update -q && apt-get install -qy --no-install-recommends {arguments.packages}"
    base = Path(tempfile.mkdtemp(prefix="bench-rootless-", dir="/var/tmp"))
    base.chmod(0o755)
    proxies = [f"{name}={value}" for name, value in os.environ.items() if name.lower().endswith("_proxy")]
    environ = {**os.environ, "PROXIES": " ".join(proxies)}

    def ready(name: str, user: str) -> None:
        """Unpack a fresh tree, as the user of the way."""
        for old in base.iterdir():
            shutil.rmtree(old)
        box = base / name
        box.mkdir()
        if user == "root":
            subprocess.run(["tar", "-xpf", arguments.tar, "-C", box, "--numeric-owner"], check=True)
            return
        account = pwd.getpwnam(user)
        os.chown(box, account.pw_uid, account.pw_gid)
        words = as_user(user, name, str(arguments.tar.resolve()))
        subprocess.run([*words, sys.executable, SCRIPT, box, "true"], check=True, stderr=subprocess.DEVNULL)

    def as_user(user: str, way: str, archive: str = "") -> list[str]:
        account = pwd.getpwnam(user)
        extra = [f"UNPACK={archive}"] if archive else []
        ids = ["setpriv", f"--reuid={account.pw_uid}", f"--regid={account.pw_gid}", "--clear-groups"]
        return [*ids, "env", "-C", "/", f"HOME={account.pw_dir}", f"SINGULARITY_ROOTLESS={way}", *extra]

    def series(name: str, user: str) -> Series:
        box = str(base / name)
        command = ["unshare", "-m", "sh", "-c", CHROOT, box, job]
        if user != "root":
            command = [*as_user(user, name), sys.executable, str(SCRIPT), box, "sh", "-c", job]
        return Series(name, command, before=lambda: ready(name, user))

    ways = [
        series("root", "root"),
        series("subuid", arguments.with_range),
        series("notify", arguments.without),
        series("bpf", arguments.without),
    ]
    try:
        interleave(ways, arguments.runs, environ, warmup=0)
        table(ways, base="root")
    finally:
        shutil.rmtree(base, ignore_errors=True)


if __name__ == "__main__":
    main()
