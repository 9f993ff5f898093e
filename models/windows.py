"""Sliding-window perplexity of texts that are longer than the model's context.

Windows of ``length`` tokens start every ``stride`` tokens; each predicts the tokens that no earlier
window has predicted. With disjoint windows (stride = length), the first tokens of a window have
little context; with sliding ones (stride < length), every token but the first few has at least
``length - stride`` tokens of context, for ``length / stride`` times the work.
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
    """Score of a text.

    Attributes:
        nats: sum of the cross-entropies.
        tokens: number of predicted tokens.
    """

    nats: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """``exp(nats / tokens)``; infinite on overflow."""
        try:
            return math.exp(self.nats / self.tokens)
        except OverflowError:
            return math.inf


def windows(
    stream: np.ndarray, length: int, stride: int, counted: np.ndarray | None = None
) -> Iterator[Batch]:
    """Yields windows over a stream that together predict every token but the first exactly once.

    Args:
        stream: token ids, (n,), at least two.
        length: inputs per window.
        stride: tokens between the starts of two windows, at most ``length``.
        counted: which tokens of the stream count as targets, bool (n,); None: all.

    Yields:
        Batches of one row, (1, length); the last one is padded.

    Raises:
        ValueError: for a stream of fewer than two tokens, or a stride outside 1 to ``length``.

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
    predicted = 1  # the first token has no context
    start = 0
    while predicted < len(stream):
        tokens = np.zeros(length + 1, np.int32)
        part = stream[start : start + length + 1]
        tokens[: len(part)] = part
        mask = np.zeros(length, np.float32)
        # Only targets that no earlier window has predicted count.
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

    Windows and batches are shrunk for short streams, to take no more memory than needed.

    Args:
        model: the model.
        stream: token ids, (n,), at least two.
        length: inputs per window.
        stride: tokens between the starts of two windows.
        batch_size: upper bound on the windows per batch.
        counted: which tokens count, bool (n,); None: all.

    Returns:
        The score of the counted tokens, without the first token of the stream.

    Raises:
        ValueError: as :func:`windows`, and for windows longer than the model accepts.

    Example:
        >>> from models import LlamaConfig
        >>> config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_layers=2,
        ...                      num_heads=4, rank=8)
        >>> found = score(Llama(config, nnx.Rngs(0)), np.arange(50), length=16, stride=8)
        >>> found.tokens, 55 < found.perplexity < 75
        (49, True)
    """
    if len(stream) > 1 and 1 <= stride <= length:
        # A short text is one short window; few windows make a smaller batch.
        if len(stream) - 1 <= length:
            length = len(stream) - 1
            stride = min(stride, length)
        # The number of windows: the first, and one for each begun stride of what it leaves.
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
