"""Transport of moments, Adam's or momentum, through an exact step.

An exact step gives each pair new factors (B', A') in a new basis, whose signs are arbitrary, so the
moments of the old factors no longer fit. They can be reset (a refresh), or transported by a rule
that does not depend on either basis:

* First moments. ``m_B`` and ``m_A`` are averages of ``G A^T`` and ``B^T G``. Together they fix one
  tangent vector at W, the average gradient's projection ``T = P_U G + (I - P_U) G P_V``
  (:mod:`loro_jax.exact.tangent`), whatever factors represented W. The new moments are what that
  average gradient would have given: ``m_B' = T A'^T`` and ``m_A' = B'^T T``.
* Second moments. The new gradients are, inside the old spaces, ``g_B' = g_B X^T`` with
  ``X = A' A^+`` and ``g_A' = Y^T g_A`` with ``Y = B^+ B'``. With uncorrelated entries their squares
  average to ``v_B' = v_B (X o X)^T`` and ``v_A' = (Y o Y)^T v_A`` (o entry by entry). For the part
  of the new factors outside the old spaces (large, if the old ones were rank-deficient) only the
  mean is known, a part of T; its square is added, so that every first moment has a second.

Adam's direction commutes with changes of sign of the inner index, and so do both rules: two runs
that start from (B, A) and from (B S, S A) keep the same product W.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from loro_jax.exact.tangent import Side, tangent_projection, with_sides
from loro_jax.linalg.precision import at_least_float32, in_full_precision

Array = jax.Array
Factors = tuple[Array, Array]


def transport_moments(
    old: Factors, new: Factors, mu: Factors, nu: Factors | None = None
) -> tuple[Factors, ...]:
    """Transports the moments of a pair (or a batch of pairs) to its new factors.

    Args:
        old: (B, A) before the exact step, shapes (..., m, r) and (..., r, n).
        new: (B', A') after it, same shapes.
        mu: first moments (m_B, m_A), shapes as the factors.
        nu: second moments (v_B, v_A), shapes as the factors; None: no second moments.

    Returns:
        The first and (if any) second moments of the new factors, in the dtypes of the old ones.

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
    mapped = with_sides(_transport, old[0].ndim - 2)
    moved = mapped(*(x.astype(dtype) for x in arguments))
    mu_B, mu_A, *nu_new = (x.astype(like.dtype) for x, like in zip(moved, moments, strict=True))
    return ((mu_B, mu_A), (nu_new[0], nu_new[1])) if nu_new else ((mu_B, mu_A),)


@in_full_precision
def _transport(
    out: Side,
    inp: Side,
    B: Array,
    A: Array,
    B_new: Array,
    A_new: Array,
    m_B: Array,
    m_A: Array,
    *v: Array,
) -> tuple[Array, ...]:
    del B, A
    # T, the average gradient's tangent vector, as blocks in the bases of the old factors.
    t = tangent_projection(out, inp, m_B, m_A)
    inner_A, inner_B = A_new @ inp.Q, out.Q.T @ B_new  # r x r
    # T A'^T and B'^T T, with T in blocks: the parts inside the old spaces, and those outside.
    seen_B = out.Q @ (t.core @ inner_A.T) + t.out_perp @ inner_A.T
    seen_A = (inner_B.T @ t.core) @ inp.Q.T + inner_B.T @ t.in_perp
    unseen_B, unseen_A = out.Q @ (t.in_perp @ A_new.T), (B_new.T @ t.out_perp) @ inp.Q.T
    moved = seen_B + unseen_B, seen_A + unseen_A
    if not v:
        return moved
    X = inner_A @ inp.inverse.T  # A' A^+
    Y = out.inverse @ inner_B  # B^+ B'
    return *moved, v[0] @ (X**2).T + unseen_B**2, (Y**2).T @ v[1] + unseen_A**2
