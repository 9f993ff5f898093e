import dataclasses
import json

import numpy as np
import pytest

from loro_jax.training.config import Config, DataConfig
from loro_jax.training.data import (
    to_batch,
    tokenise,
    train_iterator,
    validation_batches,
)
from loro_jax.training.documents import Corpus, load_corpus
from loro_jax.training.errors import TrainingError
from loro_jax.training.tokenizer import load_tokenizer
from models import LlamaConfig

BYTES = load_tokenizer("bytes")


def config(**changes):
    base = Config(
        batch_size=4,
        sequence_length=8,
        model=LlamaConfig(vocab_size=300),
        data=DataConfig(tokenizer="bytes"),
    )
    return dataclasses.replace(base, **changes)


def corpus(train, validation=("abc",)):
    return Corpus(list(train), list(validation), in_memory=True)


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def test_the_embedded_corpus_is_split_by_book():
    found = load_corpus(DataConfig())
    assert len(found.train) > 5_000
    assert len(found.validation) > 500
    assert not set(found.train[:1000]) & set(found.validation)
    assert "\n\n" not in "".join(found.train[:100])


def test_packed_sequences_are_the_stream_in_another_order():
    """Every epoch holds windows of the stream, each place once, at an offset of its own."""
    rng = np.random.default_rng(0)
    texts = [bytes(rng.integers(97, 123, size=40).tolist()).decode() for _ in range(6)]
    data = tokenise(config(), corpus(texts), BYTES)
    stream = data.train_stream
    assert len(stream) == 6 * 41
    epoch_starts = []
    for epoch in range(2):
        starts = []
        for i in range(data.sequences_per_epoch):
            row = data.train[epoch * data.sequences_per_epoch + i]
            places = [
                p
                for p in range(len(stream) - 8)
                if np.array_equal(stream[p : p + 9], row["tokens"])
            ]
            starts.append(places)
            assert row["mask"].tolist() == [1.0] * 8
        epoch_starts.append(starts)
    firsts = [sorted(min(p) for p in starts) for starts in epoch_starts]
    assert epoch_starts[0] != epoch_starts[1]
    for starts in firsts:
        assert len(set(starts)) > 20


def test_every_token_is_predicted_at_most_once_in_an_epoch():
    rng = np.random.default_rng(0)
    text = bytes(rng.integers(97, 123, size=2_000).tolist()).decode()
    data = tokenise(config(), corpus([text]), BYTES)
    seen = np.zeros(len(data.train_stream), int)
    windows = np.lib.stride_tricks.sliding_window_view(data.train_stream, 9)
    for i in range(data.sequences_per_epoch):
        (start,) = np.flatnonzero((windows == data.train[i]["tokens"]).all(axis=1))
        seen[start + 1 : start + 9] += 1
    assert seen.max() == 1
    assert seen.sum() >= len(data.train_stream) - 1 - 2 * 8


def test_the_order_is_a_function_of_the_seed():
    texts = [f"document number {i}" for i in range(50)]
    first = take(train_iterator(config(), tokenise(config(), corpus(texts), BYTES)), 20)
    again = take(train_iterator(config(), tokenise(config(), corpus(texts), BYTES)), 20)
    other = config(seed=1)
    third = take(train_iterator(other, tokenise(other, corpus(texts), BYTES)), 20)
    for one, two in zip(first, again, strict=True):
        np.testing.assert_array_equal(one["tokens"], two["tokens"])
    assert any(
        not np.array_equal(a["tokens"], b["tokens"]) for a, b in zip(first, third, strict=True)
    )


@pytest.mark.parametrize("shape", ["packed", "padded"])
@pytest.mark.parametrize("prefetch", [0, 4])
def test_the_iterators_state_restores_the_next_batch(shape, prefetch):
    texts = [f"document number {i}" for i in range(50)]
    run = config(data=DataConfig(tokenizer="bytes", shape=shape, prefetch=prefetch))
    data = tokenise(run, corpus(texts), BYTES)
    iterator = train_iterator(run, data)
    take(iterator, 7)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = take(iterator, 5)
    fresh = train_iterator(run, data)
    fresh.set_state(state)
    for one, two in zip(expected, take(fresh, 5), strict=True):
        np.testing.assert_array_equal(one["tokens"], two["tokens"])
        np.testing.assert_array_equal(one["mask"], two["mask"])


