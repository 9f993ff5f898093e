"""FRUGAL: Adam in a subspace, and a method without state for the rest of the gradient.

Source: Zmushko et al., ICML 2025 (arXiv 2411.07837), and the authors' code. Every T steps a
subspace is chosen, which holds a share rho, the density, of each matrix. With ``g1 = P(G)`` the
gradient's part inside it and ``g0 = G - P^-1(g1)`` the rest, a weight moves by
``-lr (P^-1(Adam(g1)) + c sign(g0))``: full-rank updates by the state of a fraction. Adam begins
anew in each subspace, with moments of zero and the bias correction of a first step.

As in the authors' scripts for pretraining, the subspace consists by default of whole matrices
(``basis="blocks"``), the last layers first; they choose among all matrices of a model, here each
stacked leaf has the same share of active layers. Other differences:

* the side: "columns" draws axes of the smaller side, whichever that is;
* at rho = 1 the subspace is the whole space, and stays what it is: this is AdamW, with moments
  that are never reset;
* a share that is not zero is at least one vector, or one matrix;
* the order "mirror" and single random coordinates ("randk") are not offered.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from loro_jax.peers.bases import BASES, ORDERS, blocks, is_due, renewed, step_of_adam
from loro_jax.peers.projected import (
    Projected,
    ProjectedSettings,
    Slots,
    empty_slots,
    projected_descent,
)
from loro_jax.peers.projection import AdamConstants, adam

Array = jax.Array

# The rules for the part of a gradient outside of the subspace, by the authors' names.
REMAINDERS = ("sign_sgd", "sgd", "no")


class FrugalState(NamedTuple):
    """State of :func:`frugal`; k and l are the smaller and the larger side of a leaf.

    Attributes:
        count: number of steps taken, int32 scalar.
        projector: tree like the parameters: what is stored of the basis, see
            :mod:`loro_jax.peers.bases`; a scalar for leaves not projected.
        mu: tree of first moments: (n, k, l) for n active matrices, (..., r, l) for other bases, or
            the leaf's own shape; a scalar for projected leaves if the density is 0.
        nu: tree of second moments, shapes as ``mu``.
    """

    count: jax.Array  # type: ignore[assignment]  # shadows tuple.count, as in Optax
    projector: Any
    mu: Any
    nu: Any


def frugal(
    learning_rate: optax.ScalarOrSchedule,
    *,
    projected: Projected,
    density: float = 0.25,
    basis: str = "blocks",
    order: str = "descending",
    update_every: int = 200,
    scale: float = 1.0,
    remainder: str = "sign_sgd",
    remainder_scale: float = 1.0,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """Creates FRUGAL for the projected leaves, with Adam for the others.

    The state is float32 or wider for any dtype of the parameters.

    Args:
        learning_rate: number or schedule.
        projected: which leaves to project, as for :func:`loro_jax.peers.galore.galore`.
        density: rho, the share of each matrix, or of the matrices of a leaf, with state. 0: none.
        basis: the kind of subspace, see :mod:`loro_jax.peers.bases`. "blocks" needs leaves whose
            leading axis is layers.
        order: in which order "blocks" takes layers: "descending", "ascending" or "random".
        update_every: T. Steps 0, T, 2T, ... choose new subspaces.
        scale: factor on the projected leaves' updates.
        remainder: the update outside of the subspace: the gradient's sign ("sign_sgd"), the
            gradient ("sgd"), or none ("no").
        remainder_scale: c, a further factor on it.
        b1: decay of Adam's first moment.
        b2: decay of Adam's second moment.
        eps: Adam's epsilon.
        weight_decay: decoupled decay of all leaves, ``lr * weight_decay`` per step.

    Returns:
        An ``optax.GradientTransformationExtraArgs``, learning rate included.

    Raises:
        ValueError: for settings out of range; from ``init``, if ``projected`` does not match the
            parameters, or a projected leaf has no layers to choose from; from ``update``, without
            ``params`` if there is a weight decay.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> params = {"w": jnp.zeros((4, 6, 8))}  # four layers
        >>> tx = frugal(0.01, projected={"w": True})
        >>> state = tx.init(params)
        >>> state.mu["w"].shape  # one of them has moments
        (1, 6, 8)
        >>> G = {"w": jax.random.normal(jax.random.key(0), (4, 6, 8))}
        >>> updates, state = tx.update(G, state, params)
        >>> jnp.allclose(updates["w"][0], -0.01 * jnp.sign(G["w"][0])).item()
        True

    References:
        Zmushko et al., `FRUGAL: Memory-Efficient Optimization by Reducing State Overhead for
        Scalable Training <https://arxiv.org/abs/2411.07837>`_, ICML 2025.
    """
    constants = AdamConstants(b1, b2, eps)
    settings = ProjectedSettings(
        learning_rate, 1, projected, update_every, scale, constants, weight_decay, basis, "reset"
    ).checked("frugal")
    for name, value, choices in (("order", order, ORDERS), ("remainder", remainder, REMAINDERS)):
        if value not in choices:
            raise ValueError(f"frugal: {name} must be one of {', '.join(choices)}, is {value!r}.")
    if not 0 <= density <= 1:
        raise ValueError(f"frugal: density must be between 0 and 1, is {density!r}.")
    chosen = blocks(order) if basis == "blocks" else BASES[basis]

    def begin(shape: tuple[int, ...], dtype: Any) -> Slots:
        if density:
            return empty_slots(chosen, shape, max(1, round(density * shape[-2])), dtype)
        # No state; the projector has an axis, as that of every projected leaf.
        return jnp.zeros([1], jnp.int32), jnp.zeros([], dtype), jnp.zeros([], dtype)

    def outside(rest: Array) -> Array:
        return remainder_scale * (jnp.sign(rest) if remainder == "sign_sgd" else rest)

    def step(G: Array, held: Slots, count: Array) -> tuple[Array, Slots]:
        P, mu, nu = held
        if not density:
            return scale * (outside(G) if remainder != "no" else jnp.zeros_like(G)), held
        # The whole space is chosen once; its moments are never reset.
        whole = mu.size == math.prod(G.shape)
        due = count == 0 if whole else is_due(count, update_every)
        P, mu, nu = renewed(chosen, "reset", (P, mu, nu), G, due, count)
        t = step_of_adam(count, update_every, "keep" if whole else "reset")
        # g1 = P(G) and its step of Adam, which is lifted back.
        N, mu, nu = adam(chosen.project(P, G), mu, nu, t, constants)
        D = chosen.lift(P, N, G.shape)
        # g0 = G - P^-1(g1); in the whole space it is rounding, whose sign means nothing.
        if not whole and remainder != "no":
            D = D + outside(chosen.complement(P, G))
        return scale * D, (P, mu, nu)

    return projected_descent("frugal", settings, FrugalState, begin, step)
