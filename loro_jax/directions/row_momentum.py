"""Momentum normalised by rows, for embedding and head: one scale for each token's vector.

A row of an embedding or a head (V x d) is a token's vector. One array as large as the parameters is
kept; Adam keeps two.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from loro_jax.checks import check_orthogonalised_momentum
from loro_jax.linalg.precision import at_least_float32

Array = jax.Array


class RowsState(NamedTuple):
    """State of :func:`scale_by_rows`.

    Attributes:
        mu: averaged gradients, a tree like the parameters, float32 or wider.
    """

    mu: Any


def scale_by_rows(momentum: float = 0.95, *, nesterov: bool = True) -> optax.GradientTransformation:
    """Divides each row of averaged gradients by its root mean square.

    Args:
        momentum: decay of the averaged gradients.
        nesterov: whether to use Nesterov momentum.

    Returns:
        An ``optax.GradientTransformation`` for matrices; rows of zeros stay zero.

    Raises:
        ValueError: for a ``momentum`` outside [0, 1).

    Example:
        >>> import jax.numpy as jnp
        >>> tx = scale_by_rows()
        >>> grads = jnp.array([[3.0, 3.0], [0.0, 0.0]])
        >>> moves, state = tx.update(grads, tx.init(grads))
        >>> [[round(float(x), 3) for x in row] for row in moves]
        [[1.0, 1.0], [0.0, 0.0]]
    """
    check_orthogonalised_momentum("scale_by_rows", momentum, 1)

    def average(old: Array, grad: Array) -> Array:
        return momentum * old + (1 - momentum) * grad.astype(old.dtype)

    def normalised(ahead: Array, grad: Array) -> Array:
        # By the largest entry first: squares of a momentum that decays for long underflow.
        largest = jnp.max(jnp.abs(ahead), axis=-1, keepdims=True)
        rows = ahead / jnp.where(largest > 0, largest, 1)
        size = jnp.sqrt(jnp.mean(jnp.square(rows), axis=-1, keepdims=True))
        return (rows / jnp.where(size > 0, size, 1)).astype(grad.dtype)

    def init(params: Any) -> RowsState:
        return RowsState(jax.tree.map(_wide_zeros, params))

    def update(grads: Any, state: RowsState, params: Any = None) -> tuple[Any, RowsState]:
        del params
        mu = jax.tree.map(average, state.mu, grads)
        ahead = jax.tree.map(average, mu, grads) if nesterov else mu
        return jax.tree.map(normalised, ahead, grads), RowsState(mu)

    return optax.GradientTransformation(init, update)


def _wide_zeros(p: Array) -> Array:
    return jnp.zeros_like(p, dtype=at_least_float32(p.dtype))
