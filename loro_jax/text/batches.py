"""Batches of sequences: a function of (seed, step) alone.

Grain shuffles, mixes, batches and prefetches; its iterator's state is saved with every checkpoint.
The order is that of the global batch, of which each process assembles its own rows: any number of
processes sees the same batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import grain
import numpy as np

from loro_jax.errors import TrainingError
from loro_jax.text.encoding import available_cores, check_ids
from loro_jax.text.mixture import Corpus, TrainingSource
from loro_jax.text.packing import PackedRows, PaddedRows, Rows
from loro_jax.text.shards import TokenShards
from loro_jax.text.streams import PackedStreams
from loro_jax.training.processes import largest
from models.loss import Batch

if TYPE_CHECKING:
    from loro_jax.training.config import Config

# Seeds of the sources that are mixed lie this far apart.
_SEED_STEP = 1_000_003

# Sequences in an endless dataset. (Grain's own endless repetition overflows in batches of one.)
_ENDLESS = 1 << 48


class TrainBatches:
    """Training batches, endless: an iterator that knows where it is.

    Yields this process's rows of each batch: dicts of ``tokens`` int32 (b, L + 1) and ``mask``
    float32 (b, L).

    Args:
        iterator: Grain's.
        mine: the numbers of these rows in the global batch.
        batch_size: rows of the global batch.
    """

    def __init__(self, iterator: grain.DatasetIterator, mine: Sequence[int], batch_size: int):
        self._iterator = iterator
        self._mine = list(mine)
        self._batch_size = batch_size

    def __iter__(self) -> TrainBatches:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        return next(self._iterator)

    def position(self) -> dict[str, np.ndarray]:
        """Where it is, the same in every process and whatever rows each has."""
        state = self._iterator.get_state()
        position = {}
        for name, value in state.items():
            if np.ndim(value):  # one of each row
                rows = np.full(self._batch_size, -1, np.int64)
                rows[self._mine] = value
                position[name] = largest(rows)
            else:
                position[name] = np.asarray(value, np.int64)
        return position

    def seek(self, position: dict[str, np.ndarray]) -> None:
        """Goes to where :meth:`position` was called, in this process or others."""
        self._iterator.set_state(
            {
                name: np.asarray(value)[self._mine].tolist() if np.ndim(value) else int(value)
                for name, value in position.items()
            }
        )

    def close(self) -> None:
        """Releases its threads."""
        self._iterator.close()


def train_iterator(
    config: Config, corpus: Corpus, mine: Sequence[int] | None = None
) -> TrainBatches:
    """An iterator over training batches, endless, whose position can be saved and restored.

    Args:
        config: the run's config (``data``, ``sequence_length``, ``batch_size``, ``seed``).
        corpus: its tokens.
        mine: this process's rows of the global batch; None: all of them.

    Returns:
        An iterator over these rows.

    Raises:
        TrainingError: if a source is too small for one sequence; while iterating, if an id is
            outside the vocabulary.
    """
    mine = range(config.batch_size) if mine is None else mine
    made = _streamed if is_streamed(config, corpus) else _numbered
    return TrainBatches(made(config, corpus, mine), mine, config.batch_size)


def _numbered(config: Config, corpus: Corpus, mine: Sequence[int]) -> grain.DatasetIterator:
    """Sequences that have numbers, each assembled when its turn comes."""
    rows = [_rows(config, corpus, source) for source in corpus.train]
    order = _mixed(config, [len(source) for source in rows], corpus)
    length = config.sequence_length

    def assemble(places: np.ndarray) -> dict[str, np.ndarray]:
        tokens = np.empty((len(mine), length + 1), np.int32)
        mask = np.empty((len(mine), length), np.float32)
        for i, (source, epoch, place) in enumerate(places[list(mine)].tolist()):
            tokens[i], mask[i] = rows[source].row(epoch, place)
        check_ids(tokens, corpus.vocab_size, f"config.data.source = {config.data.source!r}")
        return {"tokens": tokens, "mask": mask}

    batches = order.batch(config.batch_size).map(assemble)
    # What is encoded on the way takes all cores; shards are read by one thread.
    threads = config.data.threads or (1 if _counted(corpus) else available_cores())
    ahead = config.data.prefetch
    options = grain.ReadOptions(
        num_threads=threads if ahead else 0, prefetch_buffer_size=max(ahead, 1)
    )
    return iter(batches.to_iter_dataset(options))


def is_streamed(config: Config, corpus: Corpus) -> bool:
    """Whether sequences are packed on the way, because the tokens of a source are not counted."""
    return config.data.shape == "packed" and not _counted(corpus)


def _counted(corpus: Corpus) -> bool:
    """Whether the tokens of all sources are there already, in shards."""
    return all(isinstance(source.documents, TokenShards) for source in corpus.train)


def describe(config: Config, corpus: Corpus) -> str:
    """How much there is to train on, in words."""
    if is_streamed(config, corpus):
        count = sum(len(source.documents) for source in corpus.train)
        return f"{count:,} training documents, packed on the way"
    count = sum(len(_rows(config, corpus, source)) for source in corpus.train)
    return f"{count:,} training sequences"


def _rows(config: Config, corpus: Corpus, source: TrainingSource) -> Rows:
    length = config.sequence_length
    documents = source.documents
    if config.data.shape == "padded":
        return PaddedRows(documents, length, corpus.pad_id)
    assert isinstance(documents, TokenShards)  # otherwise is_streamed
    if documents.tokens <= length:
        raise TrainingError(
            f"config.data.source = {source.name!r} has {documents.tokens} training tokens, fewer "
            f"than one sequence of config.sequence_length = {length} needs."
        )
    return PackedRows(documents, length, config.seed)


def _mixed(config: Config, counts: list[int], corpus: Corpus) -> grain.MapDataset:
    """An endless dataset of (source, epoch, place), each epoch of a source in an order of its own.

    Numbers instead of sequences: a process looks at all of them, and reads its own.
    """
    orders = []
    for number, count in enumerate(counts):
        seed = config.seed + number * _SEED_STEP
        order = grain.MapDataset.range(count).seed(seed).shuffle().repeat(_ENDLESS // count + 1)
        orders.append(
            order.map_with_index(
                lambda index, place, number=number, count=count: np.array(
                    [number, index // count, place]
                )
            )
        )
    if len(orders) == 1:
        return orders[0]
    return grain.MapDataset.mix(orders, [source.weight for source in corpus.train])


def _streamed(config: Config, corpus: Corpus, mine: Sequence[int]) -> grain.DatasetIterator:
    """Sequences packed on the way; weights count documents here."""
    documents = [source.documents for source in corpus.train]

    def ids(place: np.ndarray) -> np.ndarray:
        found = documents[place[0]][int(place[2])]
        check_ids(found, corpus.vocab_size, f"config.data.source = {config.data.source!r}")
        return found

    order = _mixed(config, [len(source) for source in documents], corpus).map(ids)
    threads = config.data.threads or available_cores()
    batches = PackedStreams(order, mine, config.batch_size, config.sequence_length, threads)
    if config.data.prefetch == 0:
        return iter(batches)
    return iter(
        grain.experimental.ThreadPrefetchIterDataset(
            batches, prefetch_buffer_size=config.data.prefetch
        )
    )


def to_batch(tokens: np.ndarray, mask: np.ndarray) -> Batch:
    """Inputs and targets of rows of L + 1 tokens."""
    return Batch(inputs=tokens[:, :-1], targets=tokens[:, 1:], mask=mask)


def validation_batches(corpus: Corpus, batch_size: int) -> list[Batch]:
    """The validation set in batches of one shape; the last is filled up with masked rows."""
    tokens, mask = corpus.validation_tokens, corpus.validation_mask
    filler = -len(tokens) % batch_size
    tokens = np.concatenate([tokens, np.repeat(tokens[:1], filler, axis=0)])
    mask = np.concatenate([mask, np.zeros((filler, mask.shape[1]), np.float32)])
    return [
        to_batch(tokens[i : i + batch_size], mask[i : i + batch_size])
        for i in range(0, len(tokens), batch_size)
    ]
