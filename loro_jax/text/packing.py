"""Packing of documents into numbered sequences of one length.

``packed``: windows over the stream of all documents, each closed by the end-of-text id. ``padded``:
one document per sequence, truncated or padded. Either way a sequence is a row of L + 1 ids, of
which the first L are inputs and the last L targets, and a mask (L,) of the targets that count: all
of a document, or those that are not marked as context.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from loro_jax.text.encoding import encode_document
from loro_jax.text.marked import is_counted, plain_ids
from loro_jax.text.shards import TokenShards
from loro_jax.text.tokenizers.tokenizer import Tokenizer


class Row(NamedTuple):
    """A sequence.

    Attributes:
        tokens: ids, int32 (L + 1,).
        mask: 1 where the target counts, float32 (L,).
    """

    tokens: np.ndarray
    mask: np.ndarray


class Rows(Protocol):
    """Numbered sequences, which may differ from epoch to epoch."""

    def __len__(self) -> int:
        """Returns the number of sequences in an epoch."""

    def row(self, epoch: int, place: int) -> Row:
        """Returns the sequence with index ``place`` in an epoch."""


class EncodedTexts(Sequence[np.ndarray]):
    """Documents encoded on every access.

    Args:
        texts: texts of the documents.
        tokenizer: their tokenizer.
    """

    def __init__(self, texts: Sequence[str], tokenizer: Tokenizer):
        self._texts = texts
        self._tokenizer = tokenizer

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, index: Any) -> Any:
        return encode_document(self._texts[index], self._tokenizer)


class PackedRows:
    """Windows over a stream of tokens, with a random offset in each epoch.

    Args:
        split: the documents, with more than ``length`` tokens in total.
        length: L.
        seed: seed of the offsets.

    Example:
        >>> import numpy as np
        >>> from loro_jax.text.shards import make_shard
        >>> split = TokenShards([make_shard([np.arange(2, 9)], "u2", "a")])
        >>> PackedRows(split, length=6, seed=0).row(0, 0).tokens.tolist()
        [2, 3, 4, 5, 6, 7, 8]
    """

    def __init__(self, split: TokenShards, length: int, seed: int):
        self._split = split
        self._length = length
        # One window fewer than fit, so that every offset below ``length`` leaves room for all.
        self._count = max((split.tokens - length) // length, 1)
        # A split of a single window may be too short for every offset.
        choices = min(length, split.tokens - self._count * length)

        # Cached, because every row needs it; rows of a few epochs may be read alternately.
        @functools.lru_cache(maxsize=4)
        def offset(epoch: int) -> int:
            # A function of seed and epoch: nothing has to be saved to resume in the middle of an
            # epoch.
            return int(np.random.default_rng((seed, epoch)).integers(choices))

        self._offset = offset

    def __len__(self) -> int:
        return self._count

    def row(self, epoch: int, place: int) -> Row:
        """Returns window ``place`` of an epoch."""
        start = place * self._length + self._offset(epoch)
        # Windows overlap by one token, which is the last target and the next window's first input.
        return marked_row(self._split.read(start, start + self._length + 1))


class PaddedRows:
    """One document per row, truncated or padded.

    Args:
        documents: ids of the documents.
        length: L.
        pad_id: the padding id.
    """

    def __init__(self, documents: Sequence[np.ndarray], length: int, pad_id: int):
        self._documents = documents
        self._length = length
        self._pad_id = pad_id

    def __len__(self) -> int:
        return len(self._documents)

    def row(self, epoch: int, place: int) -> Row:
        """Returns document ``place``, in any epoch."""
        del epoch
        if isinstance(self._documents, TokenShards):
            # A document may be far longer than a row: only what fits is read.
            ids = self._documents.head(place, self._length + 1)
        else:
            ids = self._documents[place]
        return padded_row(ids, self._length, self._pad_id)


def padded_row(ids: np.ndarray, length: int, pad_id: int) -> Row:
    """Truncates or pads a document to one sequence."""
    kept = ids[: length + 1]
    tokens = np.full(length + 1, pad_id, np.int32)
    tokens[: len(kept)] = plain_ids(kept)
    mask = np.zeros(length, np.float32)
    # n ids make n - 1 predictions; the end-of-text id is a target, padding is not.
    mask[: len(kept) - 1] = is_counted(kept[1:])
    return Row(tokens, mask)


def marked_row(ids: np.ndarray) -> Row:
    """Returns the sequence of L + 1 ids, of which some may be marked as context."""
    return Row(plain_ids(ids), is_counted(ids[1:]).astype(np.float32))


def consecutive_rows(stream: np.ndarray, length: int, pad_id: int) -> list[Row]:
    """Cuts a stream into windows that predict every token but the first; the last is padded."""
    # Rounded up: the first token is only an input, and every other one is a target once.
    count = -(-(len(stream) - 1) // length)
    padded = np.full(count * length + 1, pad_id, np.int32)
    padded[: len(stream)] = plain_ids(stream)
    mask = np.zeros(count * length, np.float32)
    mask[: len(stream) - 1] = is_counted(stream[1:])
    return [
        Row(padded[i * length : (i + 1) * length + 1], mask[i * length : (i + 1) * length])
        for i in range(count)
    ]
