"""What all exact steps share: their size, their result and their damping."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from loro_jax.linalg.cholesky import cholesky_with_inverse
from loro_jax.linalg.precision import matmul

Array = jax.Array


class StepSize(NamedTuple):
    """How far an exact step goes; scalars, or one of each for every pair of a batch.

    Attributes:
        rate: the learning rate.
        max_move: trust region, a bound on ``rate |grad| / |W|``; None for none.
        damping: with a damping d, the inverses of ``B^T B`` and ``A A^T`` in the gradient become
            those of ``B^T B + d |B|^2 / r I`` and ``A A^T + d |A|^2 / r I``; None for none.
    """

    rate: Any
    max_move: Any | None = None
    damping: Any | None = None


class ExactStep(NamedTuple):
    """Result of an exact step.

    Attributes:
        B: new output-side factor.
        A: new input-side factor.
        ok: whether the method trusts it; always true for the reference.
    """

    B: Array
    A: Array
    ok: Array


def limited_rate(size: StepSize, grad_norm: Array, W_norm: Array) -> Array:
    """The learning rate, cut so that ``rate |grad| <= max_move |W|`` (Frobenius norms)."""
    if size.max_move is None:
        return size.rate
    bound = size.max_move * W_norm / jnp.maximum(grad_norm, jnp.finfo(grad_norm.dtype).tiny)
    return jnp.minimum(size.rate, bound)


def damped_inverse(L: Array, inverse: Array, damping: Array | None) -> Array:
    """``L^T (L L^T + mu I)^{-1}`` with ``mu = damping |L|^2 / r``; ``L^{-1}`` without damping.

    With ``X = L Q`` and Q orthonormal it takes gradients of the factor, ``X G``, to ``Q G``.
    """
    if damping is None:
        return inverse
    r = L.shape[0]
    mu = damping * jnp.sum(L**2) / r
    root = cholesky_with_inverse(matmul(L, L.T) + mu * jnp.eye(r, dtype=L.dtype)).inverse
    return matmul(matmul(root, L).T, root)
