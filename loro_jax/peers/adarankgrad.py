"""AdaRankGrad: GaLore with an adaptive rank, and moments transported to the new subspace.

Source: Refael et al., ICLR 2025 (arXiv 2410.17881). A weight's subspace is renewed when Adam has
converged inside it, or after a period. The new subspace is found by randomised SVD; its rank r is
the smallest with ``|G - P P^T G|^2 <= eta |G|^2`` (Frobenius). With ``C = P_new^T P_old`` the
moments are transported to it: ``M <- C M``. Then Adam is applied to ``R = P^T G``, and the step is
``-lr alpha P N``.

Shapes are static under jit, so every projector and moment has the largest rank; columns of P beyond
the adaptive rank are zero, and so are the rows of R, M, V and N. Smaller ranks therefore save no
memory here; ``rank`` in the state shows how small the state could be.

The rules above are from the paper's abstract and from summaries of it, not from its pseudo-code.
The defaults of ``eta`` and ``tolerance``, and the following rules, are choices of this library.

* Second moments are transported by ``V <- (C * C) V`` (entrywise square), which is exact for
  uncorrelated coordinates and never negative. By what others report of the paper it is ``C V``, the
  rule of first moments, which may be negative.
* "Converged" means that the projected gradient's norm fell below ``tolerance`` times its value
  when the subspace was computed. An absolute threshold would depend on the scale of the loss.
* Layers of a stacked leaf are tested one by one; if any is due, subspaces of all are computed, and
  only the due ones are replaced.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from loro_jax.peers.projected import Projected, ProjectedSettings, Slots, projected_descent
from loro_jax.peers.projection import AdamConstants, adam, lift, project
from loro_jax.peers.subspace import adaptive_projector, moved_moments
from loro_jax.schedules import countable

Array = jax.Array


class AdaRankGradState(NamedTuple):
    """State of :func:`adarankgrad`; k and l are the smaller and the larger side of a leaf.

    Attributes:
        count: number of steps taken, int32 scalar.
        projector: tree like the parameters: (..., k, r), or a scalar for leaves not projected.
        mu: tree of first moments: (..., r, l), or the leaf's own shape.
        nu: tree of second moments, shapes as ``mu``.
        rank: tree of adaptive ranks, int32, one per matrix.
        norm: tree of the projected gradients' norms when the subspaces were computed.
    """

    count: jax.Array  # type: ignore[assignment]  # shadows tuple.count, as in Optax
    projector: Any
    mu: Any
    nu: Any
    rank: Any
    norm: Any


def adarankgrad(
    learning_rate: optax.ScalarOrSchedule,
    rank: int,
    *,
    projected: Projected,
    update_every: int = 200,
    scale: float = 0.25,
    eta: float = 0.04,
    tolerance: float = 0.1,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    basis: str = "randomised",
) -> optax.GradientTransformationExtraArgs:
    """Creates AdaRankGrad for the projected leaves, with Adam for the others.

    The state is float32 or wider for any dtype of the parameters, and has the size of the largest
    rank.

    Args:
        learning_rate: see :func:`loro_jax.peers.galore.galore`, as for all arguments except ``eta``
            and ``tolerance``.
        rank: the largest rank of a projector.
        projected: which leaves to project.
        update_every: T. Steps 0, T, 2T, ... renew all subspaces.
        scale: alpha, a factor on the projected leaves' updates.
        eta: fraction of the gradient's squared norm that the subspace may lose, if the largest rank
            can reach it.
        tolerance: a subspace is renewed early when the projected gradient's norm is below this
            fraction of its value when the subspace was computed. 0: never early.
        b1: decay of Adam's first moment.
        b2: decay of Adam's second moment.
        eps: Adam's epsilon.
        weight_decay: decoupled decay.
        basis: "randomised" or "svd"; other bases have no singular values to choose a rank by.

    Returns:
        An ``optax.GradientTransformationExtraArgs``, learning rate included.

    Raises:
        ValueError: as GaLore; for an ``eta`` or a ``tolerance`` outside [0, 1), or another basis.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> params = {"w": jnp.zeros((4, 6))}
        >>> tx = adarankgrad(0.01, rank=3, projected={"w": True})
        >>> _, state = tx.update({"w": jnp.ones((4, 6))}, tx.init(params), params)
        >>> int(state.rank["w"])  # of at most three; the gradient has rank one
        1

    References:
        Refael et al., `AdaRankGrad: Adaptive Gradient-Rank and Moments for Memory-Efficient LLMs
        Training and Fine-Tuning <https://arxiv.org/abs/2410.17881>`_, ICLR 2025.
    """
    constants = AdamConstants(b1, b2, eps)
    settings = ProjectedSettings(
        learning_rate, rank, projected, update_every, scale, constants, weight_decay
    ).checked("adarankgrad")
    for name, value in (("eta", eta), ("tolerance", tolerance)):
        if not 0 <= value < 1:
            raise ValueError(f"adarankgrad: {name} must be at least 0 and below 1, is {value!r}.")
    if basis not in ("randomised", "svd"):
        raise ValueError(f'adarankgrad: basis must be "randomised" or "svd", is {basis!r}.')
    find = functools.partial(
        adaptive_projector, rank=rank, eta=eta, randomised=basis == "randomised"
    )

    def begin(shape: tuple[int, ...], dtype: Any) -> Slots:
        layers = shape[:-2]
        return (
            *settings.begin(shape, dtype),
            jnp.zeros(layers, jnp.int32),
            jnp.zeros(layers, dtype),
        )

    def step(G: Array, held: Slots, count: Array) -> tuple[Array, Slots]:
        P, mu, nu, ranks, norm = held
        # Little of the gradient is left in the subspace: Adam has converged inside it.
        converged = _norm(project(P, G)) < tolerance * norm
        # Renewed when Adam has converged, and after every T steps in any case.
        due = converged | (count % countable(update_every) == 0)
        subspace = (P, mu, nu, ranks, norm)
        # One scalar per leaf, so that lax.cond skips the factorisations.
        P, mu, nu, ranks, norm = jax.lax.cond(
            jnp.any(due), lambda: _renewed(subspace, due, G, *find(G, count)), lambda: subspace
        )
        # R = P^T G, Adam's N of R, and W <- W - lr alpha P N.
        N, mu, nu = adam(project(P, G), mu, nu, count + 1, constants)
        return scale * lift(P, N), (P, mu, nu, ranks, norm)

    return projected_descent("adarankgrad", settings, AdaRankGradState, begin, step)


def _norm(X: Array) -> Array:
    return jnp.linalg.vector_norm(X, axis=(-2, -1))


def _renewed(held: Slots, due: Array, G: Array, P_new: Array, ranks_new: Array) -> Slots:
    """Replaces the subspaces, moments and ranks of the layers that are due."""
    # Renewing computes all layers (shapes are static), but replaces only those that are due.
    P, mu, nu, *_ = held
    # M <- C M and V <- (C * C) V with C = P_new^T P_old.
    new = (P_new, *moved_moments(P_new, P, mu, nu), ranks_new, _norm(project(P_new, G)))
    return tuple(
        jnp.where(due.reshape(due.shape + (1,) * (after.ndim - due.ndim)), after, before)
        for after, before in zip(new, held, strict=True)
    )
