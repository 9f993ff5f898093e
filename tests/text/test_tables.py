"""Parquet: columns of every kind, and what of a damaged table can still be read."""

import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from loro_jax.errors import TrainingError
from tests.text.samples import random_text, read_file

TEXTS = ["first", "with \u2028", "café", None, "", "x" * 300]
READ = ["first", "with \u2028", "café", "x" * 300]
BYTES = [None if text is None else text.encode() for text in TEXTS]


def table(folder, column, name="a.parquet", **options):
    if not isinstance(column, pa.Table):
        column = pa.table({"id": range(len(column)), "text": column})
    pq.write_table(column, folder / name, **options)
    return folder / name


COLUMNS = {
    "string": pa.array(TEXTS),
    "large_string": pa.array(TEXTS, pa.large_string()),
    "string_view": pa.array(TEXTS, pa.string_view()),
    "binary": pa.array(BYTES),
    "large_binary": pa.array(BYTES, pa.large_binary()),
    "binary_view": pa.array(BYTES, pa.binary_view()),
    "dictionary": pa.array(TEXTS).dictionary_encode(),
    "dictionary of bytes": pa.array(BYTES).dictionary_encode(),
    "dictionary of large strings": pa.array(TEXTS, pa.large_string()).dictionary_encode(),
}


@pytest.mark.parametrize("kind", COLUMNS)
@pytest.mark.parametrize("size", [2, 100])
def test_strings_and_bytes_of_every_kind_are_read(tmp_path, kind, size):
    try:
        path = table(tmp_path, COLUMNS[kind], row_group_size=size)
    except pa.ArrowNotImplementedError:
        pytest.skip("this pyarrow does not write them")
    texts, tally = read_file(path, skip=True)
    assert texts == READ
    assert tally.first.endswith("row 4: no text in the column 'text'")
    assert tally.bad.total() == 1


@pytest.mark.parametrize("name", ["A.PARQUET", "a.pq", "a.txt", "data"])
def test_tables_are_known_by_their_ends(tmp_path, name):
    assert read_file(table(tmp_path, pa.array(READ), name))[0] == READ


def test_bytes_that_are_no_utf_8_are_bad_documents(tmp_path):
    column = [b"\xef\xbb\xbfmarked", "two words".encode("utf-16-le"), b"caf\xe9", b"good"]
    texts, tally = read_file(table(tmp_path, pa.array(column)), skip=True)
    assert texts == ["marked", "good"]
    assert tally.bad.total() == 2
    assert "row 2: not UTF-8" in tally.first


def test_byte_order_marks_leave_no_trace_in_strings(tmp_path):
    column = pa.array(["\ufeffmarked", "a\ufeffb", "\ufeff", "\ufeff\ufefftwice"])
    assert read_file(table(tmp_path, column))[0] == ["marked", "a\ufeffb", "twice"]


def unchecked(kind, offsets):
    """Strings of two bytes, the second of which is not UTF-8."""
    ends = pa.array(range(0, 2 * 5, 2), offsets).buffers()[1]
    return pa.Array.from_buffers(kind, 4, [None, ends, pa.py_buffer(b"ab\xff\xfecdef")])


@pytest.mark.parametrize(
    "column",
    [unchecked(pa.string(), pa.int32()), unchecked(pa.large_string(), pa.int64())],
    ids=["string", "large_string"],
)
@pytest.mark.parametrize("stored", [True, False])
def test_strings_that_are_no_utf_8_are_bad_documents(tmp_path, column, stored):
    path = table(tmp_path, column, store_schema=stored)
    texts, tally = read_file(path, skip=True)
    assert texts == ["ab", "cd", "ef"]
    assert tally.first == f"{path}, row 2: not UTF-8"
    with pytest.raises(TrainingError, match="row 2: not UTF-8"):
        read_file(path)


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (pa.array([1, 2]), "holds int64; expected strings"),
        (pa.array([["a"], ["b"]]), "holds list<.*>; expected strings"),
        (pa.array([{"a": "x"}]), "holds struct<.*>; expected strings"),
        (pa.table([["a"], ["b"]], names=["text", "text"]), "has several columns 'text'"),
        (pa.table({"text.a": ["x"]}), "has no column 'text'"),
    ],
)
def test_other_columns_are_named(tmp_path, column, message):
    with pytest.raises(TrainingError, match=message):
        read_file(table(tmp_path, column), skip=True)


