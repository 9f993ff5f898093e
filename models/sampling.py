"""Sampling of the next token from its logits."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array


class Sampling(NamedTuple):
    """Sampling parameters.

    Attributes:
        temperature: divisor of the logits; 0: greedy.
        top_k: draw among the k most likely tokens; 0: among all.
        top_p: draw among the most likely tokens that together have this probability; 1: among all.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def validate(self) -> None:
        """Raises ValueError for an invalid field; it names field, value and expectation."""
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
    """Divides logits by the temperature and masks the excluded tokens with minus infinity.

    Applies ``top_k`` first, then ``top_p`` to the remaining tokens, as Hugging Face's transformers
    does. Holtzman et al. (arXiv 1904.09751) introduce ``top_p``.

    Args:
        logits_BxV: logits, float32.
        sampling: parameters, with a temperature above 0.

    Returns:
        Array like ``logits_BxV``.

    Example:
        >>> import jax.numpy as jnp
        >>> logits = jnp.log(jnp.array([[0.1, 0.6, 0.3]]))
        >>> jnp.isfinite(restricted_logits(logits, Sampling(top_p=0.8))).tolist()
        [[False, True, True]]
    """
    least = float(jnp.finfo(logits_BxV.dtype).tiny)  # smaller numbers may be flushed to 0
    logits_BxV = logits_BxV / max(sampling.temperature, least)
    # All tokens that tie with the k-th stay, as in transformers.
    if 0 < sampling.top_k < logits_BxV.shape[-1]:
        least_Bx1 = jax.lax.top_k(logits_BxV, sampling.top_k)[0][:, -1:]
        logits_BxV = jnp.where(logits_BxV < least_Bx1, -jnp.inf, logits_BxV)
    if sampling.top_p < 1:
        # A token is kept if the more likely ones have less than top_p together, so that the one
        # that crosses top_p is included; then the order is undone.
        order_BxV = jnp.argsort(-logits_BxV, axis=-1)
        sorted_BxV = jnp.take_along_axis(logits_BxV, order_BxV, axis=-1)
        shares_BxV = jax.nn.softmax(sorted_BxV)
        likelier_BxV = jnp.cumsum(shares_BxV, axis=-1) - shares_BxV
        kept_BxV = likelier_BxV < sampling.top_p
        ranks_BxV = jnp.argsort(order_BxV, axis=-1)
        kept_BxV = jnp.take_along_axis(kept_BxV, ranks_BxV, axis=-1)
        logits_BxV = jnp.where(kept_BxV, logits_BxV, -jnp.inf)
    return logits_BxV


def next_tokens(logits_BxV: Array, sampling: Sampling, key: Array) -> Array:
    """Draws the next token of each row, int32 (B,).

    Args:
        logits_BxV: logits, float32.
        sampling: sampling parameters.
        key: random key.

    Returns:
        Token ids.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> next_tokens(jnp.array([[0.0, 2.0, 1.0]]), GREEDY, jax.random.key(0))
        Array([1], dtype=int32)
    """
    # No division: the likeliest token is the same at any temperature.
    if sampling.temperature == 0:
        return jnp.argmax(logits_BxV, axis=-1).astype(jnp.int32)
    # Shift the highest logit to 0, so that dividing by a tiny temperature does not overflow.
    logits_BxV = logits_BxV - jnp.max(logits_BxV, axis=-1, keepdims=True)
    return jax.random.categorical(key, restricted_logits(logits_BxV, sampling)).astype(jnp.int32)
