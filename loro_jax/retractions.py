"""The exact step of one pair, by two methods: a reference and a fast one.

Both compute the truncated SVD of ``T = W - lr grad`` (Proposition 4) in blocks of width r; the
notation is that of :mod:`loro_jax.manifold`.

``svd`` (reference)
    Householder QR and SVD of small matrices, in float64 wherever the backend has it (CPU, CUDA).
    Rank-deficient factors are met by the pseudo-inverse: directions in which B (or A) is zero carry
    no gradient.

``gram`` (fast)
    Only products, Cholesky factorisations of r x r Gram matrices and one symmetric
    eigendecomposition of ``M M^T`` (2r x 2r), in the factors' own precision:

    * QR becomes CholeskyQR2: ``X^T X = L L^T``, ``Q = X L^{-T}``, done twice, because once leaves
      Q orthogonal to cond^2 eps only. Columns are scaled to unit length first, and a shift of a few
      eps keeps the first Cholesky alive.
    * Of the 2r x 2r core M only ``M M^T`` is needed, and that takes a basis of the new directions
      on one side only: ``M M^T = [[S S^T + Z Z^T, S C^T], [C S^T, C C^T]]`` with Z (-lr times) the
      part of ``R_B^{-T} g_A`` outside Q_A and C the triangular factor of (-lr times) the part of
      ``g_B R_A^{-1}`` outside Q_B. The other factor is ``s^{-1/2} U^T [Q_B, Q_B']^T T``.

    Squaring costs accuracy where small singular values matter: an eigenvalue of ``M M^T`` is known
    to eps s_1^2, so a kept singular value below some 1e-3 s_1 is lost in the noise. The method
    therefore says whether it can be trusted (``ok``): the Cholesky factors were well conditioned
    (:data:`LARGEST_INVERSE`), the smallest kept singular value is above :data:`SMALLEST_KEPT` s_1,
    and all is finite. Where it can't, the caller takes the reference.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular

Array = jax.Array

# Smallest kept singular value, over the largest, that the fast method is trusted with: its error
# in W is about eps / SMALLEST_KEPT, 2e-5 in float32 (measured: up to 1.3 times that).
SMALLEST_KEPT = 6e-3

# Largest norm |R^{-1}| (Frobenius, of a factor with its columns scaled to length one) that the
# fast method is trusted with. The error of R^{-T} g_A grows with it; on full-rank squares, where
# nothing of it cancels, the error of W stays below 2e-7 |R^{-1}| in float32.
LARGEST_INVERSE = 200.0


class ExactStep(NamedTuple):
    """Result of an exact step.

    Attributes:
        B: new output-side factor.
        A: new input-side factor.
        ok: whether the method trusts it; always true for the reference.
    """

    B: Array
    A: Array
    ok: Array


def _matmul(x: Array, y: Array) -> Array:
    # Full float32 products on accelerators, whose default is to round the inputs.
    return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)


def limited_rate(rate: Array, max_move: Array, grad_norm: Array, W_norm: Array) -> Array:
    """The step size, cut so that ``lr |grad| <= max_move |W|`` (Frobenius norms)."""
    bound = max_move * W_norm / jnp.maximum(grad_norm, jnp.finfo(grad_norm.dtype).tiny)
    return jnp.minimum(rate, bound)


# ------------------------------------------------------------------------------- reference


def svd_step(B: Array, A: Array, dB: Array, dA: Array, rate: Array, max_move: Array) -> ExactStep:
    """The reference; see the module's docstring.

    Args:
        B: (m, r).
        A: (r, n).
        dB: direction of B, (m, r).
        dA: direction of A, (r, n).
        rate: step size, scalar.
        max_move: bound on ``lr |grad| / |W|``, scalar; infinite for none.

    Returns:
        The new factors, in the dtype of the old ones.
    """
    arguments = (B, A, dB, dA, rate, max_move)
    if B.dtype == jnp.float64:
        return _svd_step(*arguments)
    return jax.lax.platform_dependent(
        *arguments, cpu=_wide_svd_step, cuda=_wide_svd_step, default=_svd_step
    )


class _Side(NamedTuple):
    """Thin SVD of a factor X = U s V^T, with the directions of zero singular value masked out."""

    U: Array  # columns of zero singular value are zero
    s: Array
    inverse: Array  # 1 / s, or zero
    Vt: Array


def _svd_side(X: Array) -> _Side:
    Q, R = jnp.linalg.qr(X)
    U, s, Vt = jnp.linalg.svd(R, full_matrices=False)
    kept = s > s[0] * (max(X.shape) * jnp.finfo(X.dtype).eps)
    return _Side((Q @ U) * kept, s * kept, jnp.where(kept, 1 / jnp.where(kept, s, 1), 0), Vt)


def _svd_step(B: Array, A: Array, dB: Array, dA: Array, rate: Array, max_move: Array) -> ExactStep:
    r = B.shape[1]
    out, inp = _svd_side(B), _svd_side(A.T)
    left = out.inverse[:, None] * (out.Vt @ dA)  # Q_B^T G, r x n
    right = (dB @ inp.Vt.T) * inp.inverse  # G Q_A, m x r
    core = left @ inp.U
    out_perp = right - out.U @ (out.U.T @ right)
    in_perp = left - core @ inp.U.T
    W_core = (out.s[:, None] * (out.Vt @ inp.Vt.T)) * inp.s
    grad_norm = jnp.sqrt(jnp.sum(core**2) + jnp.sum(out_perp**2) + jnp.sum(in_perp**2))
    rate = limited_rate(rate, max_move, grad_norm, jnp.linalg.norm(W_core))
    Q_out, R_out = jnp.linalg.qr(out_perp)
    Q_in, R_in = jnp.linalg.qr(in_perp.T)
    S = W_core - rate * core
    M = jnp.block([[S, -rate * R_in.T], [-rate * R_out, jnp.zeros_like(S)]])
    U, s, Vt = jnp.linalg.svd(M)
    U, root, Vt = U[:, :r], jnp.sqrt(s[:r]), Vt[:r]
    B_new = (out.U @ U[:r] + Q_out @ U[r:]) * root
    A_new = root[:, None] * (Vt[:, :r] @ inp.U.T + Vt[:, r:] @ Q_in.T)
    return ExactStep(B_new, A_new, jnp.bool_(True))


# Float64 inside a program that has it switched off. The switch acts at tracing time, and vmap
# traces again, elsewhere; so the mapped version enters it by itself, one matrix after the other
# (which is also what keeps LAPACK from blocking itself on CPU).
@jax.custom_batching.custom_vmap
def _wide_svd_step(*arguments: Array) -> ExactStep:
    dtype = arguments[0].dtype
    with jax.enable_x64(True):
        step = _svd_step(*(jax.lax.convert_element_type(x, jnp.float64) for x in arguments))
        B_new, A_new = (jax.lax.convert_element_type(x, dtype) for x in step[:2])
        return ExactStep(B_new, A_new, step.ok)


@_wide_svd_step.def_vmap
def _wide_svd_step_batched(axis_size: int, in_batched: Any, *arguments: Array) -> Any:
    full = tuple(
        x if batched else jnp.broadcast_to(x, (axis_size, *x.shape))
        for x, batched in zip(arguments, in_batched, strict=True)
    )
    steps = jax.lax.map(lambda one: _wide_svd_step(*one), full)
    return steps, ExactStep(True, True, True)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------ fast


class _LQ(NamedTuple):
    """X (r x k) = L Q by two Cholesky passes, the last factor of Q left unapplied.

    ``Q = correction @ rough``, where ``rough`` is orthonormal to cond^2 eps and ``correction`` is a
    small triangular matrix close to the identity: to multiply by Q, it is cheaper to apply the
    correction to the other, smaller side.
    """

    L: Array
    rough: Array
    correction: Array
    inverse: Array  # of L
    inverse_norm: Array  # |L^{-1}| for the X with rows of length one

    def times(self, small: Array) -> Array:
        """``small @ Q``."""
        return _matmul(_matmul(small, self.correction), self.rough)

    def transpose_times(self, x: Array) -> Array:
        """``x @ Q^T`` for x (..., k)."""
        return _matmul(_matmul(x, self.rough.T), self.correction.T)


def _cholesky_pass(X: Array, shift: float) -> tuple[Array, Array, Array]:
    """Cholesky factor of X X^T with its inverse, and the norm of the inverse of the scaled one."""
    gram = _matmul(X, X.T)
    norms = jnp.sqrt(jnp.diagonal(gram))
    scale = jnp.where(norms > 0, 1 / jnp.where(norms > 0, norms, 1), 1)
    identity = jnp.eye(X.shape[0], dtype=X.dtype)
    scaled = scale[:, None] * gram * scale + shift * identity
    L = jnp.linalg.cholesky(scaled, symmetrize_input=False)
    inverse = solve_triangular(L, identity, lower=True)
    return L / scale[:, None], inverse * scale, jnp.linalg.norm(inverse)


def _cholesky_lq2(X: Array, deficient: bool = False) -> _LQ:
    """Two Cholesky passes; with ``deficient``, X may have any rank.

    Then directions that X does not have get rows of Q that are nearly zero instead of orthonormal,
    and columns of L of a few eps.
    """
    eps = float(jnp.finfo(X.dtype).eps)
    L1, inverse1, inverse_norm = _cholesky_pass(X, 4 * eps * X.shape[0] ** 0.5)
    rough = _matmul(inverse1, X)
    L2, correction, _ = _cholesky_pass(rough, 8 * eps if deficient else 0.0)
    inverse = _matmul(correction, inverse1)
    return _LQ(_matmul(L1, L2), rough, correction, inverse, inverse_norm)


def gram_step(B: Array, A: Array, dB: Array, dA: Array, rate: Array, max_move: Array) -> ExactStep:
    """The fast method; arguments as for :func:`svd_step`. Check ``ok`` before use.

    All tall matrices are kept transposed, (r x m): products that contract the long axis are several
    times faster on CPU when it is the last one in memory.
    """
    # The barrier keeps XLA from folding the transposition back into the products.
    B_t, dB_t = jax.lax.optimization_barrier((B.T, dB.T))
    out, inp = _cholesky_lq2(B_t), _cholesky_lq2(A)
    left = _matmul(out.inverse, dA)  # Q_B^T G, r x n
    right_t = _matmul(inp.inverse, dB_t)  # (G Q_A)^T, r x m
    core = inp.transpose_times(left)
    out_perp = right_t - out.times(out.transpose_times(right_t))
    in_perp = left - inp.times(core)
    W_core = _matmul(out.L.T, inp.L)
    grad_norm = jnp.sqrt(jnp.sum(core**2) + jnp.sum(out_perp**2) + jnp.sum(in_perp**2))
    rate = limited_rate(rate, max_move, grad_norm, jnp.linalg.norm(W_core))
    S = W_core - rate * core
    # The side whose new directions need a basis is the shorter one.
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
    return ExactStep(B_new_t.T, A_new, ok)


def _truncate(p: _LQ, q: _LQ, S: Array, P: Array, Z: Array) -> tuple[Array, Array, Array]:
    """Balanced factors of the best rank-r approximation of ``Q_p^T S Q_q + P^T Q_q + Q_p^T Z``.

    P (r x k_p) is orthogonal to Q_p, and Z (r x k_q) to Q_q. Returns X (r x k_p) and Y (r x k_q)
    with X^T Y the approximation, and its singular values, ascending.
    """
    r = S.shape[0]
    perp = _cholesky_lq2(P, deficient=True)
    C = perp.L.T
    SCt = _matmul(S, C.T)
    MMt = jnp.block([[_matmul(S, S.T) + _matmul(Z, Z.T), SCt], [SCt.T, _matmul(C, C.T)]])
    eigenvalues, U = jnp.linalg.eigh(MMt, symmetrize_input=False)
    s = jnp.sqrt(jnp.maximum(eigenvalues[r:], 0))
    root = jnp.sqrt(s)[:, None]
    U1_t, U2_t = U[:r, r:].T, U[r:, r:].T
    X = root * (p.times(U1_t) + perp.times(U2_t))
    Y = q.times(_matmul(U1_t, S) + _matmul(U2_t, C)) + _matmul(U1_t, Z)
    return X, Y / jnp.maximum(root, jnp.finfo(root.dtype).tiny), s


def gram_step_or_reference(
    B: Array, A: Array, dB: Array, dA: Array, rate: Array, max_move: Array
) -> ExactStep:
    """The fast method for a batch (N, ...), and the reference for the pairs that it can't do.

    ``ok`` says which were done by the fast method. ``rate`` and ``max_move`` have shape (N,).
    """
    arguments = (B, A, dB, dA, rate, max_move)

    # One pair after the other on CPU: there a branch is a real branch.
    @jax.custom_batching.sequential_vmap
    def one_pair(*arguments: Array) -> ExactStep:
        step = gram_step(*arguments)
        return jax.lax.cond(
            step.ok, lambda: step, lambda: svd_step(*arguments)._replace(ok=jnp.bool_(False))
        )

    # Elsewhere the batch stays a batch, and takes the reference as a whole if it takes it at all.
    def batch(*arguments: Array) -> ExactStep:
        step = jax.vmap(gram_step)(*arguments)

        def mend() -> ExactStep:
            reference = jax.vmap(svd_step)(*arguments)
            fine = step.ok[:, None, None]
            return ExactStep(
                jnp.where(fine, step.B, reference.B), jnp.where(fine, step.A, reference.A), step.ok
            )

        return jax.lax.cond(jnp.all(step.ok), lambda: step, mend)

    return jax.lax.platform_dependent(*arguments, cpu=jax.vmap(one_pair), default=batch)
