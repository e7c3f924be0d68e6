# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import errno
import os
import stat
import subprocess
from pathlib import Path

import pytest
from deb_mirror import ar, compress, deb, folders, tar

from pysingularity.build.deb import unpack as subject
from pysingularity.build.deb.tree import Tree
from pysingularity.build.deb.unpack import Job, Opened, control_members, open_deb
from pysingularity.errors import HostError, UserError


def unpack(tmp_path: Path, data: bytes, *, name: str = "toy", merged: bool = False, **options) -> Opened:
    """Open a .deb into tmp_path/root."""
    (tmp_path / "toy.deb").write_bytes(data)
    (tmp_path / "root").mkdir(exist_ok=True)
    job = Job(str(tmp_path / "toy.deb"), name, 0, {}, frozenset(), False)._replace(**options)
    with Tree(str(tmp_path / "root"), merged=merged) as tree:
        return open_deb(job, tree)


def listing(root: Path) -> dict[str, tuple]:
    """Return what is in a folder, as far as packages decide about it."""
    found = {}
    for path in sorted(root.rglob("*")):
        status = path.lstat()
        what: object = None
        if stat.S_ISLNK(status.st_mode):
            what = os.readlink(path)
        elif stat.S_ISREG(status.st_mode):
            what = path.read_bytes(), status.st_nlink, int(status.st_mtime)
        found[str(path.relative_to(root))] = oct(status.st_mode), what
    return found


ENTRIES = [
    ("./usr/bin/tool", b"\x7fELF" * 5000, {"mode": 0o755}),
    ("./usr/bin/su", b"setuid", {"mode": 0o4755}),
    ("./usr/bin/tool2", ("link", "./usr/bin/tool")),
    ("./usr/bin/t", ("symlink", "tool")),
    ("./usr/share/doc/empty", b""),
    ("./usr/share/" + "long/" * 40 + "name", b"deep"),
]


def test_a_full_disk_is_told_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(subject.os, "write", full)
    with pytest.raises(HostError, match=r"package toy: .*No space left") as caught:
        unpack(tmp_path, deb("toy", files=ENTRIES))
    assert "SINGULARITY_TMPDIR" in caught.value.hint


@pytest.mark.parametrize("ending", ["", ".gz", ".xz", ".bz2", ".zst"])
def test_a_package_unpacks_as_with_dpkg_deb(tmp_path: Path, tool, ending: str) -> None:
    judge = tool("dpkg-deb")
    data = deb("toy", files=ENTRIES, ending=ending, conffiles=["/etc/none"])
    unpack(tmp_path, data)
    made = listing(tmp_path / "root")
    if ending != ".bz2":  # newer dpkg refuses bzip2 in control.tar
        (tmp_path / "judge").mkdir()
        subprocess.run([judge, "-x", tmp_path / "toy.deb", tmp_path / "judge"], check=True)
        wanted = listing(tmp_path / "judge")
        assert {path: what for path, what in made.items() if not path.startswith("var")} == wanted
    assert made["usr/bin/su"][0] == "0o104755"
    assert made["usr/bin/tool"][1][1] == 2


def test_dpkgs_lists_are_written_as_dpkg_writes_them(tmp_path: Path) -> None:
    opened = unpack(
        tmp_path,
        deb("toy", files={"./etc/toy.conf": b"x", "./usr/bin/toy": b"y"}, conffiles=["/etc/toy.conf"],
            scripts={"postinst": "#!/bin/sh\n", "triggers": "interest-noawait /usr/share/x\n"}),
        name="toy:amd64",
    )  # fmt: skip
    info = tmp_path / "root/var/lib/dpkg/info"
    assert (info / "toy:amd64.list").read_text() == "/.\n/etc\n/usr\n/usr/bin\n/etc/toy.conf\n/usr/bin/toy\n"
    assert (info / "toy:amd64.md5sums").read_text().endswith("  usr/bin/toy\n")
    assert "toy.conf" not in (info / "toy:amd64.md5sums").read_text()
    assert (info / "toy:amd64.postinst").stat().st_mode & 0o777 == 0o755
    assert not (info / "toy:amd64.control").exists()
    assert opened.conffiles == [b"/etc/toy.conf"]
    assert "interest-noawait" in opened.triggers


