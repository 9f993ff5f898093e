"""The perplexity that the evaluators of published tables would have printed.

The evaluator that GaLore, LORO, SLTrain, Fira, APOLLO, CoLA and others have in common starts its
batch counter at 1 and increments it once per batch, so that the sum of the batches' mean losses is
divided by one more than their number n: a loss of n / (n + 1) times the mean. It also averages the
means of batches, which differ in tokens. FRUGAL's starts at 0 and divides by n.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np


class Published(NamedTuple):
    """What such an evaluator would print.

    Attributes:
        perplexity: the perplexity.
        batches: n, the number of batches.
    """

    perplexity: float
    batches: int


def published(loss_sums: np.ndarray, tokens: np.ndarray) -> Published:
    """Computes the perplexity from the losses of the batches of an evaluation.

    Args:
        loss_sums: sum of each batch's losses in nats, (n,).
        tokens: tokens of each batch that count, (n,); batches without any are left out.

    Returns:
        The perplexity, and n.

    Example:
        >>> found = published(np.array([30.0, 8.0]), np.array([10.0, 4.0]))
        >>> found.batches, round(math.log(found.perplexity), 4)  # (3 + 2) / (2 + 1)
        (2, 1.6667)
    """
    counted = tokens > 0
    means = loss_sums[counted] / tokens[counted]
    loss = float(np.sum(means)) / (len(means) + 1)
    return Published(math.exp(loss), len(means))
