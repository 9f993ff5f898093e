"""GaLore: Adam on gradients projected to the leading singular subspace of a recent gradient.

Source: Zhao et al., ICML 2024 (arXiv 2403.03507), Algorithm 2. For a weight m x n with m <= n,
every T steps P becomes the first r left singular vectors of the gradient; then ``R = P^T G``, Adam
turns R into N, and the weight moves by ``-lr alpha P N``. For m > n the same is done with the
transpose. Moments are kept when P changes. Other subspaces and rules for moments are options.

``optax.contrib.galore`` is not wrapped here, because four things cannot be configured:

* the side: it projects the larger one (``use_left = m >= n``; for m < n it uses right singular
  vectors, an n x r projector and moments m x r), where the paper projects the smaller one. Its
  dimension numbers can transpose a leaf, but the side is chosen by size afterwards. Adam then acts
  on other coordinates, so only square matrices, and full rank, agree;
* leaves stacked over layers: it rejects axes that are neither rows nor columns, and leaves split
  into layers would still be projected on the wrong side;
* precision: projector and moments have the parameter's dtype, bfloat16 for bfloat16 weights;
* a rank beyond the smaller side is silently reduced.

Its bias correction and its moments across projector changes are as in the paper, and on square
matrices both implementations give the same updates.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import optax

from loro_jax.peers.bases import BASES
from loro_jax.peers.projected import Projected, ProjectedSettings, Slots, projected_descent
from loro_jax.peers.projection import AdamConstants

Array = jax.Array


class GaLoreState(NamedTuple):
    """State of :func:`galore`; k and l are the smaller and the larger side of a leaf.

    Attributes:
        count: number of steps taken, int32 scalar.
        projector: tree like the parameters: (..., k, r), or indices, int32, for bases that are
            stored as such; a scalar for leaves not projected.
        mu: tree of first moments: (..., r, l), or the leaf's own shape.
        nu: tree of second moments, shapes as ``mu``.
    """

    count: jax.Array  # type: ignore[assignment]  # shadows tuple.count, as in Optax
    projector: Any
    mu: Any
    nu: Any


def galore(
    learning_rate: optax.ScalarOrSchedule,
    rank: int,
    *,
    projected: Projected,
    update_every: int = 200,
    scale: float = 0.25,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    basis: str = "svd",
    moments: str = "keep",
) -> optax.GradientTransformationExtraArgs:
    """Creates GaLore for the projected leaves, with Adam for the others.

    State is float32 or wider, whatever the parameters' dtype. Square matrices are projected from
    the left, as in the paper (the authors' code projects them from the right).

    Args:
        learning_rate: number or schedule.
        rank: r of every projector.
        projected: which leaves to project: a tree of bools with the parameters' structure, or a
            callable that returns it for the parameters. A projected leaf is (..., m, n); leading
            axes are layers, each with its own projector.
        update_every: T. Steps 0, T, 2T, ... compute new projectors.
        scale: alpha, factor on the projected leaves' updates.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the square root of the corrected second moment, as in ``optax.scale_by_adam``.
        weight_decay: decoupled decay of all leaves, ``lr * weight_decay`` per step.
        basis: the kind of subspace, see :mod:`loro_jax.peers.bases`: "svd", the paper's,
            "randomised", "random", "dct", "columns" or "blocks". With the last three the state
            holds indices in place of projectors, and a renewal costs no factorisation.
        moments: "keep" Adam's moments when P changes, as in the paper, "reset" them, and Adam's
            bias correction, or "rotate" them into the new subspace.

    Returns:
        An ``optax.GradientTransformationExtraArgs``, learning rate included.

    Raises:
        ValueError: for settings out of range; from ``init``, if ``projected`` does not match the
            parameters, the rank exceeds the smaller side of a leaf, or the basis is "blocks" and a
            projected leaf has no layers; from ``update``, without
            ``params`` if there is a weight decay.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> params = {"w": jnp.ones((3, 4, 6)), "b": jnp.zeros(4)}
        >>> tx = galore(0.01, rank=2, projected={"w": True, "b": False})
        >>> state = tx.init(params)
        >>> state.projector["w"].shape, state.mu["w"].shape, state.mu["b"].shape
        ((3, 4, 2), (3, 2, 6), (4,))
        >>> updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
        >>> round(float(updates["b"][0]), 4)
        -0.01

    References:
        Zhao et al., `GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection
        <https://arxiv.org/abs/2403.03507>`_, ICML 2024.
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
    ).checked("galore")

    def step(G: Array, held: Slots, count: Array) -> tuple[Array, Slots]:
        # Algorithm 2: R = P^T G with the projector of the last renewal, Adam's N of R, and
        # W <- W - lr alpha P N.
        _, N, held = settings.in_subspace(G, held, count)
        # alpha scales only the step within the subspace; weight decay is added without it.
        return scale * BASES[basis].lift(held[0], N, G.shape), held

    return projected_descent("galore", settings, GaLoreState, settings.begin, step)
