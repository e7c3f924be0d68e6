# SPDX-License-Identifier: Apache-2.0
"""`singularity recipe history`: what was done by hand in a sandbox, as a definition file that builds the same again."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from pysingularity.build.history import installed
from pysingularity.image.inside import FolderSource
from pysingularity.recipe.parser import parse

RECIPE = """\
Bootstrap: localimage
From: {base}

%post
    mkdir -p /opt/old
    echo old > /opt/old/file
    echo 1 > /gone
"""


def put(root: Path, path: str, text: str = "") -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text)


def dist(
    root: Path, folder: str, name: str, version: str, *, asked: bool = True, installer: str = "pip", url: str = ""
) -> None:
    info = f"{folder}/{name}-{version}.dist-info"
    put(root, f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n\nName: not this\n")
    put(root, f"{info}/INSTALLER", installer + "\n")
    if asked:
        put(root, f"{info}/REQUESTED")
    if url:
        put(root, f"{info}/direct_url.json", json.dumps({"url": url, "vcs_info": {"vcs": "git", "commit_id": "abc"}}))
    put(root, f"{info}/RECORD", f"{name}/__init__.py,,\n../../../bin/{name},,\n{name}-{version}.dist-info/RECORD,,\n")
    put(root, f"{folder}/{name}/__init__.py")
    put(root, f"{folder}/../../../bin/{name}")


def packages(root: Path) -> None:
    """Fill a root with what package managers leave behind."""
    status = (root / "var/lib/dpkg/status").read_text() if (root / "var/lib/dpkg/status").exists() else ""
    put(
        root,
        "var/lib/dpkg/status",
        status + "Package: cowsay\nStatus: install ok installed\nVersion: 3.03\nRecommends: cowsay-off | nothing\n\n"
        "Package: libcow\nStatus: install ok installed\nVersion: 1\n\n"
        "Package: removed\nStatus: deinstall ok config-files\nVersion: 1\n",
    )
    put(root, "var/lib/apt/extended_states", "Package: libcow\nArchitecture: amd64\nAuto-Installed: 1\n")
    put(root, "usr/games/cowsay", "moo")
    site = "usr/local/lib/python3.11/dist-packages"
    dist(root, site, "asked", "1.5")
    dist(root, site, "came", "2", asked=False)
    dist(root, site, "linked", "3", url="https://example.invalid/x.git")
    dist(root, site, "debians", "4", installer="debian")
    put(root, "usr/lib/python3.11/EXTERNALLY-MANAGED")
    dist(root, "opt/venv/lib/python3.11/site-packages", "inside", "5", installer="uv")
    put(root, "opt/venv/pyvenv.cfg")
    put(root, "opt/conda/conda-meta/history", "==> 2026 <==\n# update specs: ['numpy>=1', 'conda-forge::scipy']\n")
    for name in ("numpy", "scipy", "blas"):
        about = {
            "name": name,
            "version": "1.0",
            "channel": "https://conda.anaconda.org/conda-forge/linux-64",
            "files": [f"lib/{name}.so"],
        }
        put(root, f"opt/conda/conda-meta/{name}-1.0-0.json", json.dumps(about))
        put(root, f"opt/conda/lib/{name}.so")
    put(root, "usr/local/lib/node_modules/@a/tool/package.json", json.dumps({"name": "@a/tool", "version": "7"}))
    put(root, "usr/local/lib/node_modules/@a/tool/index.js")
    put(root, "usr/local/lib/node_modules/npm/package.json", json.dumps({"name": "npm", "version": "9"}))
    debians = ["usr/games/cowsay", "usr/lib/python3.11/EXTERNALLY-MANAGED", "usr/local/bin/debians"]
    for folder in (f"{site}/debians", f"{site}/debians-4.dist-info", "usr/local/lib/node_modules/npm"):
        debians += [folder, *(f"{folder}/{one.name}" for one in (root / folder).iterdir())]
    put(root, "var/lib/dpkg/info/cowsay.list", "/.\n" + "".join(f"/{path}\n" for path in debians))


def test_packages_are_read_from_the_records_of_their_managers(tmp_path):
    packages(tmp_path)
    put(tmp_path, "lib/apk/db/installed", "C:x\nP:curl\nV:8-r0\nF:usr/bin\nR:curl\n\nP:musl\nV:1\n")
    put(tmp_path, "etc/apk/world", "curl>7\n")
    with FolderSource(str(tmp_path)) as source:
        found = installed.read(source)
    assert {name: one.asked for name, one in found.apt.items()} == {"cowsay": True, "libcow": False}
    assert {name: one.asked for name, one in found.apk.items()} == {"curl": True, "musl": False}
    assert {name: (one.version, one.asked) for name, one in found.pip["usr/local"].items()} == {
        "asked": ("1.5", True),
        "came": ("2", False),
        "linked": ("3", True),
    }
    assert found.pip["usr/local"]["linked"].source == "git+https://example.invalid/x.git@abc"
    assert list(found.pip["opt/venv"]) == ["inside"]
    assert {name for name, one in found.conda["opt/conda"].items() if one.asked} == {"numpy", "scipy"}
    assert {name: one.version for name, one in found.npm.items()} == {"@a/tool": "7"}
    assert {"usr/bin/curl", "usr/games/cowsay", "usr/local/bin/asked", "opt/conda/lib/blas.so"} <= found.files


@pytest.fixture(params=["as_subuid_user", "as_plain_user"])
def user(request, base):
    found = request.getfixturevalue(request.param)
    found(["cp", "-r", str(base), "mine"], check=True)
    found(["singularity", "build", "base.sif", "mine"], check=True)
    found.write("x.def", RECIPE.format(base="base.sif"))
    return found


def shell(user, script: str) -> None:
    """Do something by hand inside the sandbox."""
    user(["singularity", "exec", "--writable", "--fakeroot", "box", "/bin/sh", "-ec", script], check=True)


BY_HAND = """
echo new > /opt/old/file
rm /gone
mkdir -p /opt/tool/bin /opt/empty /srv/data
echo tool > /opt/tool/bin/run
chmod 755 /opt/tool/bin/run
ln -s run /opt/tool/bin/alias
ln -s /nowhere /opt/dangling
echo a > "/srv/data/with blank"
echo b > /srv/data/b
echo suid > /usr/suid
chown 5:6 /usr/suid
chmod 4711 /usr/suid
mkdir -p /var/cache; echo passing > /var/cache/x
echo 'export BY_HAND=yes' >> /.singularity.d/env/90-environment.sh
printf '#!/bin/sh\\necho ran by hand\\n' > /.singularity.d/runscript
"""


@pytest.mark.rootless
@pytest.mark.parametrize("folder", [(), ("--files", "parts")])
def test_written_recipe_builds_the_same_again(user, folder):
    user(["singularity", "build", "--sandbox", "box", "x.def"], check=True)
    shell(user, BY_HAND)
    result = user(["singularity", "recipe", "history", *folder, "box"], check=True)
    recipe = parse(result.stdout)
    user.write("y.def", result.stdout)
    if folder:
        user(["singularity", "rm", "box"], check=True)
    built = user(["singularity", "build", "y.sif", "y.def"])
    assert built.returncode == 0, built.stderr
    assert recipe.stages[0].body("post").startswith("    mkdir -p /opt/old\n")  # the definition it was made of
    script = (
        "cat /opt/old/file /opt/tool/bin/alias '/srv/data/with blank' /srv/data/b; stat -c '%a %u %g' /usr/suid;"
        " stat -c %N /opt/dangling; ls -d /opt/empty; ls /gone /var/cache/x 2>/dev/null; echo $BY_HAND;"
        " stat -c %a /opt/tool/bin/run"
    )
    found = user(["singularity", "exec", "--fakeroot", "-C", "y.sif", "/bin/sh", "-c", script]).stdout.splitlines()
    owner = ["4711 5 6"] if "subuid" in result.stderr or found[4].startswith("4711 5") else ["4711 0 0"]
    assert found == ["new", "tool", "a", "b", *owner, "'/opt/dangling' -> '/nowhere'", "/opt/empty", "yes", "755"]
    assert user(["singularity", "run", "y.sif"], check=True).stdout == "ran by hand\n"


@pytest.mark.rootless
def test_untouched_sandbox_has_no_history_and_images_do_not_carry_the_record(user):
    user(["singularity", "build", "--sandbox", "box", "x.def"], check=True)
    assert user(["singularity", "recipe", "history", "--list", "box"], check=True).stdout == ""
    user(["singularity", "build", "y.sif", "box"], check=True)
    listed = user(["singularity", "exec", "y.sif", "ls", "-A", "/", "/.singularity.d"], check=True).stdout.split()
    assert "labels.json" in listed and ".singularity.record" not in listed


@pytest.mark.rootless
def test_packages_become_commands_and_their_files_are_not_named(as_plain_user, base):
    user = as_plain_user
    user(["singularity", "build", "--sandbox", "box", str(base)], check=True)
    packages(user.tmp / "box")
    for folder, names, files in os.walk(user.tmp / "box"):
        for name in (*names, *files):
            user.own(Path(folder) / name)
    text = user(["singularity", "recipe", "history", "box"], check=True).stdout
    post = parse(text).stages[0].body("post")
    lines = [line.strip() for line in post.replace(" \\\n", "").splitlines()]
    found = [" ".join(line.split()) for line in lines]
    assert "apt-get install -y --no-install-recommends cowsay" in found
    pip = "python3 -m pip install --no-cache-dir --break-system-packages"
    assert f"{pip} 'linked @ git+https://example.invalid/x.git@abc' asked==1.5" in found
    assert (
        "python3 -m venv /opt/venv" in found and "/opt/venv/bin/python -m pip install --no-cache-dir inside==5" in found
    )
    assert (
        "/opt/conda/bin/conda install -y -p /opt/conda -c https://conda.anaconda.org/conda-forge numpy=1.0 scipy=1.0"
        in found
    )
    assert "npm install -g @a/tool@7" in found
    assert not parse(text).stages[0].has("files"), text
    assert "/opt/conda is a conda that was installed by hand" in text
    assert user(["singularity", "recipe", "check", user.write("z.def", text)]).returncode == 0


@pytest.mark.rootless
def test_sandbox_without_a_record_needs_its_base(as_plain_user, base):
    user = as_plain_user
    user.write("x.def", RECIPE.format(base=base))
    user(["singularity", "build", "x.sif", "x.def"], check=True)
    user(["singularity", "build", "--sandbox", "box", "x.sif"], check=True)
    (user.tmp / "box/.singularity.record").unlink()
    result = user(["singularity", "recipe", "history", "box"])
    assert result.returncode == 255 and "--base IMAGE" in result.stderr
    user.write("box/etc/new", "x")
    text = user(["singularity", "recipe", "history", "--base", "x.sif", "box"], check=True).stdout
    assert text.startswith("Bootstrap: localimage\nFrom: x.sif\n") and "box/etc/new /etc/new" in text


def test_folder_that_is_no_sandbox_is_refused(as_user):
    as_user.write("d/file", "x")
    result = as_user(["singularity", "recipe", "history", "d"])
    assert result.returncode == 255 and "is no sandbox" in result.stderr


@pytest.mark.rootless
@pytest.mark.network
@pytest.mark.long
@pytest.mark.parametrize("kind", ["as_subuid_user", "as_plain_user"])
def test_apt_and_pip_of_a_real_debian_are_installed_again(request, kind):
    user = request.getfixturevalue(kind)
    user.write("base.def", "Bootstrap: debootstrap\nInclude: ca-certificates python3-pip\n")
    user(["singularity", "build", "base.sif", "base.def"], timeout=900, check=True)
    user(["singularity", "build", "--fakeroot", "--sandbox", "box", "base.sif"], timeout=300, check=True)
    script = (
        "export DEBIAN_FRONTEND=noninteractive; apt-get update -q; apt-get install -qy --no-install-recommends jq nano"
        " && pip install --break-system-packages sampleproject && echo '# mine' >> /etc/nanorc && echo x > /etc/own"
    )
    inside = "/etc/ssl/certs/ca-certificates.crt"
    site = ["-B", f"{os.environ.get('SSL_CERT_FILE', inside)}:{inside}", "--env", f"PIP_CERT={inside}"]
    ran = user(["singularity", "exec", *site, "--writable", "--fakeroot", "box", "sh", "-ec", script], timeout=900)
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-2000:]
    text = user(["singularity", "recipe", "history", "box"], timeout=120, check=True).stdout
    stage = parse(text).stages[0]
    files = [line.split()[-1] for line in stage.body("files").splitlines() if line.strip()]
    assert files == ["/etc/nanorc", "/etc/own"]
    words = stage.body("post").split()
    assert {"jq", "nano"} <= set(words) and "libjq1" not in words
    assert any(word.startswith("sampleproject==") for word in words) and not any("peppercorn" in word for word in words)
    user.write("y.def", text)
    built = user(["singularity", "build", "y.sif", "y.def"], timeout=900)
    assert built.returncode == 0, built.stderr[-3000:]
    check = "jq --version && python3 -c 'import sample, peppercorn' && tail -1 /etc/nanorc && cat /etc/own"
    assert user(["singularity", "exec", "y.sif", "sh", "-ec", check], check=True).stdout.endswith("# mine\nx\n")
