"""What is read of a source, in which order and into which split."""

import json

import pytest

from loro_jax.errors import TrainingError
from loro_jax.text.config import DataConfig
from loro_jax.text.documents import PartReader, Position
from loro_jax.text.sources import source_parts
from tests.text.samples import BYTES, config, load_corpus, texts_of, write_lines


def read(data):
    parts, held_out = source_parts(data.source, data)
    reader = PartReader(parts, data.bad_documents == "skip", held_out)
    splits = {"train": [], "validation": []}
    for chunk in reader.chunks():
        for split, text in zip(chunk.splits, chunk.texts, strict=True):
            splits[split].append(text)
    return splits


def test_files_of_paragraphs_and_of_json_lines(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\nlines\n\n\n\n  \n\nthree", encoding="utf-8")
    write_lines(tmp_path / "b.jsonl", ["four \u2028 still four", " ", "five"])
    (tmp_path / "v.txt").write_text("held out\n\ntwo\nlines", encoding="utf-8")
    found = read(DataConfig(source=str(tmp_path / "[ab].*"), validation=str(tmp_path / "v.txt")))
    assert found["train"] == ["one", "three", "four \u2028 still four", "five"]
    assert found["validation"] == ["held out", "two\nlines"]


def test_without_validation_files_a_hash_splits_by_document(tmp_path):
    texts = [f"document {i % 900}" for i in range(1000)]  # some twice
    (tmp_path / "all.txt").write_text("\n\n".join(texts))
    data = DataConfig(source=str(tmp_path / "*.txt"))
    found = read(data)
    assert 1 <= len(found["validation"]) <= 30
    assert not set(found["train"]) & set(found["validation"])
    assert sorted(found["train"] + found["validation"]) == sorted(texts)
    assert read(data) == found


def test_the_hash_does_not_depend_on_the_other_documents(tmp_path):
    texts = [f"document {i}" for i in range(1000)]
    (tmp_path / "all.txt").write_text("\n\n".join(texts))
    (tmp_path / "half.txt").write_text("\n\n".join(texts[::-2]))
    whole, half = (read(DataConfig(source=str(tmp_path / f"{n}.txt"))) for n in ("all", "half"))
    assert set(half["validation"]) == set(whole["validation"]) & set(texts[::-2])


def test_reading_goes_on_from_every_position(tmp_path):
    """Also the account of bad documents does."""
    for name in "abc":
        lines = [json.dumps({"text": f"{name} {i}"}) for i in range(700)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join([*lines[:300], "oops", *lines[300:]]))
    data = DataConfig(source=str(tmp_path / "*.jsonl"), bad_documents="skip")
    parts, _ = source_parts(data.source, data)
    whole = PartReader(parts, skip=True)
    chunks = list(whole.chunks())
    texts = [text for chunk in chunks for text in chunk.texts]
    assert len(chunks) > 6
    for number, chunk in enumerate(chunks):
        end = Position(**json.loads(json.dumps(chunk.end._asdict())))
        reader = PartReader(parts, skip=True)
        rest = [text for chunk in reader.chunks(end) for text in chunk.texts]
        before = sum(len(chunk.texts) for chunk in chunks[: number + 1])
        assert rest == texts[before:]
        assert reader.notes() == whole.notes()
        assert reader.bad() == {
            "not a JSON object with a text in the field 'text' (config.data.text_field)": 3
        }


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none", None, "matches no file"),
        ("empty.txt", b"", "no training document"),
        ("blank.txt", b"\n\n  \n\n", "no training document"),
        ("one.txt", b"a single paragraph", "no validation document.*config.data.validation"),
        ("latin.txt", b"caf\xe9", "not UTF-8"),
        ("bad.jsonl", b'{"text": "x"}\n{"text": oops}\n', r"bad\.jsonl, line 2"),
        ("field.jsonl", b'{"content": "x"}\n', r"line 1: .* 'text'"),
        ("list.jsonl", b"[1]\n", "line 1"),
        ("half.jsonl", b'{"text": "\\ud83d alone"}\n', "line 1: not Unicode"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(TrainingError, match=message):
        load_corpus(config(str(tmp_path / name)), BYTES)


def test_a_whole_surrogate_pair_is_a_character(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "\\ud83d\\ude00 smiles"}\n')
    assert read(DataConfig(source=str(tmp_path / "a.jsonl")))["train"] == ["\U0001f600 smiles"]


def test_a_file_with_brackets_in_its_name_is_read(tmp_path):
    for name in ("part[1].txt", "part1.txt"):
        (tmp_path / name).write_text(name)
    (part,), _ = source_parts(str(tmp_path / "part[1].txt"), DataConfig())
    assert part.name == str(tmp_path / "part[1].txt")


def test_an_unprepared_tfds_dataset_says_how_to_prepare_it(tmp_path):
    with pytest.raises(TrainingError, match=r"tfds build nowhere --file_format=array_record"):
        load_corpus(config("tfds:nowhere", data={"data_dir": str(tmp_path)}), BYTES)


def test_documents_come_back_as_texts(tmp_path):
    texts = [f"number {i}" for i in range(9)]
    source = write_lines(tmp_path / "a.jsonl", texts)
    held_out = write_lines(tmp_path / "v.jsonl", ["v"])
    corpus = load_corpus(config(source, data={"validation": held_out}), BYTES)
    assert texts_of(corpus.train[0].documents) == texts
