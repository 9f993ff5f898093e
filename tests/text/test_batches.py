import numpy as np
import pytest

from loro_jax.errors import TrainingError
from loro_jax.text.batches import TrainBatches
from loro_jax.text.packing import PackedRows
from loro_jax.text.shards import TokenShards, make_shard
from loro_jax.training.batch import to_batch, validation_batches
from tests.text.samples import (
    BYTES,
    assert_equal_batches,
    config,
    describe,
    load_corpus,
    random_text,
    take,
    train_iterator,
    with_corpus,
    write_lines,
)

DOCUMENTS = [f"document number {i}" for i in range(50)]


def stream_of(texts):
    return np.concatenate([[*ids, BYTES.eos_id] for ids in BYTES.encode(texts)])


def test_packed_sequences_are_the_stream_in_another_order(tmp_path):
    """Every epoch holds windows of the stream, each place once, at an offset of its own."""
    rng = np.random.default_rng(0)
    texts = [random_text(rng, 40) for _ in range(6)]
    run, corpus = with_corpus(tmp_path, texts, batch_size=1)
    stream = stream_of(texts)
    np.testing.assert_array_equal(corpus.train_stream, stream)
    windows = np.lib.stride_tricks.sliding_window_view(stream, 9)
    iterator = train_iterator(run, corpus)
    epochs = []
    for _ in range(2):
        starts = []
        for batch in take(iterator, 29):
            (start,) = np.flatnonzero((windows == batch["tokens"][0]).all(axis=1))
            starts.append(start)
            assert batch["mask"].tolist() == [[1.0] * 8]
        assert np.all(np.diff(sorted(starts)) == 8)
        epochs.append(starts)
    assert epochs[0] != epochs[1]
    assert describe(run, corpus) == "29 training sequences"


def test_every_token_is_predicted_at_most_once_in_an_epoch():
    rng = np.random.default_rng(0)
    stream = rng.integers(3, 259, size=2_000)
    rows = PackedRows(TokenShards([make_shard([stream], "u2", "a")]), length=8, seed=0)
    seen = np.zeros(len(stream), int)
    windows = np.lib.stride_tricks.sliding_window_view(stream, 9)
    for place in range(len(rows)):
        (start,) = np.flatnonzero((windows == rows.row(3, place).tokens).all(axis=1))
        seen[start + 1 : start + 9] += 1
    assert seen.max() == 1
    assert seen.sum() >= len(stream) - 1 - 2 * 8


def test_the_order_is_a_function_of_the_seed(tmp_path):
    run, corpus = with_corpus(tmp_path, DOCUMENTS)
    first = take(train_iterator(run, corpus), 20)
    again = take(train_iterator(run, load_corpus(run, BYTES)), 20)
    assert_equal_batches(first, again)
    other, corpus = with_corpus(tmp_path, DOCUMENTS, seed=1)
    third = take(train_iterator(other, corpus), 20)
    assert any(
        not np.array_equal(a["tokens"], b["tokens"]) for a, b in zip(first, third, strict=True)
    )


@pytest.mark.parametrize("shape", ["packed", "padded"])
@pytest.mark.parametrize("prefetch", [0, 4])
def test_the_iterators_state_restores_the_next_batch(tmp_path, shape, prefetch):
    data = {"shape": shape, "prefetch": prefetch}
    run, corpus = with_corpus(tmp_path, DOCUMENTS, data=data)
    iterator = train_iterator(run, corpus)
    take(iterator, 7)
    position = iterator.position()
    expected = take(iterator, 5)
    fresh = train_iterator(run, corpus)
    fresh.seek(position)
    assert_equal_batches(expected, take(fresh, 5))


@pytest.mark.parametrize("shape", ["packed", "padded"])
def test_four_processes_share_the_batches_of_one(tmp_path, shape):
    run, corpus = with_corpus(tmp_path, DOCUMENTS, data={"shape": shape}, batch_size=8)
    whole = take(train_iterator(run, corpus), 10)
    rows = [range(0, 3), [3], [4, 6], [5, 7]]  # of four processes
    shares = [take(train_iterator(run, corpus, mine), 10) for mine in rows]
    for step, batch in enumerate(whole):
        for name in ("tokens", "mask"):
            union = np.concatenate([share[step][name] for share in shares])
            union = union[np.argsort(np.concatenate(rows))]
            np.testing.assert_array_equal(union, batch[name])


def test_sources_are_mixed_by_their_weights(tmp_path):
    letters = {"a": 40, "b": 400, "c": 4000}
    paths = [
        write_lines(tmp_path / f"{letter}.jsonl", [letter * count, letter * 50])
        for letter, count in letters.items()
    ]
    held_out = write_lines(tmp_path / "v.jsonl", ["xyz"])
    source = f"{paths[0]},2; {paths[1]},1;{paths[2]},1"
    run = config(source, data={"validation": held_out}, batch_size=8)
    corpus = load_corpus(run, BYTES)
    assert corpus.train_stream is None
    batches = take(train_iterator(run, corpus), 50)
    drawn = [BYTES.decode(row)[0] for batch in batches for row in batch["tokens"]]
    assert [drawn.count(letter) for letter in letters] == [200, 100, 100]
    assert_equal_batches(batches, take(train_iterator(run, load_corpus(run, BYTES)), 50))


@pytest.mark.parametrize("source", ["a.txt,1;b.txt", "a.txt,1;b.txt,-2", "a.txt,1;,2", "a,x;b,1"])
def test_weights_that_are_none_are_named(source):
    with pytest.raises(TrainingError, match=r"is not SOURCE,WEIGHT"):
        load_corpus(config(source), BYTES)


