"""The default exact step of one pair, which writes its new column space as a graph.

The step moves ``W = Q_b^T L_b^T L_a Q_a`` (rows of Q_b, Q_a orthonormal, r x m and r x n) to
``T = Q_b^T S Q_a + Q_b^T z + c^T Q_a``: S is r x r, z (r x n) is orthogonal to Q_a and c (r x m) to
Q_b. If the step is not larger than the smallest singular value of W, T has r large singular values
and r small ones, of second order in the step, and the space of its r leading left singular vectors
is close to that of Q_b. This space is then the graph of a small X (r x r): it is spanned by the
columns of ``Q_b^T + c^T X``.

* In terms of X, subspace iteration with ``T T^T`` is ``X <- N^T (S N^T + z z^T)^{-1}`` with
  ``N = S + X^T c c^T``. From X = 0 it gives ``X_1 = S^T K`` with ``K = (S S^T + z z^T)^{-1}``. Its
  fixed point is also that of ``X <- X_1 + (I - X S) c c^T X K``, which reuses this one inverse:
  four small products per iteration. The smaller the dropped singular values are relative to the
  kept ones, the faster it converges.
* With ``G = I + X^T c c^T X = L L^T`` the new product is ``(Q_b^T + c^T X) G^{-1} (N Q_a + z)``,
  and the eigenvectors of the r x r matrix ``L^{-1} (N N^T + z z^T) L^{-T}`` give balanced factors.
  They only choose a basis: their rounding errors cancel in the product.

S, ``z z^T`` and ``c c^T`` are computed from three r x r products of tall matrices on each side, and
the new factors are linear combinations of B and dB, and of A and dA: ten tall products of 2 r^2 m
flops in total for a square W. No tall orthonormal basis is formed. The disadvantage is that the
condition number of the factors is squared (``B^T B`` is inverted by Cholesky), so the method
reports whether its result can be trusted.

Source: subspaces as graphs over an estimate, which solve a Riccati equation, are from Demmel,
"Three methods for refining estimates of invariant subspaces", Computing 38, 1987; this iteration
and its use for the retraction are ours.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from loro_jax.exact.basis import (
    Balance,
    by_products,
    by_singular_vectors,
    ordered_like,
    rotated_to_nearest,
)
from loro_jax.exact.step import ExactStep, StepSize, damped_inverse, limited_rate
from loro_jax.linalg.batching import batches_itself, varying_alike
from loro_jax.linalg.cholesky import cholesky_with_inverse
from loro_jax.linalg.precision import matmul

Array = jax.Array

# Largest norm |L^{-1}| (Frobenius, of a factor with its columns scaled to length one) for which one
# Cholesky pass is trusted, relative to its minimum sqrt(r).
LARGEST_INVERSE = 8.0

# Largest estimated error of W, relative to eps |T|, that the iteration may leave.
LARGEST_REMAINDER = 8.0

# Maximal number of iterations: if more are needed, another method is as fast.
MOST_ITERATIONS = 8

# Smallest kept singular value, relative to the largest: ``S S^T`` is inverted, too.
SMALLEST_KEPT = 5e-3


class NewSpace(NamedTuple):
    """The new product as ``Q^T M``: the rows of Q are an orthonormal basis of its column space.

    Q (r x m) and M (r x n) are given by coefficients (r x r): ``Q = out B^T - out_move dB^T`` and
    ``M = inp A - inp_move dA``.
    """

    out: Array
    out_move: Array
    inp: Array
    inp_move: Array
    squares: Array  # M M^T, r x r
    overlaps: tuple[Array, Array]  # Q B and M A^T
    ok: Array  # whether it is trusted, before the check of the singular values


def graph_step(
    B: Array, A: Array, dB: Array, dA: Array, size: StepSize, basis: str = "singular"
) -> ExactStep:
    """Takes the exact step of one pair; arguments as for ``svd_step``. Check ``ok`` before use.

    On platforms other than CPU it is mapped over a batch; on CPU :mod:`~loro_jax.exact.fallback`
    calls its two parts.
    """
    space = new_space(B, A, dB, dA, size)
    # Rotating to the nearest basis can start from any balanced basis, so the cheaper one is used.
    balance_of = by_products if basis == "nearest" else by_singular_vectors
    return balanced_factors(B, A, dB, dA, space, balance_of(space.squares), basis)


def new_space(B: Array, A: Array, dB: Array, dA: Array, size: StepSize) -> NewSpace:
    """Computes the new product's column space; arguments as for ``svd_step``."""
    r = A.shape[0]
    # B = Q_b^T L_b^T and A = L_a Q_a, with Q_b = L_b^{-1} B^T and Q_a = L_a^{-1} A never formed.
    out, inp = cholesky_with_inverse(matmul(B.T, B)), cholesky_with_inverse(matmul(A, A.T))
    # These take a factor's gradient to the full gradient's projection on that side:
    # Q_b G = to_left dA and Q_a G^T = to_right dB^T.
    to_left = damped_inverse(out.L, out.inverse, size.damping)
    to_right = damped_inverse(inp.L, inp.inverse, size.damping)
    core = matmul(matmul(to_left, matmul(dA, A.T)), inp.inverse.T)  # Q_b G Q_a^T
    inner = matmul(matmul(to_right, matmul(dB.T, B)), out.inverse.T)  # Q_a G^T Q_b^T, from dB
    # Gram matrices of the parts orthogonal to Q_a and Q_b, by Pythagoras, so that no tall matrix is
    # projected. Without the learning rate up to here: the trust region may still reduce it.
    zz = matmul(matmul(to_left, matmul(dA, dA.T)), to_left.T) - matmul(core, core.T)
    cc = matmul(matmul(to_right, matmul(dB.T, dB)), to_right.T) - matmul(inner, inner.T)
    W_core = matmul(out.L.T, inp.L)
    # The three parts are orthogonal, so their squares add; rounding may make a trace negative.
    grad_norm = jnp.sqrt(jnp.maximum(jnp.sum(core**2) + jnp.trace(zz) + jnp.trace(cc), 0))
    W_norm = jnp.linalg.norm(W_core)
    rate = limited_rate(size, grad_norm, W_norm)
    S, zz, cc = W_core - rate * core, rate**2 * zz, rate**2 * cc

    graph = _graph_of_leading_space(S, zz, cc)
    # L^{-1} of the module's G = L L^T makes the columns of Q_b^T + c^T X orthonormal.
    X_t = graph.X.T
    whiten = cholesky_with_inverse(jnp.eye(r, dtype=S.dtype) + matmul(X_t, graph.overlap)).inverse
    N = S + graph.overlap.T

    # Q = whiten (Q_b + X^T c) and M = whiten (N Q_a + z), in terms of B, dB, A and dA: with
    # c = -rate (to_right dB^T - inner Q_b) and z = -rate (to_left dA - core Q_a), each is one
    # combination of two tall matrices, which is applied only when the basis is known, too.
    along = rate * matmul(whiten, X_t)
    # Trusted are only well-conditioned factors, because their Gram matrices are inverted, and steps
    # smaller than W, so that the new leading space can be a graph over the old one.
    inverse_norm = jnp.maximum(out.scaled_inverse_norm, inp.scaled_inverse_norm)
    return NewSpace(
        out=matmul(whiten + matmul(along, inner), out.inverse),
        out_move=matmul(along, to_right),
        inp=matmul(matmul(whiten, N + rate * core), inp.inverse),
        inp_move=rate * matmul(whiten, to_left),
        squares=matmul(matmul(whiten, matmul(N, N.T) + zz), whiten.T),
        overlaps=(matmul(whiten, out.L.T), matmul(matmul(whiten, N), inp.L.T)),
        ok=(inverse_norm < LARGEST_INVERSE * r**0.5)
        & (rate * grad_norm < W_norm)
        & graph.converged,
    )


