"""The default exact step, which writes its new column space as a graph.

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

S, ``z z^T`` and ``c c^T`` are computed from three r x r products of tall matrices on each side
(:func:`grams`), and the new factors are linear combinations of B and dB, and of A and dA
(:func:`new_factors`): ten tall products of 2 r^2 m flops in total for a square W. What happens in
between (:func:`new_space`, :func:`combination`) sees r x r matrices only, so that pairs of all
shapes share one program. No tall orthonormal basis is formed. The disadvantage is that the
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

from loro_jax.exact.basis import Balance, ordered_like, rotated_to_nearest
from loro_jax.exact.step import ExactStep, StepSize, damped_inverse, limited_rate
from loro_jax.linalg.batching import batches_itself, one_by_one, varying_alike
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


class Grams(NamedTuple):
    """All that an exact step needs to know of a pair and its directions, r x r each."""

    out: Array  # B^T B
    out_mixed: Array  # dB^T B
    out_move: Array  # dB^T dB
    inp: Array  # A A^T
    inp_mixed: Array  # dA A^T
    inp_move: Array  # dA dA^T


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


class Combination(NamedTuple):
    """The new factors ``B out^T - dB out_move^T`` and ``inp A - inp_move dA``, all r x r."""

    out: Array
    out_move: Array
    inp: Array
    inp_move: Array
    ok: Array  # whether they are trusted


def grams(B: Array, A: Array, dB: Array, dA: Array) -> Grams:
    """Computes the products over the long axes, three on each side."""
    return Grams(
        out=matmul(B.T, B),
        out_mixed=matmul(dB.T, B),
        out_move=matmul(dB.T, dB),
        inp=matmul(A, A.T),
        inp_mixed=matmul(dA, A.T),
        inp_move=matmul(dA, dA.T),
    )


def new_space(of: Grams, size: StepSize) -> NewSpace:
    """Computes the new product's column space."""
    r = of.inp.shape[0]
    # B = Q_b^T L_b^T and A = L_a Q_a, with Q_b = L_b^{-1} B^T and Q_a = L_a^{-1} A never formed.
    out, inp = _sides(of, size)
    core = matmul(matmul(out.to_other, of.inp_mixed), inp.inverse.T)  # Q_b G Q_a^T
    inner = matmul(matmul(inp.to_other, of.out_mixed), out.inverse.T)  # Q_a G^T Q_b^T, from dB
    # Gram matrices of the parts orthogonal to Q_a and Q_b, by Pythagoras, so that no tall matrix is
    # projected. Without the learning rate up to here: the trust region may still reduce it.
    zz = matmul(matmul(out.to_other, of.inp_move), out.to_other.T) - matmul(core, core.T)
    cc = matmul(matmul(inp.to_other, of.out_move), inp.to_other.T) - matmul(inner, inner.T)
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
    # c = -rate (inp.to_other dB^T - inner Q_b) and z = -rate (out.to_other dA - core Q_a), each is
    # one combination of two tall matrices, which is applied only when the basis is known, too.
    along = rate * matmul(whiten, X_t)
    # Trusted are only well-conditioned factors, because their Gram matrices are inverted, and steps
    # smaller than W, so that the new leading space can be a graph over the old one.
    inverse_norm = jnp.maximum(out.scaled_inverse_norm, inp.scaled_inverse_norm)
    return NewSpace(
        out=matmul(whiten + matmul(along, inner), out.inverse),
        out_move=matmul(along, inp.to_other),
        inp=matmul(matmul(whiten, N + rate * core), inp.inverse),
        inp_move=rate * matmul(whiten, out.to_other),
        squares=matmul(matmul(whiten, matmul(N, N.T) + zz), whiten.T),
        overlaps=(matmul(whiten, out.L.T), matmul(matmul(whiten, N), inp.L.T)),
        ok=(inverse_norm < LARGEST_INVERSE * r**0.5)
        & (rate * grad_norm < W_norm)
        & graph.converged,
    )


class _Side(NamedTuple):
    """One factor's Gram matrix ``L L^T``, factorised."""

    L: Array
    inverse: Array  # of L
    scaled_inverse_norm: Array
    # Takes the factor's gradient to the full gradient's projection on this factor's space:
    # Q_b G = to_other dA and Q_a G^T = to_other dB^T; L^{-1} unless it is damped.
    to_other: Array


def _sides(of: Grams, size: StepSize) -> tuple[_Side, _Side]:
    """Factorises both Gram matrices by one program."""

    def factorised(gram: Array, damping: Array | None) -> _Side:
        L, inverse, norm = cholesky_with_inverse(gram)
        return _Side(L, inverse, norm, damped_inverse(L, inverse, damping))

    # NumPy scalars and None are both possible: None is an empty tree.
    damping = jax.tree.map(lambda d: jnp.stack([jnp.asarray(d)] * 2), size.damping)
    both = one_by_one(factorised, 1)(jnp.stack([of.out, of.inp]), damping)
    return jax.tree.map(lambda x: x[0], both), jax.tree.map(lambda x: x[1], both)


def combination(space: NewSpace, balance: Balance, basis: str) -> Combination:
    """Computes the coefficients of the new balanced factors in the given basis."""
    placed = rotated_to_nearest if basis == "nearest" else ordered_like
    balance = placed(balance, *space.overlaps)
    left, right = balance.left, balance.right
    # The r x r coefficients are multiplied first: this way each factor needs two tall products.
    return Combination(
        out=matmul(left, space.out),
        out_move=matmul(left, space.out_move),
        inp=matmul(right, space.inp),
        inp_move=matmul(right, space.inp_move),
        ok=space.ok & balance.ok & (balance.least > SMALLEST_KEPT * balance.largest),
    )


def new_factors(B: Array, A: Array, dB: Array, dA: Array, by: Combination) -> ExactStep:
    """Combines the old factors and the directions; the old ones stay where they are not trusted."""
    B_new = matmul(B, by.out.T) - matmul(dB, by.out_move.T)
    A_new = matmul(by.inp, A) - matmul(by.inp_move, dA)
    return ExactStep(jnp.where(by.ok, B_new, B), jnp.where(by.ok, A_new, A), by.ok)


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
