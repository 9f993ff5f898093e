"""The exact step of one pair by Householder QR and SVD: the reference.

The step is computed in float64 if the backend supports it (CPU, CUDA). Rank-deficient factors are
handled by pseudo-inverses: directions in which B (or A) is zero have no gradient.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from loro_jax.exact.basis import in_basis
from loro_jax.exact.step import ExactStep, StepSize, limited_rate
from loro_jax.linalg.batching import maps_by_a_loop
from loro_jax.linalg.precision import in_full_precision

Array = jax.Array


def svd_step(
    B: Array, A: Array, dB: Array, dA: Array, size: StepSize, basis: str = "singular"
) -> ExactStep:
    """Takes the exact step of one pair by QR and SVD.

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
    if B.dtype == jnp.float64:
        return in_basis(basis, B, A, _svd_step(*arguments))
    step = jax.lax.platform_dependent(
        *arguments, cpu=_wide_svd_step, cuda=_wide_svd_step, default=_svd_step
    )
    return in_basis(basis, B, A, step)


class _Side(NamedTuple):
    """Thin SVD of a factor X = U s V^T, with singular values below rounding errors set to zero."""

    U: Array  # columns of zero singular value are zero
    s: Array
    inverse: Array  # 1 / s, or zero; damped: s / (s^2 + mu)
    Vt: Array


@in_full_precision
def _svd_side(X: Array, damping: Array | None) -> _Side:
    Q, R = jnp.linalg.qr(X)
    U, s, Vt = jnp.linalg.svd(R, full_matrices=False)
    kept = s > s[0] * (max(X.shape) * jnp.finfo(X.dtype).eps)
    mu = 0.0 if damping is None else damping * jnp.mean(s**2)
    inverse = jnp.where(kept, s / jnp.where(kept, s**2 + mu, 1), 0)
    return _Side((Q @ U) * kept[None, :], s * kept, inverse, Vt)


@in_full_precision
def _svd_step(B: Array, A: Array, dB: Array, dA: Array, size: StepSize) -> ExactStep:
    r = B.shape[1]
    out, inp = _svd_side(B, size.damping), _svd_side(A.T, size.damping)
    left = out.inverse[:, None] * (out.Vt @ dA)  # Q_B^T G, r x n
    right = (dB @ inp.Vt.T) * inp.inverse[None, :]  # G Q_A, m x r
    core = left @ inp.U
    out_perp = right - out.U @ (out.U.T @ right)
    in_perp = left - core @ inp.U.T
    W_core = out.s[:, None] * (out.Vt @ inp.Vt.T) * inp.s[None, :]
    grad_norm = jnp.sqrt(jnp.sum(core**2) + jnp.sum(out_perp**2) + jnp.sum(in_perp**2))
    rate = limited_rate(size, grad_norm, jnp.linalg.norm(W_core))
    # In the bases (U_out, Q_out) and (U_in, Q_in) the new point is the 2r x 2r core M.
    Q_out, R_out = jnp.linalg.qr(out_perp)
    Q_in, R_in = jnp.linalg.qr(in_perp.T)
    S = W_core - rate * core
    M = jnp.block([[S, -rate * R_in.T], [-rate * R_out, jnp.zeros_like(S)]])
    U, s, Vt = jnp.linalg.svd(M)
    U, root, Vt = U[:, :r], jnp.sqrt(s[:r]), Vt[:r]
    B_new = (out.U @ U[:r] + Q_out @ U[r:]) * root[None, :]
    A_new = root[:, None] * (Vt[:, :r] @ inp.U.T + Vt[:, r:] @ Q_in.T)
    return ExactStep(B_new, A_new, jnp.ones_like(rate, dtype=bool))


# Uses float64 inside a program in which it is disabled. The switch acts at tracing time, and vmap
# would trace again outside of it; the mapped version is therefore a loop, which enters the context
# again (and also keeps batched LAPACK calls from deadlocking on CPU).
@maps_by_a_loop
def _wide_svd_step(*arguments: Any) -> ExactStep:
    dtype = arguments[0].dtype
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jax.lax.convert_element_type(x, jnp.float64), arguments)
        step = _svd_step(*wide)
        B_new, A_new = (jax.lax.convert_element_type(x, dtype) for x in step[:2])
        return ExactStep(B_new, A_new, step.ok)
