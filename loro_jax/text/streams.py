"""Packing of documents that are encoded on the fly, without knowing their token counts.

Each row of the global batch is a separate stream: row r of B reads documents r, r + B, r + 2B, ...
of the order, concatenates them and cuts them into windows. A batch is therefore a function of
(seed, step), however many processes share the rows, and no token is lost: the rest of a document
begins the next window.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grain
import numpy as np

from loro_jax.text.marked import is_counted, plain_ids


@dataclasses.dataclass
class _Stream:
    """Position of one row.

    Attributes:
        taken: number of documents read.
        rest: ids of the last document that no window has used yet, int32.
    """

    taken: int
    rest: np.ndarray


class PackedStreams(grain.IterDataset):
    """Endless dataset of batches of windows.

    Args:
        order: encoded documents in the order of training: an endless Grain dataset of int32
            arrays.
        rows: indices of this process's rows in the global batch.
        batch_size: rows of the global batch.
        length: L.
        threads: number of rows filled in parallel.
    """

    def __init__(
        self,
        order: grain.MapDataset,
        rows: Sequence[int],
        batch_size: int,
        length: int,
        threads: int,
    ):
        super().__init__()
        self.order = order
        self.rows = rows
        self.batch_size = batch_size
        self.length = length
        self.threads = threads

    def __iter__(self) -> grain.DatasetIterator:
        return _PackedIterator(self)


class _PackedIterator(grain.DatasetIterator):
    """Iterator whose state is, per row, the number of documents read and the tokens left."""

    def __init__(self, dataset: PackedStreams):
        super().__init__()
        self._dataset = dataset
        self._streams = {row: _Stream(0, np.empty(0, np.int32)) for row in dataset.rows}
        self._pool = ThreadPoolExecutor(dataset.threads, thread_name_prefix="pack")

    def __next__(self) -> dict[str, np.ndarray]:
        # Rows are independent: each thread changes only the stream of its own row.
        ids = np.stack(list(self._pool.map(self._window, self._dataset.rows)))
        return {"tokens": plain_ids(ids), "mask": is_counted(ids[:, 1:]).astype(np.float32)}

    def _window(self, row: int) -> np.ndarray:
        stream, length = self._streams[row], self._dataset.length
        pieces, size = [stream.rest], len(stream.rest)
        while size < length + 1:
            pieces.append(self._document(row, stream.taken))
            stream.taken += 1
            size += len(pieces[-1])
        tokens = np.concatenate(pieces) if len(pieces) > 1 else stream.rest
        # The last target is also the next window's first input. The rest is part of the last
        # document only, because the window was not full without it.
        stream.rest = tokens[length:]
        return tokens[: length + 1]

    def _document(self, row: int, number: int) -> np.ndarray:
        return self._dataset.order[row + number * self._dataset.batch_size]

    def get_state(self) -> dict[str, Any]:
        """Returns the numbers of documents read and of tokens left, per row."""
        return {
            "taken": [stream.taken for stream in self._streams.values()],
            "left": [len(stream.rest) for stream in self._streams.values()],
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Restores a state returned by :meth:`get_state`."""
        for row, taken, left in zip(self._streams, state["taken"], state["left"], strict=True):
            # What is left is always the end of the last document, so it is encoded again instead of
            # saved.
            rest = self._document(row, taken - 1) if taken else np.empty(0, np.int32)
            self._streams[row] = _Stream(taken, rest[len(rest) - left :])

    def close(self) -> None:
        """Stops the threads."""
        super().close()
        self._pool.shutdown(wait=False, cancel_futures=True)
