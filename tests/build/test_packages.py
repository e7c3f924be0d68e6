# SPDX-License-Identifier: Apache-2.0
"""The main job with real packages: a Debian from the mirror, apt-get and pip in %post, as both kinds of user."""

from __future__ import annotations

import json

import pytest

from pysingularity.image.inside import squashfs_of
from pysingularity.image.open import open_image

pytestmark = [pytest.mark.rootless, pytest.mark.network, pytest.mark.long]

RECIPE = """\
Bootstrap: debootstrap
Include: ca-certificates

%files
    data.txt /opt/data/

%post
    apt-get update
    apt-get install -y --no-install-recommends cmake libyaml-dev wget unzip python3-pip
    pip install --break-system-packages --no-cache-dir sampleproject
    apt-get clean

%environment
    export WHO=me

%labels
    Purpose test

%runscript
    echo "$WHO: $*"

%test
    cmake --version
    python3 -c "import sample"
    test -e /usr/include/yaml.h
"""


@pytest.mark.parametrize("kind", ["as_subuid_user", "as_plain_user"])
def test_recipe_with_apt_and_pip_becomes_an_image_that_runs(request, kind):
    user = request.getfixturevalue(kind)
    user.write("data.txt", "data")
    user.write("x.def", RECIPE)
    result = user(["singularity", "build", "x.sif", "x.def"], timeout=900)
    assert result.returncode == 0, result.stderr[-4000:]
    ran = user(["singularity", "run", "x.sif", "a", "b"], timeout=60)
    assert (ran.returncode, ran.stdout) == (0, "me: a b\n"), ran.stderr
    labels = json.loads(user(["singularity", "inspect", "--json", "x.sif"], check=True).stdout)
    assert labels["data"]["attributes"]["labels"]["Purpose"] == "test"
    with open_image(str(user.tmp / "x.sif")) as image:
        files = squashfs_of(image)
        found = {name: files.lookup(name) for name in ("etc/shadow", "usr/bin/chage", "var/cache/apt/archives/partial")}
        assert [(found[name].uid, found[name].gid, found[name].mode) for name in found] == [
            (0, 42, 0o640),
            (0, 42, 0o2755),
            (42, 0, 0o700),
        ]
