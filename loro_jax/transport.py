"""Carrying moments, Adam's or momentum, through an exact step.

An exact step gives each pair new factors (B', A') in a new basis, whose signs are arbitrary, and
the moments of the old ones no longer fit. They can be dropped (a refresh), or carried over by a
rule that does not depend on either basis:

* First moments. ``m_B`` and ``m_A`` are averages of ``G A^T`` and ``B^T G``. Together they fix one
  tangent vector at W, the average gradient's projection ``T = P_U G + (I - P_U) G P_V``
  (:mod:`loro_jax.manifold`), whatever factors represented W. The new moments are what that average
  gradient would have given: ``m_B' = T A'^T`` and ``m_A' = B'^T T``.
* Second moments. The new gradients are, inside the old spaces, ``g_B' = g_B X^T`` with
  ``X = A' A^+`` and ``g_A' = Y^T g_A`` with ``Y = B^+ B'``. With uncorrelated entries their squares
  average to ``v_B' = v_B (X o X)^T`` and ``v_A' = (Y o Y)^T v_A`` (o entry by entry).

Adam's direction commutes with changes of sign of the inner index, and so do both rules: two runs
that start from (B, A) and from (B S, S A) keep the same product W.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular

from loro_jax.batching import one_by_one
from loro_jax.manifold import tangent_projection
from loro_jax.precision import at_least_float32

Array = jax.Array
Factors = tuple[Array, Array]


def transport_moments(
    old: Factors, new: Factors, mu: Factors, nu: Factors | None = None
) -> tuple[Factors, ...]:
    """Moments of the new factors of a pair (or a batch of pairs) from those of the old.

    Args:
        old: (B, A) before the exact step, shapes (..., m, r) and (..., r, n).
        new: (B', A') behind it, same shapes.
        mu: first moments (m_B, m_A), shapes as the factors.
        nu: second moments (v_B, v_A), shapes as the factors; None: there are none.

    Returns:
        The first and (if there are) the second moments of the new factors, in the dtypes of the
        old ones.

    Example:
        >>> import jax.numpy as jnp
        >>> B, A = jnp.eye(4, 2), jnp.eye(2, 3)
        >>> sign = jnp.array([-1.0, 1.0])
        >>> mu = (jnp.ones((4, 2)), jnp.ones((2, 3)))
        >>> (mu_B, _), _ = transport_moments((B, A), (B * sign, sign[:, None] * A), mu, mu)
        >>> [float(x) for x in mu_B[0]]
        [-1.0, 1.0]
    """
    moments = (*mu, *(nu or ()))
    arguments = (*old, *new, *moments)
    dtype = at_least_float32(jnp.result_type(*arguments))
    mapped = one_by_one(_transport, old[0].ndim - 2)
    moved = mapped(*(x.astype(dtype) for x in arguments))
    mu_B, mu_A, *nu_new = (x.astype(like.dtype) for x, like in zip(moved, moments, strict=True))
    return ((mu_B, mu_A), (nu_new[0], nu_new[1])) if nu_new else ((mu_B, mu_A),)


def _transport(
    B: Array, A: Array, B_new: Array, A_new: Array, m_B: Array, m_A: Array, *v: Array
) -> tuple[Array, ...]:
    t = tangent_projection(B, A, m_B, m_A)
    inner_A, inner_B = A_new @ t.Q_A, t.Q_B.T @ B_new  # r x r
    # T A'^T and B'^T T, with T in blocks.
    m_B_new = t.Q_B @ (t.core @ inner_A.T + t.in_perp @ A_new.T) + t.out_perp @ inner_A.T
    m_A_new = (inner_B.T @ t.core + B_new.T @ t.out_perp) @ t.Q_A.T + inner_B.T @ t.in_perp
    if not v:
        return m_B_new, m_A_new
    X = solve_triangular(t.R_A, inner_A.T).T  # A' A^+ = A' Q_A R_A^{-T}
    Y = solve_triangular(t.R_B, inner_B)  # B^+ B' = R_B^{-1} Q_B^T B'
    return m_B_new, m_A_new, v[0] @ (X**2).T, (Y**2).T @ v[1]
