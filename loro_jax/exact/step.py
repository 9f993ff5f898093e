"""Common parts of all exact steps: step size, result, trust region and damping."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from loro_jax.linalg.cholesky import cholesky_with_inverse
from loro_jax.linalg.precision import matmul

Array = jax.Array


class StepSize(NamedTuple):
    """Size of an exact step; scalars, or one value per pair of a batch.

    Attributes:
        rate: the learning rate.
        max_move: trust region, an upper bound on ``rate |grad| / |W|``; None: no bound.
        damping: d, which replaces the inverses of ``B^T B`` and ``A A^T`` in the gradient by those
            of ``B^T B + d |B|^2 / r I`` and ``A A^T + d |A|^2 / r I``; None: no damping.
    """

    rate: Any
    max_move: Any | None = None
    damping: Any | None = None


class Batch(NamedTuple):
    """Pairs of one shape, with their directions; N of them, or one without the leading axis.

    Attributes:
        B: (N, m, r).
        A: (N, r, n).
        dB: directions of B, (N, m, r).
        dA: directions of A, (N, r, n).
        size: a step size for each pair, shapes (N,).
    """

    B: Array
    A: Array
    dB: Array
    dA: Array
    size: StepSize


class ExactStep(NamedTuple):
    """Result of an exact step.

    Attributes:
        B: new output-side factor.
        A: new input-side factor.
        ok: whether the result is accurate; always true for the reference. By the default method
            the factors are the old ones where it is false.
    """

    B: Array
    A: Array
    ok: Array


def limited_rate(size: StepSize, grad_norm: Array, W_norm: Array) -> Array:
    """Limits the learning rate so that ``rate |grad| <= max_move |W|`` (Frobenius norms)."""
    if size.max_move is None:
        return size.rate
    # A zero gradient gives a huge bound, so the rate is not limited.
    bound = size.max_move * W_norm / jnp.maximum(grad_norm, jnp.finfo(grad_norm.dtype).tiny)
    return jnp.minimum(size.rate, bound)


def damped_inverse(L: Array, inverse: Array, damping: Array | None) -> Array:
    """Returns ``L^T (L L^T + mu I)^{-1}``, ``mu = damping |L|^2 / r``; ``L^{-1}`` if undamped.

    For a factor ``X = L Q`` with orthonormal Q, it maps gradients ``X G`` of the factor to ``Q G``.
    """
    if damping is None:
        return inverse
    r = L.shape[0]
    mu = damping * jnp.sum(L**2) / r
    # With K K^T = L L^T + mu I and root = K^{-1}, the inverse is root^T root.
    root = cholesky_with_inverse(matmul(L, L.T) + mu * jnp.eye(r, dtype=L.dtype)).inverse
    return matmul(matmul(root, L).T, root)
