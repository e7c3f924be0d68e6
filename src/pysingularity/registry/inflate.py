# SPDX-License-Identifier: Apache-2.0
"""Streams of layers: gzip of one or many members, zstd of one or many frames, bzip2, xz, or plain bytes.

The first bytes decide, never a media type: registries are full of wrong ones. The result is read in exact portions,
as a reader of tar headers wants it, and memory stays below a few MiB whatever a layer claims or contains.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from pysingularity.errors import HostError, ImageError

#: Compressed bytes asked for at once, and the most that one step may inflate to.
INPUT, OUTPUT = 1 << 17, 1 << 20
#: Deflate reaches 1032:1; what goes far beyond, after the first GiB, is made to fill a disk.
BOMB_RATIO, BOMB_START = 1100, 1 << 30

GZIP, ZSTD, BZIP2, XZ, PLAIN = "gzip", "zstd", "bzip2", "xz", "plain"


def kind_of(start: bytes) -> str:
    """Return the compression that the first bytes of a stream tell (RFC 1952, RFC 8878 with skippable frames)."""
    if start[:2] == b"\x1f\x8b":
        return GZIP
    if start[:4] == b"\x28\xb5\x2f\xfd" or (start[1:4] == b"\x2a\x4d\x18" and start[0] & 0xF0 == 0x50):
        return ZSTD
    if start[:3] == b"BZh":
        return BZIP2
    if start[:6] == b"\xfd7zXZ\0":
        return XZ
    return PLAIN


def _gzip_engine() -> tuple[Callable[[], Any], type[Exception]]:
    try:
        from isal import isal_zlib  # twice as fast as zlib
    except ImportError:
        import zlib

        return partial(zlib.decompressobj, 31), zlib.error  # type: ignore[return-value,unused-ignore]
    return partial(isal_zlib.decompressobj, 31), isal_zlib.error  # type: ignore[return-value,unused-ignore]


def _zstd_engine() -> tuple[Callable[[], Any], type[Exception]]:
    try:
        from compression import zstd  # type: ignore[import-not-found,unused-ignore]  # Python 3.14
    except ImportError:
        try:
            from backports import zstd
        except ImportError:
            raise HostError(
                "no-zstd", "this image has zstd layers, and Python has no zstd", hint="pip install backports.zstd"
            ) from None
    return zstd.ZstdDecompressor, zstd.ZstdError


class Inflate:
    """A layer's tar, whatever it is wrapped in.

    Arguments:
        read: returns up to n bytes of the wrapped stream, b"" at its end.
        what: name of the stream for messages.
    """

    def __init__(self, read: Callable[[int], bytes], what: str) -> None:
        self.what = what
        self._raw = read
        self._buffer = b""
        self._at = self._length = 0
        self._input = read(INPUT)
        while 0 < len(self._input) < 6:
            more = read(INPUT)
            if not more:
                break
            self._input += more
        self.kind = kind_of(self._input)
        self.taken = len(self._input)
        self.given = 0
        self._engine: Any = None
        self._make: Callable[[], Any]
        self._error: type[Exception]
        if self.kind == GZIP:
            self._make, self._error = _gzip_engine()
        elif self.kind == ZSTD:
            self._make, self._error = _zstd_engine()
        elif self.kind == BZIP2:
            import bz2

            self._make, self._error = bz2.BZ2Decompressor, OSError
        elif self.kind == XZ:
            import lzma

            self._make, self._error = (lambda: lzma.LZMADecompressor(memlimit=1 << 28)), lzma.LZMAError

    def read(self, size: int) -> bytes:
        """Return exactly `size` bytes, fewer only at the end of the stream.

        Raises:
            ImageError: the compressed stream is damaged, ends early or is a bomb.
        """
        at = self._at
        end = at + size
        if end <= self._length:
            self._at = end
            return self._buffer[at:end]
        parts = [self._buffer[at:]]
        need = size - len(parts[0])
        while need > 0:
            chunk = self._next()
            if not chunk:
                self._buffer, self._at, self._length = b"", 0, 0
                return b"".join(parts)
            if len(chunk) >= need:
                parts.append(chunk[:need])
                self._buffer, self._at, self._length = chunk, need, len(chunk)
                break
            parts.append(chunk)
            need -= len(chunk)
        return b"".join(parts)

    def skip(self, size: int) -> bool:
        """Pass over `size` bytes; return whether they were there."""
        left = size - (self._length - self._at)
        if left <= 0:
            self._at += size
            return True
        self._buffer, self._at, self._length = b"", 0, 0
        while left > 0:
            chunk = self._next()
            if not chunk:
                return False
            if len(chunk) > left:
                self._buffer, self._at, self._length = chunk, left, len(chunk)
            left -= len(chunk)
        return True

    def _refill(self) -> bytes:
        data = self._raw(INPUT)
        self.taken += len(data)
        return data

    def _next(self) -> bytes:
        """Return the next piece of plain bytes, b"" at the end."""
        if self.kind == PLAIN:
            data, self._input = self._input or self._refill(), b""
            return data
        try:
            while True:
                chunk, ended = self._step()
                if chunk:
                    self.given += len(chunk)
                    if self.given > BOMB_START and self.given > BOMB_RATIO * self.taken:
                        raise ImageError(
                            "layer-bomb", f"{self.what}: {self.taken} bytes inflate to more than {self.given}"
                        )
                    return chunk
                if ended:
                    return b""
        except self._error as error:
            raise ImageError("bad-layer", f"{self.what}: damaged {self.kind} stream: {error}") from None

    def _step(self) -> tuple[bytes, bool]:
        engine = self._engine
        if engine is None or engine.eof:
            if engine is not None:  # another member or frame may follow: eStargz and zstd:chunked have thousands
                self._input = engine.unused_data or self._input
            if not self._input:
                self._input = self._refill()
            if not self._input or (engine is not None and not self._input.strip(b"\0")):
                return b"", True
            if engine is not None and self.kind == GZIP and self._input[:2] == b"\x1f":
                self._input += self._refill()
            if engine is not None and self.kind == GZIP and self._input[:2] != b"\x1f\x8b":
                return b"", True  # padding behind the last member, as gzip(1) ignores it
            engine = self._engine = self._make()
        data, self._input = self._input, b""
        if self.kind == GZIP:
            if not data:
                data = self._refill()
                if not data:
                    raise ImageError("bad-layer", f"{self.what}: the gzip stream ends early")
            chunk = engine.decompress(data, OUTPUT)
            if not engine.eof:
                self._input = engine.unconsumed_tail
            return chunk, False
        if not data and engine.needs_input:
            data = self._refill()
            if not data:
                raise ImageError("bad-layer", f"{self.what}: the {self.kind} stream ends early")
        return engine.decompress(data, OUTPUT), False
