"""Converts rows of tokens to the model's batches."""

from __future__ import annotations

import numpy as np

from loro_jax.text import Corpus
from models.loss import Batch


def to_batch(tokens: np.ndarray, mask: np.ndarray) -> Batch:
    """Returns inputs and targets of rows of L + 1 tokens.

    Args:
        tokens: ids, int32 (b, L + 1).
        mask: float32 (b, L).

    Returns:
        The batch.

    Example:
        >>> batch = to_batch(np.array([[5, 6, 7]]), np.ones((1, 2), np.float32))
        >>> batch.inputs.tolist(), batch.targets.tolist()
        ([[5, 6]], [[6, 7]])
    """
    return Batch(inputs=tokens[:, :-1], targets=tokens[:, 1:], mask=mask)


def validation_batches(corpus: Corpus, batch_size: int) -> list[Batch]:
    """Returns the validation set in batches of one shape; the last is padded with masked rows.

    Args:
        corpus: the run's corpus.
        batch_size: rows per batch.

    Returns:
        The batches.
    """
    tokens, mask = corpus.validation_tokens, corpus.validation_mask
    filler = -len(tokens) % batch_size
    # The filler is a valid row whose mask is zero: one shape, one compilation.
    tokens = np.concatenate([tokens, np.repeat(tokens[:1], filler, axis=0)])
    mask = np.concatenate([mask, np.zeros((filler, mask.shape[1]), np.float32)])
    return [
        to_batch(tokens[i : i + batch_size], mask[i : i + batch_size])
        for i in range(0, len(tokens), batch_size)
    ]
