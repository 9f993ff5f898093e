"""A tensorflow-datasets corpus of C4's format, prepared here, read without TensorFlow."""

import json
import sys

import numpy as np
import pytest

from loro_jax.bench.data import prepare_tfds
from loro_jax.errors import TrainingError
from loro_jax.text.config import DataConfig
from loro_jax.text.prepare import prepare
from loro_jax.text.prepared import open_prepared
from tests.text.samples import (
    BYTES,
    assert_equal_batches,
    config,
    describe,
    load_corpus,
    take,
    texts_of,
    train_iterator,
    write_lines,
)

TEXTS = {
    "train": [f"Training document {i}, with an é" + "." * (i % 7 * 20) for i in range(130)],
    "validation": [f"Held-out document {i}." for i in range(5)],
}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("tfds"))
    prepare_tfds(folder, TEXTS)
    return folder


def tiny(data_dir, **data):
    changes = {name: data.pop(name) for name in ("batch_size", "sequence_length") if name in data}
    return config("tfds:sample/en", data={"data_dir": data_dir, **data}, **changes)


def test_documents_come_by_split_and_field(data_dir):
    corpus = load_corpus(tiny(data_dir, shape="padded", sequence_length=64), BYTES)
    assert sorted(texts_of(corpus.train[0].documents)) == sorted(TEXTS["train"])
    assert corpus.validation_tokens.shape == (5, 65)
    assert np.all(corpus.validation_mask.sum(axis=1) == len("Held-out document 0."))
    assert "tensorflow" not in sys.modules


def test_one_epoch_of_padded_documents_holds_each_once(data_dir):
    run = tiny(data_dir, shape="padded", batch_size=10, sequence_length=200)
    iterator = train_iterator(run, load_corpus(run, BYTES))
    texts = [BYTES.decode(row) for _ in range(13) for row in next(iterator)["tokens"]]
    assert sorted(texts) == sorted(TEXTS["train"])


@pytest.mark.parametrize("prefetch", [0, 3])
def test_packed_on_the_way_documents_are_whole_and_resume_within(data_dir, prefetch):
    run = tiny(data_dir, prefetch=prefetch)
    corpus = load_corpus(run, BYTES)
    assert describe(run, corpus) == "130 training documents, packed on the fly"
    iterator = train_iterator(run, corpus)
    batches = take(iterator, 40)
    position = iterator.position()
    batches += take(iterator, 60)
    fresh = train_iterator(run, corpus)
    fresh.seek(position)
    assert_equal_batches(batches[40:], take(fresh, 60))
    for row in range(4):
        stream = np.concatenate([batch["tokens"][row, :-1] for batch in batches])
        *whole, _ = BYTES.decode(np.where(stream == BYTES.eos_id, ord("|") + 3, stream)).split("|")
        assert len(whole) > 5
        assert set(whole) <= set(TEXTS["train"])
        assert len(set(whole)) == len(whole), "one epoch holds each document once"


def test_four_processes_share_the_packed_batches_of_one(data_dir):
    run = tiny(data_dir, batch_size=8)
    corpus = load_corpus(run, BYTES)
    whole = take(train_iterator(run, corpus), 20)
    rows = [range(0, 3), [3], [4, 6], [5, 7]]  # of four processes
    shares = [take(train_iterator(run, corpus, mine), 20) for mine in rows]
    for step, batch in enumerate(whole):
        union = np.concatenate([share[step]["tokens"] for share in shares])
        union = union[np.argsort(np.concatenate(rows))]
        np.testing.assert_array_equal(union, batch["tokens"])


def test_other_validation_text_may_be_named(data_dir, tmp_path):
    held_out = write_lines(tmp_path / "v.jsonl", ["another text"])
    corpus = load_corpus(tiny(data_dir, validation=held_out), BYTES)
    assert "".join(map(BYTES.decode, corpus.validation_tokens)) == "another t" + "text"


def test_without_a_validation_split_every_hundredth_record_validates(tmp_path):
    prepare_tfds(str(tmp_path), {"train": TEXTS["train"]})
    corpus = load_corpus(tiny(str(tmp_path), shape="padded", sequence_length=200), BYTES)
    train = texts_of(corpus.train[0].documents)
    held_out = [BYTES.decode(row) for row in corpus.validation_tokens]
    assert len(held_out) == 2
    assert sorted(train + held_out) == sorted(TEXTS["train"])


