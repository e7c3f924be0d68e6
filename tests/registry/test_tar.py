# SPDX-License-Identifier: Apache-2.0
"""The tar reader: what tarfile and GNU tar write is read back; what nobody honest writes is refused in one line."""

from __future__ import annotations

import gzip
import io
import os
import subprocess
import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pysingularity.errors import ImageError
from pysingularity.registry.inflate import Inflate
from pysingularity.registry.tar import TarReader


def reader(data: bytes) -> TarReader:
    return TarReader(Inflate(io.BytesIO(data).read, "layer 1"))


def members(data: bytes):
    tar = reader(data)
    return [(member, tar.read(member.size) if member.kind == "file" else b"") for member in tar]


NAME = st.binary(min_size=1, max_size=120).filter(
    lambda name: b"/" not in name and b"\0" not in name and name not in (b".", b"..") and len(name) <= 255
)


@given(
    st.lists(st.tuples(st.lists(NAME, min_size=1, max_size=4), st.binary(max_size=1500)), max_size=5),
    st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]),
    st.integers(0, 2**32 - 1),
)
def test_what_tarfile_writes_is_read_back(files, form, owner):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form, encoding="utf-8", errors="surrogateescape") as tar:
        for parts, content in files:
            info = tarfile.TarInfo(b"/".join(parts).decode("utf-8", "surrogateescape"))
            info.size, info.uid, info.gid, info.mtime, info.mode = len(content), owner, owner, 123456789, 0o4751
            tar.addfile(info, io.BytesIO(content))
    found = members(out.getvalue())
    assert [(member.path, content) for member, content in found] == [
        (b"/".join(parts), content) for parts, content in files
    ]
    assert all(
        (member.uid, member.gid, member.mtime, member.mode) == (owner, owner, 123456789, 0o4751) for member, _ in found
    )


@given(st.binary(max_size=3000))
def test_any_bytes_are_read_or_refused(data):
    try:
        members(data)
    except ImageError:
        pass


@given(st.integers(0, 2047), st.integers(0, 255))
def test_a_changed_byte_never_escapes_as_another_error(place, value):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("é" * 120)
        info.size = 5
        tar.addfile(info, io.BytesIO(b"hello"))
    data = bytearray(out.getvalue())
    data[place] = value
    try:
        members(bytes(data))
    except ImageError:
        pass


@pytest.mark.peer
@pytest.mark.parametrize("form", ["gnu", "oldgnu", "v7", "ustar", "posix"])
@pytest.mark.parametrize("sparse", ["", "0.0", "0.1", "1.0"])
def test_gnu_tar_is_understood_in_every_format(tmp_path, tool, form, sparse):
    if sparse and form in ("v7", "ustar", "gnu"):
        pytest.skip("this format has no such sparse files")
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / ("n" * 90)).write_bytes(b"x" * 1000)
    with open(tree / "holes", "wb") as file:
        for at in range(40):
            file.seek(at * 65536)
            file.write(b"%d" % at * 100)
        file.truncate(5_000_000)
    os.symlink("../x", tree / "link")
    os.link(tree / "holes", tree / "zhard")
    words = ["--sparse", f"--sparse-version={sparse}"] if sparse and form == "posix" else ["--sparse"] if sparse else []
    archive = tmp_path / "x.tar"
    subprocess.run(
        [tool("tar"), f"--format={form}", *words, "--sort=name", "-cf", archive, "-C", tree, "."], check=True
    )
    found = {member.path: (member, content) for member, content in members(archive.read_bytes())}
    assert found[b"holes"][1] == (tree / "holes").read_bytes()
    assert found[b"n" * 90][1] == b"x" * 1000
    assert found[b"link"][0].target == b"../x"
    assert (found[b"zhard"][0].kind, found[b"zhard"][0].target) == ("link", b"holes")
    assert found[b""][0].kind == "dir"


