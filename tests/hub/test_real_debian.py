# SPDX-License-Identifier: Apache-2.0
"""A whole Debian through a hub: the real builder fetches it by the sandbox's own way out."""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from users import User

from .shelf import SINGULARITY
from .test_real_builds import server, user
from .world import Repository, Server

pytestmark = [pytest.mark.network, pytest.mark.long, pytest.mark.rootless]
__all__ = ["server", "user"]
RECIPE = """\
Bootstrap: debootstrap
OSVersion: bookworm
{mirror}

%post
    id -u
    cat /etc/debian_version
    apt-get update
    apt-get install -y --no-install-recommends hello

%test
    hello | grep -i hello

%labels
    KIND debian
"""


def mirror() -> str:
    """Return the mirror that this machine itself uses."""
    pattern = re.compile(r"^(?:deb (?:\[.*\] )?|URIs: )(https?://\S+/debian)/?(?:\s|$)", re.MULTILINE)
    for path in (Path("/etc/apt/sources.list"), *Path("/etc/apt/sources.list.d").glob("*")):
        if path.exists() and (found := pattern.search(path.read_text())):
            return found[1]
    pytest.skip("needs a mirror of Debian over HTTP")


def test_debian_is_built_tested_and_pulled(user: User, server: Server):
    address = mirror()
    host = urlsplit(address).hostname
    settings = server.data / "hub.toml"
    server.stop()
    settings.write_text(settings.read_text() + f'[egress]\nallow = ["{host}"]\n')
    server.environ = {name: os.environ[name] for name in os.environ if name.lower().endswith("_proxy")}
    server.start()
    repository = Repository(user.tmp / "debian", user)
    repository.commit({"Singularity": RECIPE.format(mirror=f"MirrorURL: {address}")})
    build = server.connect(repository)
    ended = server.ended(build["id"], 1200)
    log = server.log(build["id"])
    assert ended["state"] == "done", log[-6000:]
    path = user.tmp / "debian.sif"
    environ = {"no_proxy": "*", "SINGULARITY_NOHTTPS": "1"}
    user([*SINGULARITY, "pull", path, f"shub://127.0.0.1:{server.port}/lab/tools"], env=environ, check=True)
    assert "Hello" in user([*SINGULARITY, "exec", path, "hello"], check=True).stdout
