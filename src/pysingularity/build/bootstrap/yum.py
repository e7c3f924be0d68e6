# SPDX-License-Identifier: Apache-2.0
"""Bootstrap: yum, dnf — distributions of RPM packages, with the host's dnf or yum, or one in a container.

Keywords: MirrorURL and UpdateURL (%{OSVERSION} in them is replaced), OSVersion, Include (packages besides the smallest
system), Setopt (further options of the configuration, KEY=VALUE), Keyring (a file with the keys of the packages; the
variable GPG with an address is understood too), Verify (no: goes without). Recipes that name no key were always built
without checking; they still are, and a warning says so.
"""

from __future__ import annotations

import os

from pysingularity import messages
from pysingularity.build.bootstrap import BootstrapRequest, BootstrapResult, program
from pysingularity.errors import UserError

#: What makes a system that a shell can run in; a name of the release package differs with every distribution.
BASE = ("/etc/redhat-release", "coreutils")


def bootstrap(request: BootstrapRequest) -> BootstrapResult:
    """Fill the root with coreutils, what they need, and Include.

    Raises:
        HostError: neither dnf nor yum can be had.
        UserError: the recipe or the mirror is at fault.
    """
    url = _url(request, "MirrorURL")
    tool = program.Program(request, "dnf", "yum", package="dnf", image="docker://almalinux:9")
    home = tool.home()
    # Debian's rpm keeps its database below the home folder, which no other distribution would find.
    with open(os.path.join(home, ".rpmmacros"), "w", encoding="utf-8") as file:
        file.write("%_dbpath /var/lib/rpm\n")
    folder = os.path.join(request.tmp, "repos")
    os.makedirs(folder, exist_ok=True)
    config = os.path.join(request.tmp, "dnf.conf")
    with open(config, "w", encoding="utf-8") as file:
        file.write(configuration(request, url, folder))
    argv = ["-c", config, f"--installroot={request.root}", "-y"]
    version = request.header.get("osversion", "").strip()
    if version:
        argv.append(f"--releasever={version}")
    argv += [f"--setopt={word}" for word in program.words(request.header.get("setopt", ""))]
    include = program.words(request.header.get("include", ""))
    tool.run([*argv, "install", *BASE, *include], f"installing {len(include)} packages and the base with dnf")
    program.remove(request, "var/cache/dnf", "var/cache/yum", "var/log/dnf.log", "var/log/dnf.librepo.log",
                   "var/log/dnf.rpm.log", "var/log/hawkey.log")  # fmt: skip
    return BootstrapResult(source=url)


def configuration(request: BootstrapRequest, url: str, folder: str) -> str:
    """Return dnf's configuration, in which only the recipe's mirrors exist."""
    keys = _keys(request)
    check = bool(keys) and program.verify(request)
    if not check:
        messages.warning("signatures of packages are not checked: the recipe names no key (Keyring) or says Verify: no")
    lines = ["[main]", "keepcache=0", "plugins=0", "install_weak_deps=0", "obsoletes=1", f"reposdir={folder}",
             f"gpgcheck={int(check)}"]  # fmt: skip
    repositories = {"base": url}
    if request.header.get("updateurl", "").strip():
        repositories["updates"] = _url(request, "UpdateURL")
    for name, address in repositories.items():
        lines += ["", f"[{name}]", f"name={name}", f"baseurl={address}", "enabled=1", f"gpgcheck={int(check)}"]
        lines += [f"gpgkey={keys}"] if check else []
    return "\n".join(lines) + "\n"


def _keys(request: BootstrapRequest) -> str:
    keyring = request.header.get("keyring", "").strip()
    if keyring:
        path = os.path.abspath(os.path.join(request.directory, keyring))
        if not os.path.isfile(path):
            raise UserError("no-keyring", f"Keyring: {path} is not there")
        return f"file://{path}"
    return request.environ.get("GPG", "").strip()


def _url(request: BootstrapRequest, keyword: str) -> str:
    """Return an address of the header with the release filled in.

    Raises:
        UserError: it is missing, or has a place for a release that is not given.
    """
    url = request.need(keyword, example="ADDRESS of a folder with repodata/")
    if any(not letter.isprintable() or letter.isspace() for letter in url):
        raise UserError("bad-keyword", f"{keyword}: {url!r} is no address")
    if "%{OSVERSION}" in url.upper():
        version = request.need("OSVersion", example="9")
        start = url.upper().index("%{OSVERSION}")
        url = url[:start] + version + url[start + len("%{OSVERSION}") :]
    return f"file://{url}" if url.startswith("/") else url
