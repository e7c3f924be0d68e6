# SPDX-License-Identifier: Apache-2.0
"""Records of owners: what is written for one file is read back for it, and for no other."""

from __future__ import annotations

import os
import stat

import pytest

from pysingularity.linux import ownership
from pysingularity.linux.ownership import RealOwners, Record, RecordedOwners, SideTable, strip


@pytest.fixture(params=["attributes", "table"])
def owners(request, monkeypatch):
    """Owners on a file system with user attributes, and on one without."""
    if request.param == "table":

        def refuse(*words, **options):
            raise OSError(95, "not supported")

        for name in ("setxattr", "getxattr", "removexattr"):
            monkeypatch.setattr(ownership.os, name, refuse)
    return RecordedOwners()


def look(owners, path):
    return owners.get(str(path), os.lstat(path))


def test_file_without_record_belongs_to_root(owners, tmp_path):
    (tmp_path / "a").touch()
    assert look(owners, tmp_path / "a")[:2] == (0, 0)


@pytest.mark.parametrize("kind", ["file", "folder", "symlink", "pipe", "unreadable"])
def test_owner_is_read_back(owners, tmp_path, kind):
    path = tmp_path / "a"
    if kind == "file":
        path.touch()
    elif kind == "folder":
        path.mkdir()
    elif kind == "symlink":
        path.symlink_to("nowhere")
    elif kind == "unreadable":
        path.touch(0o000)
    else:
        os.mkfifo(path)
    before = os.lstat(path)
    owners.set(str(path), 101, 102)
    assert look(owners, path)[:2] == (101, 102)
    assert os.lstat(path).st_mode == before.st_mode
    owners.set(str(path), -1, 7)
    assert look(owners, path)[:2] == (101, 7)
    owners.set(str(path), 0, 0)
    assert look(owners, path)[:2] == (0, 0)


def test_hard_links_share_and_renames_keep(owners, tmp_path):
    (tmp_path / "a").touch()
    owners.set(str(tmp_path / "a"), 5, 6)
    os.link(tmp_path / "a", tmp_path / "b")
    os.rename(tmp_path / "a", tmp_path / "c")
    assert look(owners, tmp_path / "b")[:2] == look(owners, tmp_path / "c")[:2] == (5, 6)


def test_inode_number_given_out_again_has_no_record(owners, tmp_path):
    for _ in range(50):
        (tmp_path / "a").symlink_to("x")
        assert look(owners, tmp_path / "a")[:2] == (0, 0)
        owners.set(str(tmp_path / "a"), 5, 6)
        (tmp_path / "a").unlink()


