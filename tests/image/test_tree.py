# SPDX-License-Identifier: Apache-2.0
"""Folders become trees: every entry, once, with owners and attributes; contents are stored or refused by name."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from pysingularity.errors import UserError
from pysingularity.image.tree import lay_upper, scan_directory, store_tree


class Recorder:
    """A writer that keeps what it is given."""

    def __init__(self):
        self.stored = []

    def store_bytes(self, data):
        self.stored.append(data)
        return data

    def store(self, read, size):
        data = b""
        while len(data) < size:
            data += read(min(131072, size - len(data)))
        return self.store_bytes(data)


def contents(root):
    return {os.fsdecode(path): node.data for path, node in root.walk() if node.kind == "file"}


def test_every_entry_is_found_with_its_content(box):
    root = scan_directory(str(box))
    writer = Recorder()
    store_tree(writer, root)
    found = contents(root)
    assert {path for path, node in root.walk() if path} == {os.fsencode(p.relative_to(box)) for p in box.rglob("*")}
    for path, data in found.items():
        assert data == (box / path).read_bytes(), path
    assert root.find(b"data/link").target == b"../nowhere"
    assert root.find(b"data/odd").mode == 0o6711
    assert root.find(b"data/pipe").kind == "fifo"
    assert root.find(b"tmp").mode == 0o1777


def test_hard_links_are_one_node_and_read_once(box):
    root = scan_directory(str(box))
    assert root.find(b"data/small") is root.find(b"data/again")
    writer = Recorder()
    store_tree(writer, root)
    assert writer.stored.count(b"small") == 1


def test_order_of_contents_is_that_of_names(tmp_path):
    for name in ("b", "a", "c/x", "c/a", "B"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(name)
    writer = Recorder()
    store_tree(writer, scan_directory(str(tmp_path)))
    assert writer.stored == [b"B", b"a", b"b", b"c/a", b"c/x"]


def test_excluded_paths_and_sockets_are_left_out(tmp_path):
    (tmp_path / "keep").mkdir()
    (tmp_path / "drop/below").mkdir(parents=True)
    (tmp_path / ".singularity.owners").write_text("ours")
    said = []
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(tmp_path / "keep/socket"))
        root = scan_directory(str(tmp_path), exclude=["drop"], say=said.append)
    assert list(root.children) == [b"keep"]
    assert root.find(b"keep").children == {}
    assert "keep/socket" in said[0]


def test_later_times_are_cut_off(tmp_path):
    (tmp_path / "new").write_text("x")
    os.utime(tmp_path / "new", (1, 2_000_000_000))
    assert scan_directory(str(tmp_path), latest=1_000_000_000).find(b"new").mtime == 1_000_000_000


def test_attributes_are_kept_except_those_of_this_machine(tmp_path):
    path = tmp_path / "file"
    path.write_text("x")
    try:
        os.setxattr(path, "user.mine", b"\0\xff")
        os.setxattr(path, "user.overlay.opaque", b"y")
    except OSError:
        pytest.skip(f"no user attributes on the file system of {tmp_path}")
    root = scan_directory(str(tmp_path))
    assert root.find(b"file").xattrs == {b"user.mine": b"\0\xff"}
    assert root.xattrs is None


def test_tree_deeper_than_a_path_may_be_is_walked(tmp_path):
    here = os.open(tmp_path, os.O_RDONLY)
    name = "d" * 200
    try:
        for _ in range(30):
            os.mkdir(name, dir_fd=here)
            deeper = os.open(name, os.O_RDONLY, dir_fd=here)
            os.close(here)
            here = deeper
        fd = os.open("file", os.O_WRONLY | os.O_CREAT, 0o644, dir_fd=here)
        os.write(fd, b"deep")
        os.close(fd)
    finally:
        os.close(here)
    writer = Recorder()
    store_tree(writer, scan_directory(str(tmp_path)))
    assert writer.stored == [b"deep"]


@pytest.mark.rootless
def test_file_that_may_not_be_read_is_named(as_user):
    box = as_user.tmp / "locked"
    box.mkdir()
    (box / "secret").write_text("x")
    os.chmod(box / "secret", 0o600)  # still the caller's, when that is root
    as_user.own(box)
    if not as_user.other:
        pytest.skip("needs a file of another user: start the tests as root")
    script = (
        "import sys\nfrom pysingularity.image.tree import lay_upper, scan_directory, store_tree\n"
        "class W:\n    def store_bytes(self, data): return data\n"
        "store_tree(W(), scan_directory('locked'))\n"
    )
    result = as_user([sys.executable, "-c", script])
    assert "secret: may not be read by you" in result.stderr


@pytest.mark.rootless
def test_own_files_without_permissions_are_read_and_left_as_they_were(as_user):
    script = (
        "import os\nfrom pysingularity.image.tree import lay_upper, scan_directory, store_tree\n"
        "os.makedirs('box/dir')\nopen('box/dir/f', 'w').write('x')\n"
        "os.chmod('box/dir/f', 0)\nos.chmod('box/dir', 0)\n"
        "class W:\n    def store_bytes(self, data): return data\n"
        "root = scan_directory('box')\nstore_tree(W(), root)\n"
        "node = root.find(b'dir/f')\n"
        "print(node.data, node.mode, node.uid, oct(os.stat('box/dir').st_mode))\nos.chmod('box/dir', 0o700)\n"
    )
    result = as_user([sys.executable, "-c", script])
    assert result.stdout == "b'x' 0 0 0o40000\n", result.stderr


@pytest.mark.rootless
def test_owners_that_a_build_recorded_come_back(as_user):
    script = (
        "import os, stat\nfrom pysingularity.linux.ownership import RecordedOwners\n"
        "from pysingularity.image.tree import scan_directory\n"
        "os.makedirs('rec/d')\nopen('rec/f', 'w').close()\nopen('rec/plain', 'w').close()\nos.symlink('x', 'rec/l')\n"
        "owners = RecordedOwners('rec')\n"
        "owners.set('rec/f', 33, 34)\nowners.set('rec/l', 5, 6)\n"
        "owners.mknod('rec/null', stat.S_IFCHR | 0o666, os.makedev(1, 3))\n"
        "root = scan_directory('rec')\n"
        "for name in sorted(root.children):\n    node = root.children[name]\n"
        "    print(name.decode(), node.kind, node.uid, node.gid, node.rdev, node.xattrs)\n"
    )
    result = as_user([sys.executable, "-c", script])
    assert result.stdout.splitlines() == [
        "d dir 0 0 0 None",
        "f file 33 34 0 None",
        "l symlink 5 6 0 None",
        "null char 0 0 259 None",
        "plain file 0 0 0 None",
    ], result.stderr


@pytest.mark.parametrize("change", ["shrink", "grow", "remove"])
@pytest.mark.parametrize("size", [1000, 500_000])
def test_file_that_changes_while_it_is_read_is_an_error(tmp_path, change, size):
    path = tmp_path / "file"
    path.write_bytes(b"x" * size)
    root = scan_directory(str(tmp_path))
    if change == "remove":
        path.unlink()
    else:
        os.truncate(path, size // 2 if change == "shrink" else size * 2)
    if change == "grow" and size > 131072:
        store_tree(Recorder(), root)
        assert len(root.find(b"file").data) == size
        return
    with pytest.raises(UserError, match="file: "):
        store_tree(Recorder(), root)


def test_ten_thousand_files_are_scanned_quickly(tmp_path):
    script = "for d in $(seq 100); do mkdir d$d; (cd d$d; touch $(seq 100)); done"
    subprocess.run(["sh", "-c", script], cwd=tmp_path, check=True)
    before = os.times()
    root = scan_directory(str(tmp_path))
    after = os.times()
    assert sum(1 for _ in root.walk()) == 10101
    assert after.user + after.system - before.user - before.system < 2


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(UserError, match="nosuch"):
        scan_directory(str(tmp_path / "nosuch"))


def test_upper_folder_of_an_overlay_is_laid_over_the_lower_tree(tmp_path, root_only):
    """The kernel is the judge: what it shows is what the two trees give together."""
    lower, upper, work, shown = (tmp_path / name for name in ("lower", "upper", "work", "shown"))
    for folder in (lower, upper, work, shown):
        folder.mkdir()
    make = "mkdir -p a/b/c d e/f; echo 1 > a/b/c/x; echo 2 > a/y; echo 3 > d/z; ln -s y a/link; echo 4 > e/f/w"
    change = (
        "rm a/y; rm -r d; mkdir d; echo 5 > d/new; rm a/link; mkdir a/link; rm -r a/b/c; echo 6 > a/b/c; mkdir n;"
        "rmdir n; chown 7:8 e; echo 9 >> e/f/w; ln e/f/w again; mkdir -p q/r; rm -r e/f; mkdir e/f; touch e/f/v"
    )
    subprocess.run(["sh", "-ec", make], cwd=lower, check=True)
    before = scan_directory(str(lower))
    listed = [(path, repr(node)) for path, node in before.walk()]
    options = f"lowerdir={lower},upperdir={upper},workdir={work},userxattr"
    script = f"mount -t overlay overlay -o {options} {shown}; cd {shown}; {change}; cp -a . {tmp_path}/copy"
    done = subprocess.run(["unshare", "-m", "sh", "-ec", script], capture_output=True, text=True, check=False)
    if "mount" in done.stderr:
        pytest.skip(f"no overlay here: {done.stderr}")
    assert done.returncode == 0, done.stderr
    tree = scan_directory(str(upper), upper=True)
    lay_upper(before, tree)
    expected = scan_directory(str(tmp_path / "copy"))

    def what(root):
        return {path: (node.kind, node.mode, node.uid, node.gid, node.target) for path, node in root.walk()}

    assert what(tree) == what(expected)
    assert [(path, repr(node)) for path, node in before.walk()] == listed


def test_socket_in_an_upper_folder_hides_what_it_replaced(tmp_path):
    for name in ("lower", "upper"):
        (tmp_path / name).mkdir()
    (tmp_path / "lower/gone").write_text("x")
    (tmp_path / "lower/kept").write_text("x")
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(tmp_path / "upper/gone"))
        tree = scan_directory(str(tmp_path / "upper"), upper=True)
    lay_upper(scan_directory(str(tmp_path / "lower")), tree)
    assert set(tree.children) == {b"kept"}
