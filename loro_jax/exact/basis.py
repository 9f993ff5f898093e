"""The basis of the new factors: which of all balanced factors an exact step returns.

Balanced factors of a product, ``B^T B = A A^T``, are determined up to a rotation of the inner
index. There are two choices:

* "singular", as in the paper: the inner index numbers the singular values, and both factors have
  their square roots. Signs and order of the singular vectors, which are arbitrary, are chosen near
  the old factors, so that factors which were singular vectors and moved little stay near. Where
  singular values are close, or the old factors were not singular vectors, a small step can still
  rotate the factors far: moments of the old factors do not fit the new ones, and an average of old
  and new factors does not give an average product.
* "nearest": the factors nearest to the old ones, which minimise ``|B' - B|^2 + |A' - A|^2``. For B'
  and A' in any balanced basis, they are ``B' V, V^T A'`` with V the orthogonal polar factor of
  ``B'^T B + A' A^T`` (Procrustes). A step of length zero does not change balanced factors, a short
  one moves them little, and moments may be kept. The step commutes with rotations.

The second needs no eigenvectors. On CPU an eigendecomposition is still the fastest way to balanced
factors; other platforms, which are fast at products, compute them by products and Cholesky
factorisations (not measured there). For ``Q^T M`` with orthonormal rows in Q and ``H = M M^T``,
``P Q`` and ``P^{-T} M`` are balanced if ``(P^T P)^2 = H``. With ``H = R^T R`` (Cholesky) and the
polar factor V of R, ``H^{1/2} = V^T R``; and P is a triangular root of that.

Source: Schoenemann, "A generalized solution of the orthogonal Procrustes problem", Psychometrika
31, 1966; Higham, "Functions of Matrices", 2008, for the square root by way of the polar factor.
Their use for the retraction is ours.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from loro_jax.exact.step import ExactStep
from loro_jax.linalg.batching import varying_alike
from loro_jax.linalg.cholesky import cholesky_with_inverse
from loro_jax.linalg.newton_schulz import polar_factor
from loro_jax.linalg.precision import matmul

Array = jax.Array

BASES = ("singular", "nearest")


def check_basis(basis: str, where: str) -> None:
    """Raises ValueError for an unknown basis."""
    if basis not in BASES:
        raise ValueError(f"{where}: the basis must be one of {BASES}, but is {basis!r}.")


class Balance(NamedTuple):
    """Coefficients of balanced factors ``left Q, right M`` of ``Q^T M``; ``left^T right = I``."""

    left: Array
    right: Array
    least: Array  # smallest singular value of M, or a lower bound
    largest: Array  # largest singular value of M, or an upper bound
    ok: Array


def by_singular_vectors(squares: Array) -> Balance:
    """Balances in the basis of the singular vectors, given ``M M^T``."""
    eigenvalues, U = jnp.linalg.eigh(squares, symmetrize_input=False)
    s = jnp.sqrt(jnp.maximum(eigenvalues, 0))
    root = jnp.sqrt(s)[:, None]
    return Balance(root * U.T, U.T / root, s[0], s[-1], jnp.ones_like(s[0], dtype=bool))


def by_products(squares: Array) -> Balance:
    """Balances in an arbitrary basis, given ``M M^T``, without an eigendecomposition."""
    lower = cholesky_with_inverse(squares)
    # |X|_2 <= |X X^T X X^T|_F^(1/4), which is tight where one singular value is far above others.
    inverse = matmul(lower.inverse.T, lower.inverse)
    least = jnp.linalg.norm(matmul(inverse, inverse)) ** -0.25
    largest = jnp.linalg.norm(matmul(squares, squares)) ** 0.25
    V, converged = polar_factor(lower.L.T, least)
    # H^{1/2} = V^T R must be factorised as P^T P with P lower triangular. Cholesky gives L L^T, so
    # reverse rows and columns before and after; the inverse of P comes with the factorisation.
    root = matmul(V.T, lower.L.T)
    flipped = cholesky_with_inverse(root[::-1, ::-1])
    left, right = flipped.L[::-1, ::-1].T, flipped.inverse[::-1, ::-1]
    return Balance(left, right, least, largest, converged)


def rotated_to_nearest(balance: Balance, QB: Array, MA: Array) -> Balance:
    """Rotates to the basis nearest to old factors B and A, given ``Q B`` and ``M A^T``."""
    overlap = matmul(balance.left, QB) + matmul(balance.right, MA)
    V, converged = polar_factor(overlap, balance.least)
    return balance._replace(
        left=matmul(V.T, balance.left),
        right=matmul(V.T, balance.right),
        ok=balance.ok & converged,
    )


class _Order(NamedTuple):
    """A permutation of the inner index, and signs."""

    order: Array  # index of the new vector at each place
    signs: Array  # its sign there


def nearest_order(overlap: Array) -> _Order:
    """Finds the order and signs that make new vectors overlap with the old ones.

    This is a greedy assignment: vectors choose in descending order of their largest overlap, each
    the best free place. It is optimal where each new vector resembles one old vector.

    Args:
        overlap: ``B'^T B + A' A^T``, (r, r): new vectors in rows, old ones in columns. NaN counts
            as zero.

    Returns:
        Order and signs, (r,) each.

    Example:
        >>> import jax.numpy as jnp
        >>> order, signs = nearest_order(jnp.array([[0.1, -0.9], [0.8, 0.2]]))
        >>> order.tolist(), signs.tolist()
        ([1, 0], [1.0, -1.0])
    """
    sizes = jnp.where(jnp.isfinite(overlap), jnp.abs(overlap), 0)
    best = jnp.max(sizes, axis=1)
    sizes, best = varying_alike((sizes, best))

    def choose(_: Any, chosen: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        order, free, best = chosen
        # A sort would give all turns at once, but takes accelerators' compilers seconds.
        vector = jnp.argmax(best)
        place = jnp.argmax(jnp.where(free, sizes[vector], -1))
        return (
            order.at[place].set(vector.astype(order.dtype)),
            free.at[place].set(False),
            best.at[vector].set(-1),
        )

    # `best >= 0` is all True: every place is free, with the type that the loop carries.
    start = (jnp.zeros_like(best, dtype=jnp.int32), best >= 0, best)
    order, *_ = jax.lax.fori_loop(0, len(best), choose, varying_alike(start))
    met = jnp.take_along_axis(overlap, order[None, :], axis=0)[0]
    return _Order(order, jnp.where(met < 0, -1, 1).astype(overlap.dtype))


def ordered_like(balance: Balance, QB: Array, MA: Array) -> Balance:
    """Chooses signs and order near old factors B and A, given ``Q B`` and ``M A^T``."""
    order, signs = nearest_order(matmul(balance.left, QB) + matmul(balance.right, MA))
    return balance._replace(
        left=signs[:, None] * balance.left[order], right=signs[:, None] * balance.right[order]
    )


def in_basis(basis: str, B: Array, A: Array, step: ExactStep) -> ExactStep:
    """Transforms a step to singular factors into the given basis; works for any rank."""
    overlap = matmul(step.B.T, B) + matmul(step.A, A.T)
    if basis == "singular":
        order, signs = nearest_order(overlap)
        return ExactStep(signs[None, :] * step.B[:, order], signs[:, None] * step.A[order], step.ok)
    V = jax.lax.platform_dependent(overlap, tpu=_rotation_by_products, default=_rotation_by_svd)
    return ExactStep(matmul(step.B, V), matmul(V.T, step.A), step.ok)


def _rotation_by_svd(overlap: Array) -> Array:
    """Returns the orthogonal polar factor; Newton-Schulz does not converge for singular ones."""
    left, _, right = jnp.linalg.svd(overlap)
    return matmul(left, right)


def _rotation_by_products(overlap: Array) -> Array:
    """Does the same where an SVD takes too long to compile."""
    r = overlap.shape[-1]
    tiny = 8 * jnp.finfo(overlap.dtype).eps * jnp.linalg.norm(overlap)
    # A shift by rounding errors makes a singular overlap regular: its null space may be rotated at
    # will. (Of a zero one nothing is left to rotate.)
    V, _ = polar_factor(overlap + tiny * jnp.eye(r, dtype=overlap.dtype), tiny)
    return V
