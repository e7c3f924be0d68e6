# SPDX-License-Identifier: Apache-2.0
"""Agents besides debootstrap, as ordinary users: small repositories of RPM and Arch packages, busybox, a tarball."""

from __future__ import annotations

import hashlib
import io
import subprocess
import tarfile
from pathlib import Path

import pytest

from pysingularity.build.bootstrap import AGENTS, MISSING, BootstrapRequest, agent
from pysingularity.build.bootstrap.arch import configuration
from pysingularity.build.bootstrap.program import VARIABLE, Program, find
from pysingularity.build.bootstrap.yum import configuration as yum_configuration
from pysingularity.errors import HostError, UserError

USERS = ["as_subuid_user", "as_plain_user"]
SPEC = """
Name: toy
Version: 1
Release: 1
Summary: toy
License: none
BuildArch: noarch
Provides: coreutils aaa_base
Requires(pre): toy-setup
%description
toy
%package setup
Summary: toy
%description setup
toy
%install
mkdir -p %{buildroot}/etc %{buildroot}/var/toy %{buildroot}/bin
echo toy > %{buildroot}/etc/redhat-release
echo 'root:x:0:0::/root:/bin/sh' > %{buildroot}/etc/passwd
echo 'toy:x:77:88::/:/bin/sh' >> %{buildroot}/etc/passwd
echo 'root:x:0:' > %{buildroot}/etc/group
echo 'toy:x:88:' >> %{buildroot}/etc/group
cp BUSYBOX %{buildroot}/bin/busybox
ln -s busybox %{buildroot}/bin/sh
echo x > %{buildroot}/var/toy/file
%post
echo "post ran as $UID$(/bin/busybox id -u)" > /var/toy/post
%files
/etc/redhat-release
%attr(2755,root,toy) %dir /var/toy
%attr(0640,toy,toy) /var/toy/file
%files setup
/etc/passwd
/etc/group
/bin/busybox
/bin/sh
"""
POST = "%post\n    /bin/busybox ls -ln /var/toy\n    /bin/busybox cat /var/toy/post\n"


@pytest.fixture(scope="module")
def busybox(tool) -> Path:
    """A static busybox."""
    path = Path(tool("busybox"))
    if subprocess.run(["ldd", path], capture_output=True, check=False).returncode == 0:
        pytest.skip("needs a static busybox (package busybox-static)")
    return path


@pytest.fixture(scope="module")
def rpms(tool, busybox: Path, user_space: Path) -> Path:
    """A repository of two RPM packages."""
    rpmbuild, createrepo = tool("rpmbuild"), tool("createrepo_c")
    base = user_space / "rpm"
    base.mkdir()
    (base / "toy.spec").write_text(SPEC.replace("BUSYBOX", str(busybox)))
    macros = {"_topdir": base / "b", "_rpmdir": base / "repo", "__os_install_post": "%{nil}",
              "_build_id_links": "none", "_binaries_in_noarch_packages_terminate_build": "0"}  # fmt: skip
    words = [word for key, value in macros.items() for word in ("--define", f"{key} {value}")]
    subprocess.run([rpmbuild, "-bb", *words, base / "toy.spec"], check=True, capture_output=True)
    subprocess.run([createrepo, "-q", base / "repo"], check=True)
    subprocess.run(["chmod", "-R", "a+rX", base], check=True)
    return base / "repo"


def build(user, recipe: str, **options):
    """Build a recipe as a user and return what was said."""
    user.write("toy.def", recipe)
    done = user(["singularity", "build", "--force", "toy.sif", "toy.def"], **options)
    return done, done.stdout + done.stderr


@pytest.mark.rootless
@pytest.mark.parametrize("kind", USERS)
@pytest.mark.parametrize("program", ["dnf", "zypper"])
def test_rpm_packages_keep_their_owners(request, tool, rpms: Path, kind: str, program: str) -> None:
    tool(program)
    user = request.getfixturevalue(kind)
    done, said = build(user, f"Bootstrap: {program}\nMirrorURL: {rpms}\nVerify: no\n{POST}")
    assert done.returncode == 0, said
    assert "-rw-r-----    1 77       88" in said
    assert "post ran as 0" in said