def test_padded_documents_are_truncated_or_masked():
    run = config(data=DataConfig(tokenizer="bytes", shape="padded"))
    data = tokenise(run, corpus(["abc"], ["abc", "a much longer text"]), BYTES)
    batch = to_batch(data.validation_tokens, data.validation_mask)
    a, b, c = (ord(x) + 3 for x in "abc")
    assert batch.inputs[0].tolist() == [a, b, c, 1, 0, 0, 0, 0]
    assert batch.targets[0].tolist() == [b, c, 1, 0, 0, 0, 0, 0]
    assert batch.mask[0].tolist() == [1, 1, 1, 0, 0, 0, 0, 0]
    assert batch.mask[1].tolist() == [1] * 8
    assert BYTES.decode(data.validation_tokens[1]) == "a much lo"


def test_validation_predicts_every_token_once_in_equal_batches():
    data = tokenise(config(), corpus(["x" * 100], ["abcdefghij" * 5, "end"]), BYTES)
    batches = validation_batches(data, 4)
    assert {batch.inputs.shape for batch in batches} == {(4, 8)}
    mask = np.concatenate([batch.mask for batch in batches]).ravel()
    targets = np.concatenate([batch.targets for batch in batches]).ravel()
    text = BYTES.decode(targets[mask > 0])
    assert text == "bcdefghij" + "abcdefghij" * 4 + "end"
    assert mask.sum() == 50 + 1 + 3 + 1 - 1


def test_the_validation_set_can_be_cut_short():
    run = config(data=DataConfig(tokenizer="bytes", max_eval_sequences=3))
    data = tokenise(run, corpus(["x" * 100], ["y" * 200]), BYTES)
    assert data.validation_tokens.shape == (3, 9)


def test_files_of_paragraphs_and_of_json_lines(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\nlines\n\n\n\n  \n\nthree", encoding="utf-8")
    rows = [{"text": "four \u2028 still four"}, {"text": " "}, {"text": "five", "url": "x"}]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "b.jsonl").write_text(lines + "\n", encoding="utf-8")
    (tmp_path / "v.txt").write_text("held out\n\ntwo\nlines", encoding="utf-8")
    found = load_corpus(
        DataConfig(source=str(tmp_path / "[ab].*"), validation=str(tmp_path / "v.txt"))
    )
    assert found.train == ["one", "three", "four \u2028 still four", "five"]
    assert found.validation == ["held out", "two\nlines"]


def test_without_validation_files_a_hash_splits_by_document(tmp_path):
    texts = [f"document {i % 900}" for i in range(1000)]  # some twice
    (tmp_path / "all.txt").write_text("\n\n".join(texts))
    found = load_corpus(DataConfig(source=str(tmp_path / "*.txt")))
    assert 1 <= len(found.validation) <= 30
    assert not set(found.train) & set(found.validation)
    assert len(found.train) + len(found.validation) == 1000
    again = load_corpus(DataConfig(source=str(tmp_path / "*.txt")))
    assert again.validation == found.validation


def test_c4_files(shared_data):
    found = load_corpus(
        DataConfig(
            source=str(shared_data / "c4-sample" / "c4-en.train.jsonl"),
            validation=str(shared_data / "c4-sample" / "c4-en.validation.jsonl"),
        )
    )
    assert (len(found.train), len(found.validation)) == (1000, 200)


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
    ],
)
def test_bad_files_are_named(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(TrainingError, match=message):
        load_corpus(DataConfig(source=str(tmp_path / name)))


def test_a_corpus_shorter_than_a_sequence_is_named():
    with pytest.raises(TrainingError, match="5 training tokens, fewer than one sequence"):
        tokenise(config(), corpus(["abcd"]), BYTES)


def test_a_vocabulary_larger_than_the_models_is_named():
    with pytest.raises(TrainingError, match=r"vocab_size = 100 .* 259 ids"):
        tokenise(config(model=LlamaConfig(vocab_size=100)), corpus(["x" * 99]), BYTES)


def test_an_unprepared_tfds_dataset_says_how_to_prepare_it(tmp_path):
    with pytest.raises(TrainingError, match=r"tfds build nowhere --file_format=array_record"):
        load_corpus(DataConfig(source="tfds:nowhere", data_dir=str(tmp_path)))
