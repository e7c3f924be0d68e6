# SPDX-License-Identifier: Apache-2.0
"""Codecs: every compressor reads what it wrote, and none produces more than it was allowed."""

from __future__ import annotations

import random
import sys
import zlib

import pytest

from pysingularity.errors import HostError, UserError
from pysingularity.squashfs import codecs, layout

TEXT = b"the same words again and again, " * 2000
NOISE = random.Random(3).randbytes(9000)


def pair(name, level=None):
    try:
        number, compress, _ = codecs.compressor(name, level)
        return compress, codecs.decompressor(number)
    except HostError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("name", ["gzip", "xz", "zstd", "lz4"])
@pytest.mark.parametrize("data", [TEXT, NOISE, b"x", bytes(131072)])
def test_what_is_compressed_inflates_to_the_same(name, data):
    compress, inflate = pair(name)
    assert inflate(bytes(compress(data)), len(data)) == data
    assert inflate(bytes(compress(memoryview(data))), 1 << 20) == data


@pytest.mark.parametrize("name", ["gzip", "xz", "zstd", "lz4"])
def test_a_bomb_is_refused_at_the_limit(name):
    compress, inflate = pair(name)
    bomb = bytes(compress(bytes(1 << 20)))
    for limit in (8192, (1 << 20) - 1):
        with pytest.raises(ValueError):
            inflate(bomb, limit)


@pytest.mark.parametrize("name", ["gzip", "xz", "zstd", "lz4"])
def test_data_that_is_cut_short_or_nonsense_is_refused(name):
    compress, inflate = pair(name)
    whole = bytes(compress(TEXT))
    for data in (whole[:-5], whole[: len(whole) // 2], b"", b"\x00", NOISE[:100]):
        if name == "lz4" and data != NOISE[:100]:
            # It has no marker at its end: what is cut may look whole, and the reader then misses bytes.
            try:
                assert len(inflate(data, len(TEXT))) < len(TEXT)
            except ValueError:
                continue
        else:
            with pytest.raises(ValueError):
                inflate(data, len(TEXT))


@pytest.mark.parametrize("name", ["gzip", "zstd", "lz4"])
def test_the_fallback_libraries_agree_with_the_fast_ones(name, monkeypatch):
    compress, _ = pair(name)
    data = bytes(compress(TEXT))
    for module in ("deflate", "backports", "compression", "lz4", "lz4.block", "backports.zstd"):
        monkeypatch.setitem(sys.modules, module, None)
    try:
        inflate = codecs.decompressor(layout.COMPRESSORS[name])
    except HostError as error:
        pytest.skip(str(error))
    assert inflate(data, len(TEXT)) == TEXT
    with pytest.raises(ValueError):
        inflate(data, len(TEXT) - 1)
    with pytest.raises(ValueError):
        inflate(NOISE[:50], 8192)


def test_gzip_is_written_by_zlib_when_libdeflate_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "deflate", None)
    number, compress, label = codecs.compressor("gzip")
    assert (number, label) == (1, "zlib 6")
    assert zlib.decompress(compress(TEXT)) == TEXT


def test_a_missing_library_is_named_with_what_to_install(monkeypatch):
    for module in ("backports", "backports.zstd", "compression"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(HostError) as caught:
        codecs.compressor("zstd")
    assert caught.value.id == "no-codec"
    assert "backports.zstd" in caught.value.hint


@pytest.mark.parametrize(("name", "level"), [("gzip", 0), ("gzip", 13), ("zstd", 23), ("lz4", 0), ("xz", 10)])
def test_levels_out_of_range_are_refused(name, level):
    with pytest.raises(UserError) as caught:
        codecs.compressor(name, level)
    assert caught.value.id == "compression-level"


def test_unknown_names_and_numbers_are_refused():
    with pytest.raises(UserError):
        codecs.compressor("brotli")
    with pytest.raises(ValueError):
        codecs.decompressor(7)


def test_xz_blocks_are_of_the_kind_the_kernel_reads():
    compress, _ = pair("xz")
    data = compress(TEXT)
    assert data[:6] == b"\xfd7zXZ\0"
    assert data[7] == 1  # CRC32, the only check that the kernel's decoder knows
