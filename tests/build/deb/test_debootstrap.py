# SPDX-License-Identifier: Apache-2.0
"""The whole agent against a small signed mirror; the host's dpkg configures, and judges what we wrote."""

from __future__ import annotations

import hashlib
import os
import subprocess
from datetime import timedelta
from pathlib import Path

import pytest
from deb_mirror import Bench, Mirror

from pysingularity.build.bootstrap.debootstrap import bootstrap
from pysingularity.errors import HostError, SingularityError, UserError


def build(bench: Bench, mirror: Mirror, **header: str):
    """Publish and bootstrap."""
    mirror.publish()
    return bootstrap(bench.request(mirrorurl=mirror.url, **header))


def refused(bench: Bench, mirror: Mirror, kind: type[SingularityError] = UserError, **header: str) -> SingularityError:
    """Bootstrap, expect an error, and nothing in the root."""
    with pytest.raises(kind) as caught:
        build(bench, mirror, **header)
    assert [name for name in os.listdir(bench.path / "cache/deb") if "partial" in name] == []
    return caught.value


def installed(bench: Bench) -> dict[str, str]:
    said = subprocess.run(
        ["dpkg-query", f"--admindir={bench.root}/var/lib/dpkg", "-W", "-f", "${binary:Package} ${Version} ${Status}\n"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return {line.split()[0]: " ".join(line.split()[1:]) for line in said.splitlines()}


def test_the_base_system_is_unpacked_and_configured(bench: Bench, mirror: Mirror) -> None:
    result = build(bench, mirror)
    root = bench.root
    assert installed(bench) == {
        "base-files": "12 install ok installed",
        "dash": "0.5 install ok installed",
        "dpkg": "1.21 install ok installed",
        "libtoy:amd64": "2.0 install ok installed",
    }
    audit = subprocess.run(["dpkg", f"--root={root}", "--audit"], capture_output=True, text=True)
    assert (audit.returncode, audit.stdout) == (0, "")
    assert (root / "etc/issue").read_text() == "Toy\n"
    assert not (root / "etc/issue.dpkg-new").exists()
    assert os.readlink(root / "bin") == "usr/bin"
    assert (root / "usr/lib/libtoy.so.2").exists()
    assert (root / "usr/sbin/start-stop-daemon").read_bytes() == b"real"
    assert not (root / "usr/sbin/policy-rc.d").exists()
    assert not (root / "usr/sbin/start-stop-daemon.REAL").exists()
    assert not list((root / "var/log").glob("dpkg.log")) if (root / "var/log").exists() else True
    assert os.readlink(root / "dev/fd") == "/proc/self/fd"
    assert bench.owners.get(str(root / "var/mail"), (root / "var/mail").lstat())[:2] == (0, 8)
    assert (root / "var/mail").stat().st_mode & 0o7777 == 0o2775
    assert result.digest.startswith("sha256:")
    assert mirror.url in result.source


def test_services_cannot_start_while_packages_are_configured(bench: Bench, mirror: Mirror) -> None:
    seen = []
    configure = bench.run

    def run(argv, **options) -> int:
        seen.append((bench.root / "usr/sbin/policy-rc.d").read_text())
        seen.append((bench.root / "usr/sbin/start-stop-daemon").read_text())
        return configure(argv, **options)

    bench.run = run
    build(bench, mirror)
    assert "exit 101" in seen[0]
    assert "nothing is started" in seen[1]


def test_the_digest_depends_on_the_packages_only(bench: Bench, mirror: Mirror, tmp_path: Path, keys) -> None:
    first = build(bench, mirror).digest
    for number, include in enumerate(("", "extra")):
        (tmp_path / f"again{number}").mkdir()
        again = Bench(tmp_path / f"again{number}", keys[0].public)
        if include:
            mirror.add("extra", files={"./x": b""})
        assert (build(again, mirror, include=include).digest == first) is not bool(include)


def test_included_packages_bring_what_they_need(bench: Bench, mirror: Mirror) -> None:
    mirror.add("tool", files={"./usr/bin/tool": b"x", "./etc/tool.conf": b"y"}, conffiles=["/etc/tool.conf"],
               Depends="helper")  # fmt: skip
    mirror.add("helper", files={"./usr/share/helper": b"z"}, Pre_Depends="dash")
    mirror.add("unwanted", files={"./usr/share/unwanted": b""})
    build(bench, mirror, include="tool, dash")
    assert installed(bench)["helper"].endswith("installed")
    assert (bench.root / "etc/tool.conf").read_bytes() == b"y"
    assert not (bench.root / "usr/share/unwanted").exists()


def test_a_preinst_runs_before_its_package_is_unpacked_and_after_what_it_needs(bench: Bench, mirror: Mirror) -> None:
    script = (
        '#!/bin/sh\nset -e\n[ "$1" = install ]\n[ -e $DPKG_ROOT/etc/need.conf ]\n[ ! -e $DPKG_ROOT/usr/bin/late ]\n'
    )
    script += "echo ran > $DPKG_ROOT/ran\n"
    mirror.add("need", files={"./etc/need.conf": b"x"}, conffiles=["/etc/need.conf"])
    mirror.add("late", files={"./usr/bin/late": b"x"}, scripts={"preinst": script}, Pre_Depends="need")
    build(bench, mirror, include="late")
    assert (bench.root / "ran").read_text() == "ran\n"
    assert (bench.root / "usr/bin/late").exists()
    assert installed(bench)["late"].endswith("installed")


def test_a_preinst_that_diverts_moves_other_packages_files(bench: Bench, mirror: Mirror) -> None:
    script = "#!/bin/sh\nprintf '/usr/bin/x\\n/usr/bin/x.old\\none\\n' > $DPKG_ROOT/var/lib/dpkg/diversions\n"
    mirror.add("one", files={"./usr/bin/x": b"one"}, scripts={"preinst": script})
    mirror.add("two", files={"./usr/bin/x": b"two"}, scripts={"preinst": "#!/bin/sh\n"}, Pre_Depends="one")
    build(bench, mirror, include="one two")
    assert (bench.root / "usr/bin/x").read_bytes() == b"one"
    assert (bench.root / "usr/bin/x.old").read_bytes() == b"two"


@pytest.mark.parametrize("first", ["alpha", "zeta"])
def test_a_package_that_replaces_another_has_the_file(bench: Bench, mirror: Mirror, first: str) -> None:
    second = "zeta" if first == "alpha" else "alpha"
    mirror.add(first, files={"./usr/bin/x": b"new" * 50_000}, Replaces=f"{second} (<< 2)")
    mirror.add(second, files={"./usr/bin/x": b"old"})
    build(bench, mirror, include=f"{first} {second}")
    assert (bench.root / "usr/bin/x").read_bytes() == b"new" * 50_000
    assert "/usr/bin/x" in (bench.root / f"var/lib/dpkg/info/{first}.list").read_text()
    assert "/usr/bin/x" not in (bench.root / f"var/lib/dpkg/info/{second}.list").read_text()


def test_two_packages_with_one_file_are_refused(bench: Bench, mirror: Mirror) -> None:
    mirror.add("one", files={"./usr/bin/x": b"one"})
    mirror.add("two", files={"./usr/bin/x": b"two"})
    error = refused(bench, mirror, include="one two")
    assert error.id == "file-conflict"
    assert "/usr/bin/x" in error.message


def test_a_failing_script_names_the_package(bench: Bench, mirror: Mirror) -> None:
    mirror.add("bad", files={"./x": b""}, scripts={"preinst": "#!/bin/sh\nexit 3\n"})
    error = refused(bench, mirror, include="bad")
    assert error.id == "configure-failed"
    assert "status 3" in error.message


def test_a_second_build_takes_everything_from_the_cache(bench: Bench, mirror: Mirror, tmp_path: Path, keys) -> None:
    build(bench, mirror)
    for path in [*(mirror.path / "pool").iterdir(), *mirror.path.glob("dists/toy/main/*/*")]:
        path.unlink()
    (tmp_path / "two").mkdir()
    again = Bench(tmp_path / "two", keys[0].public)
    request = again.request(mirrorurl=mirror.url)
    request.cache = str(bench.path / "cache")
    assert bootstrap(request).digest


# -- trust ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signed", ["inline", "beside"])
def test_both_kinds_of_signatures_are_believed(bench: Bench, mirror: Mirror, signed: str) -> None:
    mirror.signed = signed
    build(bench, mirror)
    line = (bench.root / "etc/apt/sources.list").read_text()
    assert line == f"deb [signed-by=/etc/apt/keyrings/build.gpg] {mirror.url} toy main\n"
    assert (bench.root / "etc/apt/keyrings/build.gpg").read_bytes() == bench.keyring.read_bytes()


def test_an_unsigned_mirror_is_refused_unless_the_recipe_says_so(bench: Bench, mirror: Mirror) -> None:
    mirror.signed = "no"
    error = refused(bench, mirror)
    assert error.id == "unsigned-release"
    assert "Verify: no" in error.hint
    build(bench, mirror, verify="no")
    assert "[trusted=yes]" in (bench.root / "etc/apt/sources.list").read_text()


def test_an_option_of_the_build_waives_signatures_too(bench: Bench, mirror: Mirror) -> None:
    mirror.signed = "no"
    mirror.publish()
    bootstrap(bench.request(mirrorurl=mirror.url, options={"no-verify": True}))
    assert installed(bench)


def test_a_waived_signature_does_not_make_apt_blind(bench: Bench, mirror: Mirror) -> None:
    build(bench, mirror, verify="no")
    assert "trusted" not in (bench.root / "etc/apt/sources.list").read_text()


def test_a_strangers_signature_is_refused(bench: Bench, mirror: Mirror, keys) -> None:
    mirror.key = keys[1]
    assert refused(bench, mirror).id == "unknown-signer"
    assert os.listdir(bench.root) == []


def test_without_a_keyring_the_error_says_what_helps(bench: Bench, mirror: Mirror, monkeypatch) -> None:
    monkeypatch.setattr("pysingularity.build.bootstrap.debootstrap.archive_keyrings", list)
    assert refused(bench, mirror, HostError, keyring="").id == "no-keyring"
    assert refused(bench, mirror, keyring="none.gpg").id == "no-keyring"


def test_an_expired_release_is_refused_unless_dates_do_not_count(bench: Bench, mirror: Mirror) -> None:
    mirror.valid = timedelta(days=-1)
    assert refused(bench, mirror).id == "release-expired"
    build(bench, mirror, verify="no-date")
    assert "check-valid-until=no" in (bench.root / "etc/apt/sources.list").read_text()


@pytest.mark.parametrize(
    ("release", "id_"),
    [
        ({"Codename": "other", "Suite": "other"}, "wrong-suite"),
        ({"Architectures": "riscv64"}, "no-architecture"),
    ],
)
def test_a_release_that_is_for_something_else_is_refused(
    bench: Bench, mirror: Mirror, release: dict[str, str], id_: str
) -> None:
    mirror.release = release
    assert refused(bench, mirror).id == id_


def test_an_index_that_was_changed_is_refused(bench: Bench, mirror: Mirror) -> None:
    mirror.publish()
    for path in mirror.path.glob("dists/toy/main/*/*"):
        path.write_bytes(path.read_bytes()[:-1] + b"X")
    with pytest.raises(UserError) as caught:
        bootstrap(bench.request(mirrorurl=mirror.url))
    assert caught.value.id == "wrong-content"


@pytest.mark.parametrize("what", ["content", "longer", "shorter"])
def test_a_package_that_was_changed_is_refused(bench: Bench, mirror: Mirror, what: str, monkeypatch) -> None:
    monkeypatch.setattr("pysingularity.build.deb.fetch.ATTEMPTS", 1)
    path = mirror.add("tool", files={"./usr/bin/tool": b"x"})
    data = path.read_bytes()
    path.write_bytes({"content": data[:-1] + b"X", "longer": data + b"X", "shorter": data[:-1]}[what])
    error = refused(bench, mirror, include="tool")
    assert error.id in ("wrong-content", "mirror-unreachable")
    assert path.name in error.message
    assert os.listdir(bench.root) == []


def test_a_package_that_is_gone_is_told(bench: Bench, mirror: Mirror) -> None:
    mirror.add("tool", files={"./usr/bin/tool": b"x"}).unlink()
    assert refused(bench, mirror, include="tool").id == "not-on-mirror"


def test_a_path_outside_the_mirror_is_refused(bench: Bench, mirror: Mirror) -> None:
    mirror.add("tool", index={"Filename": "../../../etc/passwd"})
    assert "refused" in refused(bench, mirror, include="tool").message


def test_a_package_that_is_another_inside_is_refused(bench: Bench, mirror: Mirror) -> None:
    mirror.add("tool", index={"Version": "9"})
    assert refused(bench, mirror, include="tool").id == "wrong-package"


# -- the recipe -----------------------------------------------------------------------------------------------------


def test_missing_and_conflicting_packages_are_told_before_anything_is_fetched(bench: Bench, mirror: Mirror) -> None:
    mirror.add("tool", Conflicts="other")
    mirror.add("other")
    assert refused(bench, mirror, include="tol").hint == "did you mean tool?"
    assert refused(bench, mirror, include="tool other").id == "unsatisfiable"
    assert refused(bench, mirror, include="UPPER!").id == "bad-keyword"
    assert os.listdir(bench.root) == []
    assert not [name for name in os.listdir(bench.path / "cache/deb") if name == hashlib.sha256(b"").hexdigest()]


def test_a_version_can_be_asked_for(bench: Bench, mirror: Mirror) -> None:
    mirror.add("tool", "1.0")
    mirror.add("tool", "2.0")
    build(bench, mirror, include="tool=1.0")
    assert installed(bench)["tool"].startswith("1.0")


@pytest.mark.parametrize("ending", [".xz", ".gz", ""])
def test_one_form_of_the_index_is_enough(bench: Bench, mirror: Mirror, ending: str) -> None:
    mirror.endings = (ending,)
    build(bench, mirror)


@pytest.mark.parametrize(
    ("header", "id_"),
    [
        ({"osversion": "none"}, "no-suite"),
        ({"osversion": "../x"}, "bad-keyword"),
        ({"verify": "maybe"}, "bad-keyword"),
        ({"components": "contrib"}, "no-component"),
        ({"mirrorurl": "ftp://m"}, "bad-keyword"),
    ],
)
def test_a_header_that_cannot_work_is_told(bench: Bench, mirror: Mirror, header: dict[str, str], id_: str) -> None:
    mirror.publish()
    with pytest.raises(UserError) as caught:
        bootstrap(bench.request(**{"mirrorurl": mirror.url} | header))
    assert caught.value.id == id_


def test_a_mirror_without_a_system_is_told(bench: Bench, mirror: Mirror) -> None:
    mirror.paragraphs.clear()
    mirror.add("tool")
    assert refused(bench, mirror).id == "no-base"


def test_the_hosts_own_sources_are_used_and_kept(bench: Bench, mirror: Mirror, monkeypatch, tmp_path: Path) -> None:
    mirror.publish()
    apt = tmp_path / "host/etc/apt"
    apt.mkdir(parents=True)
    key = tmp_path / "usr/share/keyrings/toy-archive-keyring.gpg"
    key.parent.mkdir(parents=True)
    key.write_bytes(bench.keyring.read_bytes())
    (apt / "sources.list").write_text(f"deb [signed-by={key}] {mirror.url} toy main\n")
    (tmp_path / "host/etc/os-release").write_text("ID=toy\nVERSION_CODENAME=toy\n")
    name = "pysingularity.build.bootstrap.debootstrap"
    from pysingularity.build.deb import sources

    monkeypatch.setattr(f"{name}.host_sources", lambda: sources.host_sources(str(tmp_path / "host")))
    monkeypatch.setattr(f"{name}.codename", lambda: sources.codename(str(tmp_path / "host")))
    bootstrap(bench.request(keyring="", osversion=""))
    assert (bench.root / "etc/apt/sources.list").read_text() == f"deb {mirror.url} toy main\n"
    with pytest.raises(UserError, match="no apt source for other") as caught:
        bootstrap(bench.request(keyring="", osversion="other"))
    assert "MirrorURL" in caught.value.hint


def test_old_suites_keep_bin_and_usr_bin_apart(bench: Bench, mirror: Mirror) -> None:
    mirror.suite = "xenial"
    build(bench, mirror, osversion="xenial", components="main")
    assert not (bench.root / "bin").is_symlink()
    assert (bench.root / "bin/dash").exists()
    assert os.readlink(bench.root / "bin/sh") == "dash"


def test_ubuntu_has_two_components_and_packages_in_zstandard(bench: Bench, mirror: Mirror) -> None:
    """As Ubuntu's mirrors are since jammy: half of the useful packages in universe, .deb files of .tar.zst."""
    mirror.suite, mirror.components = "jammy", ("main", "universe")
    mirror.add("ubuntu-keyring", files={"./usr/share/keyrings/x": b"k"}, ending=".zst", Priority="required")
    mirror.add("figlet", files={"./usr/bin/figlet": b"f"}, ending=".zst", component="universe")
    build(bench, mirror, osversion="jammy", include="figlet")
    assert os.readlink(bench.root / "bin") == "usr/bin"
    assert (bench.root / "usr/bin/figlet").read_bytes() == b"f"
    assert {"figlet", "ubuntu-keyring"} <= {name.partition(":")[0] for name in installed(bench)}
    line = (bench.root / "etc/apt/sources.list").read_text()
    assert "jammy main universe" in line
