"""Batches of encoded rows, which depend only on the seed and the step."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from loro_jax.glue.config import GlueConfig
from loro_jax.glue.encoding import Encoded, PairTokenizer
from loro_jax.glue.reading import read_rows
from loro_jax.glue.tasks import Task

# Lengths are multiples of this, for the products of accelerators.
_MULTIPLE = 8


class Split(NamedTuple):
    """An encoded split of a task.

    Attributes:
        name: "train", "validation", ...
        rows: ids of its rows.
        labels: numbers of the labels, int32, or scores, float32.
    """

    name: str
    rows: Encoded
    labels: np.ndarray


class GlueData(NamedTuple):
    """The encoded splits of a task.

    Attributes:
        task: the task.
        train: training split.
        validation: validation splits, by the task's order.
        lengths: lengths that batches are padded to, ascending.
        pad_id: the padding id.
        vocab_size: number of the tokenizer's ids.
        fingerprint: identifies rows, labels and tokenizer.
        notes: lines to show about what was left out.
    """

    task: Task
    train: Split
    validation: tuple[Split, ...]
    lengths: tuple[int, ...]
    pad_id: int
    vocab_size: int
    fingerprint: str
    notes: tuple[str, ...]


class Rows(NamedTuple):
    """Some rows of a batch, NumPy or JAX arrays.

    Attributes:
        ids: int32 (b, L), padded.
        mask: 1 for tokens, 0 for padding, float32 (b, L).
        labels: int32 or float32 (b,).
        weights: 1 for rows, 0 for what fills up the last batch, float32 (b,).
        numbers: of the rows within all batches so far, uint32 (b,).
    """

    ids: Any
    mask: Any
    labels: Any
    weights: Any
    numbers: Any


def load_data(
    config: GlueConfig, task: Task, tokenizer: PairTokenizer, max_length: int
) -> GlueData:
    """Reads and encodes all splits of a task.

    Args:
        config: the config's part about tables.
        task: the task.
        tokenizer: the tokenizer.
        max_length: most tokens of a row; longer ones are cut.

    Returns:
        The encoded splits.

    Raises:
        TrainingError: as :func:`loro_jax.glue.reading.read_rows`.
    """
    splits: list[Split] = []
    notes: list[str] = []
    seen = hashlib.sha256(tokenizer.fingerprint.encode())
    for name in ("train", *task.validation):
        read = read_rows(task, config.source, name, config.data_dir)
        rows = tokenizer.encode(read.texts, max_length)
        for array in (rows.ids, rows.starts, read.labels):
            seen.update(array.tobytes())
        splits.append(Split(name, rows, read.labels))
        notes += read.notes
    train, *validation = splits
    longest = max(int(split.rows.lengths.max()) for split in splits)
    return GlueData(
        task,
        train,
        tuple(validation),
        _lengths(longest, config.buckets, max_length),
        tokenizer.pad_id,
        tokenizer.vocab_size,
        seen.hexdigest()[:16],
        tuple(notes),
    )


def _lengths(longest: int, buckets: int, max_length: int) -> tuple[int, ...]:
    """Returns the lengths that batches are padded to: the longest row's, its half, ...

    Example:
        >>> _lengths(100, 3, 512), _lengths(100, 1, 100)
        ((32, 56, 104), (100,))
    """
    halves = [-(-longest // (2**i * _MULTIPLE)) * _MULTIPLE for i in range(buckets)]
    return tuple(sorted({min(length, max_length) for length in halves}))


class TrainBatches:
    """Endless iterator over this process's rows of training batches; its position can be saved.

    Each pass has an order of its own. The last batch of a pass is filled up with rows of weight 0,
    so that every batch has the same shape, and the step of a batch says all about it.

    Args:
        data: the encoded task.
        batch_size: rows of the global batch.
        seed: seed of the orders.
        mine: indices of this process's rows; None: all.
    """

    def __init__(
        self, data: GlueData, batch_size: int, seed: int, mine: Sequence[int] | None = None
    ):
        self._data, self._batch_size, self._seed = data, batch_size, seed
        self._mine = np.arange(batch_size) if mine is None else np.asarray(mine)
        self._step = 0
        self._order: tuple[int, np.ndarray] = (-1, np.zeros(0, np.int64))

    @property
    def per_epoch(self) -> int:
        """Batches of one pass over the rows."""
        return batches_per_epoch(self._data, self._batch_size)

    def __iter__(self) -> TrainBatches:
        return self

    def __next__(self) -> Rows:
        epoch, batch = divmod(self._step, self.per_epoch)
        if self._order[0] != epoch:
            rng = np.random.default_rng((self._seed, epoch))
            self._order = (epoch, rng.permutation(len(self._data.train.rows)))
        places = np.arange(batch * self._batch_size, (batch + 1) * self._batch_size)
        rows = _rows(self._data, self._data.train, places, self._order[1], self._mine)
        number = self._step * self._batch_size
        self._step += 1
        numbers = (number + self._mine) % 2**32
        return rows._replace(numbers=numbers.astype(np.uint32))

    def position(self) -> dict[str, np.ndarray]:
        """Returns the position, the same in every process."""
        return {"step": np.asarray(self._step, np.int64)}

    def seek(self, position: dict[str, np.ndarray]) -> None:
        """Restores a position saved by :meth:`position`, in this or another process."""
        self._step = int(position["step"])

    def close(self) -> None:
        """Does nothing: there are no threads."""


def batches_per_epoch(data: GlueData, batch_size: int) -> int:
    """Returns the batches of one pass over the training rows."""
    return -(-len(data.train.rows) // batch_size)


def validation_batches(data: GlueData, split: Split, batch_size: int) -> Iterator[Rows]:
    """Yields the rows of a split in their order; the last batch is filled up."""
    order, everything = np.arange(len(split.rows)), np.arange(batch_size)
    for start in range(0, len(split.rows), batch_size):
        yield _rows(data, split, start + everything, order, everything)


def _rows(
    data: GlueData, split: Split, places: np.ndarray, order: np.ndarray, mine: np.ndarray
) -> Rows:
    """Returns the rows at some places of an order, of which those past its end have weight 0."""
    inside = places < len(order)
    # What fills up is a row with a text, so that nothing is normalised over no tokens.
    chosen = order[np.where(inside, places, 0)]
    longest = int(split.rows.lengths[chosen].max())
    length = next(one for one in data.lengths if one >= longest)
    chosen = chosen[mine]
    ids = split.rows.padded(chosen, length, data.pad_id)
    mask = np.arange(length) < split.rows.lengths[chosen][:, None]
    return Rows(
        ids,
        mask.astype(np.float32),
        split.labels[chosen],
        inside[mine].astype(np.float32),
        np.zeros(len(chosen), np.uint32),
    )
