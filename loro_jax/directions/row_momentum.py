"""Momentum normalised by rows, for embedding and head: one scale for each token's vector.

* :func:`scale_by_rows`: averaged gradients whose rows all have a root mean square of one;
* :func:`scale_by_row_adam`: Adam with one second moment for each row, the mean square of the row's
  gradient. Rows of tokens that do not occur come to rest as their momentum decays, as in Adam.

Both need one array as large as the parameters; Adam needs two. A row of an embedding or a head
(V x d) is a token's vector.

Source: one second moment for each token is from Zhang et al., "Adam-mini", arXiv 2406.16793, 2024.
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


class RowAdamState(NamedTuple):
    """State of :func:`scale_by_row_adam`.

    Attributes:
        count: steps taken, int32 scalar.
        mu: first moments, a tree like the parameters, float32 or wider.
        nu: second moments of rows, (..., m, 1).
    """

    count: Array  # type: ignore[assignment]  # shadows tuple.count, as in Optax
    mu: Any
    nu: Any


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


def scale_by_row_adam(
    b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8
) -> optax.GradientTransformation:
    """Rescales gradients by Adam with one second moment for each row.

    Args:
        b1: decay of the first moment.
        b2: decay of the second moments.
        eps: added to the root of the corrected second moment.

    Returns:
        An ``optax.GradientTransformation`` for matrices.

    Example:
        >>> import jax.numpy as jnp
        >>> tx = scale_by_row_adam()
        >>> grads = jnp.array([[1.0, 7.0], [0.0, 0.0]])
        >>> moves, state = tx.update(grads, tx.init(grads))
        >>> [[round(float(x), 3) for x in row] for row in moves], state.nu.shape
        ([[0.2, 1.4], [0.0, 0.0]], (2, 1))
    """

    def init(params: Any) -> RowAdamState:
        mu = jax.tree.map(_wide_zeros, params)
        return RowAdamState(
            jnp.zeros([], jnp.int32), mu, jax.tree.map(lambda m: jnp.zeros_like(m[..., :1]), mu)
        )

    def update(grads: Any, state: RowAdamState, params: Any = None) -> tuple[Any, RowAdamState]:
        del params
        count = optax.safe_increment(state.count)
        wide = jax.tree.map(lambda g, m: g.astype(m.dtype), grads, state.mu)
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, wide)
        nu = jax.tree.map(
            lambda v, g: b2 * v + (1 - b2) * jnp.mean(jnp.square(g), axis=-1, keepdims=True),
            state.nu,
            wide,
        )
        first, second = (optax.tree.bias_correction(x, b, count) for x, b in ((mu, b1), (nu, b2)))
        moves = jax.tree.map(
            lambda m, v, g: (m / (jnp.sqrt(v) + eps)).astype(g.dtype), first, second, grads
        )
        return moves, RowAdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def _wide_zeros(p: Array) -> Array:
    return jnp.zeros_like(p, dtype=at_least_float32(p.dtype))
