# SPDX-License-Identifier: Apache-2.0
"""Bootstrap: arch — Arch Linux and its kin, with the host's pacman, or one in a container.

Keywords: MirrorURL (a mirror; $repo/os/$arch is added unless it is there) or ConfURL (a whole pacman.conf), Include,
Components (repositories of the mirror, core and extra), Verify (no: goes without signatures; else pacman's own
keys of this host count). What pacstrap does around pacman, mounts and devices, we do already.
"""

from __future__ import annotations

import os

from pysingularity.build.bootstrap import BootstrapRequest, BootstrapResult, program
from pysingularity.build.deb.fetch import Fetcher
from pysingularity.errors import UserError

BASE = ("base",)
_ARCHITECTURES = {"amd64": "x86_64", "arm64": "aarch64", "armhf": "armv7h", "riscv64": "riscv64"}
_MOST_CONFIGURATION = 1 << 20


def bootstrap(request: BootstrapRequest) -> BootstrapResult:
    """Fill the root with the group base and Include.

    Raises:
        HostError: pacman cannot be had.
        UserError: the recipe or the mirror is at fault.
    """
    url, text = configuration(request)
    tool = program.Program(request, "pacman", package="pacman-package-manager", image="docker://archlinux:latest")
    config = os.path.join(request.tmp, "pacman.conf")
    with open(config, "w", encoding="utf-8") as file:
        file.write(text)
    for name in ("var/lib/pacman", "var/cache/pacman/pkg", "etc"):
        os.makedirs(os.path.join(request.root, name), exist_ok=True)
    cache = os.path.join(request.cache, "arch")
    os.makedirs(cache, exist_ok=True)
    include = program.words(request.header.get("include", ""))
    argv = ["--root", request.root, "--config", config, "--cachedir", cache, "--noconfirm", "--noprogressbar"]
    argv += ["--hookdir", os.path.join(request.root, "etc/pacman.d/hooks"), "-Sy", *BASE, *include]
    tool.run(argv, f"installing {len(include)} packages and the base with pacman")
    program.remove(request, "var/log/pacman.log", "var/lib/pacman/sync")
    return BootstrapResult(source=url)


def configuration(request: BootstrapRequest) -> tuple[str, str]:
    """Return the mirror and pacman's configuration."""
    url = request.header.get("mirrorurl", "").strip().rstrip("/")
    other = request.header.get("confurl", "").strip()
    if not url and not other:
        raise UserError(
            "keyword-missing",
            "Bootstrap: arch needs the keyword MirrorURL or ConfURL",
            hint="add a line to the header: MirrorURL: ADDRESS of a mirror",
        )
    if other and not url:
        fetcher = Fetcher(os.path.join(request.tmp, "fetch"), request.environ, request.progress)
        try:
            source = f"file://{other}" if other.startswith("/") else other
            return other, fetcher.get(source, _MOST_CONFIGURATION).decode("utf-8", "replace")
        finally:
            fetcher.close()
    if any(letter.isspace() or not letter.isprintable() for letter in url):
        raise UserError("bad-keyword", f"MirrorURL: {url!r} is no address")
    url = f"file://{url}" if url.startswith("/") else url
    server = url if "$repo" in url else f"{url}/$repo/os/$arch"
    level = "Required DatabaseOptional" if program.verify(request) else "Never"
    lines = ["[options]", f"Architecture = {_ARCHITECTURES.get(request.arch, request.arch)}", f"SigLevel = {level}"]
    for name in program.words(request.header.get("components", "")) or ["core", "extra"]:
        lines += ["", f"[{name}]", f"Server = {server}"]
    return url, "\n".join(lines) + "\n"
