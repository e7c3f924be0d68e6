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


PYTHON = """\
Bootstrap: debootstrap
Include: ca-certificates python3-venv

%post
    #step the tool
    python3 -m venv /opt/tool
    /opt/tool/bin/pip install --no-cache-dir uv
    #step what it installs
    /opt/tool/bin/uv venv --python /usr/bin/python3 /opt/env
    VIRTUAL_ENV=/opt/env /opt/tool/bin/uv pip install --no-cache sampleproject

%test
    /opt/env/bin/python -c "import sample"
"""


@pytest.mark.parametrize("kind", ["as_subuid_user", "as_plain_user"])
def test_uv_installs_what_pip_would(request, kind):
    user = request.getfixturevalue(kind)
    user.write("x.def", PYTHON)
    result = user(["singularity", "build", "x.sif", "x.def"], timeout=900)
    assert result.returncode == 0, result.stderr[-4000:]
    again = user(["singularity", "build", "--force", "x.sif", "x.def"], timeout=120)
    assert again.returncode == 0 and "uv pip" not in again.stderr
