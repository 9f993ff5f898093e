"""Perplexity of a text that is longer than what a model takes at once: by windows.

Windows of ``length`` tokens start every ``stride`` tokens; each predicts the tokens that no window
before it has. Blocked (stride = length), the first tokens of a window have little to go by; sliding
(less), every token but the first few has at least ``length - stride`` before it, at the price of
``length / stride`` times the work.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from models.llama import Llama
from models.loss import Batch, next_token_loss


class Score(NamedTuple):
    """How well a text was predicted.

    Attributes:
        nats: sum of the cross-entropies.
        tokens: how many were predicted.
    """

    nats: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """``exp(nats / tokens)``; infinite where that is beyond the largest float."""
        try:
            return math.exp(self.nats / self.tokens)
        except OverflowError:
            return math.inf


def windows(
    stream: np.ndarray, length: int, stride: int, counted: np.ndarray | None = None
) -> Iterator[Batch]:
    """Windows of a stream, the last one padded, that predict every token but the first once.

    Args:
        stream: token ids, (n,), at least two.
        length: inputs of a window.
        stride: tokens between the starts of two windows, at most ``length``.
        counted: which tokens of the stream count when they are predicted, bool (n,); None: all.

    Yields:
        Batches of one row, (1, length).

    Raises:
        ValueError: for a stream too short, or a stride outside 1 to ``length``.

    Example:
        >>> import numpy as np
        >>> for window in windows(np.arange(6), length=3, stride=2):
        ...     print(window.inputs[0], window.targets[0] * window.mask[0].astype(int))
        [0 1 2] [1 2 3]
        [2 3 4] [0 4 5]
    """
    if len(stream) < 2:
        raise ValueError(f"windows: expected at least two tokens, but there are {len(stream)}.")
    if not 1 <= stride <= length:
        raise ValueError(f"windows: stride must be between 1 and {length}, but is {stride}.")
    predicted = 1  # the first token has nothing before it
    start = 0
    while predicted < len(stream):
        tokens = np.zeros(length + 1, np.int32)
        part = stream[start : start + length + 1]
        tokens[: len(part)] = part
        mask = np.zeros(length, np.float32)
        new = slice(predicted - start - 1, len(part) - 1)
        mask[new] = 1.0 if counted is None else counted[predicted : start + len(part)]
        yield Batch(tokens[None, :-1], tokens[None, 1:], mask[None])
        predicted = start + len(part)
        start += stride


@functools.partial(jax.jit, static_argnums=0)
def _nats(graphdef: Any, state: Any, batch: Batch) -> jax.Array:
    return next_token_loss(nnx.merge(graphdef, state), batch)


def score(
    model: Llama,
    stream: np.ndarray,
    length: int,
    stride: int,
    batch_size: int = 8,
    counted: np.ndarray | None = None,
) -> Score:
    """Scores a stream by windows.

    A stream shorter than a window, or of fewer windows than a batch, takes no more memory than it
    needs.

    Args:
        model: the model.
        stream: token ids, (n,), at least two.
        length: inputs of a window.
        stride: tokens between the starts of two windows.
        batch_size: windows at a time, at most.
        counted: which tokens count, bool (n,); None: all.

    Returns:
        The score of the tokens that count, but for the first.

    Raises:
        ValueError: as :func:`windows`, and for windows longer than the model takes.

    Example:
        >>> from models import LlamaConfig
        >>> config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_layers=2,
        ...                      num_heads=4, rank=8)
        >>> found = score(Llama(config, nnx.Rngs(0)), np.arange(50), length=16, stride=8)
        >>> found.tokens, 55 < found.perplexity < 75
        (49, True)
    """
    if len(stream) > 1 and 1 <= stride <= length:
        # A text shorter than a window is one shorter window; of few windows, a smaller batch.
        if len(stream) - 1 <= length:
            length = len(stream) - 1
            stride = min(stride, length)
        batch_size = min(batch_size, -(-max(len(stream) - 1 - length, 0) // stride) + 1)
    graphdef, state = nnx.split(model)
    rows: list[Batch] = []
    total, tokens = 0.0, 0

    def flush() -> float:
        nothing = rows[0]._replace(mask=np.zeros_like(rows[0].mask))
        full = rows + [nothing] * (batch_size - len(rows))  # one shape, one compilation
        batch = Batch(*(np.concatenate(field) for field in zip(*full, strict=True)))
        rows.clear()
        return float(_nats(graphdef, state, batch))

    for row in windows(stream, length, stride, counted):
        rows.append(row)
        tokens += int(row.mask.sum())
        if len(rows) == batch_size:
            total += flush()
    if rows:
        total += flush()
    return Score(total, tokens)
