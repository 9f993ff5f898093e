"""Ids are those of transformers' RoBERTa, and batches depend on the seed and the step alone."""

import random

import numpy as np
import pytest

from loro_jax.errors import TrainingError
from loro_jax.glue import TASKS, GlueConfig, PairTokenizer, TrainBatches, load_data
from loro_jax.glue.batches import validation_batches
from tests.glue.samples import NOUNS, write_jsonl, write_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def data_of(folder, tmp_path, name="rte", count=21, max_length=512):
    task = TASKS[name]
    write_jsonl(tmp_path / task.title, task, count)
    config = GlueConfig(source=str(tmp_path))
    return load_data(config, task, PairTokenizer(str(folder)), max_length)


def some_texts():
    rng = random.Random(0)
    lengths = [(0, 3), (3, 0), (30, 2), (2, 30), (30, 30), (11, 14), (4, 4), (9, 31)]
    for one, two in lengths:
        yield " ".join(rng.choices(NOUNS, k=one)), " ".join(rng.choices(NOUNS, k=two))


@pytest.mark.parametrize("as_json", [True, False], ids=["tokenizer.json", "vocab.json"])
def test_ids_are_those_of_transformers(as_json, tmp_path):
    transformers = pytest.importorskip("transformers", reason="the counterpart needs transformers")
    write_tokenizer(tmp_path, as_json)
    ours = PairTokenizer(str(tmp_path))
    write_tokenizer(tmp_path / "theirs", as_json=False)
    theirs = transformers.RobertaTokenizer.from_pretrained(tmp_path / "theirs")
    assert ours.vocab_size == len(theirs)
    assert ours.pad_id == theirs.pad_token_id == 1
    pairs = list(some_texts())
    for rows in (pairs, [(one,) for one, _ in pairs]):
        for length in (20, 21, 512):
            found = ours.encode(rows, length)
            assert len(found) == len(rows)
            # As whole columns: alone, an empty second text would count as none.
            columns = [list(column) for column in zip(*rows, strict=True)]
            encoded = theirs(*columns, truncation=True, max_length=length)["input_ids"]
            for i, wanted in enumerate(encoded):
                assert found.ids[found.starts[i] : found.starts[i + 1]].tolist() == wanted


def test_a_pair_has_two_separators(folder):
    tokenizer = PairTokenizer(str(folder / "tokenizer.json"))
    first, last = 0, 2
    row = tokenizer.encode([("cat", "dog")], 64).ids.tolist()
    one, two = (tokenizer.encode([(word,)], 64).ids.tolist() for word in ("cat", "dog"))
    assert row == [first, *one[1:-1], last, last, *two[1:-1], last]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"tokenizer\.json can't be read \(No such file"),
        ("{}", r"is no tokenizer\.json"),
    ],
)
def test_unusable_tokenizers(content, message, tmp_path):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(TrainingError, match=message):
        PairTokenizer(str(tmp_path))


def test_a_tokenizer_of_another_model(tmp_path):
    from loro_jax.text.tokenizers.tokenizer import load_tokenizer

    for name, content in load_tokenizer("bytes").files().items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(TrainingError, match="has no <s>; expected RoBERTa's tokenizer"):
        PairTokenizer(str(tmp_path))


def test_each_row_comes_once_per_pass_whatever_the_batch(folder, tmp_path):
    data = data_of(folder, tmp_path)
    iterator = TrainBatches(data, 8, seed=3)
    assert iterator.per_epoch == 3
    passes = []
    for _ in range(2):
        rows = [next(iterator) for _ in range(3)]
        assert {batch.ids.shape for batch in rows} == {(8, data.lengths[0])}
        assert [int(batch.weights.sum()) for batch in rows] == [8, 8, 5]
        kept = np.concatenate([batch.ids[batch.weights > 0] for batch in rows])
        passes.append(kept)
        assert len(np.unique(kept, axis=0)) == len(np.unique(data_ids(data), axis=0))
        np.testing.assert_array_equal(np.sort(kept, 0), np.sort(data_ids(data), 0))
    assert not np.array_equal(*passes)
    other = TrainBatches(data, 8, seed=4)
    assert not np.array_equal(next(other).ids, passes[0][:8])


def data_ids(data):
    rows = data.train.rows
    return rows.padded(np.arange(len(rows)), data.lengths[-1], data.pad_id)


def test_a_position_and_parts_of_a_batch(folder, tmp_path):
    data = data_of(folder, tmp_path)
    whole = TrainBatches(data, 8, seed=0)
    for _ in range(4):
        next(whole)
    position = whole.position()
    wanted = next(whole)
    parts = [TrainBatches(data, 8, seed=0, mine=mine) for mine in ([0, 1, 2, 3], [4, 5, 6, 7])]
    for part in parts:
        part.seek(position)
    found = [next(part) for part in parts]
    for name in wanted._fields:
        joined = np.concatenate([getattr(one, name) for one in found])
        np.testing.assert_array_equal(joined, getattr(wanted, name), err_msg=name)
    # Numbers tell rows of all batches apart.
    assert wanted.numbers.tolist() == list(range(32, 40))


def test_masks_and_labels(folder, tmp_path):
    data = data_of(folder, tmp_path, "mnli")
    batch = next(TrainBatches(data, 8, seed=0))
    np.testing.assert_array_equal(batch.mask, batch.ids != data.pad_id)
    assert set(batch.labels.tolist()) <= {0, 1, 2}
    assert [split.name for split in data.validation] == [
        "validation_matched",
        "validation_mismatched",
    ]
    batches = list(validation_batches(data, data.validation[1], 8))
    weights = np.concatenate([batch.weights for batch in batches])
    labels = np.concatenate([batch.labels for batch in batches])[weights > 0]
    np.testing.assert_array_equal(labels, data.validation[1].labels)


def test_lengths_are_few(folder, tmp_path):
    task = TASKS["rte"]
    write_jsonl(tmp_path / "RTE", task, 40)
    text = (tmp_path / "RTE" / "train.jsonl").read_text().replace("cat", "cat cat cat cat cat cat")
    (tmp_path / "RTE" / "train.jsonl").write_text(text)
    config = GlueConfig(source=str(tmp_path), buckets=3)
    data = load_data(config, task, PairTokenizer(str(folder)), 512)
    assert len(data.lengths) == 3
    assert all(length % 8 == 0 for length in data.lengths)
    batches = [next(iterator) for iterator in [TrainBatches(data, 1, 0)] for _ in range(40)]
    assert {batch.ids.shape[1] for batch in batches} <= set(data.lengths)
    assert len({batch.ids.shape[1] for batch in batches}) > 1
    for batch in batches:
        used = int(batch.mask.sum())
        assert batch.ids.shape[1] == min(one for one in data.lengths if one >= used)


def test_the_fingerprint_is_that_of_the_rows(folder, tmp_path):
    one, again = data_of(folder, tmp_path), data_of(folder, tmp_path)
    assert one.fingerprint == again.fingerprint
    changed = data_of(folder, tmp_path, count=22)
    assert changed.fingerprint != one.fingerprint
    cut = data_of(folder, tmp_path, max_length=8)
    assert cut.lengths == (8,)
