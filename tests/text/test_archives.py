"""Archives: all of their streams, padding, and what does not belong to them."""

import bz2
import gzip
import lzma
import tracemalloc

import pytest
from backports import zstd

from loro_jax.errors import TrainingError
from loro_jax.text.readers import Tally, read_documents
from tests.text.samples import read_content, read_file

MARK = b"\xef\xbb\xbf"
ONE, TWO = b'{"text": "first"}\n', b'{"text": "second"}\n'
BOTH = (["first", "second"], [])
PACK = {
    "gz": gzip.compress,
    "xz": lzma.compress,
    "zst": zstd.compress,
    "bz2": bz2.compress,
    "lzma": lambda content: lzma.compress(content, format=lzma.FORMAT_ALONE),
}
every_format = pytest.mark.parametrize("suffix", PACK)


def checked_zst(content):
    return zstd.compress(content, options={zstd.CompressionParameter.checksum_flag: 1})


@every_format
@pytest.mark.parametrize("zeros", [0, 1, 4, 512, 200_000])
def test_all_streams_are_read_with_padding_between_and_after_them(tmp_path, suffix, zeros):
    pack, padding = PACK[suffix], b"\0" * zeros
    packed = pack(ONE) + padding + pack(b"") + pack(TWO[:5]) + pack(TWO[5:]) + padding
    assert read_content(tmp_path, f"a.jsonl.{suffix}", packed) == BOTH


@every_format
@pytest.mark.parametrize("garbage", [b"g", b"garbage!", b"\0\0garbage" + b"\xff" * 100_000])
def test_garbage_after_a_stream_is_said_and_all_before_it_is_read(tmp_path, suffix, garbage):
    packed = PACK[suffix](ONE + TWO.strip()) + garbage
    texts, reasons = read_content(tmp_path, f"a.jsonl.{suffix}", packed, skip=True)
    assert texts == BOTH[0]
    assert ["neither padding nor another stream" in reason for reason in reasons] == [True]
    with pytest.raises(TrainingError, match=rf"a\.jsonl\.{suffix}, byte 36 of the content"):
        read_file(tmp_path / f"a.jsonl.{suffix}")
    packed = PACK[suffix](b"one\n\ntwo") + garbage
    assert read_content(tmp_path, f"a.txt.{suffix}", packed, skip=True)[0] == ["one", "two"]


@every_format
@pytest.mark.parametrize("content", [b"", b"\0" * 1000, ONE], ids=["empty", "zeros", "text"])
def test_what_is_no_archive_is_an_error(tmp_path, suffix, content):
    texts, reasons = read_content(tmp_path, f"a.jsonl.{suffix}", content, skip=True)
    assert texts == []
    assert ["not in the format of" in reason for reason in reasons] == [True]
    with pytest.raises(TrainingError, match="not in the format of"):
        read_file(tmp_path / f"a.jsonl.{suffix}")


@every_format
def test_an_archive_of_nothing_is_a_file_without_documents(tmp_path, suffix):
    assert read_content(tmp_path, f"a.jsonl.{suffix}", PACK[suffix](b"")) == ([], [])


@every_format
def test_a_truncated_last_stream_loses_no_more_than_its_own_end(tmp_path, suffix):
    """And of plain text no half document is read."""
    pack = PACK[suffix]
    packed = pack(b"one\n\n") + pack(b"two\n\nthree " * 1000)[:-12]
    texts, reasons = read_content(tmp_path, f"a.txt.{suffix}", packed, skip=True)
    assert texts[0] == "one"
    assert set(texts[1:]) <= {"two", "three two"}
    assert len(reasons) == 1
    # A bad line before the end counts, the one that is cut off does not count again.
    packed = pack(ONE + b"oops\n") + pack(TWO * 1000)[:-12]
    texts, tally = read_content(tmp_path, f"a.jsonl.{suffix}", packed, skip=True)
    assert texts[0] == "first"
    assert set(texts[1:]) <= {"second"}
    assert len(tally) == 2


@pytest.mark.parametrize("suffix", ["gz", "xz", "zst", "bz2"])
@pytest.mark.parametrize("count", [1, 3000])
def test_a_wrong_checksum_costs_no_line_before_it(tmp_path, suffix, count):
    lines = b"".join(b'{"text": "%d"}\n' % (i**5) for i in range(count))
    pack = checked_zst if suffix == "zst" else PACK[suffix]
    packed = pack(ONE) + pack(lines)
    # The last bytes are a checksum or a length of the content, or of xz the end of its index.
    wrong = packed[:-4] + bytes(byte ^ 255 for byte in packed[-4:])
    texts, reasons = read_content(tmp_path, f"a.jsonl.{suffix}", wrong, skip=True)
    assert texts == ["first", *(str(i**5) for i in range(count))]
    assert ["can't be read" in reason for reason in reasons] == [True]


