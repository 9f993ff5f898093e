"""The next token from its logits: the likeliest, or drawn."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array


class Sampling(NamedTuple):
    """How tokens are drawn.

    Attributes:
        temperature: logits are divided by it; 0: always the likeliest token.
        top_k: draw among this many of the likeliest; 0: among all.
        top_p: draw among the likeliest that together have this probability; 1: among all.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def validate(self) -> None:
        """Raises ValueError, naming field, value and what was expected."""
        if not 0 <= self.temperature < math.inf:
            raise ValueError(
                f"temperature must be at least 0 and finite, but is {self.temperature}."
            )
        if self.top_k < 0:
            raise ValueError(f"top_k must be at least 0, but is {self.top_k}.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, but is {self.top_p}.")


GREEDY = Sampling(temperature=0.0)


def restricted_logits(logits_BxV: Array, sampling: Sampling) -> Array:
    """Logits over the temperature, minus infinity where a token may not be drawn.

    First the ``top_k``, then among these the ``top_p``, as in Hugging Face's transformers. Holtzman
    et al. (arXiv 1904.09751) introduce ``top_p``.

    Args:
        logits_BxV: float32.
        sampling: with a temperature above 0.

    Returns:
        Array like ``logits_BxV``.

    Example:
        >>> import jax.numpy as jnp
        >>> logits = jnp.log(jnp.array([[0.1, 0.6, 0.3]]))
        >>> jnp.isfinite(restricted_logits(logits, Sampling(top_p=0.8))).tolist()
        [[False, True, True]]
    """
    least = float(jnp.finfo(logits_BxV.dtype).tiny)  # below it, a number may count as 0
    logits_BxV = logits_BxV / max(sampling.temperature, least)
    if 0 < sampling.top_k < logits_BxV.shape[-1]:
        least_Bx1 = jax.lax.top_k(logits_BxV, sampling.top_k)[0][:, -1:]
        logits_BxV = jnp.where(logits_BxV < least_Bx1, -jnp.inf, logits_BxV)
    if sampling.top_p < 1:
        order_BxV = jnp.argsort(-logits_BxV, axis=-1)
        sorted_BxV = jnp.take_along_axis(logits_BxV, order_BxV, axis=-1)
        shares_BxV = jax.nn.softmax(sorted_BxV)
        likelier_BxV = jnp.cumsum(shares_BxV, axis=-1) - shares_BxV
        kept_BxV = likelier_BxV < sampling.top_p  # what is likelier does not suffice
        ranks_BxV = jnp.argsort(order_BxV, axis=-1)
        kept_BxV = jnp.take_along_axis(kept_BxV, ranks_BxV, axis=-1)
        logits_BxV = jnp.where(kept_BxV, logits_BxV, -jnp.inf)
    return logits_BxV


def next_tokens(logits_BxV: Array, sampling: Sampling, key: Array) -> Array:
    """A token for each row, int32 (B,).

    Args:
        logits_BxV: float32.
        sampling: how.
        key: a random key.

    Returns:
        Token ids.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> next_tokens(jnp.array([[0.0, 2.0, 1.0]]), GREEDY, jax.random.key(0))
        Array([1], dtype=int32)
    """
    if sampling.temperature == 0:
        return jnp.argmax(logits_BxV, axis=-1).astype(jnp.int32)
    # The highest is moved to 0, so that no temperature, however low, makes infinities of it.
    logits_BxV = logits_BxV - jnp.max(logits_BxV, axis=-1, keepdims=True)
    return jax.random.categorical(key, restricted_logits(logits_BxV, sampling)).astype(jnp.int32)