def header(name=b"x", size=0, kind=b"0", **fields) -> bytearray:
    head = bytearray(512)
    head[: len(name)] = name
    head[100:108] = b"0000644\0"
    head[124:136] = fields.get("size_field", b"%011o\0" % size)
    head[136:148] = b"%011o\0" % 0
    head[108:116] = fields.get("uid", b"0000000\0")
    head[116:124] = b"0000000\0"
    head[156:157] = kind
    head[257:265] = b"ustar\x0000"
    head[148:156] = b"        "
    head[148:156] = b"%06o\0 " % sum(head)
    return head


def test_numbers_in_base_256_and_negative_ones():
    data = bytes(header(uid=b"\x80\0\0\0\xff\xff\xff\xfe")) + bytes(1024)
    assert members(data)[0][0].uid == 0xFFFFFFFE
    with pytest.raises(ImageError, match="negative size"):
        members(bytes(header(size_field=b"\xff" * 12)) + bytes(1024))


@pytest.mark.parametrize("name", [b"../x", b"a/../../x", b"/../x"])
def test_name_that_climbs_out_is_refused(name):
    with pytest.raises(ImageError, match="climbs out"):
        members(bytes(header(name)) + bytes(1024))


def test_absolute_and_untidy_names_lie_inside():
    paths = [member.path for member, _ in members(bytes(header(b"/a/./b//c/../d")) + bytes(1024))]
    assert paths == [b"a/b/d"]


def test_extensions_are_bounded():
    with pytest.raises(ImageError, match="header extension"):
        members(bytes(header(size=1 << 30, kind=b"x")))
    with pytest.raises(ImageError, match="no name"):
        long = b"a/" * 6000
        members(bytes(header(size=len(long), kind=b"L")) + long + bytes(-len(long) % 512) + bytes(header()))


def test_hole_map_that_lies_is_refused():
    head = header(b"s", size=512, kind=b"S")
    head[386:410] = b"%011o\0%011o\0" % (0, 1 << 20)
    head[483:495] = b"%011o\0" % (1 << 21)
    head[148:156] = b"        "
    head[148:156] = b"%06o\0 " % sum(head)
    with pytest.raises(ImageError, match="sparse"):
        members(bytes(head) + bytes(2048))


def test_truncated_archive_is_refused():
    with pytest.raises(ImageError, match="ends in the middle"):
        members(bytes(header(size=5000)) + b"x" * 600)


def test_extended_attributes_of_star_and_libarchive():
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("f")
        info.pax_headers = {"SCHILY.xattr.user.a": "1", "LIBARCHIVE.xattr.user.b%20c": "AP8="}
        tar.addfile(info)
    assert members(out.getvalue())[0][0].xattrs == {b"user.a": b"1", b"user.b c": b"\0\xff"}


def test_many_gzip_members_and_zstd_frames_are_one_stream():
    from backports import zstd

    data = os.urandom(300_000)
    pieces = [data[at : at + 1000] for at in range(0, len(data), 1000)]
    skippable = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"skip"
    for stream, kind in (
        (b"".join(gzip.compress(piece) for piece in pieces), "gzip"),
        (skippable + b"".join(zstd.compress(piece) + skippable for piece in pieces), "zstd"),
        (data, "plain"),
    ):
        source = io.BytesIO(stream)
        plain = Inflate(lambda size, source=source: source.read(min(size, 777)), "x")
        assert plain.kind == kind
        assert plain.read(len(data)) == data
        assert plain.read(1) == b""


@pytest.mark.parametrize("cut", [1, 9, 100])
def test_cut_or_damaged_stream_is_an_error(cut):
    stream = gzip.compress(os.urandom(200_000))
    with pytest.raises(ImageError):
        Inflate(io.BytesIO(stream[:-cut]).read, "x").read(300_000)
    spoilt = bytearray(stream)
    spoilt[len(spoilt) // 2] ^= 0xFF
    with pytest.raises(ImageError):
        Inflate(io.BytesIO(bytes(spoilt)).read, "x").read(300_000)


def test_bomb_is_given_up(monkeypatch):
    from backports import zstd

    monkeypatch.setattr("pysingularity.registry.inflate.BOMB_START", 1 << 22)
    stream = zstd.compress(bytes(64 << 20))
    with pytest.raises(ImageError, match="inflate to more"):
        Inflate(io.BytesIO(stream).read, "x").skip(64 << 20)