@every_format
def test_every_stream_may_begin_with_a_mark(tmp_path, suffix):
    packed = b"".join(PACK[suffix](MARK + text) for text in (b"one\n\n", b"two", b" too"))
    assert read_content(tmp_path, f"a.txt.{suffix}", packed) == (["one", "two too"], [])


@every_format
def test_other_encodings_are_refused_within_archives_too(tmp_path, suffix):
    for encoding in ("utf-16", "utf-16-le", "utf-32-be"):
        packed = PACK[suffix]("first text\n\nsecond".encode(encoding))
        texts, reasons = read_content(tmp_path, f"a.txt.{suffix}", packed, skip=True)
        assert texts == []
        assert "expected UTF-8" in reasons[0]


@pytest.mark.parametrize(
    ("name", "pack"),
    [
        ("a.jsonl.GZ", gzip.compress),
        ("a.JSONL.Xz", lzma.compress),
        ("a.jsonl.zstd", checked_zst),
        ("a.ndjson.BZ2", bz2.compress),
        ("a.jsonl.gzip", gzip.compress),
        ("a.jsonl", gzip.compress),  # named by what is in it
        ("a.txt", zstd.compress),
        ("a.jsonl.gz", bz2.compress),
        ("a.gz", lzma.compress),
    ],
)
def test_archives_are_known_by_name_and_by_content(tmp_path, name, pack):
    assert read_content(tmp_path, name, pack(ONE + TWO)) == BOTH


def gzipped(content):
    """Without the time, which would make the names of tests differ between workers."""
    return gzip.compress(content, mtime=0)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.zip", b"PK\x03\x04"),
        ("a.tar", b""),
        ("a.tar.gz", gzipped(b"x" * 257 + b"ustar" + b"\0" * 250)),
        ("a.txt.gz", gzipped(b"x" * 257 + b"ustar" + b"\0" * 250)),
        ("a.TGZ", b""),
        ("a.jsonl.lz4", b"\x04\x22\x4d\x18"),
        ("a.jsonl", b"\x04\x22\x4d\x18text"),
        ("a.txt", b"PK\x03\x04text"),
        ("a.7z", b""),
        ("a.jsonl.gz.gz", gzipped(gzipped(ONE))),
        ("a.parquet.gz", gzipped(b"PAR1")),
        ("a.arrow", b"ARROW1"),
        ("a.csv", b"id,text\n1,first\n"),
        ("a.TSV.gz", gzipped(b"id\ttext\n1\tfirst\n")),
        ("a.txt.Z", b"text"),
        ("a.txt", b"\x1f\x9d\x90text"),
        ("a.txt", b"%PDF-1.4\n1 0 obj\n\ntext"),
        ("a.txt.gz", gzipped(b"{\\rtf1\\ansi text}")),
    ],
)
def test_other_formats_are_refused(tmp_path, name, content):
    texts, reasons = read_content(tmp_path, name, content, skip=True)
    assert texts == []
    assert ["expected text, JSON lines or Parquet" in reason for reason in reasons] == [True]


def test_zstd_frames_that_hold_nothing_and_pieces_of_others(tmp_path):
    nothing = b"\x50\x2a\x4d\x18" + (8).to_bytes(4, "little") + b"x" * 8
    last = nothing.replace(b"\x50", b"\x5f")
    packed = nothing + zstd.compress(ONE) + last + checked_zst(TWO) + nothing
    assert read_content(tmp_path, "a.jsonl.zst", packed) == BOTH


@pytest.mark.parametrize("log", [28, 31])
def test_zstd_with_a_long_window(tmp_path, log):
    made = zstd.ZstdCompressor(options={zstd.CompressionParameter.window_log: log})
    # Without a known size, the frame's header asks for the whole window.
    packed = made.compress(ONE) + made.compress(TWO) + made.flush()
    assert read_content(tmp_path, "a.jsonl.zst", packed) == BOTH


@every_format
def test_what_expands_a_thousandfold_is_read_piece_by_piece(tmp_path, suffix):
    line = b'{"text": "' + b" " * 90_000 + b'x"}\n'
    path = tmp_path / f"a.jsonl.{suffix}"
    path.write_bytes(PACK[suffix](line * 500))
    tracemalloc.start()
    texts = read_documents(str(path), Tally("SOURCE", skip=False), "text", whole_files=False)
    assert sum(len(text) == 90_001 for text in texts) == 500
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20_000_000  # of 45 million; xz holds a dictionary of 8 million
