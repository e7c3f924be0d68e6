# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from pysingularity.build.deb.keyrings import archive_keyrings
from pysingularity.build.deb.release import Release
from pysingularity.build.deb.sources import Source, codename, host_sources, of_distribution, parse_deb822, parse_list
from pysingularity.errors import UserError

SUM = "a" * 64
NOW = datetime(2026, 1, 10, tzinfo=UTC)


def release(*lines: str, sums: str = f" {SUM} 10 main/binary-amd64/Packages.xz\n") -> Release:
    return Release(("\n".join(lines) + f"\nSHA256:\n{sums}").encode(), "R")


def test_an_expired_release_is_refused_with_the_date() -> None:
    made = release("Valid-Until: Fri, 09 Jan 2026 10:00:00 UTC")
    with pytest.raises(UserError, match="expired on 2026-01-09 10:00 UTC") as caught:
        made.check_date(NOW)
    assert "Verify: no-date" in caught.value.hint
    release("Valid-Until: Sun, 11 Jan 2026 10:00:00 UTC").check_date(NOW)
    release("Date: Sat, 10 Jan 2026 10:00:00 UTC").check_date(NOW)


def test_a_release_from_the_future_is_refused() -> None:
    with pytest.raises(UserError, match="made on 2026-01-20"):
        release("Date: Tue, 20 Jan 2026 10:00:00 +0000").check_date(NOW)


def test_a_date_that_is_none_is_told() -> None:
    with pytest.raises(UserError, match="Valid-Until is no date"):
        release("Valid-Until: soon").check_date(NOW)


@pytest.mark.parametrize(
    ("fields", "suite"),
    [
        (("Suite: stable", "Codename: toy"), "toy"),
        (("Suite: stable", "Codename: toy"), "stable"),
        (("Suite: oldstable", "Codename: toy"), "toy/updates"),
        (("Codename: toy-security",), "toy/updates"),
        ((), "anything"),
    ],
)
def test_a_suite_may_be_called_by_all_its_names(fields: tuple[str, ...], suite: str) -> None:
    release(*fields).check_suite(suite)


def test_another_suite_than_the_one_asked_for_is_refused() -> None:
    with pytest.raises(UserError, match="is for oldstable or old, not for toy"):
        release("Suite: oldstable", "Codename: old").check_suite("toy")


def test_architectures_and_components_are_checked() -> None:
    made = release("Architectures: amd64 i386", "Components: main")
    made.check_architecture("amd64")
    with pytest.raises(UserError, match="but no riscv64"):
        made.check_architecture("riscv64")
    assert [file.path for file in made.packages("main", "amd64")] == ["main/binary-amd64/Packages.xz"]
    with pytest.raises(UserError, match="no packages for contrib") as caught:
        made.packages("contrib", "amd64")
    assert "main" in caught.value.hint
    with pytest.raises(UserError, match="MiB"):
        release(sums=f" {SUM} 99999999999 main/binary-amd64/Packages\n").packages("main", "amd64")


def test_checksums_that_can_be_forged_are_not_enough() -> None:
    with pytest.raises(UserError, match="no SHA256"):
        Release(b"Suite: x\nMD5Sum:\n 0cc175b9c0f1b6a831c399e269772661 1 main/binary-amd64/Packages\n", "R")


def test_only_keys_of_distributions_speak_for_them(tmp_path: Path) -> None:
    folder = tmp_path / "usr/share/keyrings"
    folder.mkdir(parents=True)
    for name in ("toy-archive-keyring.gpg", "vendor.gpg"):
        (folder / name).write_bytes(b"")
    assert [Path(path).name for path in archive_keyrings(str(tmp_path))] == ["toy-archive-keyring.gpg"]


# -- sources --------------------------------------------------------------------------------------------------------


def test_both_styles_of_sources_are_read(tmp_path: Path) -> None:
    folder = tmp_path / "etc/apt/sources.list.d"
    folder.mkdir(parents=True)
    (folder.parent / "sources.list").write_text(
        "# old\ndeb [ arch=amd64 signed-by=/usr/share/keyrings/toy-archive-keyring.gpg ] http://m/toy/ toy main # x\n"
        "deb-src http://m/toy toy main\ndeb http://flat ./\ndeb cdrom:[x]/ toy main\ndeb http://m/toy toy extra\n"
    )
    (folder / "a.sources").write_text(
        "Types: deb deb-src\nURIs: http://m/toy https://n\nSuites: toy-updates toy-security\nComponents: main\n"
        "Signed-By:\n -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n mDME\n -----END PGP PUBLIC KEY BLOCK-----\n\n"
        "Types: deb\nEnabled: no\nURIs: http://o\nSuites: toy\nComponents: main\n"
    )
    (folder / "broken.sources").write_text("nonsense\n")
    (folder / "ignored.save").write_text("deb http://x y z\n")
    found = host_sources(str(tmp_path))
    assert [(source.url, source.suite) for source in found] == [
        ("http://m/toy", "toy"),
        ("http://m/toy", "toy-updates"),
        ("http://m/toy", "toy-security"),
        ("https://n", "toy-updates"),
        ("https://n", "toy-security"),
    ]
    assert found[0].components == ("main", "extra")
    assert found[1].signed_by.startswith("-----BEGIN PGP PUBLIC KEY BLOCK-----\n\nmDME\n-----END")


def test_a_release_is_its_suite_updates_and_security_and_no_vendor() -> None:
    mine = [Source("http://m", suite, ("main",)) for suite in ("toy", "toy-updates", "toy-security", "toy-backports")]
    vendor = Source("http://v", "toy", ("main",), "/usr/share/keyrings/vendor.gpg")
    stable = Source("http://w", "toy", ("stable",))
    assert of_distribution([*mine, vendor, stable], "toy") == mine[:3]
    assert of_distribution([*mine, vendor], "other") == []
    assert of_distribution(mine[1:], "toy") == []


def test_a_source_is_written_as_apt_reads_it() -> None:
    source = Source("http://m", "toy", ("main", "extra"), check_date=False)
    line = source.line("/k.gpg", trusted=True)
    assert line == "deb [signed-by=/k.gpg trusted=yes check-valid-until=no] http://m toy main extra\n"
    (back,) = parse_list(line)
    assert back == source._replace(signed_by="/k.gpg", trusted=True)
    assert Source("http://m", "toy", ("main",)).line() == "deb http://m toy main\n"
    assert parse_deb822("Types: deb\nURIs: http://m\nSuites: toy\nComponents: main\nTrusted: yes")[0].trusted


def test_the_codename_comes_from_os_release(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/os-release").write_text('ID=toy\nVERSION_CODENAME="one"\n')
    assert codename(str(tmp_path)) == ("toy", "one")
    assert codename(str(tmp_path / "etc")) == ("", "")
