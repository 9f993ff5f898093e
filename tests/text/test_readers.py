"""Documents of files of every format, and an account of the bad ones."""

import functools
import gzip
import json
import lzma

import pyarrow
import pyarrow.parquet
import pytest
from backports import zstd

from loro_jax.errors import TrainingError
from loro_jax.text.config import DataConfig
from loro_jax.training.config import Config
from tests.text.samples import BYTES, config, load_corpus
from tests.text.samples import read_file as read

TEXTS = ["first", "with \u2028 a separator of lines", "café\nwith two lines", "x" * 3_000_000]


def json_lines(texts, field="text"):
    rows = (json.dumps({"id": i, field: text}, ensure_ascii=False) for i, text in enumerate(texts))
    return "".join(f"{row}\n" for row in rows).encode()


def zstandard(content):
    # With a checksum, as the command line tool writes it.
    return zstd.compress(content, options={zstd.CompressionParameter.checksum_flag: 1})


@pytest.mark.parametrize(
    ("name", "pack"),
    [
        ("a.jsonl", bytes),
        ("a.json", bytes),
        ("a.jsonl.gz", gzip.compress),
        ("a.jsonl.xz", lzma.compress),
        ("a.jsonl.zst", zstandard),
        ("c4-train.00000-of-01024.json.gz", gzip.compress),
    ],
)
def test_json_lines_come_back_from_every_archive(tmp_path, name, pack):
    (tmp_path / name).write_bytes(pack(json_lines(TEXTS)))
    texts, tally = read(tmp_path / name)
    assert texts == TEXTS
    assert (tally.good, tally.report()) == (4, None)


def test_another_field_and_a_last_line_without_an_end(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(json_lines(TEXTS, "content").rstrip(b"\n"))
    assert read(tmp_path / "a.jsonl", text_field="content")[0] == TEXTS


def test_archives_of_several_members(tmp_path):
    parts = [json_lines(TEXTS[:2]), json_lines(TEXTS[2:])]
    (tmp_path / "a.jsonl.gz").write_bytes(b"".join(map(gzip.compress, parts)))
    assert read(tmp_path / "a.jsonl.gz")[0] == TEXTS


def test_tables(tmp_path):
    table = pyarrow.table({"text": [*TEXTS, None], "id": list(range(5))})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    texts, tally = read(tmp_path / "a.parquet", skip=True)
    assert texts == TEXTS
    assert tally.first.endswith("a.parquet, row 5: no text in the column 'text'")
    with pytest.raises(TrainingError, match=r"no column 'words' .* it has text, id"):
        read(tmp_path / "a.parquet", text_field="words")


def test_text_by_paragraphs_and_by_files(tmp_path):
    content = "one\n\ntwo\nlines\n\n \n\n" + "y" * 2_500_000 + "\n\nlast"
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(content.encode()))
    assert read(tmp_path / "a.txt.gz")[0] == ["one", "two\nlines", "y" * 2_500_000, "last"]
    assert read(tmp_path / "a.txt.gz", whole_files=True)[0] == [content]


def test_empty_documents_are_none(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(json_lines(["", " \n", "text"]) + b"\n \n")
    texts, tally = read(tmp_path / "a.jsonl")
    assert (texts, tally.good, tally.report()) == (["text"], 1, None)


BAD = {
    "malformed": (b'{"text": oops}', "line 501: not a JSON object with a text in the field"),
    "missing field": (b'{"url": "x"}', "line 501: not a JSON object with a text"),
    "not a text": (b'{"text": 7}', "line 501: not a JSON object with a text"),
    "no object": (b"[1]", "line 501: not a JSON object"),
    "not UTF-8": (b'{"text": "caf\xe9"}', "line 501: not UTF-8"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_lines_are_skipped_up_to_a_thousandth_and_then_stop_the_run(tmp_path, kind):
    bad, place = BAD[kind]
    path = tmp_path / "a.jsonl"
    good = json_lines(["text"] * 500)
    path.write_bytes(good + bad + b"\n" + good)
    texts, tally = read(path)
    assert len(texts) == 1000
    assert place in tally.first
    assert tally.report().startswith("config.data.source: skipped 1 of 1001 documents (1 ")
    path.write_bytes(good + bad + b"\n" + bad + b"\n" + good)
    with pytest.raises(TrainingError, match=rf"a\.jsonl, {place}.*\(2 bad of 502 documents"):
        read(path)
    assert len(read(path, skip=True)[0]) == 1000


@pytest.mark.parametrize(
    ("name", "pack"),
    [
        ("a.gz", gzip.compress),
        ("a.xz", functools.partial(lzma.compress, preset=0)),
        ("a.zst", zstandard),
    ],
)
@pytest.mark.parametrize("damage", ["truncated", "overwritten"])
def test_damaged_archives_are_named_and_what_was_read_is_kept(tmp_path, name, pack, damage):
    path = tmp_path / f"b.jsonl{name[1:]}"
    lines = json_lines([f"{i * 7919 % 10_007} and {i**3}" for i in range(50_000)])
    packed = bytearray(pack(lines))
    middle = len(packed) // 2
    if damage == "truncated":
        del packed[middle:]
    else:
        packed[middle : middle + 100] = b"\xff" * 100
    path.write_bytes(packed)
    texts, tally = read(path, skip=True)
    assert "can't be read" in " ".join([tally.first, *tally.bad])
    assert len(texts) < 50_000
    (tmp_path / "c.jsonl").write_bytes(json_lines(["text"] * 20))
    with pytest.raises(TrainingError, match=rf"b\.jsonl{name[1:]}"):
        load_corpus(config(str(tmp_path / "*.jsonl*")), BYTES)


def test_files_that_disappear_are_bad_documents(tmp_path):
    texts, tally = read(tmp_path / "gone.jsonl", skip=True)
    assert texts == []
    assert "No such file" in tally.report()
    (tmp_path / "not.parquet").write_bytes(b"not a table")
    assert "not readable as Parquet" in read(tmp_path / "not.parquet", skip=True)[1].report()


def test_enormous_documents_are_bad(tmp_path, monkeypatch):
    monkeypatch.setattr("loro_jax.text.readers.LONGEST_DOCUMENT", 1_000_000)
    (tmp_path / "a.jsonl").write_bytes(json_lines(TEXTS))
    texts, tally = read(tmp_path / "a.jsonl", skip=True)
    assert texts == TEXTS[:3]
    assert "line 4: text of more than 1,000,000 characters" in tally.first


def test_what_was_skipped_is_a_note_of_the_corpus(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(json_lines(["one", "two", "three"]) + b"oops\n")
    run = config(str(tmp_path / "a.jsonl"), data={"bad_documents": "skip"})
    assert (
        load_corpus(run, BYTES).notes[0].startswith("config.data.source: skipped 1 of 4 documents")
    )


def test_wikipedias_archive(shared_data):
    path = sorted((shared_data / "wikipedia").glob("train-*.jsonl.xz"))[0]
    texts, tally = read(path)
    assert tally.good == len(texts) > 100
    assert not tally.bad


@pytest.mark.parametrize(
    ("field", "value"), [("text_files", "lines"), ("bad_documents", "ignore"), ("shape", "ragged")]
)
def test_unknown_choices_are_named(field, value):
    with pytest.raises(TrainingError, match=rf"config.data.{field} must be .* or .* '{value}'"):
        Config(data=DataConfig(**{field: value})).validate()
