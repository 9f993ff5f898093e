"""DCT-AdamW: Adam on the coordinates of gradients in a few columns of a cosine basis.

Source: Modoranu et al., arXiv 2505.17967, and the authors' code. For a gradient G (m x n, m >= n;
otherwise the transpose) and the basis Q of :mod:`loro_jax.peers.cosine_columns`, every T steps I
becomes the r columns of ``G Q`` with the largest L1 norms. Adam turns ``(G Q)_I`` into N, and the
weight moves by ``-lr N Q_I^T``. When I changes, the moments move to the new columns: by
``R = Q_old^T Q_new`` the first ones and by ``|R|`` the second ones, which are the same here: R
copies the columns that stay and puts zeros in the others.

With error feedback, ``G + E`` replaces G, and the part outside of the subspace is kept for the next
step, ``E <- G + E - (G + E) Q_I Q_I^T``.

Differences from the authors' code:

* moments always move with the columns, as in the paper; there it is an option that is off by
  default, and moments then stay in the places of columns that have gone;
* steps 0, T, 2T, ... choose columns; there it is step 0, and then T - 1, 2T - 1, ... With the
  default T = 1 both choose them at each step;
* the error is held in float32; its quantisation to 4 or 8 bits is left out, and so are the other
  bases (Hadamard and random) and the L2 norm;
* two sizes of wide matrices are projected on their longer side there, a remedy for two models.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from loro_jax.peers.cosine_columns import (
    combined,
    coordinates,
    cosine_basis,
    moved_columns,
    strongest_columns,
    vectors_of,
)
from loro_jax.peers.projected import Projected, ProjectedSettings, Slots, projected_descent
from loro_jax.peers.projection import AdamConstants, adam
from loro_jax.schedules import countable

Array = jax.Array


class DCTAdamWState(NamedTuple):
    """State of :func:`dct_adamw`; k and l are the smaller and the larger side of a leaf.

    Attributes:
        count: number of steps taken, int32 scalar.
        columns: tree like the parameters: chosen columns, int32 (..., r), or a scalar for leaves
            not projected.
        mu: tree of first moments: (..., l, r), or the leaf's own shape.
        nu: tree of second moments, shapes as ``mu``.
    """

    count: jax.Array  # type: ignore[assignment]  # shadows tuple.count, as in Optax
    columns: Any
    mu: Any
    nu: Any


class DCTAdamWErrorState(NamedTuple):
    """State of :func:`dct_adamw` with error feedback.

    Attributes:
        count: as in :class:`DCTAdamWState`.
        columns: as there.
        mu: as there.
        nu: as there.
        error: tree of what was outside of the subspaces: (..., k, l), or a scalar.
    """

    count: jax.Array  # type: ignore[assignment]  # shadows tuple.count, as in Optax
    columns: Any
    mu: Any
    nu: Any
    error: Any


def dct_adamw(
    learning_rate: optax.ScalarOrSchedule,
    rank: int,
    *,
    projected: Projected,
    update_every: int = 1,
    scale: float = 1.0,
    error_feedback: bool = False,
    max_side: int = 32_000,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """Creates DCT-AdamW for the projected leaves, with AdamW for the others.

    State is float32 or wider, whatever the parameters' dtype.

    Args:
        learning_rate: number or schedule.
        rank: r, number of columns.
        projected: which leaves to project: a tree of bools with the parameters' structure, or a
            callable that returns it for the parameters. A projected leaf is (..., m, n); leading
            axes are layers, each with its own columns.
        update_every: T. Steps 0, T, 2T, ... choose columns.
        scale: factor on the projected leaves' updates.
        error_feedback: whether to add to the next gradient what the projection leaves out. The
            state then has another array of the leaf's size.
        max_side: projected leaves with a side of at least this length get AdamW (embeddings).
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the square root of the corrected second moment, as in ``optax.scale_by_adam``.
        weight_decay: decoupled decay of all leaves, ``lr * weight_decay`` per step.

    Returns:
        An ``optax.GradientTransformationExtraArgs``, learning rate included.

    Raises:
        ValueError: for settings out of range; from ``init``, if ``projected`` does not match the
            parameters or the rank exceeds the smaller side of a leaf; from ``update``, without
            ``params`` if there is a weight decay.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> params = {"w": jnp.ones((3, 4, 6)), "b": jnp.zeros(4)}
        >>> tx = dct_adamw(0.01, rank=2, projected={"w": True, "b": False})
        >>> state = tx.init(params)
        >>> state.columns["w"].shape, state.mu["w"].shape, state.mu["b"].shape
        ((3, 2), (3, 6, 2), (4,))
        >>> updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
        >>> round(float(updates["b"][0]), 4)
        -0.01

    References:
        Modoranu et al., `SVD-Free Low-Rank Adaptive Gradient Optimization for Large Language Models
        <https://arxiv.org/abs/2505.17967>`_, 2025.
    """
    constants = AdamConstants(b1, b2, eps)
    settings = ProjectedSettings(
        learning_rate,
        rank,
        _below(max_side, projected),
        update_every,
        scale,
        constants,
        weight_decay,
    ).checked("dct_adamw")
    if max_side < 1:
        raise ValueError(f"dct_adamw: max_side must be at least 1, is {max_side!r}.")

    def begin(shape: tuple[int, ...], dtype: Any) -> Slots:
        batch, longer = shape[:-2], shape[-1]
        moments = [jnp.zeros((*batch, longer, rank), dtype) for _ in range(2)]
        error = [jnp.zeros(shape, dtype)] if error_feedback else []
        return (jnp.zeros((*batch, rank), jnp.int32), *moments, *error)

    def step(G: Array, held: Slots, count: Array) -> tuple[Array, Slots]:
        columns, mu, nu, *error = held
        # G + E, with the longer side first. Square matrices are as given: projected from the right.
        X = _turned(G + error[0] if error else G)
        Q = cosine_basis(X.shape[-1], X.dtype)

        def chosen() -> Slots:
            # I = the columns of X Q with the largest norms, a = (X Q)_I; moments move with I.
            new, a = strongest_columns(X, Q, rank)
            moments = (moved_columns(moment, columns, new) for moment in (mu, nu))
            return (new, a, *moments)

        def kept() -> Slots:
            return columns, coordinates(X, vectors_of(Q, columns)), mu, nu

        due = count % countable(update_every) == 0
        columns, a, mu, nu = jax.lax.cond(due, chosen, kept)
        vectors = vectors_of(Q, columns)
        # Adam's N of a, W <- W - lr N Q_I^T, and E <- X - a Q_I^T.
        N, mu, nu = adam(a, mu, nu, count + 1, constants)
        if error:
            error = [_turned(X - combined(a, vectors))]
        return scale * _turned(combined(N, vectors)), (columns, mu, nu, *error)

    state_type = DCTAdamWErrorState if error_feedback else DCTAdamWState
    return projected_descent("dct_adamw", settings, state_type, begin, step)


def _turned(G: Array) -> Array:
    """Swaps the sides of G unless it is square; it inverts itself."""
    return G if G.shape[-2] == G.shape[-1] else G.mT


def _below(max_side: int, projected: Projected) -> Projected:
    """Returns which leaves to project, without those that have a side of ``max_side`` or more."""

    def flags(params: Any) -> Any:
        tree = projected(params) if callable(projected) else projected
        treedef: Any = jax.tree.structure(params)
        if jax.tree.structure(tree) != treedef:
            return tree  # projected_descent reports it
        return jax.tree.map(
            lambda flag, leaf: flag if max(leaf.shape[-2:], default=0) < max_side else False,
            tree,
            params,
        )

    return flags
