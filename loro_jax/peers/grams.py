"""Division of a factor's directions by the Gram matrix of the other factor."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from loro_jax.linalg.batching import one_by_one
from loro_jax.linalg.cholesky import cholesky_with_inverse
from loro_jax.linalg.precision import at_least_float32, matmul

Array = jax.Array


def divide_by_grams(
    B: Array, A: Array, g_B: Array, g_A: Array, damping: jax.typing.ArrayLike
) -> tuple[Array, Array]:
    """Returns ``g_B (A A^T + damping I)^-1`` and ``(B^T B + damping I)^-1 g_A``.

    Shapes are (..., m, r) and (..., r, n); computed and returned in float32 or wider. Zero factors
    and zero damping give finite results: see
    :func:`loro_jax.peers.preconditioned.scale_by_preconditioner`.

    Example:
        >>> import jax.numpy as jnp
        >>> B, A = jnp.eye(3, 2), 2 * jnp.eye(2, 4)
        >>> d_B, d_A = divide_by_grams(B, A, B, A, 0.0)
        >>> round(float(d_B[0, 0]), 5), round(float(d_A[0, 0]), 5)
        (0.25, 2.0)
    """

    def divide(B: Array, A: Array, g_B: Array, g_A: Array, damping: Array) -> tuple[Array, Array]:
        # With (A A^T + damping I)^-1 = X^T X a division is two products, which unlike triangular
        # solves run at full speed on all devices.
        root_A = _inverse_root(matmul(A, A.T), damping)
        root_B = _inverse_root(matmul(B.T, B), damping)
        return (
            matmul(matmul(g_B, root_A.T), root_A),
            matmul(root_B.T, matmul(root_B, g_A)),
        )

    return _on_single_pairs(divide, B, A, g_B, g_A, damping)


def _inverse_root(gram: Array, damping: Array) -> Array:
    """Returns X with ``X^T X = (gram + damping I)^-1``."""
    r = gram.shape[0]
    damped = gram + damping * jnp.eye(r, dtype=gram.dtype)
    # Rounding may make eigenvalues near zero negative; the shift is larger than that.
    return cholesky_with_inverse(damped, shift=r * float(jnp.finfo(gram.dtype).eps)).inverse


def _on_single_pairs(
    fn: Callable, B: Array, A: Array, g_B: Array, g_A: Array, damping: jax.typing.ArrayLike
) -> tuple[Array, Array]:
    dtype = at_least_float32(jnp.result_type(B, A))
    matrices = (x.astype(dtype) for x in (B, A, g_B, g_A))
    # As one argument per pair: the mapped function must not close over traced values.
    dampings = jnp.broadcast_to(jnp.asarray(damping, dtype), B.shape[:-2])
    result: tuple[Array, Array] = one_by_one(fn, B.ndim - 2)(*matrices, dampings)
    return result