def test_configuration_files_wait_for_dpkg(tmp_path: Path) -> None:
    data = deb("toy", files={"./etc/toy.conf": b"x"}, conffiles=["/etc/toy.conf"])
    unpack(tmp_path, data)
    assert sorted(os.listdir(tmp_path / "root/etc")) == ["toy.conf.dpkg-new"]
    unpack(tmp_path, data, in_place=True)
    assert sorted(os.listdir(tmp_path / "root/etc")) == ["toy.conf", "toy.conf.dpkg-new"]


def test_diverted_files_go_elsewhere(tmp_path: Path) -> None:
    unpack(tmp_path, deb("toy", files={"./bin/sh": b"x"}), diversions={b"/bin/sh": b"/bin/sh.distrib"})
    assert os.listdir(tmp_path / "root/bin") == ["sh.distrib"]


def test_foreign_owners_and_devices_are_left_to_the_caller(tmp_path: Path) -> None:
    entries = [
        ("./var", "dir"),
        ("./etc/shadow", b"", {"mode": 0o640, "gid": 42}),
        ("./var/mail", "dir", {"mode": 0o2775, "gid": 8}),
        ("./var/mail/x", b"inherits no group"),
        ("./dev/null", "char", {"mode": 0o666, "devmajor": 1, "devminor": 3}),
    ]
    owned = {entry.path: entry for entry in unpack(tmp_path, deb("toy", data=tar(entries))).owned}
    assert (owned[b"etc/shadow"].gid, owned[b"etc/shadow"].mode) == (42, 0o640)
    assert owned[b"var/mail"].mode == 0o2775
    assert (owned[b"dev/null"].kind, owned[b"dev/null"].rdev) == ("char", os.makedev(1, 3))
    assert owned[b"var/mail/x"].gid == 0
    assert not (tmp_path / "root/dev/null").exists()


def test_links_into_usr_are_made_where_they_are_needed(tmp_path: Path) -> None:
    root = tmp_path / "root"
    unpack(tmp_path, deb("toy", files={"./lib64/ld.so": b"x", "./bin/sh": b"y", "./lib/modules/z": b""}), merged=True)
    assert os.readlink(root / "bin") == "usr/bin"
    assert (root / "usr/lib64/ld.so").read_bytes() == b"x"
    assert not (root / "lib32").exists()
    # A package of later releases brings the links itself.
    unpack(
        tmp_path,
        deb("toy", files=[("./bin", ("symlink", "usr/bin")), ("./sbin", ("symlink", "usr/sbin"))]),
        merged=True,
    )
    assert (root / "bin/sh").read_bytes() == b"y"


def test_the_first_package_decides_about_a_folder_and_links_to_folders_stay(tmp_path: Path) -> None:
    root = tmp_path / "root"
    unpack(tmp_path, deb("toy", files=[("./srv", "dir", {"mode": 0o700}), ("./www", ("symlink", "srv"))]))
    unpack(
        tmp_path,
        deb("toy", files=[("./srv/", "dir", {"mode": 0o755}), ("./www/", "dir"), ("./www/x", b"x")], data=None),
    )
    assert root.joinpath("srv").stat().st_mode & 0o777 == 0o700
    assert (root / "www").is_symlink()
    assert (root / "srv/x").exists()


# -- hostile packages ---------------------------------------------------------------------------------------------


