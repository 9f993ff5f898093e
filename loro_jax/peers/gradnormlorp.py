"""GradNormLoRP: GaLore on the directions of a weight's rows, and Adam on their magnitudes.

Source: Huang et al., AAAI 2025 (arXiv 2412.19616). Each row of a weight is a magnitude times a
direction, ``W = g v / |v|`` with g (m, 1), v (m x n) and the norms of v's rows. With the gradient G
of W and ``u = v / |v|`` the chain rule gives ``dg = sum_j (G u)_ij`` and
``dv = (g / |v|) (G - dg u)``. GaLore steps v along its projected gradient, Adam steps g, and the
new weight is ``g v / |v|`` again; at first ``g = |v| = |W|``.

**What is stored.** Not v, which is as large as W: the weight itself holds v's directions, and the
state g, with its sign, and |v|, a number each per row. Then ``u = sign(g) W / |W|`` and
``v = |v| u``. Magnitudes are always those of the state, so that steps of g that are smaller than
the precision of a bfloat16 weight add up. What else changes the weights between two steps keeps its
effect on the directions of rows alone; therefore this transformation is the last of a chain. It
emits ``W_new - W``. A row of zeros has no direction, and stays zero.

**Weight decay** is that of W, as everywhere here: it shrinks g, because W is proportional to g and
does not depend on |v|.

The parametrisation and its gradients are those of the paper. Norms of rows, and GaLore's projection
of one side with its scale, are those of the authors' pretraining code; the paper also describes a
projection of both sides, and, for fine-tuning, a v that is a fixed matrix plus factors, which is
not implemented here. Not taken from their code: one of its optimizers sets g = |v| before every
step, which undoes the last step of g, and leaves out the second term of dv; the other writes no
weight back, and leaves out the factor g / |v|.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from loro_jax.linalg.precision import at_least_float32
from loro_jax.peers.galore import GaLoreState, galore
from loro_jax.peers.projected import Projected
from loro_jax.peers.projection import AdamConstants, adam
from loro_jax.schedules import value_at

Array = jax.Array


class GradNormLoRPState(NamedTuple):
    """State of :func:`gradnormlorp`; k and l are the smaller and the larger side of a leaf.

    The trees of rows have (..., m, 1) for a projected leaf (..., m, n), and a scalar for others.

    Attributes:
        count: number of steps taken, int32 scalar.
        projector: tree like the parameters: (..., k, r), or a scalar for leaves not projected.
        mu: tree of first moments: (..., r, l), or the leaf's own shape.
        nu: tree of second moments, shapes as ``mu``.
        magnitude: tree of rows, g.
        norm: tree of rows, |v|.
        magnitude_mu: tree of rows, first moments of g.
        magnitude_nu: tree of rows, second moments of g.
    """

    count: jax.Array  # type: ignore[assignment]  # shadows tuple.count, as in Optax
    projector: Any
    mu: Any
    nu: Any
    magnitude: Any
    norm: Any
    magnitude_mu: Any
    magnitude_nu: Any


class Rows(NamedTuple):
    """The state of one leaf's rows, (..., m, 1) each: the last four fields of the state."""

    magnitude: Array
    norm: Array
    mu: Array
    nu: Array


def row_norms(W: Array) -> Array:
    """Returns the norms of a matrix's rows, (..., m, 1).

    Example:
        >>> row_norms(jnp.array([[3.0, 4.0], [0.0, 2.0]])).tolist()
        [[5.0], [2.0]]
    """
    return jnp.linalg.vector_norm(W, axis=-1, keepdims=True)


def directions(W: Array, magnitude: Array) -> Array:
    """Returns u, the rows of ``W = g u`` with norm 1; a row of zeros stays one.

    Args:
        W: the weight, (..., m, n).
        magnitude: g, (..., m, 1), of which only the signs are used.
    """
    norms = row_norms(W)
    u = W / jnp.where(norms > 0, norms, 1)
    return jnp.where(magnitude < 0, -u, u)


def split_gradient(G: Array, u: Array, magnitude: Array, norm: Array) -> tuple[Array, Array]:
    """Returns the gradients of g and v from that of ``W = g v / |v|``.

    Args:
        G: the gradient of W, (..., m, n).
        u: v / |v|, (..., m, n).
        magnitude: g, (..., m, 1).
        norm: |v|, (..., m, 1).

    Returns:
        dg, (..., m, 1), and dv, (..., m, n).

    Example:
        >>> G, u, g = jnp.array([[3.0, 4.0]]), jnp.array([[1.0, 0.0]]), jnp.array([[2.0]])
        >>> [x.tolist() for x in split_gradient(G, u, g, g)]
        [[[3.0]], [[0.0, 4.0]]]
    """
    dg = jnp.sum(G * u, axis=-1, keepdims=True)
    ratio = jnp.where(norm > 0, magnitude / jnp.where(norm > 0, norm, 1), 0)
    return dg, ratio * (G - dg * u)