@pytest.mark.rootless
def test_a_repository_without_the_base_is_told_with_the_programs_words(as_user, tool, rpms: Path) -> None:
    tool("dnf")
    done, said = build(as_user, f"Bootstrap: yum\nMirrorURL: {rpms}\nVerify: no\nInclude: gone\n")
    assert done.returncode == 255
    assert "dnf ended with status 1" in said
    assert "No match for argument: gone" in said


@pytest.mark.rootless
@pytest.mark.parametrize("kind", USERS)
def test_arch_packages_are_installed(request, tool, busybox: Path, kind: str) -> None:
    tool("pacman")
    user = request.getfixturevalue(kind)
    folder = user.tmp / "mirror/core/os/x86_64"
    folder.mkdir(parents=True)
    package = folder / "base-1-1-x86_64.pkg.tar.gz"
    info = b"pkgname = base\npkgver = 1-1\npkgdesc = toy\narch = x86_64\nsize = 1\n"
    with tarfile.open(package, "w:gz") as archive:
        for name, data, mode, owner in (
            (".PKGINFO", info, 0o644, 0),
            ("usr/", None, 0o755, 0),
            ("usr/bin/", None, 0o755, 0),
            ("usr/bin/busybox", busybox.read_bytes(), 0o755, 0),
            ("var/", None, 0o755, 0),
            ("var/toy/", None, 0o755, 0),
            ("var/toy/file", b"x", 0o640, 77),
            ("var/toy/post", b"post ran as 0\n", 0o644, 0),
            ("bin", "usr/bin", 0o777, 0),
            ("usr/bin/sh", "busybox", 0o777, 0),
        ):
            member = tarfile.TarInfo(name.rstrip("/"))
            member.mode, member.uid = mode, owner
            if data is None:
                member.type = tarfile.DIRTYPE
            elif isinstance(data, str):
                member.type, member.linkname = tarfile.SYMTYPE, data
            else:
                member.size = len(data)
            archive.addfile(member, io.BytesIO(data) if isinstance(data, bytes) else None)
    data = package.read_bytes()
    fields = {"FILENAME": package.name, "NAME": "base", "VERSION": "1-1", "ARCH": "x86_64", "CSIZE": len(data)}
    fields["SHA256SUM"] = hashlib.sha256(data).hexdigest()
    text = "".join(f"%{key}%\n{value}\n\n" for key, value in fields.items()).encode()
    with tarfile.open(folder / "core.db", "w:gz") as archive:  # as repo-add writes it
        member = tarfile.TarInfo("base-1-1/desc")
        member.size = len(text)
        archive.addfile(member, io.BytesIO(text))
    subprocess.run(["chmod", "-R", "a+rX", user.tmp / "mirror"], check=True)
    recipe = f"Bootstrap: arch\nMirrorURL: {user.tmp}/mirror/$repo/os/$arch\nComponents: core\nVerify: no\n{POST}"
    done, said = build(user, recipe)
    assert done.returncode == 0, said
    assert "-rw-r-----    1 77       0 " in said


@pytest.mark.rootless
@pytest.mark.parametrize("kind", USERS)
def test_busybox_makes_its_links(request, busybox: Path, kind: str) -> None:
    user = request.getfixturevalue(kind)
    done, said = build(
        user, f"Bootstrap: busybox\nMirrorURL: {busybox}\n%post\n    echo hello | rev\n    ls -ld /tmp\n"
    )
    assert done.returncode == 0, said
    assert "olleh" in said
    assert "drwxrwxrwt" in said


@pytest.mark.rootless
def test_a_page_in_the_place_of_busybox_is_refused(as_user) -> None:
    page = as_user.write("busybox", "<html>")
    done, said = build(as_user, f"Bootstrap: busybox\nMirrorURL: {page}\n")
    assert done.returncode == 255
    assert "is no program for Linux" in said