def test_columns_with_dots_in_their_names_are_told_apart(tmp_path):
    columns = pa.table({"text.foo": ["wrong"], "text": ["right"], "a.b": ["other"]})
    path = table(tmp_path, columns)
    assert read_file(path)[0] == ["right"]
    assert read_file(path, text_field="a.b")[0] == ["other"]


def test_row_groups_without_rows_and_columns_without_values(tmp_path):
    with pq.ParquetWriter(tmp_path / "a.parquet", pa.schema([("text", pa.string())])) as writer:
        for rows in ([], ["a"], [], ["b", "c"], []):
            writer.write_table(pa.table({"text": pa.array(rows, pa.string())}))
    assert read_file(tmp_path / "a.parquet")[0] == ["a", "b", "c"]
    texts, tally = read_file(table(tmp_path, pa.nulls(3)), skip=True)
    assert (texts, tally.bad.total()) == ([], 3)


def damaged(folder, **options):
    """A table of 3,000 texts, in the second of whose row groups something is overwritten."""
    rng = np.random.default_rng(0)
    texts = [random_text(rng, 200) for _ in range(3000)]
    path = table(
        folder,
        pa.array(texts),
        row_group_size=1000,
        data_page_size=8192,
        write_batch_size=40,
        use_dictionary=False,
        **options,
    )
    column = pq.ParquetFile(path).metadata.row_group(1).column(1)
    content = bytearray(path.read_bytes())
    middle = column.data_page_offset + column.total_compressed_size // 2
    content[middle : middle + 64] = b"\xff" * 64
    path.write_bytes(content)
    return path, texts


@pytest.mark.parametrize("codec", ["zstd", "snappy", "gzip", "lz4", "brotli"])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_damaged_pages_cost_the_rest_of_their_row_group_alone(tmp_path, codec, version):
    path, texts = damaged(
        tmp_path, compression=codec, data_page_version=version, write_page_checksum=True
    )
    found, tally = read_file(path, skip=True)
    lost = tally.bad.total()
    assert 450 < lost < 600  # half of the group, and up to a page
    assert found == texts[: 2000 - lost] + texts[2000:]
    assert tally.first.startswith(f"{path}, row {2000 - lost + 1}: can't be read (")
    with pytest.raises(TrainingError, match=rf"row {2000 - lost + 1}: can't be read"):
        read_file(path)
    assert read_file(path, skip=True)[0] == found  # so that a resumed reading finds its place


@pytest.mark.parametrize("damage", ["nothing", "no footer", "footer"])
def test_unreadable_tables_are_bad_documents(tmp_path, damage):
    path = table(tmp_path, pa.array(READ))
    content = path.read_bytes()
    content = {
        "nothing": b"",
        "no footer": content[:-50],
        "footer": content[:-150] + b"\xff" * 100 + content[-50:],
    }[damage]
    path.write_bytes(content)
    texts, tally = read_file(path, skip=True)
    assert texts == []
    assert "not readable as Parquet" in tally.first
    with pytest.raises(TrainingError, match="not readable as Parquet"):
        read_file(path)


PEAK = """
import resource, sys
import pyarrow.parquet
from loro_jax.text.readers import Tally, read_documents
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
texts = read_documents(sys.argv[1], Tally("SOURCE", False), "text", False)
count = sum(len(text) == 100_000 for text in texts)
print(count, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1000)
"""


def test_a_table_needs_no_more_memory_than_a_few_row_groups(tmp_path):
    """All of it, and so its first document; a table as a whole would take 100 MB and more."""
    rng = np.random.default_rng(0)
    rows = [random_text(rng, 100_000) for _ in range(50)]
    with pq.ParquetWriter(tmp_path / "a.parquet", pa.schema([("text", pa.string())])) as writer:
        for _ in range(20):  # row groups of 5 MB
            rng.shuffle(rows)
            writer.write_table(pa.table({"text": rows}), row_group_size=50)
    ran = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path / "a.parquet")],
        capture_output=True,
        text=True,
        check=True,
    )
    count, megabytes = map(int, ran.stdout.split())
    assert count == 1000
    assert megabytes < 70
