# SPDX-License-Identifier: Apache-2.0
"""Any kind into any other, with content, modes, links and times kept; judged by unsquashfs and Apptainer."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pysingularity.errors import ImageError, SingularityError, UserError
from pysingularity.image import metadata
from pysingularity.image.convert import assemble_sif, to_file, to_sandbox, with_changes
from pysingularity.image.entries import Entry
from pysingularity.image.inside import source_of
from pysingularity.image.open import open_image
from pysingularity.sif.file import SifFile


def unsquashed(path: Path, offset: int, where: Path, tool) -> Path:
    command = [tool("unsquashfs"), "-n", "-q", "-o", str(offset), "-d", where, path]
    subprocess.run(command, check=True, capture_output=True)
    return where


def test_folder_becomes_a_sif_that_unsquashfs_reads(box, tmp_path, tool, snapshot):
    written = assemble_sif(str(box), str(tmp_path / "a.sif"))
    there = unsquashed(tmp_path / "a.sif", written.partition_offset, tmp_path / "out", tool)
    found = snapshot(there)
    if os.getuid():  # then unsquashfs leaves setuid and setgid out
        kind, mode, *rest = found["data/odd"]
        found["data/odd"] = (kind, mode | 0o6000, *rest)
    assert found == snapshot(box)
    assert (tmp_path / "a.sif").stat().st_mode & 0o777 == 0o755
    assert written.size == (tmp_path / "a.sif").stat().st_size


def test_sif_has_apptainers_objects(box, tmp_path):
    assemble_sif(str(box), str(tmp_path / "a.sif"), oci_config=b'{"config":{}}', arch="arm64")
    with SifFile.open(str(tmp_path / "a.sif")) as sif:
        kinds = [(one.type, one.file_name) for one in sif.descriptors]
        assert kinds == [
            (0x4001, ""),
            (0x4006, "inspect-metadata.json"),
            (0x4006, "oci-config.json"),
            (0x4004, ""),
        ]
        assert sif.read(sif.descriptors[0]) == b"bootstrap: scratch\n"
        found = json.loads(sif.read(sif.descriptors[1]))
        assert found["data"]["attributes"]["labels"] == {"A": "1"}
        assert sif.header.arch == b"04\0"


def test_same_folder_gives_the_same_bytes(box, tmp_path):
    for number, threads in enumerate((1, 2, 8)):
        assemble_sif(str(box), str(tmp_path / f"{number}.sif"), threads=threads)
    first = (tmp_path / "0.sif").read_bytes()
    assert (tmp_path / "1.sif").read_bytes() == first
    assert (tmp_path / "2.sif").read_bytes() == first


def test_source_date_epoch_is_the_latest_time(box, tmp_path, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1000000000")
    assemble_sif(str(box), str(tmp_path / "a.sif"))
    for path in box.rglob("*"):
        os.utime(path, (2, 1_900_000_000), follow_symlinks=False)
    os.utime(box, (2, 1_900_000_000))
    assemble_sif(str(box), str(tmp_path / "b.sif"))
    assert (tmp_path / "a.sif").read_bytes() == (tmp_path / "b.sif").read_bytes()
    with SifFile.open(str(tmp_path / "a.sif")) as sif:
        assert sif.header.created == sif.header.modified == 1_000_000_000


def test_plain_folder_gets_what_a_runtime_expects(tmp_path):
    folder = tmp_path / "plain"
    (folder / "tmp").mkdir(parents=True)
    (folder / "tmp").chmod(0o700)
    assemble_sif(str(folder), str(tmp_path / "a.sif"))
    assert os.listdir(folder) == ["tmp"]
    with open_image(str(tmp_path / "a.sif")) as image, source_of(image) as source:
        assert source.read(metadata.RUNSCRIPT) is not None
        assert source.names("") == sorted([*source.names("")])
        assert "proc" in source.names("")


def test_sandbox_round_trip_is_equal(box, tmp_path, snapshot):
    assemble_sif(str(box), str(tmp_path / "a.sif"))
    with open_image(str(tmp_path / "a.sif")) as image:
        to_sandbox(image, str(tmp_path / "again"))
    assert snapshot(tmp_path / "again") == snapshot(box)
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".partial")]


@pytest.mark.rootless
def test_ordinary_user_owns_all_of_a_sandbox_and_root_all_of_an_image(as_user, tool):
    script = "mkdir -p src/d; echo x > src/d/f; chmod 750 src/d; singularity convert src a.sif && "
    script += "singularity convert --to sandbox a.sif out && stat -c '%U %a' out/d out/d/f"
    result = as_user(["sh", "-ec", script])
    assert result.stdout.split() == [as_user.name, "750", as_user.name, "644"], result.stderr
    with open_image(str(as_user.tmp / "a.sif")) as image:
        offset = image.offset
    listed = subprocess.run(
        [tool("unsquashfs"), "-lln", "-o", str(offset), as_user.tmp / "a.sif"], capture_output=True, text=True
    )
    assert {line.split()[1] for line in listed.stdout.splitlines() if "squashfs-root" in line} == {"0/0"}


def test_root_keeps_owners_and_devices(root_only, box, tmp_path, snapshot):
    os.mknod(box / "dev/null", 0o20666, os.makedev(1, 3))
    os.chown(box / "data/small", 12, 34)
    assemble_sif(str(box), str(tmp_path / "a.sif"))
    with open_image(str(tmp_path / "a.sif")) as image:
        to_sandbox(image, str(tmp_path / "again"))
    assert snapshot(tmp_path / "again") == snapshot(box)


def test_bare_squashfs_and_back(box, tmp_path, snapshot):
    to_file(str(box), str(tmp_path / "a.simg"), bare=True)
    with open_image(str(tmp_path / "a.simg")) as image:
        assert (image.kind, image.offset) == ("squashfs", 0)
    to_file(str(tmp_path / "a.simg"), str(tmp_path / "b.sif"))
    with open_image(str(tmp_path / "b.sif")) as image:
        assert image.kind == "sif"
        assert metadata.attributes_of(image)["labels"] == {"A": "1"}
        to_sandbox(image, str(tmp_path / "again"))
    assert snapshot(tmp_path / "again") == snapshot(box)


def test_launch_line_of_old_images_is_read(box, tmp_path, snapshot):
    to_file(str(box), str(tmp_path / "a.sqfs"), bare=True)
    old = tmp_path / "old.simg"
    old.write_bytes(b"#!/usr/bin/env run-singularity\n" + (tmp_path / "a.sqfs").read_bytes())
    to_file(str(old), str(tmp_path / "b.sif"))
    with open_image(str(tmp_path / "b.sif")) as image:
        to_sandbox(image, str(tmp_path / "again"))
    assert snapshot(tmp_path / "again") == snapshot(box)


@pytest.mark.parametrize("compression", ["gzip", "zstd", "xz"])
def test_recompressing_keeps_everything(box, tmp_path, compression, snapshot):
    pytest.importorskip("lzma")
    assemble_sif(str(box), str(tmp_path / "a.sif"), compression="gzip" if compression != "gzip" else "zstd")
    to_file(str(tmp_path / "a.sif"), str(tmp_path / "b.sif"), compression=compression)
    with open_image(str(tmp_path / "b.sif")) as image:
        to_sandbox(image, str(tmp_path / "again"))
    assert snapshot(tmp_path / "again") == snapshot(box)


def test_changes_lie_over_an_image_whose_blocks_are_kept(box, tmp_path):
    (box / "usr").mkdir()
    (box / "lib").symlink_to("usr")
    assemble_sif(str(box), str(tmp_path / "a.sif"))
    staged = tmp_path / "staged"
    (staged / "lib").mkdir(parents=True)
    (staged / "lib/new").write_text("through a link")
    (staged / "data").mkdir()
    (staged / "data/small").write_text("replaced")
    labels = Entry.file(metadata.LABELS, metadata.labels_file({"B": "2"}))
    with open_image(str(tmp_path / "a.sif")) as image:
        with_changes(image, str(tmp_path / "b.sif"), entries=[labels], staged=str(staged), remove=["data/large"])
    with open_image(str(tmp_path / "b.sif")) as image, source_of(image) as source:
        assert metadata.attributes_of(image)["labels"] == {"B": "2"}
        assert source.read("usr/new") == b"through a link"
        assert source.read("data/small") == b"replaced"
        assert source.read("data/again") == b"small"
        assert source.read("data/large") is None
        assert len(source.read("data/hole")) == 5_000_000
    (tmp_path / "c.sif").write_bytes((tmp_path / "b.sif").read_bytes())
    with open_image(str(tmp_path / "a.sif")) as image:
        with_changes(
            image,
            str(tmp_path / "b.sif"),
            entries=[labels],
            staged=str(staged),
            remove=["data/large"],
            force=True,
        )
    assert (tmp_path / "b.sif").read_bytes() == (tmp_path / "c.sif").read_bytes()


def test_image_may_be_changed_in_its_own_place(box, tmp_path):
    path = tmp_path / "a.sif"
    assemble_sif(str(box), str(path))
    with open_image(str(path)) as image:
        with_changes(image, str(path), entries=[Entry.file("new", b"x")], force=True)
    with open_image(str(path)) as image, source_of(image) as source:
        assert source.read("new") == b"x"
        assert source.read("data/small") == b"small"


def test_definition_and_oci_configuration_travel_along(box, tmp_path):
    assemble_sif(str(box), str(tmp_path / "a.sif"), definition=b"bootstrap: x\n", oci_config=b"{}")
    to_file(str(tmp_path / "a.sif"), str(tmp_path / "b.sif"), compression="zstd")
    with open_image(str(tmp_path / "b.sif")) as image:
        assert metadata.oci_config_of(image) == b"{}"
        assert image.sif.read(image.sif.descriptors[0]) == b"bootstrap: x\n"


def test_missing_folder_of_the_target_is_found_before_the_work(box, tmp_path):
    with pytest.raises(UserError, match="the folder"):
        assemble_sif(str(box), str(tmp_path / "no/a.sif"), progress=lambda size: pytest.fail("work was done"))


def test_existing_target_stays(box, tmp_path):
    (tmp_path / "a.sif").write_text("precious")
    with pytest.raises(UserError, match="exists already"):
        assemble_sif(str(box), str(tmp_path / "a.sif"))
    assert (tmp_path / "a.sif").read_text() == "precious"


@pytest.mark.parametrize("stage", ["contents", "tables"])
def test_full_disk_leaves_nothing(box, tmp_path, stage):
    target = tmp_path / "out"
    target.mkdir()
    limit = 100_000 if stage == "contents" else 300_000
    script = (
        "import resource, signal, sys\nfrom pysingularity.cli.main import main\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit},) * 2)\n"
        f"sys.exit(main(['convert', {str(box)!r}, {str(target / 'a.sif')!r}]))\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 255
    assert "no space left" in result.stderr
    assert "Traceback" not in result.stderr
    assert os.listdir(target) == []


def test_damaged_image_leaves_nothing(box, tmp_path):
    assemble_sif(str(box), str(tmp_path / "a.sif"))
    out = tmp_path / "out"
    out.mkdir()
    with open_image(str(tmp_path / "a.sif")) as image:
        offset, size = image.offset, image.size
    data = bytearray((tmp_path / "a.sif").read_bytes())
    for at in range(offset + 96, offset + size, 997):
        data[at] ^= 0x55
    (tmp_path / "bad.sif").write_bytes(data)
    with pytest.raises(SingularityError), open_image(str(tmp_path / "bad.sif")) as image:
        to_sandbox(image, str(out / "box"))
    with pytest.raises(SingularityError):
        to_file(str(tmp_path / "bad.sif"), str(out / "b.sif"), compression="zstd")
    assert os.listdir(out) == []


def test_encrypted_image_is_refused_by_name(tmp_path):
    from pysingularity.sif import layout
    from pysingularity.sif.file import SifObject, create

    extra = layout.partition_extra(layout.ENCRYPTED_SQUASHFS, layout.PRIMARY, "amd64")
    with open(tmp_path / "a.sif", "w+b") as file:
        create(file.fileno(), [SifObject(layout.PARTITION, b"luks", extra=extra)], identity=bytes(16))
    with pytest.raises(SingularityError, match="encrypted"):
        to_file(str(tmp_path / "a.sif"), str(tmp_path / "b.sif"))
    with pytest.raises(SingularityError, match="encrypted"), open_image(str(tmp_path / "a.sif")) as image:
        to_sandbox(image, str(tmp_path / "out"))


@pytest.fixture
def ext3(box, tmp_path, tool):
    tool("debugfs")
    path = tmp_path / "old.img"
    command = [tool("mkfs.ext3"), "-q", "-d", box, path, "32M"]
    subprocess.run(command, check=True, capture_output=True)
    return path


@pytest.mark.parametrize("launch", [b"", b"#!/usr/bin/env run-singularity\n"])
def test_ext3_image_becomes_a_sif_and_a_sandbox(ext3, box, tmp_path, launch, snapshot):
    if any(b"\n" in os.fsencode(path) for path in box.rglob("*")):
        # The tool lists one name a line, so such a name is refused; see the test below.
        next(box.glob("data/caf*")).unlink()
    ext3.unlink()
    subprocess.run(["/usr/sbin/mkfs.ext3", "-q", "-d", box, ext3, "32M"], check=True, capture_output=True)
    old = tmp_path / "with.img"
    old.write_bytes(launch + ext3.read_bytes())
    with open_image(str(old)) as image:
        assert metadata.attributes_of(image)["labels"] == {"A": "1"}
        to_sandbox(image, str(tmp_path / "again"))
    expected = snapshot(box)
    found = snapshot(tmp_path / "again")
    assert found == expected
    to_file(str(old), str(tmp_path / "a.sif"))
    with open_image(str(tmp_path / "a.sif")) as image:
        to_sandbox(image, str(tmp_path / "more"))
    assert snapshot(tmp_path / "more") == expected


def test_ext3_names_that_the_tool_cannot_show_are_refused(ext3, tmp_path):
    with pytest.raises(ImageError, match="cannot be"), open_image(str(ext3)) as image:
        to_sandbox(image, str(tmp_path / "again"))
    assert not (tmp_path / "again").exists()


def test_missing_tool_for_ext3_is_named(ext3, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    with pytest.raises(SingularityError, match="debugfs") as caught:
        to_file(str(ext3), str(tmp_path / "a.sif"))
    assert "e2fsprogs" in caught.value.hint


@pytest.mark.peer
def test_apptainer_runs_what_we_assemble(box, tmp_path, apptainer, tool):
    busybox = tool("busybox")
    if b"statically" not in subprocess.run(["file", "-L", busybox], capture_output=True).stdout:
        pytest.skip("needs a static busybox (and file)")
    shutil.copy(busybox, box / "bin/busybox")
    for name in ("sh", "cat", "echo"):
        os.symlink("busybox", box / "bin" / name)
    for kind in ("gzip", "zstd"):
        path = tmp_path / f"{kind}.sif"
        assemble_sif(str(box), str(path), compression=kind)
        path.chmod(0o755)
        tmp_path.chmod(0o755)
        for parent in list(tmp_path.parents)[:3]:
            if parent.stat().st_uid == os.getuid() and parent != Path("/tmp"):
                parent.chmod(0o755)
        assert "FS (Squashfs/*System/" in apptainer("sif", "list", path).stdout
        assert apptainer("inspect", path).stdout == "A: 1\n"
        result = apptainer("exec", path, "cat", "/data/small", user=True)
        assert result.stdout == "small", result.stderr
        result = apptainer("run", path, "a", "b c", user=True)
        assert result.stdout == "run a b c\n", result.stderr


@pytest.mark.peer
def test_we_convert_what_apptainer_builds(box, tmp_path, apptainer):
    (box / "data/pipe").unlink()
    shutil.rmtree(box / "data")
    built = apptainer("build", tmp_path / "theirs.sif", box)
    if built.returncode:
        pytest.skip(f"Apptainer cannot build here: {built.stderr.splitlines()[-1]}")
    to_file(str(tmp_path / "theirs.sif"), str(tmp_path / "ours.sif"))
    with open_image(str(tmp_path / "ours.sif")) as image:
        theirs = json.loads(apptainer("inspect", "--all", tmp_path / "theirs.sif").stdout)
        assert metadata.document(metadata.attributes_of(image)) == theirs