def tarball(busybox: Path) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:xz") as archive:
        for name, data, mode, owner in (
            ("./bin/busybox", busybox.read_bytes(), 0o755, 0),
            ("./bin/sh", "busybox", 0o777, 0),
            ("./var/toy/file", b"x", 0o4640, 77),
            ("./var/toy/post", b"from a tar\n", 0o644, 0),
        ):
            member = tarfile.TarInfo(name)
            member.mode, member.uid = mode, owner
            if isinstance(data, str):
                member.type, member.linkname = tarfile.SYMTYPE, data
            else:
                member.size = len(data)
            archive.addfile(member, io.BytesIO(data) if isinstance(data, bytes) else None)
    return stream.getvalue()


@pytest.mark.rootless
@pytest.mark.parametrize("kind", USERS)
def test_a_tarball_becomes_a_root_with_its_owners(request, busybox: Path, kind: str) -> None:
    user = request.getfixturevalue(kind)
    data = tarball(busybox)
    user.write("root.tar.xz", data)
    digest = hashlib.sha256(data).hexdigest()
    done, said = build(user, f"Bootstrap: tarball\nFrom: root.tar.xz\nChecksum: sha256:{digest}\n{POST}")
    assert done.returncode == 0, said
    assert "-rwSr-----    1 77       0 " in said
    done, said = build(user, f"Bootstrap: tarball\nFrom: root.tar.xz\nChecksum: {'0' * 64}\n")
    assert done.returncode == 255
    assert "has the checksum" in said
    done, said = build(user, "Bootstrap: tarball\nFrom: root.tar.xz\nChecksum: md5:0\n")
    assert "64 hexadecimal digits" in said


@pytest.mark.rootless
@pytest.mark.parametrize(
    ("data", "why"),
    [(b"", "no bin, usr or etc"), (b"rubbish" * 100, "neither a tar"), (b"\xfd7zXZ\0rubbish", "damaged|ends early")],
)
def test_what_is_no_tarball_is_refused(as_user, data: bytes, why: str) -> None:
    import re

    as_user.write("root.tar", data)
    done, said = build(as_user, "Bootstrap: tarball\nFrom: root.tar\n")
    assert done.returncode == 255
    assert re.search(why, said)
    assert not (as_user.tmp / "toy.sif").exists()


def request_for(tmp_path: Path, **header: str) -> BootstrapRequest:
    return BootstrapRequest(
        header=header, root=str(tmp_path), way=None, cache=str(tmp_path), tmp=str(tmp_path),
        progress=lambda *_: None, run=lambda *_, **__: 0, directory=str(tmp_path),
    )  # fmt: skip


def test_a_missing_program_is_named_with_its_package(tmp_path: Path) -> None:
    assert find("no-such-dnf", "no-such-yum") == ""
    asked = request_for(tmp_path, bootstrap="yum")
    asked.environ[VARIABLE] = "host"
    with pytest.raises(HostError, match="Bootstrap: yum needs no-such-dnf or no-such-yum") as caught:
        Program(asked, "no-such-dnf", "no-such-yum", package="dnf", image="docker://x")
    assert "install the package dnf" in caught.value.hint


def test_a_container_that_cannot_be_had_is_told_with_its_reason(tmp_path: Path) -> None:
    asked = request_for(tmp_path, bootstrap="zypper")
    asked.environ[VARIABLE] = str(tmp_path / "gone.sif")
    with pytest.raises(HostError, match=r"a container with it cannot be had either.*gone\.sif") as caught:
        Program(asked, "zypper", package="zypper", image="docker://x")
    assert VARIABLE in caught.value.hint


FAKE = """#!/bin/busybox sh
set -e
for word in "$@"; do
    case $word in
        --installroot=*) root=${word#*=} ;;
        -c) next=yes ;;
        *) [ -z "$next" ] || config=$word; next= ;;
    esac
done
/bin/busybox test "$(/bin/busybox id -u)" = 0
/bin/busybox grep -q baseurl=file:// "$config"
/bin/busybox mkdir -p "$root/bin" "$root/etc" "$root/var/toy"
/bin/busybox cp /bin/busybox "$root/bin/"
/bin/busybox ln -s busybox "$root/bin/sh"
echo toy > "$root/etc/redhat-release"
echo x > "$root/var/toy/file"
echo "from the container" > "$root/var/toy/post"
/bin/busybox chown 77:88 "$root/var/toy/file"
/bin/busybox chmod 640 "$root/var/toy/file"
/bin/busybox chroot "$root" /bin/busybox sh -c 'test -c /dev/null && test -e /proc/self/stat'
"""


