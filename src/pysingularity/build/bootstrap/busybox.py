# SPDX-License-Identifier: Apache-2.0
"""Bootstrap: busybox — one static program and the links that make it a system.

Keywords: MirrorURL, the address (or path) of the program or of the folder that has it as busybox-MACHINE, and Checksum
(sha256:…) of the program.
"""

from __future__ import annotations

import hashlib
import os

from pysingularity.build.bootstrap import BootstrapRequest, BootstrapResult
from pysingularity.build.deb.fetch import Fetcher, NotFound
from pysingularity.build.deb.tree import Tree
from pysingularity.errors import UserError

#: A BusyBox with everything has 2 MB.
MOST = 64 << 20
_MACHINES = {"amd64": "x86_64", "i386": "i686", "arm64": "armv8l", "armhf": "armv7l", "ppc64el": "powerpc64"}
_FOLDERS = ("bin", "sbin", "usr/bin", "usr/sbin", "dev", "proc", "sys", "etc", "home", "root", "tmp", "var/tmp")
_FILES = {
    "etc/passwd": "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n",
    "etc/group": "root:x:0:\nnogroup:x:65534:\n",
    "etc/hosts": "127.0.0.1 localhost\n::1 localhost\n",
    "etc/resolv.conf": "",
}


def bootstrap(request: BootstrapRequest) -> BootstrapResult:
    """Fetch the program, put it into the root and let it make its links.

    Raises:
        UserError: it is not there, is no program, or does not run.
    """
    url = request.need("MirrorURL", example="ADDRESS of a static busybox")
    url = f"file://{url}" if url.startswith("/") else url
    machine = _MACHINES.get(request.arch, request.arch)
    fetcher = Fetcher(os.path.join(request.tmp, "fetch"), request.environ, request.progress)
    try:
        request.progress(f"fetching {url}")
        data = _fetch(fetcher, url.rstrip("/"), machine)
    finally:
        fetcher.close()
    digest = hashlib.sha256(data).hexdigest()
    request.check(digest, url)
    if data[:4] != b"\x7fELF":
        raise UserError("no-program", f"{url}: is no program for Linux", hint="the file itself, not a page about it")
    with Tree(request.root) as tree:
        for name in _FOLDERS:
            tree.folder(name.encode())
        for name in ("tmp", "var/tmp"):
            parent, last, _ = tree.place(name.encode())
            os.chmod(last, 0o1777, dir_fd=parent)
        for name, text in _FILES.items():
            tree.write(name.encode(), text.encode())
        tree.write(b"bin/busybox", data, 0o755)
    status = request.run(["/bin/busybox", "--install", "-s"])
    if status:
        raise UserError("program-failed", f"{url}: busybox --install ended with status {status}; is it static?")
    return BootstrapResult(digest=f"sha256:{digest}", source=url)


def _fetch(fetcher: Fetcher, url: str, machine: str) -> bytes:
    """Return the program at an address, or in the folder there."""
    inside = f"{url}/busybox-{machine}"
    first, second = (url, inside) if url.rpartition("/")[2].startswith("busybox") else (inside, url)
    try:
        return fetcher.get(first, MOST)
    except NotFound:
        return fetcher.get(second, MOST)