def test_a_link_that_points_outside_cannot_be_written_through(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (tmp_path / "root" / str(outside)[1:]).mkdir(parents=True)
    for number, target in enumerate((str(outside), "../" * 12 + str(outside)[1:])):
        entries = [(f"./evil{number}", ("symlink", target)), (f"./evil{number}/file", b"gotcha")]
        unpack(tmp_path, deb("toy", files=entries, data=tar(entries)))
    assert os.listdir(outside) == []
    assert (tmp_path / "root" / str(outside)[1:] / "file").read_bytes() == b"gotcha"


def test_a_file_is_never_written_through_a_link_of_its_own_name(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("unharmed")
    entries = [("./file", ("symlink", str(victim))), ("./file", b"gotcha")]
    unpack(tmp_path, deb("toy", data=tar(entries)))
    assert victim.read_text() == "unharmed"
    assert (tmp_path / "root/file").read_bytes() == b"gotcha"


def test_a_hard_link_cannot_reach_outside(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("unharmed")
    entries = [("./up", ("symlink", str(tmp_path))), ("./file", ("link", "./up/victim"))]
    with pytest.raises(Exception, match=r"No such file|cannot"):
        unpack(tmp_path, deb("toy", data=tar(entries)))
    assert victim.stat().st_nlink == 1


@pytest.mark.parametrize(
    ("entries", "why"),
    [
        ([("../escape", b"x")], "climbs out"),
        ([("./a/../../escape", b"x")], "climbs out"),
        ([("./file", ("link", "../../etc/passwd"))], "climbs out"),
    ],
)
def test_paths_that_climb_out_are_refused(tmp_path: Path, entries: list[tuple], why: str) -> None:
    with pytest.raises(UserError, match=why):
        unpack(tmp_path, deb("toy", data=tar(entries)))
    assert not (tmp_path / "escape").exists()


@pytest.mark.parametrize("name", ["../../x", "sub/x", "a b", "x\x1b"])
def test_control_files_have_plain_names(tmp_path: Path, name: str) -> None:
    control = tar([("./control", b"Package: toy\nVersion: 1\nArchitecture: all\n"), (f"./{name}", b"x")])
    data = ar([("debian-binary", b"2.0\n"), ("control.tar", control), ("data.tar", tar([]))])
    with pytest.raises(UserError):
        unpack(tmp_path, data)


def test_a_file_in_the_place_of_a_folder_is_refused(tmp_path: Path) -> None:
    unpack(tmp_path, deb("toy", files={"./etc/x/y": b""}))
    with pytest.raises(UserError, match="is a folder in another package"):
        unpack(tmp_path, deb("toy", files={"./etc/x": b""}))
    unpack(tmp_path, deb("toy", files={"./file": b""}))
    with pytest.raises(UserError, match="something else in another package"):
        unpack(tmp_path, deb("toy", data=tar([("./file", "dir")])))


GOOD = deb("toy", files={"./usr/bin/toy": b"x" * 100_000})


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "no Debian package"),
        (b"<html>proxy error</html>", "no Debian package"),
        (GOOD[:40], "damaged archive"),
        (GOOD[:300], "ends early|no control|damaged"),
        (GOOD[:-200], "ends"),
        (ar([("debian-binary", b"3.0\n")]), "unknown version"),
        (ar([("control.tar", b"")]), "unexpected member"),
        (ar([("debian-binary", b"2.0\n"), ("data.tar", tar([]))]), "unexpected member"),
        (ar([("debian-binary", b"2.0\n"), ("control.tar", tar([("./control", b"Package: toy")]))]), "has no data"),
        (ar([("debian-binary", b"2.0\n"), ("control.tar", tar([])), ("data.tar", tar([]))]), "no control file"),
        (ar([("debian-binary", b"2.0\n"), ("control.tar.xz", b"\xfd7zXZ\0rubbish" * 9), ("data.tar", b"")]), "damaged"),
    ],
)
def test_damage_is_told_and_nothing_else(tmp_path: Path, data: bytes, why: str) -> None:
    with pytest.raises(UserError, match=why) as caught:
        unpack(tmp_path, data)
    assert "toy" in str(caught.value)


def test_a_bomb_stops_at_what_its_maker_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pysingularity.build.deb.unpack._ROOM", 1 << 20)
    with pytest.raises(UserError, match="bomb"):
        unpack(tmp_path, deb("toy", files={"./zero": bytes(4 << 20)}), installed_size=100_000)


def test_members_for_others_are_passed_over(tmp_path: Path) -> None:
    head = b"!<arch>\n"
    signature = ar([("_gpgorigin", b"odd")])[len(head) :]
    body = deb("toy", files={"./x": b"x"})
    unpack(tmp_path, body + signature)
    assert (tmp_path / "root/x").exists()


def test_control_files_can_be_read_alone(tmp_path: Path) -> None:
    (tmp_path / "toy.deb").write_bytes(deb("toy", scripts={"preinst": "#!/bin/sh\n"}))
    members = control_members(Job(str(tmp_path / "toy.deb"), "toy", 0, {}, frozenset(), False))
    assert set(members) == {"control", "preinst"}
    assert members["preinst"][1] == 0o755


def test_helpers_write_what_dpkg_accepts(tmp_path: Path, tool) -> None:
    path = tmp_path / "toy.deb"
    path.write_bytes(deb("toy", files={"./usr/bin/toy": b"x"}, ending=".gz"))
    said = subprocess.run([tool("dpkg-deb"), "-f", path, "Package"], capture_output=True, text=True, check=True)
    assert said.stdout == "toy\n"
    assert compress(b"x", "") == b"x"
    assert folders(["./a/b"]) == [("./", "dir"), ("./a/", "dir")]
