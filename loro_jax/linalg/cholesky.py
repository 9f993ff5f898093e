"""Cholesky factorisation with the inverse of the factor, recursive on CPU.

On CPU the matrix is halved until the blocks are small::

    [G_1    .  ]   [L_1       ] [L_1       ]^T         L_21 = G_21 L_1^{-T}
    [G_21  G_2 ] = [L_21  L_2 ] [L_21  L_2 ]           L_2 L_2^T = G_2 - L_21 L_21^T

and the inverse has ``-L_2^{-1} L_21 L_1^{-1}`` below its diagonal. With the inverses of the blocks,
no triangular system has to be solved, and the blocks are too small for OpenBLAS (the LAPACK that
JAX calls on CPU) to use its threads. These would spin after each call on the cores that XLA's
threads need: blocks of 128 rows, which use them, make the exact step of a layer of LLaMA 1B a third
slower. The price is compilation, once a rank; other platforms, where this was not measured,
factorise the whole matrix.

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

# Rows of the largest block given to LAPACK, unless that makes more than MOST_BLOCKS blocks, each of
# which is compiled separately. OpenBLAS uses one thread up to about 200 rows, more than the 2 x 64
# of a block with its identity (see _small).
LARGEST_BLOCK = 64
MOST_BLOCKS = 8


class Cholesky(NamedTuple):
    """``G = L L^T`` with the inverse of L."""

    L: Array
    inverse: Array
    scaled_inverse_norm: Array  # |L^{-1}| (Frobenius) for G scaled to unit diagonal


def cholesky_with_inverse(G: Array, shift: float = 0.0) -> Cholesky:
    """Factorises the matrix after scaling it to unit diagonal and adding ``shift``.

    Args:
        G: symmetric matrix (r, r), float32 or wider; entries above the diagonal are not read.
        shift: added to the diagonal of the scaled matrix.

    Returns:
        The factor and its inverse, both lower triangular; NaN if the shifted matrix is not positive
        definite.

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
    """Factorises G as a whole; returns the factor and its inverse."""
    L = jnp.linalg.cholesky(G, symmetrize_input=False)
    return L, solve_triangular(L, jnp.eye(G.shape[0], dtype=G.dtype), lower=True)


def _by_halves(G: Array) -> tuple[Array, Array]:
    """Factorises G by recursive halving; returns the factor and its inverse."""
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
    """Factorises ``[[G, I], [I, .]]``, whose factor contains both L and ``L^{-T}``.

    OpenBLAS would use threads to solve for the inverse, however small the matrix is.
    """
    r = G.shape[0]
    identity = jnp.eye(r, dtype=G.dtype)
    # Any block that keeps the matrix positive definite works: L and L^{-T} don't depend on it.
    G_and_more = jnp.block([[G, identity], [identity, 1e30 * identity]])
    L = jnp.linalg.cholesky(G_and_more, symmetrize_input=False)
    return L[:r, :r], L[r:, :r].T