@pytest.mark.rootless
@pytest.mark.parametrize("kind", USERS)
def test_a_program_that_the_host_lacks_runs_in_a_container(request, busybox: Path, kind: str) -> None:
    user = request.getfixturevalue(kind)
    user.write("tools/bin/busybox", busybox.read_bytes(), 0o755)
    user.write("tools/usr/bin/yum", FAKE, 0o755)
    user.write("tools/etc/hosts")
    user.write("mirror/repodata")
    recipe = f"Bootstrap: yum\nMirrorURL: {user.tmp}/mirror\n{POST}"
    done, said = build(user, recipe, env={VARIABLE: "tools"})
    assert done.returncode == 0, said
    assert "-rw-r-----    1 77       88" in said
    assert "from the container" in said
    (user.tmp / "tools/usr/bin/yum").unlink()
    done, said = build(user, recipe, env={VARIABLE: "tools"})
    assert done.returncode == 255
    assert "tools: has no dnf or yum" in said


@pytest.mark.rootless
@pytest.mark.network
@pytest.mark.long
@pytest.mark.parametrize("kind", USERS)
@pytest.mark.parametrize("program", ["dnf", "zypper"])
def test_a_small_debian_brings_the_program(request, rpms: Path, kind: str, program: str) -> None:
    user = request.getfixturevalue(kind)
    recipe = f"Bootstrap: {program}\nMirrorURL: {rpms}\nVerify: no\n{POST}"
    for _ in ("made", "cached"):
        done, said = build(user, recipe, env={VARIABLE: "debian"}, timeout=600)
        assert done.returncode == 0, said
        assert "-rw-r-----    1 77       88" in said
        assert "post ran as 0" in said
    assert "Preparing" not in said


@pytest.mark.parametrize(
    ("header", "id_"),
    [
        ({"bootstrap": "arch"}, "keyword-missing"),
        ({"bootstrap": "arch", "mirrorurl": "http://m\nServer = x"}, "bad-keyword"),
        ({"bootstrap": "arch", "mirrorurl": "http://m", "verify": "perhaps"}, "bad-keyword"),
    ],
)
def test_arch_headers_are_checked(tmp_path: Path, header: dict[str, str], id_: str) -> None:
    with pytest.raises(UserError) as caught:
        configuration(request_for(tmp_path, **header))
    assert caught.value.id == id_


def test_arch_repositories_and_signatures(tmp_path: Path) -> None:
    url, text = configuration(request_for(tmp_path, mirrorurl="http://m/arch/"))
    assert url == "http://m/arch"
    assert "SigLevel = Required" in text
    assert "[extra]\nServer = http://m/arch/$repo/os/$arch" in text


def test_yum_checks_signatures_when_a_key_is_given(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("key")
    text = yum_configuration(
        request_for(tmp_path, keyring="key", updateurl="http://u/%{OSVERSION}/x", osversion="9"), "http://m", "/r"
    )
    assert "gpgcheck=1" in text
    assert f"gpgkey=file://{tmp_path}/key" in text
    assert "baseurl=http://u/9/x" in text
    assert "gpgcheck=0" in yum_configuration(request_for(tmp_path), "http://m", "/r")
    with pytest.raises(UserError, match="OSVersion"):
        yum_configuration(request_for(tmp_path, updateurl="http://u/%{OSVERSION}"), "http://m", "/r")


def test_every_agent_of_the_table_exists() -> None:
    for word in AGENTS:
        assert callable(agent(word))
    for word in MISSING:
        with pytest.raises(UserError, match="not available"):
            agent(word)
    with pytest.raises(UserError, match="no bootstrap agent") as caught:
        agent("debootstrp")
    assert "debootstrap" in caught.value.hint
