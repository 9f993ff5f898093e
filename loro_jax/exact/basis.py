"""The basis of the new factors: which of all balanced ones.

Balanced factors of a product, ``B^T B = A A^T``, are determined up to a rotation of the inner
index. An exact step has two to offer:

* "singular": the paper's. The inner index counts singular values, and both factors have their
  square roots. Of all signs and orders, which singular vectors leave open, those near the old
  factors are taken, so that factors which were singular and moved little stay near. Where singular
  values are close, or the old factors were no singular vectors, neighbouring products still have
  quite different ones: moments of the old factors do not fit the new, nor does an average of old
  and new factors give an average product.
* "nearest": those nearest to the old factors, ``|B' - B|^2 + |A' - A|^2`` at its least. If B' and
  A' are in any balanced basis, that is ``B' V, V^T A'`` with V the orthogonal polar factor of
  ``B'^T B + A' A^T`` (Procrustes). A step of length zero leaves balanced factors alone, a short one
  moves them little, and moments may stay as they are. Rotated old factors give rotated new ones.

The second needs no eigenvectors. On CPU an eigendecomposition is the shortest way to some balanced
factors; other platforms, made for
products, have it made of products and Cholesky factorisations (which was not measured there). For
``Q^T M`` with orthonormal rows in Q and ``H = M M^T``, ``P Q`` and ``P^{-T} M`` are balanced when
``(P^T P)^2 = H``. With ``H = R^T R`` (Cholesky) and the polar factor V of R, ``H^{1/2} = V^T R``;
and P is a triangular root of that.

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
    """Raises ValueError unless ``basis`` names one."""
    if basis not in BASES:
        raise ValueError(f"{where}: the basis must be one of {BASES}, but is {basis!r}.")


class Balance(NamedTuple):
    """What makes balanced factors ``left Q`` and ``right M`` of ``Q^T M``; ``left^T right = I``."""

    left: Array
    right: Array
    least: Array  # singular value of M, or a bound from below
    largest: Array  # likewise, from above
    ok: Array


def by_singular_vectors(squares: Array) -> Balance:
    """In the basis of the singular vectors, from ``M M^T``."""
    eigenvalues, U = jnp.linalg.eigh(squares, symmetrize_input=False)
    s = jnp.sqrt(jnp.maximum(eigenvalues, 0))
    root = jnp.sqrt(s)[:, None]
    return Balance(root * U.T, U.T / root, s[0], s[-1], jnp.ones_like(s[0], dtype=bool))


def by_products(squares: Array) -> Balance:
    """In some basis, from ``M M^T``, without an eigendecomposition."""
    lower = cholesky_with_inverse(squares)
    # |X|_2 <= |X X^T X X^T|_F^(1/4), which is tight where one singular value is far above others.
    inverse = matmul(lower.inverse.T, lower.inverse)
    least = jnp.linalg.norm(matmul(inverse, inverse)) ** -0.25
    largest = jnp.linalg.norm(matmul(squares, squares)) ** 0.25
    V, converged = polar_factor(lower.L.T, least)
    # Its Cholesky factor from the last row up is triangular the other way round, and inverted
    # with it.
    root = matmul(V.T, lower.L.T)
    flipped = cholesky_with_inverse(root[::-1, ::-1])
    left, right = flipped.L[::-1, ::-1].T, flipped.inverse[::-1, ::-1]
    return Balance(left, right, least, largest, converged)


def rotated_to_nearest(balance: Balance, QB: Array, MA: Array) -> Balance:
    """In the basis nearest to old factors B and A, given ``Q B`` and ``M A^T``."""
    overlap = matmul(balance.left, QB) + matmul(balance.right, MA)
    V, converged = polar_factor(overlap, balance.least)
    return balance._replace(
        left=matmul(V.T, balance.left),
        right=matmul(V.T, balance.right),
        ok=balance.ok & converged,
    )


class _Order(NamedTuple):
    """An order of the inner index, and signs."""

    order: Array  # which new vector goes to each place
    signs: Array  # its sign there


def nearest_order(overlap: Array) -> _Order:
    """The order and the signs that make new vectors overlap with the old ones.

    Nearest would be the best assignment of all; here vectors choose one after the other, those with
    the largest overlap first, each the best place that is left. It is the same where each has one
    old vector that it resembles.

    Args:
        overlap: ``B'^T B + A' A^T``, (r, r): new vectors in rows, old ones in columns. What is not
            a number counts as none.

    Returns:
        Order and signs, (r,) each.

    Example:
        >>> import jax.numpy as jnp
        >>> order, signs = nearest_order(jnp.array([[0.1, -0.9], [0.8, 0.2]]))
        >>> order.tolist(), signs.tolist()
        ([1, 0], [1.0, -1.0])
    """
    sizes = jnp.where(jnp.isfinite(overlap), jnp.abs(overlap), 0)
    turns = jnp.argsort(-jnp.max(sizes, axis=1))
    turns, sizes = varying_alike((turns, sizes))

    def choose(turn: Any, chosen: tuple[Array, Array]) -> tuple[Array, Array]:
        order, free = chosen
        vector = turns[turn]
        place = jnp.argmax(jnp.where(free, sizes[vector], -1))
        return order.at[place].set(vector), free.at[place].set(False)

    order, _ = jax.lax.fori_loop(0, len(turns), choose, (turns, sizes[0] >= 0))
    met = jnp.take_along_axis(overlap, order[None, :], axis=0)[0]
    return _Order(order, jnp.where(met < 0, -1, 1).astype(overlap.dtype))


def ordered_like(balance: Balance, QB: Array, MA: Array) -> Balance:
    """In signs and order near old factors B and A, given ``Q B`` and ``M A^T``."""
    order, signs = nearest_order(matmul(balance.left, QB) + matmul(balance.right, MA))
    return balance._replace(
        left=signs[:, None] * balance.left[order], right=signs[:, None] * balance.right[order]
    )


def in_basis(basis: str, B: Array, A: Array, step: ExactStep) -> ExactStep:
    """A step to singular factors, in the basis of that name; any rank will do."""
    overlap = matmul(step.B.T, B) + matmul(step.A, A.T)
    if basis == "singular":
        order, signs = nearest_order(overlap)
        return ExactStep(signs[None, :] * step.B[:, order], signs[:, None] * step.A[order], step.ok)
    left, _, right = jnp.linalg.svd(overlap)
    V = matmul(left, right)
    return ExactStep(matmul(step.B, V), matmul(V.T, step.A), step.ok)
