"""The exact step of one pair by CholeskyQR2 and one symmetric eigendecomposition of size 2r.

Only products, Cholesky factorisations of r x r Gram matrices and one symmetric eigendecomposition
of ``M M^T`` (2r x 2r), in the factors' own precision:

* QR becomes CholeskyQR2: ``X^T X = L L^T``, ``Q = X L^{-T}``, done twice, because after one pass Q
  is orthogonal to cond^2 eps only. Columns are scaled to unit length first, and a shift of a few
  eps keeps the first Cholesky factorisation from failing.
* Of the 2r x 2r core M only ``M M^T`` is needed, and that takes a basis of the new directions on
  one side only: ``M M^T = [[S S^T + Z Z^T, S C^T], [C S^T, C C^T]]`` with Z (-lr times) the part of
  ``R_B^{-T} g_A`` outside Q_A and C the triangular factor of (-lr times) the part of
  ``g_B R_A^{-1}`` outside Q_B. The other factor is ``s^{-1/2} U^T [Q_B, Q_B']^T T``.

Squaring loses accuracy for small singular values: an eigenvalue of ``M M^T`` is accurate to
eps s_1^2, so a kept singular value below about 1e-3 s_1 is lost in rounding errors. The method
therefore returns whether it can be trusted (``ok``): the Cholesky factors are well conditioned
(:data:`LARGEST_INVERSE`), the smallest kept singular value is above :data:`SMALLEST_KEPT` s_1, and
all entries are finite.

Source: Yamamoto, Nakatsukasa, Yanagisawa and Fukaya, "Roundoff error analysis of the CholeskyQR2
algorithm", ETNA 44, 2015.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from loro_jax.exact.basis import in_basis
from loro_jax.exact.step import ExactStep, StepSize, damped_inverse, limited_rate
from loro_jax.linalg.cholesky import cholesky_with_inverse
from loro_jax.linalg.precision import matmul

Array = jax.Array

# Smallest ratio of kept singular values for which the method is trusted: its error in W is about
# eps / SMALLEST_KEPT, 2e-5 in float32 (measured: up to 1.3 times that).
SMALLEST_KEPT = 6e-3

# Largest norm |R^{-1}| (Frobenius, of a factor with its columns scaled to unit length) for which
# the method is trusted. The error of R^{-T} g_A grows with it; for square matrices of full rank,
# where nothing cancels, the error of W stays below 2e-7 |R^{-1}| in float32.
LARGEST_INVERSE = 200.0


class _LQ(NamedTuple):
    """X (r x k) = L Q by two Cholesky passes, with the last factor of Q not applied.

    ``Q = correction @ rough``, where ``rough`` is orthonormal to cond^2 eps and ``correction`` is a
    small triangular matrix close to the identity: to multiply by Q, it is cheaper to apply the
    correction to the other, smaller side.
    """

    L: Array
    rough: Array
    correction: Array
    inverse: Array  # of L
    inverse_norm: Array  # |L^{-1}| for X with rows scaled to unit length

    def times(self, small: Array) -> Array:
        """Returns ``small @ Q``."""
        return matmul(matmul(small, self.correction), self.rough)

    def transpose_times(self, x: Array) -> Array:
        """Returns ``x @ Q^T`` for x (..., k)."""
        return matmul(matmul(x, self.rough.T), self.correction.T)


def _cholesky_lq2(X: Array, deficient: bool = False) -> _LQ:
    """Factorises X = L Q by two Cholesky passes; with ``deficient``, X may have any rank.

    Missing directions then have rows of Q that are nearly zero instead of orthonormal, and columns
    of L of a few eps.
    """
    eps = float(jnp.finfo(X.dtype).eps)
    # The shift bounds the rounding errors of the Gram matrix, so that it stays positive definite.
    first = cholesky_with_inverse(matmul(X, X.T), 4 * eps * X.shape[0] ** 0.5)
    rough = matmul(first.inverse, X)
    # The second Gram matrix is close to the identity, except in directions that X does not have.
    second = cholesky_with_inverse(matmul(rough, rough.T), 8 * eps if deficient else 0.0)
    return _LQ(
        L=matmul(first.L, second.L),
        rough=rough,
        correction=second.inverse,
        inverse=matmul(second.inverse, first.inverse),
        inverse_norm=first.scaled_inverse_norm,
    )


def gram_step(
    B: Array, A: Array, dB: Array, dA: Array, size: StepSize, basis: str = "singular"
) -> ExactStep:
    """Takes the exact step of one pair; arguments as for ``svd_step``. Check ``ok`` before use.

    All tall matrices are stored transposed, (r x m): products that contract the long axis are
    several times faster on CPU if it is the last one in memory.
    """
    # The barrier keeps XLA from fusing the transposition into the products.
    B_t, dB_t = jax.lax.optimization_barrier((B.T, dB.T))
    out, inp = _cholesky_lq2(B_t), _cholesky_lq2(A)
    left = matmul(damped_inverse(out.L, out.inverse, size.damping), dA)  # Q_B^T G, r x n
    right_t = matmul(damped_inverse(inp.L, inp.inverse, size.damping), dB_t)  # (G Q_A)^T, r x m
    # The gradient in blocks: inside both spaces, and the parts outside the column and row space.
    core = inp.transpose_times(left)
    out_perp = right_t - out.times(out.transpose_times(right_t))
    in_perp = left - inp.times(core)
    W_core = matmul(out.L.T, inp.L)
    grad_norm = jnp.sqrt(jnp.sum(core**2) + jnp.sum(out_perp**2) + jnp.sum(in_perp**2))
    rate = limited_rate(size, grad_norm, jnp.linalg.norm(W_core))
    S = W_core - rate * core
    # Only one side needs a basis of its new directions: use the shorter one.
    if B.shape[0] <= A.shape[1]:
        B_new_t, A_new, s = _truncate(out, inp, S, -rate * out_perp, -rate * in_perp)
    else:
        A_new, B_new_t, s = _truncate(inp, out, S.T, -rate * in_perp, -rate * out_perp)
    ok = (
        (jnp.maximum(out.inverse_norm, inp.inverse_norm) < LARGEST_INVERSE)
        & (s[0] > SMALLEST_KEPT * s[-1])
        & jnp.all(jnp.isfinite(B_new_t))
        & jnp.all(jnp.isfinite(A_new))
    )
    return in_basis(basis, B, A, ExactStep(B_new_t.T, A_new, ok))


def _truncate(p: _LQ, q: _LQ, S: Array, P: Array, Z: Array) -> tuple[Array, Array, Array]:
    """Truncates ``Q_p^T S Q_q + P^T Q_q + Q_p^T Z`` to rank r, in balanced factors.

    P (r x k_p) is orthogonal to Q_p, and Z (r x k_q) to Q_q. Returns X (r x k_p) and Y (r x k_q)
    with X^T Y the approximation, and its singular values, ascending.
    """
    r = S.shape[0]
    perp = _cholesky_lq2(P, deficient=True)
    C = perp.L.T
    SCt = matmul(S, C.T)
    MMt = jnp.block([[matmul(S, S.T) + matmul(Z, Z.T), SCt], [SCt.T, matmul(C, C.T)]])
    # Eigenvalues ascend, so the last r are kept; rounding can make small ones negative.
    eigenvalues, U = jnp.linalg.eigh(MMt, symmetrize_input=False)
    s = jnp.sqrt(jnp.maximum(eigenvalues[r:], 0))
    root = jnp.sqrt(s)[:, None]
    U1_t, U2_t = U[:r, r:].T, U[r:, r:].T
    # X carries s^{1/2} U^T, so Y = s^{-1/2} U^T T; a zero singular value must not divide by zero.
    X = root * (p.times(U1_t) + perp.times(U2_t))
    Y = q.times(matmul(U1_t, S) + matmul(U2_t, C)) + matmul(U1_t, Z)
    return X, Y / jnp.maximum(root, jnp.finfo(root.dtype).tiny), s
