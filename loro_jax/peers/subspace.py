"""Subspaces of adaptive rank by randomised subspace iteration, and transport of moments."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from loro_jax.linalg.batching import one_by_one
from loro_jax.linalg.precision import matmul

Array = jax.Array

# Columns of the sketch beyond the rank, and subspace iterations: usual values, for which the
# subspace equals that of the SVD up to rounding if singular values decay.
_OVERSAMPLE, _ITERATIONS = 8, 2


def randomised_vectors(
    G: Array, key: Array, rank: int, oversample: int, iterations: int
) -> tuple[Array, Array]:
    """Approximates the leading left singular vectors and values of one matrix.

    Uses a Gaussian sketch of ``rank + oversample`` columns, orthonormalised after each product with
    G or its transpose, then the SVD of the small matrix ``Q^T G``. It is exact if the sketch is as
    wide as the smaller side.

    Args:
        G: (k, l) with k <= l.
        key: a JAX random key.
        rank: number of vectors.
        oversample: additional columns of the sketch.
        iterations: products with ``G G^T`` after the first product with G.

    Returns:
        (k, rank) orthonormal columns, and (rank,) singular values.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> G = jnp.diag(jnp.array([1.0, 3.0, 2.0]))
        >>> U, s = randomised_vectors(G, jax.random.key(0), 2, 1, 1)
        >>> [round(float(x), 3) for x in s]
        [3.0, 2.0]
    """
    # A wider sketch than the rank makes it unlikely that a leading direction is missed.
    width = min(rank + oversample, G.shape[0])
    Q = jnp.linalg.qr(matmul(G, jax.random.normal(key, (G.shape[1], width), G.dtype)))[0]

    def sharpened(_: Array, Q: Array) -> Array:
        # Orthonormalised after each product; otherwise all columns would turn to the first vector.
        return jnp.linalg.qr(matmul(G, jnp.linalg.qr(matmul(G.T, Q))[0]))[0]

    Q = jax.lax.fori_loop(0, iterations, sharpened, Q)
    # Q's columns span nearly the leading vectors: of G only Q^T G, which is small, is factorised.
    U, s, _ = jnp.linalg.svd(matmul(Q.T, G), full_matrices=False)
    return matmul(Q, U[:, :rank]), s[:rank]


def adaptive_rank(s: Array, total: Array, eta: float) -> Array:
    """Returns the smallest rank whose approximation loses at most ``eta`` of the squared norm.

    Args:
        s: leading singular values, (..., r) in descending order.
        total: squared Frobenius norm of the matrix, (...,).
        eta: the information threshold.

    Returns:
        int32 (...,), from 1 to r, whether or not the threshold is reached.

    Example:
        >>> import jax.numpy as jnp
        >>> s = jnp.array([3.0, 2.0, 1.0])
        >>> [int(adaptive_rank(s, jnp.sum(s**2), eta)) for eta in (0.5, 0.1, 0.05)]
        [1, 2, 3]
    """
    lost = total[..., None] - jnp.cumsum(s**2, axis=-1)
    # lost[i] is what the first i + 1 vectors lose: as many as lose too much, and one more.
    too_little = jnp.sum(lost > eta * total[..., None], axis=-1, dtype=jnp.int32)
    return jnp.clip(too_little + 1, 1, s.shape[-1])


def randomised_factors(G: Array, count: Array, rank: int) -> tuple[Array, Array]:
    """Approximates the leading left singular vectors and values of stacked matrices.

    Args:
        G: (..., k, l) with k <= l.
        count: the step, which seeds the sketch, so that the state needs no random key.
        rank: number of vectors.

    Returns:
        (..., k, rank) orthonormal columns, and (..., rank) singular values.

    Example:
        >>> import jax.numpy as jnp
        >>> _, s = randomised_factors(jnp.diag(jnp.array([1.0, 3.0, 2.0])), jnp.int32(0), 2)
        >>> [round(float(x), 3) for x in s]
        [3.0, 2.0]
    """

    def of_one(G: Array, count: Array) -> tuple[Array, Array]:
        key = jax.random.fold_in(jax.random.key(0), count)
        return randomised_vectors(G, key, rank, _OVERSAMPLE, _ITERATIONS)

    # One count per layer, because the mapped function must not close over traced values.
    counts = jnp.broadcast_to(count, G.shape[:-2])
    return one_by_one(of_one, G.ndim - 2)(G, counts)


def leading_factors(G: Array, rank: int) -> tuple[Array, Array]:
    """Computes the leading left singular vectors and values of stacked matrices.

    Example:
        >>> import jax.numpy as jnp
        >>> _, s = leading_factors(jnp.diag(jnp.array([1.0, 3.0, 2.0])), 2)
        >>> [round(float(x), 3) for x in s]
        [3.0, 2.0]
    """

    def of_one(G: Array) -> tuple[Array, Array]:
        U, s, _ = jnp.linalg.svd(G, full_matrices=False)
        return U[:, :rank], s[:rank]

    return one_by_one(of_one, G.ndim - 2)(G)


def adaptive_projector(
    G: Array, count: Array, *, rank: int, eta: float, randomised: bool = True
) -> tuple[Array, Array]:
    """Returns the projector of a gradient, with zero columns beyond its adaptive rank.

    Args:
        G: (..., k, l) with k <= l.
        count: the step, which seeds the sketch, so that the state needs no random key.
        rank: r, the largest rank.
        eta: see :func:`adaptive_rank`.
        randomised: whether the SVD is a randomised one.

    Returns:
        (..., k, r) and the ranks, int32 (...,).

    Example:
        >>> import jax.numpy as jnp
        >>> G = jnp.diag(jnp.array([1.0, 3.0, 0.1]))
        >>> P, r = adaptive_projector(G, jnp.int32(0), rank=3, eta=0.05)
        >>> int(r), [round(float(x), 3) for x in jnp.linalg.norm(P, axis=0)]
        (2, [1.0, 1.0, 0.0])
    """
    U, s = randomised_factors(G, count, rank) if randomised else leading_factors(G, rank)
    ranks = adaptive_rank(s, jnp.sum(G**2, axis=(-2, -1)), eta)
    return U * (jnp.arange(rank) < ranks[..., None])[..., None, :], ranks


def moved_moments(P_new: Array, P_old: Array, mu: Array, nu: Array) -> tuple[Array, Array]:
    """Transports Adam's moments to another subspace.

    Args:
        P_new: (..., k, r).
        P_old: (..., k, r).
        mu: first moments in the old subspace, (..., r, l).
        nu: second moments in the old subspace, (..., r, l).

    Returns:
        Both moments in the new subspace.

    Example:
        >>> import jax.numpy as jnp
        >>> P_old, P_new = jnp.eye(3)[:, :2], -jnp.eye(3)[:, 1:]
        >>> mu, nu = jnp.array([[1.0], [2.0]]), jnp.array([[3.0], [4.0]])
        >>> mu, nu = moved_moments(P_new, P_old, mu, nu)
        >>> mu[:, 0].tolist(), nu[:, 0].tolist()
        ([-2.0, 0.0], [4.0, 0.0])
    """
    # Squares of C's entries are not negative, so neither is the transported second moment.
    C = matmul(P_new.mT, P_old)
    return matmul(C, mu), matmul(C * C, nu)
