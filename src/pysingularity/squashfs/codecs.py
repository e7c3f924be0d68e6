# SPDX-License-Identifier: Apache-2.0
"""Codecs: the compressors of squashfs by number and name, each from the fastest library that is there.

Reading never needs a package for gzip, xz and lzma images; zstd, lz4 and lzo fall back to the system's shared library.
Every decompressor is given the most bytes it may produce, so a decompression bomb ends as ValueError, not as a full
memory. Start ring: libraries are imported when an image asks for them.
"""

from __future__ import annotations

from pysingularity import thirdparty
from pysingularity.errors import HostError, UserError

from . import layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    Decompress = Callable[[bytes, int], bytes]
    Compress = Callable[[bytes | memoryview], bytes | bytearray]

_DAMAGED = "compressed data is damaged"
_TOO_BIG = "compressed data inflates to more than its block may hold"

#: Levels by name: lowest, highest, what is used when nothing is asked.
LEVELS = {"gzip": (1, 12, 6), "xz": (0, 9, 6), "zstd": (1, 22, 3), "lz4": (1, 12, 1)}


def decompressor(number: int) -> Decompress:
    """Return `inflate(data, max_size) -> bytes` for a compressor id of the superblock.

    The function raises ValueError when data is damaged, cut short, or would give more than max_size bytes.

    Raises:
        HostError: "no-codec", this machine has no library for that compressor.
        ValueError: the format knows no such compressor.
    """
    make = _READERS.get(number)
    if make is None:
        raise ValueError(f"unknown compressor {number}")
    return make()


def compressor(name: str, level: int | None = None) -> tuple[int, Compress, str]:
    """Return the compressor's id, its function over one block, and a label of library and level for records.

    The output of one label is always the same for the same input. The functions release the interpreter lock.

    Raises:
        UserError: unknown name or a level outside the compressor's range.
        HostError: "no-codec", this machine has no library for it.
    """
    make = _WRITERS.get(name)
    if make is None:
        raise UserError(
            "unknown-compression",
            f"images cannot be written with compression {name!r}",
            hint="choose one of " + ", ".join(_WRITERS),
        )
    low, high, default = LEVELS[name]
    if level is None:
        level = default
    if not low <= level <= high:
        raise UserError("compression-level", f"{name} level {level} is not between {low} and {high}")
    function, label = make(level)
    return layout.COMPRESSORS[name], function, label


def _missing(name: str, hint: str) -> HostError:
    return HostError("no-codec", f"{name}-compressed squashfs images need a library that is not here", hint=hint)


# -- gzip ----------------------------------------------------------------------------------------------------


def _gzip_reader() -> Decompress:
    thirdparty.neighbours()
    try:
        import deflate  # more than twice as fast as zlib
    except ImportError:
        return _zlib_inflate
    fast: Callable[[bytes, int], bytearray] = deflate.zlib_decompress
    failure: type[Exception] = deflate.DeflateError

    def inflate(data: bytes, limit: int) -> bytes:
        try:
            return bytes(fast(data, limit))
        except failure:
            return _zlib_inflate(data, limit)  # it tells what is wrong

    return inflate


def _zlib_inflate(data: bytes, limit: int) -> bytes:
    import zlib  # 0.3 ms that the start of a container does without where libdeflate is installed

    stream = zlib.decompressobj()
    try:
        # One byte more than allowed: the end of the stream is only seen when there is room left.
        out = stream.decompress(data, limit + 1)
    except zlib.error:
        raise ValueError(_DAMAGED) from None
    if len(out) > limit:
        raise ValueError(_TOO_BIG)
    if not stream.eof:
        raise ValueError(_DAMAGED)
    return out


def _gzip_writer(level: int) -> tuple[Compress, str]:
    try:
        import deflate
    except ImportError:
        import zlib

        level = min(level, 9)
        return lambda block: zlib.compress(block, level), f"zlib {level}"
    squeeze: Callable[[bytes | memoryview, int], bytearray] = deflate.zlib_compress
    return lambda block: squeeze(block, level), f"libdeflate {level}"


# -- xz and lzma ---------------------------------------------------------------------------------------------


def _lzma_reader(alone: bool) -> Decompress:
    try:
        import _lzma  # the C half: `lzma` itself pulls in io and compression machinery
    except ImportError:
        raise _missing("xz", "this Python was built without lzma") from None
    form = _lzma.FORMAT_ALONE if alone else _lzma.FORMAT_XZ
    start, failure = _lzma.LZMADecompressor, _lzma.LZMAError

    def inflate(data: bytes, limit: int) -> bytes:
        try:
            # Dictionaries are as large as a block, 1 MiB at most; the rest is liblzma's own tables.
            stream = start(form, 64 << 20)
            out = stream.decompress(data, limit + 1)
        except (failure, EOFError):
            raise ValueError(_DAMAGED) from None
        if len(out) > limit:
            raise ValueError(_TOO_BIG)
        # Blocks of the old lzma kind may end without a marker: their header tells the size.
        if not stream.eof and not alone:
            raise ValueError(_DAMAGED)
        return out

    return inflate


