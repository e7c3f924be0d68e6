# SPDX-License-Identifier: Apache-2.0
"""Headers and descriptors: what is packed comes back equal, and nothing hostile is accepted."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pysingularity.errors import ImageError
from pysingularity.sif import layout
from pysingularity.sif.layout import DESCRIPTOR, HEADER, Descriptor, Header, unpack_table

BIG = 1 << 40
i64 = st.integers(-(1 << 63), (1 << 63) - 1)
u32 = st.integers(0, (1 << 32) - 1)


def text(most: int) -> st.SearchStrategy[bytes]:
    return st.binary(max_size=most).map(lambda data: data.rstrip(b"\0"))


descriptors = st.builds(
    Descriptor,
    st.integers(0x4001, 0x400B),
    id=st.integers(1, (1 << 32) - 1),
    group=u32,
    link=u32,
    offset=i64,
    size=i64,
    padded=i64,
    created=i64,
    modified=i64,
    uid=i64,
    gid=i64,
    name=text(128),
    extra=text(384),
)


def fields(value: object) -> dict[str, object]:
    return {name: getattr(value, name) for name in value.__slots__}


def test_structures_have_the_sizes_of_the_format():
    assert (HEADER.size, DESCRIPTOR.size) == (128, 585)
    assert layout.DATA_OFFSET == 32176


@given(descriptors)
def test_descriptor_comes_back_as_it_was_packed(one):
    again = Descriptor.unpack(one.pack())
    assert again is not None
    assert fields(again) == fields(one)


@given(
    st.builds(
        Header,
        launch=text(32),
        arch=st.sampled_from([b"00\0", b"02\0", b"13\0"]),
        identity=st.binary(min_size=16, max_size=16),
        created=i64,
        modified=i64,
        data_offset=st.integers(0, BIG),
        data_length=st.integers(0, BIG),
    )
)
def test_header_comes_back_as_it_was_packed(header):
    assert fields(Header.unpack(header.pack(), BIG)) == fields(header)


@given(st.binary(min_size=128, max_size=128), st.integers(0, BIG))
def test_any_bytes_give_a_header_inside_the_file_or_an_image_error(data, size):
    data = data[:32] + layout.MAGIC + layout.VERSION + data[45:]
    try:
        header = Header.unpack(data, size)
    except ImageError:
        return
    assert 0 <= header.free <= header.total <= layout.MOST_SLOTS
    assert HEADER.size <= header.table_offset <= size - header.total * DESCRIPTOR.size


@given(st.lists(st.one_of(descriptors.map(Descriptor.pack), st.binary(min_size=585, max_size=585)), max_size=4))
def test_any_table_gives_objects_inside_the_file_or_an_image_error(slots):
    header = Header(free=0, total=len(slots), table_length=len(slots) * 585)
    size = 1 << 20
    try:
        found = unpack_table(b"".join(slots), header, size)
    except ImageError:
        return
    assert all(min(one.offset, one.size) >= 0 and one.offset + one.size <= size for one in found)
    assert len({one.id for one in found}) == len(found)


def test_negative_times_are_read():
    header = Header(created=layout.NO_TIME)
    assert Header.unpack(header.pack(), BIG).created == -62135596800
    assert header.deterministic


def test_table_of_the_c_library_may_stand_elsewhere():
    header = Header(version=b"00\0", table_offset=4096, data_offset=32768, data_length=10)
    assert Header.unpack(header.pack(), BIG).data_offset == 32768


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"total": -1}, "descriptors"),
        ({"total": 1 << 40}, "descriptors"),
        ({"free": 49}, "descriptors"),
        ({"table_offset": 1 << 62}, "outside the file"),
        ({"table_offset": -4096}, "outside the file"),
        ({"table_offset": 0}, "outside the file"),
        ({"data_offset": -1}, "bounds"),
        ({"data_length": (1 << 63) - 1}, "bounds"),
    ],
)
def test_wild_headers_are_refused(change, words):
    with pytest.raises(ImageError, match=words):
        Header.unpack(Header(**change).pack(), 1 << 20)


def test_newer_versions_are_refused_by_name():
    with pytest.raises(ImageError, match="'07'"):
        Header.unpack(Header(version=b"07\0").pack(), BIG)


def table(*found: Descriptor) -> bytes:
    return b"".join(one.pack() for one in found)


def unpack(*found: Descriptor) -> list[Descriptor]:
    return unpack_table(table(*found), Header(free=0, total=len(found)), 1 << 20)


PRIMARY = layout.partition_extra(layout.SQUASHFS, layout.PRIMARY, "amd64")


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ([Descriptor(layout.RAW, id=1, offset=1 << 19, size=1 << 20)], "outside the file"),
        ([Descriptor(layout.RAW, id=1, offset=-1, size=1)], "outside the file"),
        ([Descriptor(layout.RAW, id=1, offset=40000, size=-1)], "outside the file"),
        ([Descriptor(layout.RAW, id=1, offset=0, size=10)], "overlaps"),
        ([Descriptor(layout.RAW, id=1, offset=4096, size=10)], "overlaps"),
        (
            [
                Descriptor(layout.RAW, id=1, offset=40000, size=100),
                Descriptor(layout.RAW, id=2, offset=40099, size=100),
            ],
            "object 2 overlaps object 1",
        ),
        ([Descriptor(layout.RAW, id=1), Descriptor(layout.RAW, id=1)], "two objects"),
        ([Descriptor(layout.RAW, id=0)], "id 0"),
        (
            [
                Descriptor(layout.PARTITION, id=1, extra=PRIMARY, offset=40000, size=1),
                Descriptor(layout.PARTITION, id=2, extra=PRIMARY, offset=50000, size=1),
            ],
            "two primary",
        ),
    ],
)
def test_wild_tables_are_refused(found, words):
    with pytest.raises(ImageError, match=words):
        unpack(*found)


def test_architectures_have_their_codes():
    assert layout.arch_code("amd64") == b"02\0"
    assert layout.arch_code("loong64") == b"13\0"
    assert [layout.arch_name(layout.arch_code(name)) for name in layout.ARCHITECTURES] == list(layout.ARCHITECTURES)
    assert layout.arch_name(b"00\0") == layout.arch_name(b"99\0") == layout.arch_name(b"") == "unknown"
    with pytest.raises(ImageError, match="sparc"):
        layout.arch_code("sparc")


def test_signed_bytes_ignore_place_and_group():
    one = Descriptor(layout.RAW, id=5, offset=1, size=3, group=layout.GROUP_MASK | 1, modified=7)
    other = Descriptor(layout.RAW, id=6, offset=9, size=3, group=layout.GROUP_MASK | 2, modified=8, padded=5)
    assert one.signed_bytes(5) == other.signed_bytes(6)
    assert len(Header().signed_bytes()) == 61


def test_groups_and_links_are_told_apart():
    assert Descriptor(layout.RAW, link=3).linked_group is None
    assert Descriptor(layout.RAW, link=layout.GROUP_MASK | 3).linked_group == 3
    assert Descriptor(layout.RAW, group=layout.GROUP_MASK).group_number == 0