def gradnormlorp(
    learning_rate: optax.ScalarOrSchedule,
    rank: int,
    *,
    projected: Projected,
    update_every: int = 250,
    scale: float = 0.25,
    basis: str = "svd",
    moments: str = "keep",
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """Creates GradNormLoRP for the projected leaves, with Adam for the others.

    State is float32 or wider, whatever the parameters' dtype.

    Args:
        learning_rate: number or schedule; of magnitudes, too.
        rank: r of every projector.
        projected: which leaves to project: a tree of bools with the parameters' structure, or a
            callable that returns it for the parameters. A projected leaf is (..., m, n) and its
            last axis is what a row's norm sums over; leading axes are layers.
        update_every: T. Steps 0, T, 2T, ... compute new projectors.
        scale: alpha, factor on the steps of v.
        basis: the kind of subspace, as for :func:`loro_jax.peers.galore.galore`.
        moments: what becomes of moments when the subspace is renewed, as there.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the square root of the corrected second moment, as in ``optax.scale_by_adam``.
        weight_decay: decoupled decay of all leaves, ``lr * weight_decay`` per step.

    Returns:
        An ``optax.GradientTransformationExtraArgs``, learning rate included; the last of a chain.

    Raises:
        ValueError: as :func:`loro_jax.peers.galore.galore`, which does the projection; from
            ``update``, without ``params``.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> params = {"w": jnp.ones((3, 4, 6)), "b": jnp.zeros(4)}
        >>> tx = gradnormlorp(0.01, rank=2, projected={"w": True, "b": False})
        >>> state = tx.init(params)
        >>> state.projector["w"].shape, state.mu["w"].shape, state.magnitude["w"].shape
        ((3, 4, 2), (3, 2, 6), (3, 4, 1))
        >>> updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
        >>> round(float(updates["w"][0, 0, 0] * 6**0.5), 4)  # Adam's step of g
        -0.01

    References:
        Huang et al., `Gradient Weight-normalized Low-rank Projection for Efficient LLM Training
        <https://arxiv.org/abs/2412.19616>`_, AAAI 2025.
    """
    constants = AdamConstants(b1, b2, eps)
    # Without its decay, which would also reach v. It is given wide gradients and no parameters, so
    # that its updates are wide, too.
    subspace: dict[str, Any] = {"scale": scale, "basis": basis, "moments": moments}
    subspace |= {"projected": projected, "update_every": update_every, **constants._asdict()}
    of_directions = galore(learning_rate, rank, **subspace)
    if weight_decay < 0:
        raise ValueError(f"gradnormlorp: weight_decay must not be negative, is {weight_decay!r}.")

    def init(params: Any) -> GradNormLoRPState:
        inner = of_directions.init(params)
        treedef: Any
        leaves, treedef = jax.tree.flatten(params)
        if not leaves:  # includes Optax's placeholder for a tree of parameters
            return GradNormLoRPState(*inner, *[params] * len(Rows._fields))
        # GaLore has checked the flags.
        flags = jax.tree.leaves(projected(params) if callable(projected) else projected)
        rows = [_begin(W, flag) for W, flag in zip(leaves, flags, strict=True)]
        return GradNormLoRPState(*inner, *map(treedef.unflatten, zip(*rows, strict=True)))

    def update(
        grads: Any, state: GradNormLoRPState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, GradNormLoRPState]:
        del extra_args
        if params is None:
            raise ValueError("gradnormlorp: update needs params, whose directions are v's.")
        inner, trees = GaLoreState(*state[:4]), state[4:]
        treedef: Any
        leaves, treedef = jax.tree.flatten(grads)
        weights = treedef.flatten_up_to(params)
        held = [Rows(*row) for row in zip(*map(treedef.flatten_up_to, trees), strict=True)]
        # Gradients of g and v; of other leaves, their own.
        split = [_split(G, W, row) for G, W, row in zip(leaves, weights, held, strict=True)]
        moves, inner = of_directions.update(treedef.unflatten([dv for _, dv in split]), inner)
        rate = value_at(learning_rate, state.count)
        step = functools.partial(_step, constants=constants, rate=rate, decay=rate * weight_decay)
        steps = [
            step(dg, move, W, row, count=inner.count)
            for (dg, _), move, W, row in zip(
                split, treedef.flatten_up_to(moves), weights, held, strict=True
            )
        ]
        updates, rows = [update for update, _ in steps], [row for _, row in steps]
        # Without leaves zip yields nothing, and the empty trees stay.
        fields = [treedef.unflatten(field) for field in zip(*rows, strict=True)] or trees
        return treedef.unflatten(updates), GradNormLoRPState(*inner, *fields)

    return optax.GradientTransformationExtraArgs(init, update)


def _begin(W: Array, flag: bool) -> Rows:
    """Returns the rows of a weight at first, g = |v| = |W|; scalars for other leaves."""
    dtype = at_least_float32(W.dtype)
    norms = row_norms(W.astype(dtype)) if flag else jnp.zeros([], dtype)
    zeros = jnp.zeros_like(norms)
    return Rows(norms, norms, zeros, zeros)


def _split(G: Array, W: Array, row: Rows) -> tuple[Array | None, Array]:
    """Returns the gradients of g (None for a leaf that is not projected) and v, wide."""
    dtype = row.magnitude.dtype
    if row.magnitude.ndim < 2:
        return None, G.astype(dtype)
    u = directions(W.astype(dtype), row.magnitude)
    return split_gradient(G.astype(dtype), u, row.magnitude, row.norm)


def _step(
    dg: Array | None,
    move: Array,
    W: Array,
    row: Rows,
    *,
    constants: AdamConstants,
    rate: Array,
    decay: Array,
    count: Array,
) -> tuple[Array, Rows]:
    """Returns the update of a weight, given the move of v or (without dg) its own, and its rows."""
    wide = W.astype(move.dtype)
    if dg is None:
        return (move - decay * wide).astype(W.dtype), row
    D, mu, nu = adam(dg, row.mu, row.nu, count, constants)
    g = row.magnitude - rate * D - decay * row.magnitude
    v = row.norm * directions(wide, row.magnitude) + move
    # g v / |v|: the sign of the new g is not in v's rows.
    new = g * directions(v, jnp.ones_like(g))
    return (new - wide).astype(W.dtype), Rows(g, row_norms(v), mu, nu)
