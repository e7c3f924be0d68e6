# SPDX-License-Identifier: Apache-2.0
"""Bootstrap: zypper — openSUSE and its kin, with the host's zypper, or one in a container.

Keywords: MirrorURL, UpdateURL, OtherURL0 … (%{OSVERSION} in them is replaced), OSVersion, Include, Verify (no: goes
without signatures). Registration of SUSE's commercial products is not done here.
"""

from __future__ import annotations

import re

from pysingularity.build.bootstrap import BootstrapRequest, BootstrapResult, program
from pysingularity.build.bootstrap.yum import _url
from pysingularity.errors import UserError

#: The smallest system; the pattern of a base differs from release to release, this package does not.
BASE = ("aaa_base",)
_REGISTERED = ("product", "regcode", "productpgp", "registerurl", "modules")


def bootstrap(request: BootstrapRequest) -> BootstrapResult:
    """Fill the root with aaa_base, what it needs, and Include.

    Raises:
        HostError: zypper cannot be had.
        UserError: the recipe or the mirror is at fault.
    """
    for keyword in _REGISTERED:
        if keyword in request.header:
            raise UserError(
                "registered-product",
                f"{keyword.capitalize()}: registered SUSE products cannot be installed by this agent",
                hint="give MirrorURL, or start from SUSE's own image with Bootstrap: docker",
            )
    others = sorted(key for key in request.header if re.fullmatch(r"otherurl[0-9]+", key))
    names = ["MirrorURL", *(["UpdateURL"] if request.header.get("updateurl", "").strip() else []), *others]
    check = program.verify(request)
    urls = [_url(request, name) for name in names]
    tool = program.Program(request, "zypper", package="zypper", image="docker://opensuse/leap:15")
    base = ["--root", request.root, "--non-interactive", *([] if check else ["--no-gpg-checks"])]
    for number, url in enumerate(urls):
        argv = [*base, "addrepo", *(["--gpgcheck"] if check else ["--no-gpgcheck"]), url, f"repo-{number}"]
        tool.run(argv, f"adding {url}")
    tool.run([*base, *(["--gpg-auto-import-keys"] if check else []), "refresh"], "reading repositories")
    include = program.words(request.header.get("include", ""))
    argv = [*base, "install", "--no-recommends", "--auto-agree-with-licenses", *BASE, *include]
    tool.run(argv, f"installing {len(include)} packages and the base with zypper")
    program.remove(request, "var/cache/zypp", "var/log/zypper.log", "var/log/zypp")
    return BootstrapResult(source=urls[0])
