"""Batches of sequences, which depend only on the seed and the step.

Grain shuffles, mixes, batches and prefetches; its iterator's state is saved with every checkpoint.
The order is defined for the global batch, of which each process assembles its own rows, so batches
don't depend on the number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import grain
import numpy as np

from loro_jax.errors import TrainingError
from loro_jax.text.config import DataConfig
from loro_jax.text.encoding import available_cores, check_ids
from loro_jax.text.marked import plain_ids
from loro_jax.text.mixture import Corpus, TrainingSource
from loro_jax.text.packing import PackedRows, PaddedRows, Rows
from loro_jax.text.shards import TokenShards
from loro_jax.text.streams import PackedStreams

# Distance between the seeds of mixed sources.
_SEED_STEP = 1_000_003

# Length of an endless dataset. (Grain's own endless repetition overflows with a batch size of 1.)
_ENDLESS = 1 << 48

# Returns the largest value of each entry over the arrays of all processes, the same in all of them.
Agree = Callable[[np.ndarray], np.ndarray]


class TrainBatches:
    """Endless iterator over training batches whose position can be saved and restored.

    Yields this process's rows of each batch: dicts of ``tokens`` int32 (b, L + 1) and ``mask``
    float32 (b, L).

    Args:
        iterator: Grain iterator.
        mine: indices of this process's rows in the global batch.
        batch_size: rows of the global batch.
        agree: returns the largest value of each entry over all processes; None: there is one
            process.
    """

    def __init__(
        self,
        iterator: grain.DatasetIterator,
        mine: Sequence[int],
        batch_size: int,
        agree: Agree | None = None,
    ):
        self._iterator = iterator
        self._mine = list(mine)
        self._batch_size = batch_size
        self._agree = agree

    def __iter__(self) -> TrainBatches:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        return next(self._iterator)

    def position(self) -> dict[str, np.ndarray]:
        """Returns the position, which is the same in every process."""
        state = self._iterator.get_state()
        position = {}
        for name, value in state.items():
            if np.ndim(value):  # one value per row
                # Positions are not negative, so that the largest value over the processes is that
                # of the one that holds the row.
                rows = np.full(self._batch_size, -1, np.int64)
                rows[self._mine] = value
                position[name] = rows if self._agree is None else self._agree(rows)
            else:
                position[name] = np.asarray(value, np.int64)
        return position

    def seek(self, position: dict[str, np.ndarray]) -> None:
        """Restores a position saved by :meth:`position`, in this or another process."""
        self._iterator.set_state(
            {
                # Saved for the global batch: each process takes its rows, however many processes
                # there are.
                name: np.asarray(value)[self._mine].tolist() if np.ndim(value) else int(value)
                for name, value in position.items()
            }
        )

    def close(self) -> None:
        """Stops the threads."""
        self._iterator.close()


class _Order(NamedTuple):
    """The settings that determine the batches of a run."""

    data: DataConfig
    corpus: Corpus
    batch_size: int
    sequence_length: int
    seed: int

    @property
    def name(self) -> str:
        """Name of the source in error messages."""
        return f"config.data.source = {self.data.source!r}"


def train_iterator(
    data: DataConfig,
    corpus: Corpus,
    *,
    batch_size: int,
    sequence_length: int,
    seed: int,
    rows: Sequence[int] | None = None,
    agree: Agree | None = None,
) -> TrainBatches:
    """Returns an endless iterator over training batches with a position to save and restore.

    Args:
        data: the data group of the run's config.
        corpus: the corpus.
        batch_size: sequences in the global batch.
        sequence_length: tokens per sequence, L.
        seed: seed of the order.
        rows: this process's rows of the global batch; None: all of them.
        agree: returns the largest value of each entry over all processes, for positions; None:
            there is one process.

    Returns:
        An endless iterator over these rows.

    Raises:
        TrainingError: if a source is too small for one sequence; while iterating, if an id is
            outside the vocabulary.
    """
    rows = range(batch_size) if rows is None else rows
    order = _Order(data, corpus, batch_size, sequence_length, seed)
    made = _streamed if is_streamed(data, corpus) else _numbered
    return TrainBatches(made(order, rows), rows, batch_size, agree)


def _numbered(order: _Order, mine: Sequence[int]) -> grain.DatasetIterator:
    """Iterates over numbered sequences, each assembled when it is read."""
    corpus, length = order.corpus, order.sequence_length
    rows = [_rows(order.data, corpus, source, length, order.seed) for source in corpus.train]
    places = _mixed(order, [len(source) for source in rows])

    def assemble(places: np.ndarray) -> dict[str, np.ndarray]:
        tokens = np.empty((len(mine), length + 1), np.int32)
        mask = np.empty((len(mine), length), np.float32)
        # Places of the whole batch are known to every process, but only its own rows are read.
        for i, (source, epoch, place) in enumerate(places[list(mine)].tolist()):
            tokens[i], mask[i] = rows[source].row(epoch, place)
        check_ids(tokens, corpus.vocab_size, order.name)
        return {"tokens": tokens, "mask": mask}

    # Batched before anything is read: places are three numbers each.
    batches = places.batch(order.batch_size).map(assemble)
    # Encoding on the fly uses all cores; reading shards needs one thread.
    threads = order.data.threads or (1 if _counted(corpus) else available_cores())
    ahead = order.data.prefetch
    options = grain.ReadOptions(
        num_threads=threads if ahead else 0, prefetch_buffer_size=max(ahead, 1)
    )
    return iter(batches.to_iter_dataset(options))


def is_streamed(data: DataConfig, corpus: Corpus) -> bool:
    """Returns whether sequences are packed on the fly, because token counts are unknown."""
    return data.shape == "packed" and not _counted(corpus)


def _counted(corpus: Corpus) -> bool:
    """Returns whether all sources are already tokenised, in shards."""
    return all(isinstance(source.documents, TokenShards) for source in corpus.train)


def describe(data: DataConfig, corpus: Corpus, sequence_length: int) -> str:
    """Describes the amount of training data in words."""
    if is_streamed(data, corpus):
        count = sum(len(source.documents) for source in corpus.train)
        return f"{count:,} training documents, packed on the fly"
    count = sum(len(_rows(data, corpus, source, sequence_length)) for source in corpus.train)
    return f"{count:,} training sequences"


def _rows(
    data: DataConfig, corpus: Corpus, source: TrainingSource, length: int, seed: int = 0
) -> Rows:
    documents = source.documents
    if data.shape == "padded":
        return PaddedRows(documents, length, corpus.pad_id)
    assert isinstance(documents, TokenShards)  # otherwise is_streamed
    if documents.tokens <= length:
        raise TrainingError(
            f"config.data.source = {source.name!r} has {documents.tokens} training tokens, fewer "
            f"than one sequence of config.sequence_length = {length} needs."
        )
    return PackedRows(documents, length, seed)


def _mixed(order: _Order, counts: list[int]) -> grain.MapDataset:
    """Returns an endless dataset of (source, epoch, place), every epoch of a source reshuffled.

    The dataset contains indices instead of sequences, so that a process reads only its own rows.
    """
    orders = []
    for number, count in enumerate(counts):
        # Two sources of the same size must not be shuffled alike.
        seed = order.seed + number * _SEED_STEP
        # Repeated after the shuffle, so that Grain draws another order in each epoch.
        places = grain.MapDataset.range(count).seed(seed).shuffle().repeat(_ENDLESS // count + 1)
        orders.append(
            places.map_with_index(
                # Bound as defaults: a plain closure would see the values of the last source.
                lambda index, place, number=number, count=count: np.array(
                    [number, index // count, place]
                )
            )
        )
    if len(orders) == 1:
        return orders[0]
    return grain.MapDataset.mix(orders, [source.weight for source in order.corpus.train])


def _streamed(order: _Order, mine: Sequence[int]) -> grain.DatasetIterator:
    """Iterates over sequences packed on the fly; here weights are fractions of documents."""
    data, vocab_size = order.data, order.corpus.vocab_size
    documents = [source.documents for source in order.corpus.train]

    def ids(place: np.ndarray) -> np.ndarray:
        found = documents[place[0]][int(place[2])]
        check_ids(plain_ids(found), vocab_size, order.name)
        return found

    texts = _mixed(order, [len(source) for source in documents]).map(ids)
    threads = data.threads or available_cores()
    batches = PackedStreams(texts, mine, order.batch_size, order.sequence_length, threads)
    if data.prefetch == 0:
        return iter(batches)
    return iter(
        grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=data.prefetch)
    )
