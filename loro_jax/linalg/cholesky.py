"""Cholesky factorisation with the inverse of the factor, on CPU made of matrix products.

There the matrix is halved until the blocks are small::

    [G_1    .  ]   [L_1       ] [L_1       ]^T         L_21 = G_21 L_1^{-T}
    [G_21  G_2 ] = [L_21  L_2 ] [L_21  L_2 ]           L_2 L_2^T = G_2 - L_21 L_21^T

and the inverse has ``-L_2^{-1} L_21 L_1^{-1}`` below its diagonal. As the inverses of the blocks
are there, no triangular system is solved; and what LAPACK gets is too small for OpenBLAS (the one
that JAX calls on CPU) to wake its threads. Those go on waiting for work when theirs is done, on the
cores that XLA's threads need: blocks of 128 rows, which wake them, make the exact step of a layer
of LLaMA 1B a third slower. The price is compilation, 11 seconds more for the step of 1B; so other
platforms, where none of this was measured, factorise the matrix as a whole.

Source: Du Croz and Higham, "Stability of methods for matrix inversion", IMA J. Numer. Anal. 12,
1992, for inverting by blocks; the factorisation itself is the recursive one of textbooks.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular

from loro_jax.linalg.precision import matmul

Array = jax.Array

# Rows of the largest block that is left to LAPACK, if that makes no more than so many blocks, each
# of which is compiled by itself. OpenBLAS factorises up to some 200 rows, twice as many as a block
# has, with one thread.
LARGEST_BLOCK = 64
MOST_BLOCKS = 8


class Cholesky(NamedTuple):
    """``G = L L^T`` with the inverse of L."""

    L: Array
    inverse: Array
    scaled_inverse_norm: Array  # |L^{-1}| (Frobenius) for the G scaled to a diagonal of ones


def cholesky_with_inverse(G: Array, shift: float = 0.0) -> Cholesky:
    """Cholesky factorisation by way of the matrix scaled to a diagonal of ones, plus ``shift``.

    Args:
        G: symmetric matrix (r, r), float32 or wider; what is above the diagonal is not read.
        shift: added to the diagonal of the scaled matrix.

    Returns:
        The factor and its inverse, both lower triangular; not numbers where the shifted matrix is
        not positive definite.

    Example:
        >>> import jax.numpy as jnp
        >>> L, inverse, _ = cholesky_with_inverse(jnp.array([[4.0, 2.0], [2.0, 10.0]]))
        >>> bool(jnp.allclose(L, jnp.array([[2.0, 0.0], [1.0, 3.0]])))
        True
        >>> bool(jnp.allclose(inverse @ L, jnp.eye(2)))
        True
    """
    norms = jnp.sqrt(jnp.diagonal(G))
    scale = jnp.where(norms > 0, 1 / jnp.where(norms > 0, norms, 1), 1)
    scaled = scale[:, None] * G * scale[None, :] + shift * jnp.eye(G.shape[0], dtype=G.dtype)
    L, inverse = jax.lax.platform_dependent(scaled, cpu=_by_halves, default=_whole)
    return Cholesky(L / scale[:, None], inverse * scale[None, :], jnp.linalg.norm(inverse))


def _whole(G: Array) -> tuple[Array, Array]:
    """The factor of G and its inverse."""
    L = jnp.linalg.cholesky(G, symmetrize_input=False)
    return L, solve_triangular(L, jnp.eye(G.shape[0], dtype=G.dtype), lower=True)


def _by_halves(G: Array) -> tuple[Array, Array]:
    """The same by blocks."""
    largest = max(LARGEST_BLOCK, -(-G.shape[0] // MOST_BLOCKS))

    def factorise(G: Array) -> tuple[Array, Array]:
        r = G.shape[0]
        if r <= largest:
            return _small(G)
        half = -(-r // 2)
        L_1, inverse_1 = factorise(G[:half, :half])
        L_21 = matmul(G[half:, :half], inverse_1.T)
        L_2, inverse_2 = factorise(G[half:, half:] - matmul(L_21, L_21.T))
        inverse_21 = -matmul(inverse_2, matmul(L_21, inverse_1))
        above = jnp.zeros((half, r - half), G.dtype)
        return (
            jnp.block([[L_1, above], [L_21, L_2]]),
            jnp.block([[inverse_1, above], [inverse_21, inverse_2]]),
        )

    return factorise(G)


def _small(G: Array) -> tuple[Array, Array]:
    """The same by one factorisation: that of ``[[G, I], [I, .]]`` has ``L^{-T}`` below.

    OpenBLAS would take threads to solving for the inverse, however small the matrix is.
    """
    r = G.shape[0]
    identity = jnp.eye(r, dtype=G.dtype)
    # Anything that keeps the whole positive definite would do: nothing else depends on it.
    G_and_more = jnp.block([[G, identity], [identity, 1e30 * identity]])
    L = jnp.linalg.cholesky(G_and_more, symmetrize_input=False)
    return L[:r, :r], L[r:, :r].T
