"""Perplexity of unigram and bigram models, the baselines that a network has to beat."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

# Absolute discount of Kneser-Ney smoothing; 0.75 is the usual value.
DISCOUNT = 0.75


class NgramPerplexity(NamedTuple):
    """Perplexities on held-out tokens.

    Attributes:
        unigram: tokens drawn by frequency, add-one smoothed.
        bigram: each token given the one before, interpolated Kneser-Ney.
    """

    unigram: float
    bigram: float


def ngram_perplexity(
    train_N: np.ndarray, inputs_M: np.ndarray, targets_M: np.ndarray, vocab_size: int
) -> NgramPerplexity:
    """Fits both models on a token stream and scores (input, target) pairs of another.

    Args:
        train_N: training ids in order, int (N,).
        inputs_M: the token before each scored one, int (M,).
        targets_M: the scored tokens, int (M,).
        vocab_size: number of ids V.

    Returns:
        Perplexity of each model over the targets.

    Example:
        >>> import numpy as np
        >>> text = np.array([0, 1, 0, 1, 0, 1, 0, 1, 0, 1])
        >>> score = ngram_perplexity(text, text[:-1], text[1:], vocab_size=2)
        >>> round(score.unigram, 2), score.bigram < 1.3
        (2.0, True)
    """
    train_N = np.asarray(train_N, np.int64)
    # Add-one smoothing: no held-out token has probability zero.
    counts_V = np.bincount(train_N, minlength=vocab_size) + 1.0
    unigram_M = counts_V[targets_M] / counts_V.sum()

    # Bigrams as single sorted integers, for lookup by bisection.
    bigrams, bigram_counts = np.unique(train_N[:-1] * vocab_size + train_N[1:], return_counts=True)
    contexts, followers = np.divmod(bigrams, vocab_size)
    context_counts_V = np.bincount(train_N[:-1], minlength=vocab_size)
    distinct_followers_V = np.bincount(contexts, minlength=vocab_size)
    # Kneser-Ney's lower order: the number of contexts a token follows; 0.5 avoids zeros.
    continuation_V = np.bincount(followers, minlength=vocab_size) + 0.5
    continuation_V /= continuation_V.sum()

    keys_M = np.asarray(inputs_M, np.int64) * vocab_size + targets_M
    # Keys beyond the last bigram are compared with it, and don't match.
    places_M = np.minimum(np.searchsorted(bigrams, keys_M), len(bigrams) - 1)
    found_M = np.where(bigrams[places_M] == keys_M, bigram_counts[places_M], 0)
    contexts_M = context_counts_V[inputs_M]
    seen_M = np.maximum(contexts_M, 1)
    # Interpolated Kneser-Ney: what the discount takes from seen followers goes to all tokens, by
    # the number of contexts they follow.
    bigram_M = (
        np.maximum(found_M - DISCOUNT, 0)
        + DISCOUNT * distinct_followers_V[inputs_M] * continuation_V[targets_M]
    ) / seen_M
    # After a context that was never seen only the lower order is left.
    bigram_M = np.where(contexts_M > 0, bigram_M, continuation_V[targets_M])
    return NgramPerplexity(_perplexity(unigram_M), _perplexity(bigram_M))


def _perplexity(probabilities_M: np.ndarray) -> float:
    return math.exp(-float(np.mean(np.log(probabilities_M))))
