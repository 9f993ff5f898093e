"""Fira: GaLore's update plus the rest of the gradient, scaled like the projected part by Adam.

Source: Chen et al., NeurIPS 2025 (arXiv 2410.01623). With ``R = P^T G`` and Adam's direction N of
R, the part of the gradient that GaLore drops is ``S = G - P R``. Adam has no moments for it, so
each column is multiplied by the factor by which Adam changed the norm of the same column of R (the
paper's norm-based scaling): ``phi_j = |N_j| / |R_j|``. Columns are counted along the larger side.
Then the norm-growth limiter is applied: if ``|S_t| > gamma |S_(t-1)|`` (Frobenius, one norm per
matrix, after limiting), S_t is scaled down to ``gamma |S_(t-1)|``. The update is ``alpha P N + S``.

Unlike in the authors' code (github.com/xichen-fy/Fira), N includes Adam's bias correction before
its norm is computed, and epsilon is added to the corrected root, as in the other methods here; a
previous norm of zero does not limit S; square matrices are projected from the left. And S is the
paper's: in the code the projection back includes alpha, so that ``S = G - alpha P R`` there, which
at alpha = 0.25 keeps three quarters of the projected part in S.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from loro_jax.peers.bases import BASES
from loro_jax.peers.projected import Projected, ProjectedSettings, Slots, projected_descent
from loro_jax.peers.projection import AdamConstants

Array = jax.Array

# Added to |R_j|, as in the authors' code.
_NORM_EPS = 1e-8


class FiraState(NamedTuple):
    """State of :func:`fira`; k and l are the smaller and the larger side of a leaf.

    Attributes:
        count: number of steps taken, int32 scalar.
        projector: tree like the parameters: (..., k, r), or indices, int32, for bases that are
            stored as such; a scalar for leaves not projected.
        mu: tree of first moments: (..., r, l), or the leaf's own shape.
        nu: tree of second moments, shapes as ``mu``.
        norm: tree of the last remainders' norms, one per matrix; zero before the first step.
    """

    count: jax.Array  # type: ignore[assignment]  # shadows tuple.count, as in Optax
    projector: Any
    mu: Any
    nu: Any
    norm: Any


def norm_scaling(N: Array, R: Array) -> Array:
    """Returns the factor by which Adam changed the norm of each column of a projected gradient.

    Args:
        N: Adam's direction, (..., r, l).
        R: the projected gradient, (..., r, l).

    Returns:
        Factors, (..., 1, l).

    Example:
        >>> import jax.numpy as jnp
        >>> N, R = jnp.array([[3.0, 1.0], [4.0, 0.0]]), jnp.array([[0.6, 2.0], [0.8, 0.0]])
        >>> [round(float(x), 3) for x in norm_scaling(N, R)[0]]
        [5.0, 0.5]
    """
    top, bottom = (jnp.linalg.vector_norm(x, axis=-2, keepdims=True) for x in (N, R))
    return top / (bottom + _NORM_EPS)


def limit_growth(S: Array, last: Array, gamma: float) -> tuple[Array, Array]:
    """Limits the growth of a matrix's norm from step to step.

    Args:
        S: (..., k, l).
        last: norm of the previous S, (...); zero: no limit.
        gamma: largest growth in one step.

    Returns:
        S, scaled down to norm ``gamma * last`` if its norm is larger, and its new norm.

    Example:
        >>> import jax.numpy as jnp
        >>> S, norm = limit_growth(jnp.array([[3.0, 4.0]]), jnp.float32(1.0), 1.5)
        >>> [round(float(x), 3) for x in S[0]], float(norm)
        ([0.9, 1.2], 1.5)
    """
    norm = jnp.linalg.vector_norm(S, axis=(-2, -1))
    # Zero is no limit: neither before the first step, as in the authors' code, nor for an S that
    # was zero once, which would otherwise stay near zero forever.
    kept = jnp.where(last > 0, jnp.minimum(norm, gamma * last), norm)
    factor = kept / jnp.where(norm > 0, norm, 1)
    return S * factor[..., None, None], kept


def fira(
    learning_rate: optax.ScalarOrSchedule,
    rank: int,
    *,
    projected: Projected,
    update_every: int = 200,
    scale: float = 0.25,
    gamma: float = 1.01,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    basis: str = "svd",
    moments: str = "keep",
) -> optax.GradientTransformationExtraArgs:
    """Creates Fira for the projected leaves, with Adam for the others.

    The state is float32 or wider for any dtype of the parameters: GaLore's and one number per
    matrix.

    Args:
        learning_rate: see :func:`loro_jax.peers.galore.galore`, as for all arguments except
            ``gamma``.
        rank: r of every projector.
        projected: which leaves to project.
        update_every: T.
        scale: alpha, a factor on the update within the subspace.
        gamma: largest factor by which the remainder's norm grows in a step.
        b1: decay of Adam's first moment.
        b2: decay of Adam's second moment.
        eps: Adam's epsilon.
        weight_decay: decoupled decay.
        basis: the kind of subspace; all but "blocks", in which no column has both parts.
        moments: "keep", "reset" or "rotate".

    Returns:
        An ``optax.GradientTransformationExtraArgs``, learning rate included.

    Raises:
        ValueError: as GaLore; for a ``gamma`` below 1, or the basis "blocks".

    Example:
        >>> import jax, jax.numpy as jnp
        >>> params = {"w": jnp.zeros((4, 6))}
        >>> tx = fira(0.01, rank=1, projected={"w": True})
        >>> G = {"w": jax.random.normal(jax.random.key(0), (4, 6))}
        >>> updates, state = tx.update(G, tx.init(params), params)
        >>> int(jnp.linalg.matrix_rank(updates["w"]))  # GaLore's would have rank one
        4

    References:
        Chen et al., `Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank Constraint?
        <https://arxiv.org/abs/2410.01623>`_, NeurIPS 2025.
    """
    constants = AdamConstants(b1, b2, eps)
    settings = ProjectedSettings(
        learning_rate,
        rank,
        projected,
        update_every,
        scale,
        constants,
        weight_decay,
        basis,
        moments,
    ).checked("fira")
    if basis == "blocks":
        raise ValueError(
            'fira: basis "blocks" gives whole matrices, with no projected part to scale the rest '
            "by; expected another basis."
        )
    if gamma < 1:
        raise ValueError(f"fira: gamma must be at least 1, is {gamma!r}.")

    def begin(shape: tuple[int, ...], dtype: Any) -> Slots:
        return (*settings.begin(shape, dtype), jnp.zeros(shape[:-2], dtype))

    def step(G: Array, held: Slots, count: Array) -> tuple[Array, Slots]:
        *subspace, last = held
        lift = BASES[basis].lift
        # GaLore's step: the projector every T steps, R = P^T G, and Adam's N of R.
        R, N, (P, mu, nu) = settings.in_subspace(G, tuple(subspace), count)
        # The remainder S = G - P R, its columns scaled by phi_j = |N_j| / |R_j|, and limited in its
        # growth.
        rest = G - lift(P, R, G.shape)
        S, norm = limit_growth(norm_scaling(N, R) * rest, last, gamma)
        # alpha is not applied to S.
        return scale * lift(P, N, G.shape) + S, (P, mu, nu, norm)

    return projected_descent("fira", settings, FiraState, begin, step)
