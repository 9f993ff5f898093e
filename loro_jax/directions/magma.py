"""Magma: skips updates of matrices at random, and shortens those against the gradient.

At each step every matrix of a direction is kept with probability one half, times a running mean s
of how well momentum and gradient agree: ``s <- 0.9 s + 0.1 sigmoid(cos(momentum, gradient) / 2)``.
The direction's own state does not notice: momentum averages all gradients. s is close to one half,
so the moves of a step are a quarter of the direction's on average.

Source: Joo, Xia, Kim, Zhang and Ie, "On surprising effectiveness of masking updates in adaptive
optimizers", arXiv 2602.15322, 2026.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from loro_jax.directions.protocol import Direction
from loro_jax.linalg.precision import at_least_float32
from loro_jax.pairs import Pairs

Array = jax.Array

_AGREEMENT_DECAY = 0.9


class MagmaState(NamedTuple):
    """State of :func:`magma`.

    Attributes:
        inner: state of the direction.
        agreement: s of each matrix, a tree like the parameters, (..., 1, 1).
        key: the random key of the next step, as two numbers: an array that a checkpoint can hold
            and that members of an ensemble may share.
    """

    inner: Any
    agreement: Any
    key: Array


def magma(
    direction: Direction, *, keep: float = 0.5, tau: float = 2.0, seed: int | Array = 0
) -> Direction:
    """Returns a direction with Magma's mask.

    Args:
        direction: any direction whose state has a first moment ``mu``.
        keep: probability that a matrix moves in a step.
        tau: temperature of the sigmoid.
        seed: seed of the mask, a number or a key.

    Returns:
        A direction of the same kind, with the same ``lr_scale``.

    Raises:
        ValueError: for a ``keep`` outside (0, 1], a ``tau`` of 0 or less; from ``init``, for a
            direction without a first moment.

    Example:
        >>> import jax.numpy as jnp
        >>> from loro_jax import LowRank, loro, orthogonal
        >>> params = {"w": LowRank(jnp.ones((6, 2)), jnp.eye(2, 4))}
        >>> tx = loro(0.01, direction=magma(orthogonal()), lr_scale=4.0, exact_every=None)
        >>> updates, state = tx.update(params, tx.init(params), params)
    """
    if isinstance(keep, float | int) and not 0 < keep <= 1:
        raise ValueError(f"magma: keep must be above 0 and at most 1, but is {keep}.")
    if isinstance(tau, float | int) and tau <= 0:
        raise ValueError(f"magma: tau must be above 0, but is {tau}.")

    def init(params: Any) -> MagmaState:
        inner = direction.init(params)
        if not hasattr(inner, "mu"):
            raise ValueError(
                f"magma: the state of the direction must have mu, but is a {type(inner).__name__}."
            )
        # One half is the value for a gradient that is orthogonal to the momentum.
        agreement = jax.tree.map(lambda p: jnp.full_like(_sum(p), 0.5), params)
        is_key = jnp.issubdtype(getattr(seed, "dtype", jnp.int32), jax.dtypes.prng_key)
        key: Any = seed if is_key else jax.random.key(seed)
        return MagmaState(inner, agreement, jax.random.key_data(key))

    def update(
        grads: Any, state: MagmaState, params: Any, pairs: Pairs, **extra_args: Any
    ) -> tuple[Any, MagmaState]:
        moves, inner = direction.update(grads, state.inner, params, pairs, **extra_args)
        agreement = jax.tree.map(
            lambda s, mu, g: (
                _AGREEMENT_DECAY * s + (1 - _AGREEMENT_DECAY) * jax.nn.sigmoid(_cosine(mu, g) / tau)
            ),
            state.agreement,
            inner.mu,
            grads,
        )
        leaves, structure = jax.tree.flatten(agreement)
        key, *keys = jax.random.split(jax.random.wrap_key_data(state.key), 1 + len(leaves))
        masked = [
            jnp.where(jax.random.bernoulli(one, keep, s.shape), s, 0)
            for one, s in zip(keys, leaves, strict=True)
        ]
        factors = jax.tree.unflatten(structure, masked)
        moves = jax.tree.map(lambda move, s: (s * move).astype(move.dtype), moves, factors)
        return moves, MagmaState(inner, agreement, jax.random.key_data(key))

    # Not as an Adam, whose directions would be computed from its moments, without the mask.
    return Direction(init, update, direction.kind, direction.lr_scale)


def _cosine(x: Array, y: Array) -> Array:
    norms = jnp.sqrt(_sum(x * x) * _sum(y * y))
    return jnp.where(norms > 0, _sum(x * y) / jnp.where(norms > 0, norms, 1), 0)


def _sum(x: Array) -> Array:
    """Returns sums over each matrix of a stack, (..., 1, 1), in float32 or wider."""
    axes = (-2, -1) if x.ndim > 1 else None
    return jnp.sum(x, axis=axes, keepdims=True, dtype=at_least_float32(x.dtype))
