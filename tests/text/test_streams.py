"""Sequences packed on the way: nothing lost, whoever reads, wherever it was interrupted."""

import json

import grain
import numpy as np
import pytest

from loro_jax.text.streams import PackedStreams
from tests.text.samples import assert_equal_batches, take

LENGTH, BATCH = 8, 4


def documents(count=60):
    """Of 1 to 40 ids, each different from all others."""
    rng = np.random.default_rng(0)
    lengths = rng.choice([1, 2, 3, 7, 8, 9, 16, 17, 40], size=count)
    ends = np.cumsum(lengths)
    return [np.arange(end - n, end, dtype=np.int32) for n, end in zip(lengths, ends, strict=True)]


def streams(rows=range(BATCH), threads=2):
    order = grain.MapDataset.source(documents()).repeat(1000)
    return PackedStreams(order, rows, BATCH, LENGTH, threads)


def test_each_row_reads_its_own_documents_without_a_gap():
    batches = take(iter(streams()), 30)
    for row in range(BATCH):
        whole = np.concatenate(documents()[row::BATCH] * 20)
        read = np.concatenate([batch["tokens"][row, :-1] for batch in batches])
        np.testing.assert_array_equal(read, whole[: 30 * LENGTH])
        last = [batch["tokens"][row, -1] for batch in batches]
        np.testing.assert_array_equal(last, whole[LENGTH : 30 * LENGTH + 1 : LENGTH])
        assert all(batch["mask"].all() for batch in batches)


@pytest.mark.parametrize("prefetch", [0, 3])
@pytest.mark.parametrize("steps", range(12))
def test_state_goes_on_within_a_document(steps, prefetch):
    def iterator():
        if prefetch == 0:
            return iter(streams())
        dataset = grain.experimental.ThreadPrefetchIterDataset(
            streams(), prefetch_buffer_size=prefetch
        )
        return iter(dataset)

    first = iterator()
    take(first, steps)
    state = json.loads(json.dumps(first.get_state()))
    fresh = iterator()
    fresh.set_state(state)
    assert_equal_batches(take(first, 8), take(fresh, 8))


def test_the_rows_of_several_processes_are_those_of_one():
    whole = take(iter(streams()), 10)
    halves = [take(iter(streams(range(start, start + 2))), 10) for start in (0, 2)]
    for step, batch in enumerate(whole):
        union = np.concatenate([half[step]["tokens"] for half in halves])
        np.testing.assert_array_equal(union, batch["tokens"])
