"""Packed files, unpacked as streams: gzip, xz, zstd and bzip2.

An archive may be several streams, one after the other, with zero bytes between and after them (the
padding of .xz files and tapes): all of them are read. Anything else after a stream is an error,
raised when all before it has been handed out.
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

# Bytes that are read at a time, and that a decoder hands out at a time at most.
_BLOCK = 1 << 15

UTF8_MARK = b"\xef\xbb\xbf"

# How a stream begins. zstd allows frames that hold no content before, between and after the others.
_BEGINNINGS = {
    "gzip": re.compile(rb"\x1f\x8b\x08"),
    "xz": re.compile(rb"\xfd7zXZ\0"),
    "zstd": re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),
    "bzip2": re.compile(rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)"),
    "lzma": re.compile(rb"[\x01-\xe0]\0(?:\0|[\x10-\xf0]\0\0)"),  # known by its name
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
    """What can't be unpacked.

    Attributes:
        cut: whether it ended in the middle of a stream, so that its last document may be cut off.
    """

    def __init__(self, reason: str, cut: bool):
        super().__init__(reason)
        self.cut = cut


class _DecoderError(ArchiveError):
    """What a decoder says is wrong."""


def packing_of(beginning: bytes) -> str | None:
    """The format of an archive that begins with these bytes; None if they begin none.

    Example:
        >>> packing_of(b"BZh91AY&SY..."), packing_of(b"BZh")
        ('bzip2', None)
    """
    for packing, pattern in _BEGINNINGS.items():
        if packing != "lzma" and pattern.match(beginning):
            return packing
    return None


def unpack(file: BinaryIO, packing: str) -> Iterator[bytes]:
    """Unpacks all streams of an archive.

    Args:
        file: the archive, at its beginning.
        packing: its format, one of the values of ``SUFFIXES``.

    Yields:
        The content, without the byte order mark that a stream may begin with.

    Raises:
        ArchiveError: at the end of all that can be unpacked, if that is not the end of the file.
    """
    data, first = b"", True
    while True:
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


# What yields the content of a stream, and returns what was read of the file after it.
_Stream = Generator[bytes, None, bytes]


def _unmarked(stream: _Stream) -> _Stream:
    """A stream without a byte order mark at its beginning."""
    beginning: bytes | None = b""  # until it is long enough for a mark
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
    """The content of one stream, up to the byte before an error."""
    start = file.tell() - len(data)
    decoded, calls = _decoded(file, data, packing), 0
    while True:
        try:
            out = next(decoded)
        except StopIteration as end:
            return end.value
        except _DecoderError:
            # What a decoder makes in the call that fails is lost; so all calls again, but that one.
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
    """The content of one stream, call by call; after ``coarse`` calls byte by byte."""
    decoder: Any = _DECODERS[packing]()
    for call in itertools.count():
        if decoder.eof:
            return decoder.unused_data + data
        if decoder.needs_input and not data:
            data = file.read(_BLOCK)
            if not data:
                raise ArchiveError(f"the file ends within a stream of {packing}", cut=True)
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
        # A full output may leave more to come, though no input is left.
        return not (self._decoder.unconsumed_tail or self._full)

    def decompress(self, data: bytes, max_length: int) -> bytes:
        out = self._decoder.decompress(self._decoder.unconsumed_tail + data, max_length)
        self._full = len(out) == max_length
        return out


def _zstd() -> zstd.ZstdDecompressor:
    """A decoder for frames of any window (`zstd --long=31`), which reads 128 MiB unless told."""
    parameter = zstd.DecompressionParameter.window_log_max
    return zstd.ZstdDecompressor(options={parameter: parameter.bounds()[1]})


_DECODERS: dict[str, Any] = {
    "gzip": _Gzip,
    "xz": lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ),
    "lzma": lambda: lzma.LZMADecompressor(lzma.FORMAT_ALONE),
    "zstd": _zstd,
    "bzip2": bz2.BZ2Decompressor,
}
