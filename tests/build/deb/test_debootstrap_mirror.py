# SPDX-License-Identifier: Apache-2.0
"""The real thing: this host's release from its own apt sources, as ordinary users, judged by dpkg and debootstrap."""

from __future__ import annotations

import os
import subprocess

import pytest

from pysingularity.build.deb.sources import codename, host_sources, of_distribution

RECIPE = """Bootstrap: debootstrap
Include: netbase, dbus

%post
    dpkg --audit > /audit
    dpkg-query -W -f '${binary:Package} ${db:Status-Status}\\n' > /packages
    apt-get update
    apt-get install -y --no-install-recommends unzip
"""


@pytest.fixture(scope="module")
def suite() -> str:
    """The host's release, with sources that can be reached."""
    name = codename()[1]
    if not of_distribution(host_sources(), name):
        pytest.skip("needs a Debian or Ubuntu host with apt sources")
    return name


@pytest.mark.network
@pytest.mark.rootless
@pytest.mark.parametrize("kind", ["as_subuid_user", "as_plain_user"])
def test_a_system_is_installed_and_can_install_more(request, suite: str, kind: str) -> None:
    user = request.getfixturevalue(kind)
    user.write("toy.def", RECIPE)
    done = user(["singularity", "build", "--sandbox", "box", "toy.def"], timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    box = user.tmp / "box"
    assert (box / "audit").read_text() == ""
    lines = (box / "packages").read_text().splitlines()
    assert {line.split()[1] for line in lines} == {"installed"}
    assert {"apt", "base-files", "netbase", "dbus"} <= {line.split()[0].partition(":")[0] for line in lines}
    assert (box / "usr/bin/unzip").exists()
    said = user(
        ["singularity", "exec", "box", "ls", "-ln", "/etc/shadow", "/usr/lib/dbus-1.0/dbus-daemon-launch-helper"]
    )
    if kind == "as_subuid_user":
        assert said.returncode == 0, said.stderr


@pytest.mark.network
@pytest.mark.root
@pytest.mark.long
def test_the_packages_are_those_of_debootstrap(root_only, tool, suite: str, tmp_path) -> None:
    debootstrap = tool("debootstrap")
    source = next(source for source in of_distribution(host_sources(), suite) if source.suite == suite)
    subprocess.run(
        [debootstrap, "--variant=minbase", suite, tmp_path / "judge", source.url], check=True, capture_output=True
    )
    (tmp_path / "toy.def").write_text(f"Bootstrap: debootstrap\nOSVersion: {suite}\nMirrorURL: {source.url}\n")
    environ = {**os.environ, "SINGULARITY_CACHEDIR": str(tmp_path / "cache")}
    subprocess.run(["singularity", "build", "--sandbox", "box", "toy.def"], cwd=tmp_path, env=environ, check=True)
    query = ["dpkg-query", "-W", "-f", "${binary:Package} ${Version} ${Status}\n"]
    found = [
        subprocess.run(
            [*query, f"--admindir={tmp_path}/{name}/var/lib/dpkg"], capture_output=True, text=True, check=True
        ).stdout
        for name in ("judge", "box")
    ]
    assert found[0] == found[1]