def balanced_factors(
    B: Array,
    A: Array,
    dB: Array,
    dA: Array,
    space: NewSpace,
    balance: Balance,
    basis: str = "singular",
) -> ExactStep:
    """Returns the new balanced factors in the given basis."""
    placed = rotated_to_nearest if basis == "nearest" else ordered_like
    balance = placed(balance, *space.overlaps)
    left, right = balance.left, balance.right
    # The r x r coefficients are multiplied first: this way each factor needs two tall products.
    B_new = matmul(B, matmul(left, space.out).T) - matmul(dB, matmul(left, space.out_move).T)
    A_new = matmul(matmul(right, space.inp), A) - matmul(matmul(right, space.inp_move), dA)
    ok = space.ok & balance.ok & (balance.least > SMALLEST_KEPT * balance.largest)
    return ExactStep(B_new, A_new, ok)


class _Graph(NamedTuple):
    """The leading left singular space of T as a graph over Q_b."""

    X: Array
    overlap: Array  # c c^T X
    converged: Array  # by an estimate of the remaining error of W


def _graph_of_leading_space(S: Array, zz: Array, cc: Array) -> _Graph:
    """Iterates ``X <- X_1 + (I - X S) c c^T X K`` from X_1; see the module's docstring."""
    inverse = cholesky_with_inverse(matmul(S, S.T) + zz).inverse
    K = matmul(inverse.T, inverse)
    X_1 = matmul(S.T, K)
    # X moves W by about |c| in total, so a relative change of X moves it by that fraction of |c|.
    c_norm = jnp.sqrt(jnp.maximum(jnp.trace(cc), 0))
    tiny = jnp.finfo(S.dtype).tiny
    relative = c_norm / jnp.maximum(jnp.linalg.norm(X_1), tiny)
    enough = LARGEST_REMAINDER * jnp.finfo(S.dtype).eps * jnp.sqrt(jnp.sum(S**2) + jnp.trace(zz))

    remainder, X = _iterated(
        S, cc, X_1, K, c_norm[..., None, None], relative[..., None, None], enough[..., None, None]
    )
    return _Graph(X, matmul(cc, X), (remainder <= enough)[0, 0])


