"""The mathematics of one pair: the tangent space of the rank-r matrices at its product.

Notation, for a pair W = B A with B (m x r), A (r x n), a loss with full gradient G (m x n), and
the thin QR decompositions B = Q_B R_B and A^T = Q_A R_A:

* The gradients of the factors are ``g_B = G A^T`` and ``g_A = B^T G``.
* Tangent projection of G at W: ``P_U G + (I - P_U) G P_V`` with ``P_U = Q_B Q_B^T`` and
  ``P_V = Q_A Q_A^T``. Two of its pieces are known without G: ``Q_B^T G = R_B^{-T} g_A`` and
  ``G Q_A = g_B R_A^{-1}`` (Proposition 3).
* Retraction: the rank-r truncated SVD of ``W - lr grad``. The column and row spaces of that matrix,
  of rank at most 2r, are spanned by ``[Q_B, Q_B']`` and ``[Q_A, Q_A']``: ``Q_B'`` is a basis of the
  part of ``G Q_A`` orthogonal to Q_B, and ``Q_A'`` of the part of ``G^T Q_B`` orthogonal to Q_A. So
  only a 2r x 2r core needs an SVD (Proposition 4). :mod:`loro_jax.exact` has three methods for it.

Algorithm 2 as printed in the paper has misprints (``-lr R_b`` for ``-lr R_b'``, ``[Q_b, Q_b]`` for
``[Q_b, Q_b']``, A instead of its transpose in the QR, the full SVD instead of its leading r
triplets); the formulas here follow Proposition 4, and the authors' code agrees with them.

Source: Mo, Huang and Pan, "LORO: Parameter and Memory Efficient Pretraining via Low-rank
Riemannian Optimization", ICLR 2025.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular

from loro_jax.linalg.batching import one_by_one
from loro_jax.linalg.precision import at_least_float32, in_full_precision, matmul
from loro_jax.lowrank import check_factors, check_real

Array = jax.Array


class Side(NamedTuple):
    """An orthonormal basis of the columns of a factor X, and its pseudo-inverse.

    If X is rank-deficient, the missing directions are zero in both.
    """

    Q: Array  # like X
    inverse: Array  # r x r: the pseudo-inverse of X is ``inverse Q^T``


class Tangent(NamedTuple):
    """The tangent vector ``Q_B core Q_A^T + out_perp Q_A^T + Q_B in_perp`` at W = B A."""

    core: Array  # r x r
    out_perp: Array  # m x r, orthogonal to Q_B
    in_perp: Array  # r x n, orthogonal to Q_A


@in_full_precision
def tangent_projection(out: Side, inp: Side, g_B: Array, g_A: Array) -> Tangent:
    """Projects onto the tangent space by Proposition 3, given the sides of B and of A^T.

    For true gradients the core can be computed from either factor (``R_B^{-T} g_A Q_A`` equals
    ``Q_B^T g_B R_A^{-1}``). For Adam's directions the two differ, and parity with the authors' code
    requires the former.
    """
    left = out.inverse.T @ g_A  # Q_B^T G, r x n
    right = g_B @ inp.inverse  # G Q_A, m x r
    core = left @ inp.Q
    return Tangent(core, right - out.Q @ (out.Q.T @ right), left - core @ inp.Q.T)


def with_sides(fn: Callable[..., Any], batch_axes: int) -> Callable[..., Any]:
    """Maps ``fn(side of B, side of A^T, B, A, ...)`` over pairs of any rank.

    The sides are computed by QR, and again by SVD if any of the pairs is rank-deficient.

    Args:
        fn: function of one pair that returns matrices.
        batch_axes: number of leading axes that B, A and all other arguments share.

    Returns:
        A function of B, A and the other arguments.
    """

    def by_qr(B: Array, A: Array, *others: Array) -> Any:
        (out, fine_out), (inp, fine_inp) = _side_by_qr(B), _side_by_qr(A.T)
        return fn(out, inp, B, A, *others), fine_out & fine_inp

    def by_svd(B: Array, A: Array, *others: Array) -> Any:
        return fn(_side_by_svd(B), _side_by_svd(A.T), B, A, *others)

    def mapped(*arguments: Array) -> Any:
        results, fine = one_by_one(by_qr, batch_axes)(*arguments)

        def with_svd() -> Any:
            others = one_by_one(by_svd, batch_axes)(*arguments)
            return jax.tree.map(
                lambda x, y: jnp.where(fine[..., None, None], x, y), results, others
            )

        return jax.lax.cond(jnp.all(fine), lambda: results, with_svd)

    return mapped


def _smallest_kept(X: Array) -> float:
    """Returns the smallest singular value, relative to the largest, that is not counted as zero."""
    return max(X.shape) * float(jnp.finfo(X.dtype).eps)


def _side_by_qr(X: Array) -> tuple[Side, Array]:
    """Returns the side, and whether X has full rank."""
    Q, R = jnp.linalg.qr(X)
    diagonal = jnp.diagonal(R)
    inverse = solve_triangular(
        R + jnp.diag((diagonal == 0).astype(R.dtype)), jnp.eye(R.shape[0], dtype=R.dtype)
    )
    condition = jnp.linalg.norm(R) * jnp.linalg.norm(inverse)
    # Written so that NaN counts as full rank: an SVD of NaN would not help.
    return Side(Q, inverse), jnp.all(diagonal != 0) & ~(condition * _smallest_kept(X) > 1)


@in_full_precision
def _side_by_svd(X: Array) -> Side:
    Q, R = jnp.linalg.qr(X)
    U, s, Vt = jnp.linalg.svd(R, full_matrices=False)
    kept = s > s[0] * _smallest_kept(X)
    inverse = jnp.where(kept, 1 / jnp.where(kept, s, 1), 0)
    return Side((Q @ U) * kept[None, :], Vt.T * inverse[None, :])


def riemannian_gradient(B: Array, A: Array, gB: Array, gA: Array) -> Array:
    """Returns the Riemannian gradient at W = B A as a full matrix, for checks (Proposition 3).

    This is the projection of the full gradient G onto the tangent space of the rank-r matrices at
    W, computed only from the gradients of the factors, ``gB = G A^T`` and ``gA = B^T G``.

    Args:
        B: output-side factor, shape (..., m, r). If it is rank-deficient, the missing directions
            have no gradient.
        A: input-side factor, shape (..., r, n), with the same remark.
        gB: gradient of B, same shape as B.
        gA: gradient of A, same shape as A.

    Returns:
        Array of shape (..., m, n), as large as a dense weight; the optimizer never forms it.

    Raises:
        ValueError: as :func:`exact_update`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> keys = jax.random.split(jax.random.key(0), 3)
        >>> B, A = jax.random.normal(keys[0], (6, 2)), jax.random.normal(keys[1], (2, 5))
        >>> G = jax.random.normal(keys[2], (6, 5))
        >>> riemannian_gradient(B, A, G @ A.T, B.T @ G).shape
        (6, 5)
    """
    check_directions(B, A, gB, gA, "riemannian_gradient")
    dtype = at_least_float32(jnp.promote_types(B.dtype, A.dtype))

    @in_full_precision
    def assemble(out: Side, inp: Side, B: Array, A: Array, gB: Array, gA: Array) -> Array:
        t = tangent_projection(out, inp, gB, gA)
        return (out.Q @ t.core + t.out_perp) @ inp.Q.T + out.Q @ t.in_perp

    return with_sides(assemble, B.ndim - 2)(*(x.astype(dtype) for x in (B, A, gB, gA)))


def as_gradients(B: Array, A: Array, dB: Array, dA: Array) -> tuple[Array, Array]:
    """Returns gradients for an exact step whose tangent vector is the move ``dB A + B dA``.

    :func:`loro_jax.exact_update` turns gradients into the tangent vector ``g_B (A A^T)^{-1} A``
    projected outside the columns of B, plus ``B (B^T B)^{-1} g_A``. For these gradients it equals
    the whole move. (:func:`multiply_by_grams` lacks the term ``(B^T dB) A`` of ``g_A``: its tangent
    vector omits the part of ``dB A`` in the columns of B.)

    Args:
        B: shape (..., m, r).
        A: shape (..., r, n).
        dB: move of B.
        dA: move of A.

    Returns:
        Arrays of the shapes of B and A, in float32 or wider.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from loro_jax import riemannian_gradient
        >>> B, A, dB, dA = (
        ...     jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(5, 2), (2, 4)] * 2)
        ... )
        >>> tangent = riemannian_gradient(B, A, *as_gradients(B, A, dB, dA))
        >>> bool(jnp.allclose(tangent, dB @ A + B @ dA, atol=1e-4))
        True
    """
    dtype = at_least_float32(jnp.result_type(B, A))
    B, A, dB, dA = (x.astype(dtype) for x in (B, A, dB, dA))
    g_B = matmul(dB, matmul(A, A.mT))
    g_A = matmul(matmul(B.mT, B), dA) + matmul(matmul(B.mT, dB), A)
    return g_B, g_A


def multiply_by_grams(B: Array, A: Array, d_B: Array, d_A: Array) -> tuple[Array, Array]:
    """Returns ``d_B (A A^T)`` and ``(B^T B) d_A``, in float32 or wider.

    Used as gradients, their tangent vector is ``(I - P_U) d_B A + B d_A``: each direction in its
    part of the tangent space. For preconditioned gradients d this undoes the division by the Gram
    matrices. :func:`as_gradients` adds the term ``(B^T d_B) A`` to the second, which keeps
    ``P_U d_B A`` too.

    Example:
        >>> import jax.numpy as jnp
        >>> B, A = jnp.eye(3, 2), 2 * jnp.eye(2, 4)
        >>> g_B, g_A = multiply_by_grams(B, A, B, A)
        >>> float(g_B[0, 0]), float(g_A[0, 0])
        (4.0, 2.0)
    """
    dtype = at_least_float32(jnp.result_type(B, A))
    B, A, d_B, d_A = (x.astype(dtype) for x in (B, A, d_B, d_A))
    return matmul(matmul(d_B, A), A.mT), matmul(B.mT, matmul(B, d_A))


def check_directions(B: Array, A: Array, dB: Array, dA: Array, where: str) -> None:
    """Raises ValueError unless the factors form a real pair and the directions fit them."""
    check_factors(B, A, where)
    check_real(B, A, where)
    if dB.shape != B.shape or dA.shape != A.shape:
        raise ValueError(
            f"{where}: expected directions of the factors' shapes {tuple(B.shape)} and "
            f"{tuple(A.shape)}, but found {tuple(dB.shape)} and {tuple(dA.shape)}."
        )
