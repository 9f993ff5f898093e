"""Shards of tokens: the ids of all documents in order, and the end of each document.

On disk a shard is a pair of ``.npy`` files, which are memory-mapped.
"""

from __future__ import annotations

import bisect
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np


class Shard(NamedTuple):
    """Tokens of consecutive documents.

    Attributes:
        tokens: ids, each document closed by the end-of-text id, uint16 or uint32 (N,); int32 if
            some may be marked as context.
        ends: end of each document in ``tokens``, int64 (D,).
        name: name in error messages.
    """

    tokens: np.ndarray
    ends: np.ndarray
    name: str


def make_shard(documents: Sequence[np.ndarray], dtype: Any, name: str) -> Shard:
    """Creates a shard in memory.

    Args:
        documents: ids of each document, closed by the end-of-text id.
        dtype: dtype of the shard's ids.
        name: name of the shard.

    Returns:
        The shard.
    """
    lengths = [len(document) for document in documents]
    tokens = np.concatenate(documents) if documents else np.empty(0)
    return Shard(tokens.astype(dtype, copy=False), np.cumsum(lengths, dtype=np.int64), name)


def map_shard(path: pathlib.Path) -> Shard:
    """Maps the shard ``PATH.tokens.npy`` and ``PATH.ends.npy``.

    Raises:
        OSError: if a file can't be opened.
        ValueError: if a file does not hold an array.
    """
    arrays = [
        # A plain view of the mapping, because slicing a memmap creates a new memmap object.
        np.asarray(np.load(f"{path}.{name}.npy", mmap_mode="r", allow_pickle=False))
        for name in ("tokens", "ends")
    ]
    return Shard(arrays[0], arrays[1], str(path))


class TokenShards(Sequence[np.ndarray]):
    """Sequence of the documents of several shards, also readable as one stream of tokens.

    Args:
        shards: the shards, in order.

    Attributes:
        tokens: number of tokens.

    Example:
        >>> import numpy as np
        >>> split = TokenShards([make_shard([np.array([5, 1]), np.array([6, 7, 1])], "u2", "a")])
        >>> len(split), split[1].tolist(), split.read(1, 4).tolist()
        (2, [6, 7, 1], [1, 6, 7])
    """

    def __init__(self, shards: Iterable[Shard]):
        # Without empty shards all ends are different, and bisection finds exactly one.
        self._shards = [shard for shard in shards if len(shard.ends)]
        self._token_ends = np.cumsum([len(shard.tokens) for shard in self._shards]).tolist()
        self._document_ends = np.cumsum([len(shard.ends) for shard in self._shards]).tolist()
        self.tokens: int = self._token_ends[-1] if self._shards else 0

    def __len__(self) -> int:
        return self._document_ends[-1] if self._shards else 0

    def __getitem__(self, index: Any) -> Any:
        """Returns the ids of a document, closed by the end-of-text id, int32 (n,)."""
        return self.head(index, None)

    def head(self, index: int, count: int | None) -> np.ndarray:
        """Returns the first ``count`` ids of a document (None: all), int32."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = bisect.bisect_right(self._document_ends, index)
        shard = self._shards[number]
        # The document's number within its shard; it begins where the one before it ends.
        place = index - (self._document_ends[number - 1] if number else 0)
        start = int(shard.ends[place - 1]) if place else 0
        end = int(shard.ends[place])
        return shard.tokens[start : end if count is None else min(end, start + count)].astype(
            np.int32
        )

    def read(self, start: int, stop: int) -> np.ndarray:
        """Returns tokens ``start`` to ``stop`` of the stream, int32."""
        pieces = []
        # A window may span several shards, even whole ones.
        number = bisect.bisect_right(self._token_ends, start)
        while start < stop:
            offset = self._token_ends[number - 1] if number else 0
            end = min(stop, self._token_ends[number])
            pieces.append(self._shards[number].tokens[start - offset : end - offset])
            start, number = end, number + 1
        # Almost always: one copy, from the mapping to int32, instead of two.
        if len(pieces) == 1:
            return pieces[0].astype(np.int32)
        return np.concatenate(pieces or [np.empty(0, np.int32)]).astype(np.int32)

    def stream(self) -> np.ndarray:
        """Returns all tokens in order, (N,); not copied if there is only one shard."""
        if len(self._shards) == 1:
            return self._shards[0].tokens
        return self.read(0, self.tokens)
