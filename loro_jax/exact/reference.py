"""The exact step of one pair by orthogonal factorisations: the reference.

By Householder QR and SVD, in float64, if the backend supports it (CPU, CUDA). Elsewhere (TPU),
where an SVD takes half a minute to compile and a QR five seconds, by polar factors and symmetric
eigendecompositions, in the factors' precision: ``X = Q H`` with H symmetric, ``H = V s V^T`` and so
``X = (Q V) s V^T``. Rank-deficient factors are handled by pseudo-inverses: directions in which B
(or A) is zero have no gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from loro_jax.exact.basis import in_basis
from loro_jax.exact.step import ExactStep, StepSize, limited_rate
from loro_jax.linalg.batching import maps_by_a_loop
from loro_jax.linalg.newton_schulz import polar_factor
from loro_jax.linalg.precision import in_full_precision, matmul

Array = jax.Array


def svd_step(
    B: Array, A: Array, dB: Array, dA: Array, size: StepSize, basis: str = "singular"
) -> ExactStep:
    """Takes the exact step of one pair by orthogonal factorisations.

    Args:
        B: (m, r).
        A: (r, n).
        dB: direction of B, (m, r).
        dA: direction of A, (r, n).
        size: step size; scalars.
        basis: basis of the new factors, see :mod:`~loro_jax.exact.basis`.

    Returns:
        The new factors, in the dtype of the old ones.
    """
    arguments = (B, A, dB, dA, size)
    narrow = functools.partial(_step, _BY_SVD)
    if B.dtype == jnp.float64:
        return in_basis(basis, B, A, narrow(*arguments))
    step = jax.lax.platform_dependent(
        *arguments,
        cpu=_wide_step,
        cuda=_wide_step,
        tpu=functools.partial(_step, _BY_PRODUCTS),
        default=narrow,
    )
    return in_basis(basis, B, A, step)


class _Factorisations(NamedTuple):
    """The factorisations that a step needs, of X (k x r, k >= r)."""

    # X -> U, s, V^T with X = U s V^T; columns of U for zero singular values may be zero.
    svd: Callable[[Array], tuple[Array, Array, Array]]
    # X -> Q, R with X = Q R and orthonormal columns of Q; columns that X does not need may be zero.
    orthonormal: Callable[[Array], tuple[Array, Array]]


def _thin_svd(X: Array) -> tuple[Array, Array, Array]:
    if X.shape[0] == X.shape[1]:
        U, s, Vt = jnp.linalg.svd(X)
        return U, s, Vt
    Q, R = jnp.linalg.qr(X)
    U, s, Vt = jnp.linalg.svd(R)
    return Q @ U, s, Vt


def _thin_qr(X: Array) -> tuple[Array, Array]:
    Q, R = jnp.linalg.qr(X)
    return Q, R


_BY_SVD = _Factorisations(_thin_svd, _thin_qr)


def _polar(X: Array) -> tuple[Array, Array]:
    """Returns Q and H = Q^T X.

    Singular values below rounding errors may end between zero and one in Q: they contribute no more
    than they are.
    """
    eps = jnp.finfo(X.dtype).eps
    Q, _ = polar_factor(X, eps * jnp.linalg.norm(X))
    return Q, matmul(Q.T, X)


def _svd_by_polar(X: Array) -> tuple[Array, Array, Array]:
    Q, H = _polar(X)
    # Eigenvalues ascend; rounding can make small ones negative.
    s, V = jnp.linalg.eigh(H)
    s, V = jnp.maximum(s[::-1], 0), V[:, ::-1]
    return matmul(Q, V), s, V.T


_BY_PRODUCTS = _Factorisations(_svd_by_polar, _polar)


class _Side(NamedTuple):
    """Thin SVD of a factor X = U s V^T, with singular values below rounding errors set to zero."""

    U: Array  # columns of zero singular value are zero
    s: Array
    inverse: Array  # 1 / s, or zero; damped: s / (s^2 + mu)
    Vt: Array


def _side(by: _Factorisations, X: Array, damping: Array | None) -> _Side:
    U, s, Vt = by.svd(X)
    kept = s > s[0] * (max(X.shape) * jnp.finfo(X.dtype).eps)
    mu = 0.0 if damping is None else damping * jnp.mean(s**2)
    inverse = jnp.where(kept, s / jnp.where(kept, s**2 + mu, 1), 0)
    return _Side(U * kept[None, :], s * kept, inverse, Vt)


@in_full_precision
def _step(
    by: _Factorisations, B: Array, A: Array, dB: Array, dA: Array, size: StepSize
) -> ExactStep:
    r = B.shape[1]
    out, inp = _side(by, B, size.damping), _side(by, A.T, size.damping)
    left = out.inverse[:, None] * (out.Vt @ dA)  # Q_B^T G, r x n
    right = (dB @ inp.Vt.T) * inp.inverse[None, :]  # G Q_A, m x r
    core = left @ inp.U
    out_perp = right - out.U @ (out.U.T @ right)
    in_perp = left - core @ inp.U.T
    W_core = out.s[:, None] * (out.Vt @ inp.Vt.T) * inp.s[None, :]
    grad_norm = jnp.sqrt(jnp.sum(core**2) + jnp.sum(out_perp**2) + jnp.sum(in_perp**2))
    rate = limited_rate(size, grad_norm, jnp.linalg.norm(W_core))
    # In the bases (U_out, Q_out) and (U_in, Q_in) the new point is the 2r x 2r core M.
    Q_out, R_out = by.orthonormal(out_perp)
    Q_in, R_in = by.orthonormal(in_perp.T)
    S = W_core - rate * core
    M = jnp.block([[S, -rate * R_in.T], [-rate * R_out, jnp.zeros_like(S)]])
    U, s, Vt = by.svd(M)
    U, root, Vt = U[:, :r], jnp.sqrt(s[:r]), Vt[:r]
    B_new = (out.U @ U[:r] + Q_out @ U[r:]) * root[None, :]
    A_new = root[:, None] * (Vt[:, :r] @ inp.U.T + Vt[:, r:] @ Q_in.T)
    return ExactStep(B_new, A_new, jnp.ones_like(rate, dtype=bool))


# Uses float64 inside a program in which it is disabled. The switch acts at tracing time, and vmap
# would trace again outside of it; the mapped version is therefore a loop, which enters the context
# again (and also keeps batched LAPACK calls from deadlocking on CPU).
@maps_by_a_loop
def _wide_step(*arguments: Any) -> ExactStep:
    dtype = arguments[0].dtype
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jax.lax.convert_element_type(x, jnp.float64), arguments)
        step = _step(_BY_SVD, *wide)
        B_new, A_new = (jax.lax.convert_element_type(x, dtype) for x in step[:2])
        return ExactStep(B_new, A_new, step.ok)
