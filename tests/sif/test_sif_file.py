# SPDX-License-Identifier: Apache-2.0
"""SIF files on disk: made, read and changed by us, and judged by Apptainer where it is installed."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pysingularity.errors import ImageError
from pysingularity.sif import layout
from pysingularity.sif.file import SifFile, SifObject, create, identity_from, plan, random_identity

PRIMARY = layout.partition_extra(layout.SQUASHFS, layout.PRIMARY, "arm64")
SYSTEM = layout.partition_extra(layout.SQUASHFS, layout.SYSTEM, "amd64")


def make(path, *objects, identity=bytes(16), when=layout.NO_TIME, **more):
    with open(path, "w+b") as file:
        return create(file.fileno(), objects, identity=identity, when=when, **more)


def usual() -> list[SifObject]:
    return [
        SifObject(layout.DEFINITION, b"bootstrap: scratch\n"),
        SifObject(layout.JSON, b"{}", name="inspect-metadata.json"),
        SifObject(layout.PARTITION, b"p" * 5000, extra=PRIMARY),
    ]


def test_objects_stand_where_apptainer_puts_them(tmp_path):
    path = tmp_path / "a.sif"
    made = make(path, *usual())
    assert [(one.id, one.offset, one.size, one.padded) for one in made] == [
        (1, 32176, 19, 19),
        (2, 32195, 2, 2),
        (3, 32768, 5000, 32768 - 32197 + 5000),
    ]
    with SifFile.open(str(path)) as sif:
        assert sif.header.arch == b"04\0"
        assert (sif.header.free, sif.header.total) == (45, 48)
        assert sif.header.data_length == sif.size - 32176
        assert sif.read(sif.descriptors[1]) == b"{}"
        assert sif.named("inspect-metadata.json").id == 2
        assert sif.primary().id == 3
        assert b"".join(sif.chunks(sif.primary())) == b"p" * 5000


def test_the_same_objects_give_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        make(tmp_path / name, *usual(), identity=identity_from(b"x" * 32), when=1_700_000_000)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_partition_already_in_place_is_described_and_kept(tmp_path):
    path = tmp_path / "a.sif"
    objects = [SifObject(layout.DEFINITION, b"x"), SifObject(layout.PARTITION, extra=PRIMARY)]
    offset = plan(objects)[-1]
    with open(path, "w+b") as file:
        os.pwrite(file.fileno(), b"squash", offset)
        objects[-1].offset, objects[-1].size = offset, 6
        create(file.fileno(), objects, identity=random_identity())
    with SifFile.open(str(path)) as sif:
        assert sif.read(sif.primary()) == b"squash"


def test_identities_are_uuids():
    assert (random_identity()[6] >> 4, random_identity()[8] >> 6) == (4, 2)
    assert (identity_from(b"\xff" * 32)[6] >> 4, identity_from(bytes(32))[8] >> 6) == (8, 2)
    assert identity_from(b"a" * 32) != identity_from(b"b" * 32)


def test_added_object_comes_behind_everything(tmp_path):
    path = tmp_path / "a.sif"
    make(path, *usual())
    with SifFile.open(str(path), writable=True) as sif:
        new = sif.add(SifObject(layout.RAW, b"more", name="note", alignment=512))
        assert (new.id, new.offset % 512) == (4, 0)
    with SifFile.open(str(path)) as sif:
        assert sif.read(sif.get(4)) == b"more"
        assert sif.header.modified == layout.NO_TIME  # a file without times stays one
        assert sif.header.free == 44


def test_second_primary_partition_is_refused(tmp_path):
    path = tmp_path / "a.sif"
    make(path, *usual())
    with SifFile.open(str(path), writable=True) as sif, pytest.raises(ImageError, match="primary"):
        sif.add(SifObject(layout.PARTITION, b"q", extra=PRIMARY))
    with pytest.raises(ImageError, match="primary"):
        make(tmp_path / "b.sif", SifObject(layout.PARTITION, b"q", extra=PRIMARY), *usual())


def test_full_table_is_refused(tmp_path):
    path = tmp_path / "a.sif"
    make(path, SifObject(layout.RAW, b"1"), slots=1)
    with SifFile.open(str(path), writable=True) as sif, pytest.raises(ImageError, match="slots"):
        sif.add(SifObject(layout.RAW, b"2"))
    with pytest.raises(ImageError, match="slots"):
        make(path, SifObject(layout.RAW, b"1"), SifObject(layout.RAW, b"2"), slots=1)


def test_deleting_keeps_the_other_bytes(tmp_path):
    path = tmp_path / "a.sif"
    make(path, *usual(), when=5)
    before = path.read_bytes()
    with SifFile.open(str(path), writable=True) as sif:
        sif.delete(2, when=9)
    after = path.read_bytes()
    assert after[32176:] == before[32176:]
    with SifFile.open(str(path)) as sif:
        assert [one.id for one in sif.descriptors] == [1, 3]
        assert (sif.header.modified, sif.header.created) == (9, 5)
        with pytest.raises(ImageError, match="no object"):
            sif.get(2)


def test_deleting_can_zero_and_compact(tmp_path):
    path = tmp_path / "a.sif"
    make(path, *usual())
    with SifFile.open(str(path), writable=True) as sif:
        sif.delete(1, zero=True)
        sif.delete(3, compact=True)
        assert sif.header.arch == b"00\0"
    data = path.read_bytes()
    assert data[32176:32195] == bytes(19)
    assert len(data) == 32197
    with SifFile.open(str(path), writable=True) as sif:
        new = sif.add(SifObject(layout.RAW, b"again"))
        assert (new.id, new.offset) == (1, 32197)


def test_another_partition_becomes_primary(tmp_path):
    path = tmp_path / "a.sif"
    make(path, *usual(), SifObject(layout.PARTITION, b"q", extra=SYSTEM))
    with SifFile.open(str(path), writable=True) as sif:
        with pytest.raises(ImageError, match="not a system partition"):
            sif.set_primary(1)
        sif.set_primary(4)
    with SifFile.open(str(path)) as sif:
        assert sif.primary().id == 4
        assert sif.header.arch == b"02\0"
        assert sif.get(3).partition[1] == layout.SYSTEM


def test_two_writers_do_not_meet(tmp_path):
    path = tmp_path / "a.sif"
    make(path, *usual())
    with SifFile.open(str(path), writable=True), pytest.raises(ImageError, match="another process"):
        SifFile.open(str(path), writable=True)
    with SifFile.open(str(path)) as sif:
        assert len(sif.descriptors) == 3


def test_full_disk_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "a.sif"
    make(path, *usual())
    before = path.read_bytes()
    script = (
        "import resource, signal, sys\n"
        "from pysingularity.sif.file import SifFile, SifObject\n"
        f"signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({len(before) + 4096},) * 2)\n"
        f"with SifFile.open({str(path)!r}, writable=True) as sif:\n"
        "    sif.add(SifObject(0x4007, b'x' * 100000))\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "File too large" in result.stderr
    assert path.read_bytes() == before


@pytest.mark.parametrize("keep", [0, 10, 127, 128, 5000, 32176, 32767, 36000])
def test_truncated_files_are_refused(tmp_path, keep):
    path = tmp_path / "a.sif"
    make(path, *usual())
    os.truncate(path, keep)
    with pytest.raises(ImageError):
        SifFile.open(str(path))


def test_missing_file_says_so(tmp_path):
    with pytest.raises(ImageError, match="no such file"):
        SifFile.open(str(tmp_path / "nosuch.sif"))


def test_large_objects_are_not_read_into_memory(tmp_path):
    path = tmp_path / "a.sif"
    make(path, *usual())
    with SifFile.open(str(path)) as sif, pytest.raises(ImageError, match="more than 4999"):
        sif.read(sif.primary(), limit=4999)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4096 + 585 * 4), st.binary(min_size=1, max_size=16)), min_size=1, max_size=6))
def test_damaged_files_are_read_or_refused_and_never_anything_else(tmp_path, patches):
    path = tmp_path / "a.sif"
    make(path, *usual())
    data = bytearray(path.read_bytes())
    for at, patch in patches:
        data[at : at + len(patch)] = patch
    path.write_bytes(data)
    try:
        with SifFile.open(str(path)) as sif:
            for one in sif.descriptors:
                assert len(sif.read(one)) == one.size
    except ImageError:
        pass


types = st.sampled_from(range(0x4001, 0x400C))
written = st.lists(
    st.tuples(types, st.binary(max_size=300), st.text("abc.é", max_size=20), st.sampled_from([0, 1, 16, 4096])),
    max_size=8,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(written, st.data())
def test_what_is_written_and_changed_is_read_back(tmp_path, contents, data):
    path = tmp_path / "a.sif"
    half = len(contents) // 2
    objects = [SifObject(kind, body, name=name, alignment=align) for kind, body, name, align in contents]
    make(path, *objects[:half])
    with SifFile.open(str(path), writable=True) as sif:
        for one in objects[half:]:
            sif.add(one)
    expected = dict(enumerate(contents, 1))
    if contents and data.draw(st.booleans()):
        gone = data.draw(st.sampled_from(sorted(expected)))
        with SifFile.open(str(path), writable=True) as sif:
            sif.delete(gone, zero=True, compact=data.draw(st.booleans()))
        del expected[gone]
    with SifFile.open(str(path)) as sif:
        found = {one.id: (one.type, sif.read(one), one.file_name) for one in sif.descriptors}
    assert found == {number: entry[:3] for number, entry in expected.items()}


@pytest.mark.peer
def test_apptainer_reads_what_we_change(tmp_path, apptainer):
    path = tmp_path / "a.sif"
    make(path, *usual(), SifObject(layout.PARTITION, b"q", extra=SYSTEM), identity=random_identity(), when=1)
    with SifFile.open(str(path), writable=True) as sif:
        sif.add(SifObject(layout.SIGNATURE, b"s", extra=layout.signature_extra(layout.SHA256, b"f" * 20), group=0))
        sif.delete(1, zero=True)
        sif.set_primary(4)
    listed = apptainer("sif", "list", path)
    assert listed.returncode == 0, listed.stderr
    assert "FS (Squashfs/*System/amd64)" in listed.stdout
    assert "Signature (SHA-256)" in listed.stdout
    assert "Primary Architecture: amd64" in apptainer("sif", "header", path).stdout


@pytest.mark.peer
def test_we_read_and_change_what_apptainer_makes(tmp_path, apptainer):
    path = tmp_path / "a.sif"
    (tmp_path / "object").write_bytes(b"hello")
    assert apptainer("sif", "new", path).returncode == 0
    add = ["sif", "add", path, tmp_path / "object", "--datatype"]
    assert apptainer(*add, "1").returncode == 0
    assert apptainer(*add, "4", "--parttype", "2", "--partfs", "1", "--partarch", "2").returncode == 0
    with SifFile.open(str(path), writable=True) as sif:
        assert sif.header.pack() == path.read_bytes()[:128]
        table = b"".join(one.pack() for one in sif.descriptors)
        assert table == path.read_bytes()[4096 : 4096 + len(table)]
        assert [sif.read(one) for one in sif.descriptors] == [b"hello", b"hello"]
        sif.delete(1)
    assert "32176" not in apptainer("sif", "list", path).stdout
