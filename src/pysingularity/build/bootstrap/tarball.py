# SPDX-License-Identifier: Apache-2.0
"""Bootstrap: http, https, tarball — a root file system as one tar, compressed or not, from the web or this machine.

Keywords: From, the address or path (with Bootstrap: https it may start behind the colon, //host/root.tar.xz), and
Checksum (sha256:…), which is checked before anything is unpacked.
"""

from __future__ import annotations

import os

from pysingularity import messages
from pysingularity.build.bootstrap import BootstrapRequest, BootstrapResult
from pysingularity.build.deb.fetch import Fetcher
from pysingularity.errors import UserError

#: The largest tarball (that of a full distribution has 5 GB).
MOST = 64 << 30


def bootstrap(request: BootstrapRequest) -> BootstrapResult:
    """Fetch the tarball and unpack it into the root.

    Raises:
        UserError: it is not there, is not what was promised, is damaged or hostile.
    """
    url = request.need("From", example="ADDRESS of a tar")
    agent = request.header.get("bootstrap", "").strip().lower()
    if agent in ("http", "https") and "://" not in url:
        url = f"{agent}://{url.lstrip('/')}"
    elif "://" not in url:
        url = f"file://{os.path.abspath(os.path.join(request.directory, url))}"
    fetcher = Fetcher(os.path.join(request.tmp, "fetch"), request.environ, request.progress)
    try:
        path, digest = fetcher.stream(url, MOST, f"fetching {url}")
    finally:
        fetcher.close()
    try:
        if not request.check(digest, url) and url.startswith("http:"):
            messages.warning(f"{url}: came unprotected and without a Checksum: it may be anybody's")
        unpack(request, path, url)
    finally:
        os.unlink(path)
    return BootstrapResult(digest=f"sha256:{digest}", source=url)


def unpack(request: BootstrapRequest, path: str, what: str) -> None:
    """Unpack a tar, whatever it is wrapped in, into the root."""
    from pysingularity.build.deb.tree import Tree
    from pysingularity.build.deb.unpack import open_tar, settle_owners

    request.progress(f"unpacking {what}")
    with Tree(request.root) as tree:
        settle_owners(tree, request.way.owners, open_tar(path, tree, what))
    # Tarballs of one folder with the system inside are a usual mistake worth a word.
    if not any(os.path.isdir(os.path.join(request.root, name)) for name in ("bin", "usr", "etc")):
        names = ", ".join(sorted(os.listdir(request.root))[:5]) or "nothing"
        raise UserError(
            "no-system", f"{what}: has no bin, usr or etc at its top, but {names}", hint="is this the tar of a root?"
        )