@batches_itself
def _iterated(
    S: Array, cc: Array, X_1: Array, K: Array, c_norm: Array, relative: Array, enough: Array
) -> tuple[Array, Array]:
    """Iterates to convergence; returns the estimated error of W, shape (..., 1, 1), and X."""
    tiny = jnp.finfo(S.dtype).tiny

    def unfinished(last: _Iterate) -> Array:
        # With NaN no comparison holds, so the iteration stops.
        return (last.remainder > enough) & (last.round < MOST_ITERATIONS)

    def again(last: _Iterate) -> _Iterate:
        cc_X = matmul(cc, last.X)
        X = X_1 + matmul(cc_X - matmul(last.X, matmul(S, cc_X)), K)
        change = _norm(X - last.X)
        # The rate of convergence differs between directions. The slowest may be one of r, so its
        # factor is at most sqrt(r) times the ratio of the norms.
        ratio = S.shape[-1] ** 0.5 * change / jnp.maximum(last.change, tiny)
        remainder = relative * change * jnp.minimum(ratio, 1.0)
        new = _Iterate(last.round + 1, X, change, remainder)
        # Members of a batch that have converged keep their values while others iterate.
        going = unfinished(last)
        return jax.tree.map(lambda x, y: jnp.where(going, x, y), new, last)

    first = _Iterate(jnp.zeros_like(c_norm, jnp.int32), X_1, _norm(X_1), c_norm)
    final = jax.lax.while_loop(lambda last: jnp.any(unfinished(last)), again, varying_alike(first))
    return final.remainder, final.X


def _norm(X: Array) -> Array:
    return jnp.sqrt(jnp.sum(X**2, axis=(-2, -1), keepdims=True))


class _Iterate(NamedTuple):
    round: Array
    X: Array
    change: Array
    remainder: Array
