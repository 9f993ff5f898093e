"""Streaming decompression of gzip, xz, zstd, bzip2 and lzma files.

A file may consist of several streams, with zero bytes between and after them (the padding of .xz
files and tapes); all of them are read. Anything else after a stream is an error, raised after
everything before it has been yielded.
"""

from __future__ import annotations

import bz2
import contextlib
import itertools
import lzma
import math
import re
import zlib
from collections.abc import Generator, Iterator
from typing import Any, BinaryIO

from backports import zstd

# Bytes read at a time, and upper bound on a decoder's output per call.
_BLOCK = 1 << 15

UTF8_MARK = b"\xef\xbb\xbf"

# Magic numbers. zstd allows skippable frames before, between and after the others.
_BEGINNINGS = {
    "gzip": re.compile(rb"\x1f\x8b\x08"),
    "xz": re.compile(rb"\xfd7zXZ\0"),
    "zstd": re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),
    "bzip2": re.compile(rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)"),
    "lzma": re.compile(rb"[\x01-\xe0]\0(?:\0|[\x10-\xf0]\0\0)"),  # identified by file name only
}
_LONGEST_BEGINNING = 10

SUFFIXES = {
    ".gz": "gzip",
    ".gzip": "gzip",
    ".xz": "xz",
    ".zst": "zstd",
    ".zstd": "zstd",
    ".bz2": "bzip2",
    ".lzma": "lzma",
}


class ArchiveError(Exception):
    """A file can't be decompressed.

    Attributes:
        cut: whether it ends in the middle of a stream, so that its last document may be truncated.
    """

    def __init__(self, reason: str, cut: bool):
        super().__init__(reason)
        self.cut = cut


class _DecoderError(ArchiveError):
    """A decoder's own error."""


def packing_of(beginning: bytes) -> str | None:
    """Returns the compression format of a file with these first bytes; None if unknown.

    Example:
        >>> packing_of(b"BZh91AY&SY..."), packing_of(b"BZh")
        ('bzip2', None)
    """
    for packing, pattern in _BEGINNINGS.items():
        if packing != "lzma" and pattern.match(beginning):
            return packing
    return None


def unpack(file: BinaryIO, packing: str) -> Iterator[bytes]:
    """Decompresses all streams of a file.

    Args:
        file: the file, at its beginning.
        packing: compression format, one of the values of ``SUFFIXES``.

    Yields:
        The content, without byte order marks at the beginning of streams.

    Raises:
        ArchiveError: after all content that can be decompressed, if that is not the whole file.
    """
    data, first = b"", True
    while True:
        # A read may end within the padding or within a magic number: read on until it is complete.
        while len(data) < _LONGEST_BEGINNING and (block := file.read(_BLOCK)):
            data += block
            if not first:
                data = data.lstrip(b"\0")
        if not data and not first:
            return
        if not _BEGINNINGS[packing].match(data):
            what = f"begins with {data[:6]!r}" if data else "an empty file"
            raise ArchiveError(
                f"not in the format of {packing}: {what}"
                if first
                else f"neither padding nor another stream follows one of {packing}: {data[:6]!r}",
                cut=False,
            )
        data = (yield from _unmarked(_stream(file, data, packing))).lstrip(b"\0")
        first = False


# Yields the content of a stream and returns the bytes that were read beyond its end.
_Stream = Generator[bytes, None, bytes]


def _unmarked(stream: _Stream) -> _Stream:
    """Removes a byte order mark at the beginning of a stream."""
    beginning: bytes | None = b""  # buffered until long enough for a mark
    while True:
        try:
            out = next(stream)
        except StopIteration as end:
            if beginning:
                yield beginning.removeprefix(UTF8_MARK)
            return end.value
        if beginning is not None:
            beginning += out
            if len(beginning) < len(UTF8_MARK):
                continue
            out, beginning = beginning.removeprefix(UTF8_MARK), None
        yield out


def _stream(file: BinaryIO, data: bytes, packing: str) -> _Stream:
    """Yields the content of one stream, up to the last byte before an error."""
    # To decode the stream again if a call fails.
    start = file.tell() - len(data)
    decoded, calls = _decoded(file, data, packing), 0
    while True:
        try:
            out = next(decoded)
        except StopIteration as end:
            return end.value
        except _DecoderError:
            # The failing call's output is lost: decode again, and repeat that call byte by byte.
            file.seek(start)
            again, rest = _decoded(file, file.read(len(data)), packing, calls), bytearray()
            with contextlib.suppress(ArchiveError):
                for out in itertools.islice(again, calls, None):
                    rest += out
            yield bytes(rest)
            raise
        calls += 1
        yield out


def _decoded(file: BinaryIO, data: bytes, packing: str, coarse: float = math.inf) -> _Stream:
    """Yields the content of one stream, block by block; after ``coarse`` calls byte by byte."""
    decoder: Any = _DECODERS[packing]()
    for call in itertools.count():
        if decoder.eof:
            return decoder.unused_data + data
        if decoder.needs_input and not data:
            data = file.read(_BLOCK)
            if not data:
                raise ArchiveError(f"the file ends within a stream of {packing}", cut=True)
        # Byte by byte, in and out: what is decoded before an error is then not lost with it.
        taken, most = (len(data), _BLOCK) if call < coarse else (int(decoder.needs_input), 1)
        piece, data = data[:taken], data[taken:]
        try:
            out = decoder.decompress(piece, most)
        except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError, zstd.ZstdError) as error:
            raise _DecoderError(str(error), cut=True) from None
        yield out
    raise AssertionError  # the loop has no end


class _Gzip:
    """zlib's decoder with the methods of the others."""

    def __init__(self) -> None:
        self._decoder = zlib.decompressobj(wbits=31)
        self._full = False

    @property
    def eof(self) -> bool:
        return self._decoder.eof

    @property
    def unused_data(self) -> bytes:
        return self._decoder.unused_data

    @property
    def needs_input(self) -> bool:
        # If the output was full, more may follow even without further input.
        return not (self._decoder.unconsumed_tail or self._full)

    def decompress(self, data: bytes, max_length: int) -> bytes:
        out = self._decoder.decompress(self._decoder.unconsumed_tail + data, max_length)
        # zlib does not say whether output is left in its buffers.
        self._full = len(out) == max_length
        return out


def _zstd() -> zstd.ZstdDecompressor:
    """Returns a decoder for any window size (`zstd --long=31`); the default limit is 128 MiB."""
    parameter = zstd.DecompressionParameter.window_log_max
    return zstd.ZstdDecompressor(options={parameter: parameter.bounds()[1]})


_DECODERS: dict[str, Any] = {
    "gzip": _Gzip,
    "xz": lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ),
    "lzma": lambda: lzma.LZMADecompressor(lzma.FORMAT_ALONE),
    "zstd": _zstd,
    "bzip2": bz2.BZ2Decompressor,
}