def _xz_writer(level: int) -> tuple[Compress, str]:
    import lzma

    def compress(block: bytes | memoryview) -> bytes:
        # The kernel's decoder knows CRC32 only, and wants dictionaries no larger than the block (a power of two, or
        # one and a half times one); a dictionary larger than the data gains nothing.
        size = max(8192, 1 << (len(block) - 1).bit_length())
        filters = [{"id": lzma.FILTER_LZMA2, "preset": level, "dict_size": size}]
        return lzma.compress(block, lzma.FORMAT_XZ, lzma.CHECK_CRC32, filters=filters)

    return compress, f"xz {level}"


# -- zstd ----------------------------------------------------------------------------------------------------


def _zstd_module() -> Any:
    thirdparty.neighbours()
    try:
        from compression import zstd  # type: ignore[import-not-found,unused-ignore]  # since Python 3.14
    except ImportError:
        from backports import zstd
    return zstd


def _zstd_reader() -> Decompress:
    try:
        zstd = _zstd_module()
    except ImportError:
        return _zstd_reader_system()
    start, failure = zstd.ZstdDecompressor, zstd.ZstdError
    # The largest block is 1 MiB; a frame that asks for a larger window than twice that is not from a squashfs writer.
    options = {zstd.DecompressionParameter.window_log_max: 21}

    def inflate(data: bytes, limit: int) -> bytes:
        stream = start(None, options)
        try:
            out: bytes = stream.decompress(data, limit + 1)
        except failure:
            raise ValueError(_DAMAGED) from None
        if len(out) > limit:
            raise ValueError(_TOO_BIG)
        if not stream.eof:
            raise ValueError(_DAMAGED)
        return out

    return inflate


def _zstd_reader_system() -> Decompress:
    from pysingularity.linux import libc

    try:
        function = libc.load("libzstd.so.1", "ZSTD_decompress")
    except OSError:
        raise _missing("zstd", "pip install backports.zstd, use Python 3.14, or install libzstd1") from None
    long, pointer = libc.long, libc.pointer

    def inflate(data: bytes, limit: int) -> bytes:
        out = bytearray(limit)
        size = function(pointer(out), long(limit), data, long(len(data)))
        if size < 0:
            raise ValueError(_DAMAGED)
        return bytes(memoryview(out)[:size])

    return inflate


def _zstd_writer(level: int) -> tuple[Compress, str]:
    try:
        zstd = _zstd_module()
    except ImportError:
        raise _missing("zstd", "pip install backports.zstd, or use Python 3.14") from None
    compress = zstd.compress
    return lambda block: compress(block, level), f"zstd {level} ({zstd.zstd_version})"


# -- lz4 -----------------------------------------------------------------------------------------------------


def _lz4_reader() -> Decompress:
    try:
        import lz4.block
    except ImportError:
        return _lz4_reader_system()
    function, failure = lz4.block.decompress, lz4.block.LZ4BlockError

    def inflate(data: bytes, limit: int) -> bytes:
        try:
            return function(data, uncompressed_size=limit)  # type: ignore[no-any-return]
        except (failure, ValueError):
            raise ValueError(_DAMAGED) from None

    return inflate


def _lz4_reader_system() -> Decompress:
    from pysingularity.linux import libc

    try:
        function = libc.load("liblz4.so.1", "LZ4_decompress_safe")
    except OSError:
        raise _missing("lz4", "pip install lz4, or install liblz4-1") from None
    long, pointer = libc.long, libc.pointer

    def inflate(data: bytes, limit: int) -> bytes:
        out = bytearray(limit)
        size = function(data, pointer(out), long(len(data)), long(limit)) & 0xFFFFFFFF  # a C int
        if size > limit:  # negative
            raise ValueError(_DAMAGED)
        return bytes(memoryview(out)[:size])

    return inflate


def _lz4_writer(level: int) -> tuple[Compress, str]:
    try:
        import lz4.block
    except ImportError:
        raise _missing("lz4", "pip install lz4") from None
    compress = lz4.block.compress
    if level < 3:  # the levels below are all the plain fast one
        return lambda block: compress(block, store_size=False), "lz4"
    return lambda block: compress(
        block, mode="high_compression", compression=level, store_size=False
    ), f"lz4 high {level}"


# -- lzo -----------------------------------------------------------------------------------------------------


def _lzo_reader() -> Decompress:
    from pysingularity.linux import libc

    try:
        function = libc.load("liblzo2.so.2", "lzo1x_decompress_safe")
    except OSError:
        raise _missing("lzo", "install liblzo2-2") from None
    long, pointer, reference = libc.long, libc.pointer, libc.reference

    def inflate(data: bytes, limit: int) -> bytes:
        out, size = bytearray(limit), long(limit)
        if function(data, long(len(data)), pointer(out), reference(size), None) & 0xFFFFFFFF:
            raise ValueError(_DAMAGED)
        return bytes(memoryview(out)[: size.value])

    return inflate


_READERS: dict[int, Callable[[], Decompress]] = {
    1: _gzip_reader,
    2: lambda: _lzma_reader(alone=True),
    3: _lzo_reader,
    4: lambda: _lzma_reader(alone=False),
    5: _lz4_reader,
    6: _zstd_reader,
}
_WRITERS: dict[str, Callable[[int], tuple[Compress, str]]] = {
    "gzip": _gzip_writer,
    "xz": _xz_writer,
    "zstd": _zstd_writer,
    "lz4": _lz4_writer,
}