def test_device_is_a_record_with_the_permissions_of_its_file(owners, tmp_path):
    path = str(tmp_path / "null")
    owners.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3))
    assert look(owners, path) == (0, 0, stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.chmod(path, 0o600)
    owners.set(path, 0, 6)
    assert look(owners, path) == (0, 6, stat.S_IFCHR | 0o600, os.makedev(1, 3))
    with pytest.raises(FileExistsError):
        owners.mknod(path, stat.S_IFBLK | 0o600, 1)


def test_pipe_is_real(owners, tmp_path):
    owners.mknod(str(tmp_path / "p"), stat.S_IFIFO | 0o622, 0)
    assert os.lstat(tmp_path / "p").st_mode == stat.S_IFIFO | 0o622


def test_names_below_an_open_folder(owners, tmp_path):
    (tmp_path / "a").touch()
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        owners.set("a", 3, 4, dir_fd=fd)
        owners.mknod("n", stat.S_IFBLK | 0o660, os.makedev(8, 1), dir_fd=fd)
        status = os.stat("n", dir_fd=fd, follow_symlinks=False)
        assert owners.get("n", status, dir_fd=fd)[2:] == (stat.S_IFBLK | 0o660, os.makedev(8, 1))
    finally:
        os.close(fd)
    assert look(owners, tmp_path / "a")[:2] == (3, 4)


def test_children_share_the_table_in_memory(tmp_path):
    (tmp_path / "l").symlink_to("x")
    owners = RecordedOwners()
    child = os.fork()
    if child == 0:
        owners.set(str(tmp_path / "l"), 9, 9)
        os._exit(0)
    os.waitpid(child, 0)
    assert look(owners, tmp_path / "l")[:2] == (9, 9)


def test_sandbox_keeps_its_table(tmp_path):
    (tmp_path / "l").symlink_to("x")
    RecordedOwners(str(tmp_path)).set(str(tmp_path / "l"), 9, 8)
    assert look(RecordedOwners(str(tmp_path)), tmp_path / "l")[:2] == (9, 8)
    assert look(RecordedOwners(), tmp_path / "l")[:2] == (0, 0)


def test_table_with_foreign_lines_is_read_as_far_as_it_goes(tmp_path):
    (tmp_path / "t").write_bytes(b"1 2 3 4 0 0\nnonsense\n5 6 7\n\xff\xff\n8 9 10 11 20000 259\n12 13 1")
    table = SideTable(str(tmp_path / "t"))
    assert table.find(1, lambda: 2) == Record(3, 4)
    assert table.find(8, lambda: 9) == Record(10, 11, 0o20000, 259)
    assert table.find(8, lambda: 1) is None
    assert table.find(12, lambda: 13) is None


def test_table_behind_a_link_is_not_opened(tmp_path):
    (tmp_path / "secret").write_bytes(b"")
    (tmp_path / "t").symlink_to("secret")
    with pytest.raises(OSError):
        SideTable(str(tmp_path / "t"))


@pytest.mark.parametrize("value", [b"", b"1", b"a:b", b"1:2:3"])
def test_attribute_that_is_not_ours_says_nothing(tmp_path, value):
    path = tmp_path / "a"
    path.touch()
    os.setxattr(path, ownership.OWNER_XATTR, value)
    assert look(RecordedOwners(), path)[:2] == (0, 0)


@pytest.mark.parametrize("value", [b"", b"x", b"40755:0", b"120777:1"])
def test_record_of_a_node_is_a_device_or_nothing(tmp_path, value):
    path = tmp_path / "a"
    path.touch()
    os.setxattr(path, ownership.OWNER_XATTR, b"0:0")
    os.setxattr(path, ownership.NODE_XATTR, value)
    assert look(RecordedOwners(), path)[2] == os.lstat(path).st_mode


def test_records_never_reach_an_image():
    plain = bytes.fromhex("0100000200200000000000000000000000000000")
    in_namespace = bytes.fromhex("0100000300200000000000000000000000000000e9030000")
    records = {
        ownership.OWNER_XATTR: b"1:1",
        ownership.NODE_XATTR: b"20666:259",
        ownership.CAPABILITY: in_namespace,
        b"user.mine": b"x",
    }
    assert strip(records) == {b"user.mine": b"x", ownership.CAPABILITY: plain}
    assert strip({ownership.CAPABILITY_XATTR: plain}) == {ownership.CAPABILITY: plain}
    assert strip({}) == {}


def test_real_root_gives_files_away(root_only, tmp_path):
    owners = RealOwners()
    (tmp_path / "l").symlink_to("x")
    owners.set(str(tmp_path / "l"), 70000, 80000)
    owners.mknod(str(tmp_path / "null"), stat.S_IFCHR | 0o666, os.makedev(1, 3))
    assert look(owners, tmp_path / "l")[:2] == (70000, 80000)
    assert look(owners, tmp_path / "null") == (0, 0, stat.S_IFCHR | 0o666, os.makedev(1, 3))


def test_real_root_believes_no_records(root_only, tmp_path):
    (tmp_path / "a").touch()
    os.setxattr(tmp_path / "a", ownership.OWNER_XATTR, b"5:5")
    os.setxattr(tmp_path / "a", ownership.NODE_XATTR, b"20666:259")
    assert look(RealOwners(), tmp_path / "a") == (0, 0, os.lstat(tmp_path / "a").st_mode, 0)


def test_mapped_root_records_only_what_it_may_not_do(root_only, tmp_path):
    owners = RealOwners(mapped=True)
    path = str(tmp_path / "null")
    owners.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3))
    owners.set(path, 0, 6)
    os.chmod(path, 0o660)
    assert look(owners, path) == (0, 6, stat.S_IFCHR | 0o660, os.makedev(1, 3))
    (tmp_path / "a").touch()
    owners.set(str(tmp_path / "a"), 5, 6)
    assert (os.lstat(tmp_path / "a").st_uid, look(owners, tmp_path / "a")[:2]) == (5, (5, 6))