def test_padded_documents_are_truncated_or_masked(tmp_path):
    texts = ["abc", "a much longer text"]
    _, corpus = with_corpus(tmp_path, ["x"], texts, data={"shape": "padded"})
    batch = to_batch(corpus.validation_tokens, corpus.validation_mask)
    a, b, c = (ord(x) + 3 for x in "abc")
    assert batch.inputs[0].tolist() == [a, b, c, 1, 0, 0, 0, 0]
    assert batch.targets[0].tolist() == [b, c, 1, 0, 0, 0, 0, 0]
    assert batch.mask[0].tolist() == [1, 1, 1, 0, 0, 0, 0, 0]
    assert batch.mask[1].tolist() == [1] * 8
    assert BYTES.decode(corpus.validation_tokens[1]) == "a much lo"


def test_validation_predicts_every_token_once_in_equal_batches(tmp_path):
    _, corpus = with_corpus(tmp_path, ["x" * 100], ["abcdefghij" * 5, "end"])
    batches = validation_batches(corpus, 4)
    assert {batch.inputs.shape for batch in batches} == {(4, 8)}
    mask = np.concatenate([batch.mask for batch in batches]).ravel()
    targets = np.concatenate([batch.targets for batch in batches]).ravel()
    assert BYTES.decode(targets[mask > 0]) == "bcdefghij" + "abcdefghij" * 4 + "end"
    assert mask.sum() == 50 + 1 + 3 + 1 - 1


def test_the_validation_set_can_be_cut_short(tmp_path):
    _, corpus = with_corpus(tmp_path, ["x" * 100], ["y" * 200], data={"max_eval_sequences": 3})
    assert corpus.validation_tokens.shape == (3, 9)


def test_a_limited_validation_set_has_equal_parts_of_each_source(tmp_path):
    paths = [
        write_lines(tmp_path / f"{a}.jsonl", [f"{a}{i}" * 99 for i in range(500)]) for a in "pq"
    ]
    run = config(f"{paths[0]},1;{paths[1]},1", data={"max_eval_sequences": 6})
    rows = load_corpus(run, BYTES).validation_tokens
    assert [BYTES.decode(row)[:9].count("p") > 1 for row in rows] == [True] * 3 + [False] * 3


def test_a_corpus_shorter_than_a_sequence_is_named(tmp_path):
    with pytest.raises(TrainingError, match="5 training tokens, fewer than one sequence"):
        train_iterator(*with_corpus(tmp_path, ["abcd"]))


def test_ids_outside_the_vocabulary_end_the_run(tmp_path):
    run, corpus = with_corpus(tmp_path, DOCUMENTS, data={"prefetch": 0})
    with pytest.raises(TrainingError, match=r"token id \d+ in .*jsonl.* outside the vocabulary"):
        next(train_iterator(run, corpus._replace(vocab_size=60)))


def test_the_fingerprint_changes_with_the_text(tmp_path):
    fingerprints = {
        with_corpus(tmp_path, *texts)[1].fingerprint
        for texts in ((["one"],), (["two"],), (["one"], ["other"]))
    }
    assert len(fingerprints) == 3


def test_the_embedded_corpus_is_split_by_book():
    corpus = load_corpus(config(data={"tokenizer": "embedded"}), BYTES)
    documents = corpus.train[0].documents
    assert len(documents) > 5_000
    assert BYTES.decode(documents[0]) == "TREASURE ISLAND"
    assert len(corpus.validation_tokens) > 10_000


def test_too_few_documents_for_a_hash_leave_one_to_validate(tmp_path):
    source = write_lines(tmp_path / "a.jsonl", ["one" * 9, "two" * 9, "three" * 9])
    corpus = load_corpus(config(source), BYTES)
    assert len(corpus.train[0].documents) == 2
    assert BYTES.decode(corpus.validation_tokens.ravel()).startswith("three")


def test_c4_files(shared_data):
    run = config(
        str(shared_data / "c4-sample" / "c4-en.train.jsonl"),
        data={"validation": str(shared_data / "c4-sample" / "c4-en.validation.jsonl")},
    )
    corpus = load_corpus(run, BYTES)
    assert len(corpus.train[0].documents) == 1000


def test_threads_and_prefetch_change_nothing(tmp_path):
    found = []
    for threads, prefetch in ((1, 0), (1, 4), (3, 5)):
        data = {"threads": threads, "prefetch": prefetch, "shape": "padded"}
        found.append(take(train_iterator(*with_corpus(tmp_path, DOCUMENTS, data=data)), 30))
    assert_equal_batches(found[0], found[1])
    assert_equal_batches(found[0], found[2])


def test_unknown_sources_say_what_there_is(tmp_path):
    with pytest.raises(TrainingError, match=r"matches no file; expected .embedded., .tfds:NAME."):
        load_corpus(config(str(tmp_path / "*.txt")), BYTES)


def test_processes_agree_on_the_positions_of_all_rows():
    class Iterator:
        def __init__(self):
            self.state = {"row": [5], "step": 3}

        def get_state(self):
            return self.state

        def set_state(self, state):
            self.state = state

    iterator = Iterator()
    others = np.array([7, 8, -1, 9])
    batches = TrainBatches(iterator, [2], 4, agree=lambda rows: np.maximum(rows, others))
    position = batches.position()
    assert position["row"].tolist() == [7, 8, 5, 9]
    assert position["step"] == 3
    iterator.state = None
    batches.seek(position)
    assert iterator.state == {"row": [5], "step": 3}