def test_prepared_shards_hold_the_same(data_dir, tmp_path):
    out = str(tmp_path / "out")
    data = DataConfig(source="tfds:sample/en", data_dir=data_dir, tokenizer="bytes")
    prepare(data, BYTES, out, shard_tokens=1000)
    prepared = open_prepared(out, BYTES, skip=False)
    corpus = load_corpus(tiny(data_dir), BYTES)
    assert texts_of(prepared.train) == texts_of(corpus.train[0].documents)
    assert sorted(texts_of(prepared.validation)) == TEXTS["validation"]


def test_mixed_with_shards_documents_are_drawn_by_weight(data_dir, tmp_path):
    source = write_lines(tmp_path / "a.jsonl", [f"@{i}" * 9 for i in range(200)])
    prepare(DataConfig(source=source, tokenizer="bytes"), BYTES, str(tmp_path / "out"))
    mixed = config(
        f"tfds:sample/en,1;{tmp_path / 'out'},3", data={"data_dir": data_dir, "shape": "padded"}
    )
    batches = take(train_iterator(mixed, load_corpus(mixed, BYTES)), 40)
    firsts = [BYTES.decode(row)[0] for batch in batches for row in batch["tokens"]]
    assert (firsts.count("T"), firsts.count("@")) == (40, 120)


@pytest.mark.parametrize("what", ["not UTF-8", "gone", "a number", "UTF-16"])
def test_bad_records_are_counted_and_end_the_run(data_dir, monkeypatch, what):
    class Records(list):
        def __getitem__(self, index):
            if index == 3 and what == "gone":
                raise OSError("no such shard")
            others = {"not UTF-8": b"caf\xe9", "a number": 5, "UTF-16": b"t\0e\0"}
            return {"text": others[what] if index == 3 else "\ufefftext".encode()}

    from loro_jax.text.readers import Tally
    from loro_jax.text.records import TextField
    from loro_jax.text.tfds_source import TfdsTexts

    def texts(skip):
        tally = Tally("config.data.source", skip)
        return TfdsTexts(
            Records(range(9)), range(9), TextField("text"), "tfds:tiny, train", tally
        ), tally

    found, tally = texts(skip=True)
    assert [found[i] for i in range(9)] == ["text"] * 3 + [""] + ["text"] * 5
    assert tally.bad.total() == 1
    found, tally = texts(skip=False)
    assert found[3] == "", "one in a thousand may be bad"
    with pytest.raises(TrainingError, match=r"tfds:tiny, train, record 3: "):
        _ = found[3]


def test_a_field_that_is_not_there_is_named(data_dir):
    with pytest.raises(TrainingError, match=r"no field 'body'.*text"):
        load_corpus(tiny(data_dir, text_field="body"), BYTES)


def test_documents_of_c4(shared_data, tmp_path):
    """Real ones, in the dataset's own format, through tfds, shards and the paper's tokenizer."""
    from loro_jax.text.tokenizers.tokenizer import load_tokenizer

    splits = {}
    for split, count in (("train", 300), ("validation", 50)):
        path = shared_data / "c4-sample" / f"c4-en.{split}.jsonl"
        lines = path.read_text(encoding="utf-8").split("\n")[:count]
        splits[split] = [json.loads(line)["text"] for line in lines]
    prepare_tfds(str(tmp_path), splits)
    t5 = load_tokenizer(str(shared_data / "tokenizers" / "t5_spiece.model"))
    run = tiny(str(tmp_path), batch_size=10, sequence_length=256, shape="padded")
    corpus = load_corpus(run, t5)
    assert corpus.validation_tokens.shape == (50, 257)
    seen = np.concatenate([batch["tokens"] for batch in take(train_iterator(run, corpus), 30)])
    wanted = [[*ids, t5.eos_id][:257] for ids in t5.encode(splits["train"])]
    wanted = sorted([*ids, *[t5.pad_id] * (257 - len(ids))] for ids in wanted)
    assert sorted(seen.tolist()) == wanted
