"""Trion: orthogonalised momentum of low rank, in columns of a cosine basis.

Source: Modoranu et al., arXiv 2505.17967, and the authors' code. For a projection W (m x n,
m >= n; otherwise the transpose) with gradient G and the basis Q of
:mod:`loro_jax.peers.cosine_columns`::

    M <- M + G
    I = the r columns of M Q with the largest L1 norms;  m = (M Q)_I
    M <- M - (1 - mu) m Q_I^T
    W <- W - lr c NS(m) Q_I^T

NS moves all singular values towards one (:func:`loro_jax.linalg.newton_schulz.orthogonalise`), and
c is a factor of the shape. It is Dion with its power iteration and QR replaced by the choice of
columns: M keeps what the step leaves out (error feedback), and only its part in the subspace
decays. With r the smaller side, it is Muon without Nesterov momentum, because NS commutes with Q.

Differences from the authors' code: momentum and NS are float32, where they have the parameters'
dtype and bfloat16 there; all matrices have the same basis, where the code's product takes the
transposed one for tall matrices, and its Fourier transform lifts wide ones by the transposed one;
Adam's constants for the other leaves are the usual ones, not 0.9, 0.95 and 1e-10.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from loro_jax.checks import check_orthogonalised_momentum
from loro_jax.linalg.newton_schulz import orthogonalise
from loro_jax.linalg.precision import at_least_float32
from loro_jax.peers.cosine_columns import (
    as_before,
    combined,
    cosine_basis,
    longer_side_first,
    strongest_columns,
    vectors_of,
)
from loro_jax.peers.muon import muon
from loro_jax.peers.projected import Projected

Array = jax.Array

# c for m outputs and n inputs, by the names of the authors' code.
SHAPE_FACTORS: dict[str, Callable[[int, int], float]] = {
    "kj": lambda m, n: max(1.0, m / n) ** 0.5,
    "kimi": lambda m, n: 0.2 * max(m, n) ** 0.5,
    "dion": lambda m, n: (m / n) ** 0.5,
}


class TrionState(NamedTuple):
    """State of :func:`scale_by_trion`.

    Attributes:
        momentum: M, a tree like the parameters, float32 or wider.
    """

    momentum: Any


def scale_by_trion(
    rank: int,
    momentum: float | Array = 0.95,
    *,
    newton_schulz_steps: int = 5,
    shape_factor: str = "kj",
) -> optax.GradientTransformation:
    """Orthogonalises the largest columns of accumulated gradients in a cosine basis.

    Args:
        rank: r, number of columns, at most the smaller side of each leaf.
        momentum: mu, the part of the momentum in the subspace that is kept.
        newton_schulz_steps: number of Newton-Schulz iterations.
        shape_factor: c: "kj" is ``sqrt(max(1, m / n))``, "kimi" ``0.2 sqrt(max(m, n))``, and "dion"
            ``sqrt(m / n)``.

    Returns:
        An ``optax.GradientTransformation`` for leaves of shape (..., m, n), m outputs by n inputs;
        leading axes are layers, each with its own columns.

    Raises:
        ValueError: for settings out of range; from ``init``, for a leaf that is not a matrix or has
            a side below the rank.

    Example:
        >>> import jax.numpy as jnp
        >>> tx = scale_by_trion(2)
        >>> state = tx.init(jnp.zeros((5, 4)))
        >>> moves, state = tx.update(jnp.arange(20.0).reshape(5, 4) ** 2, state)
        >>> int(jnp.linalg.matrix_rank(moves, rtol=1e-3))
        2
    """
    check_orthogonalised_momentum("trion", momentum, newton_schulz_steps)
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ValueError(f"trion: rank must be a whole number of at least 1, is {rank!r}.")
    if shape_factor not in SHAPE_FACTORS:
        raise ValueError(
            f"trion: shape_factor must be one of {', '.join(SHAPE_FACTORS)}, is {shape_factor!r}."
        )

    def init(params: Any) -> TrionState:
        for path, leaf in jax.tree_util.tree_leaves_with_path(params):
            if jnp.ndim(leaf) < 2 or min(jnp.shape(leaf)[-2:]) < rank:
                raise ValueError(
                    f"trion: the projected leaf {jax.tree_util.keystr(path)} has shape "
                    f"{tuple(jnp.shape(leaf))}; expected (..., m, n) with min(m, n) at least the "
                    f"rank {rank}."
                )
        zeros = lambda W: jnp.zeros_like(W, dtype=at_least_float32(W.dtype))  # noqa: E731
        return TrionState(jax.tree.map(zeros, params))

    def one(G: Array, M: Array) -> tuple[Array, Array]:
        # M <- M + G, the longer side first, and m = (M Q)_I.
        X = longer_side_first(M + G.astype(M.dtype))
        Q = cosine_basis(X.shape[-1], X.dtype)
        columns, m = strongest_columns(X, Q, rank)
        vectors = vectors_of(Q, columns)
        # Only the part in the subspace decays: M <- M - (1 - mu) m Q_I^T.
        kept = X - (1 - momentum) * combined(m, vectors)
        # c NS(m) Q_I^T.
        O = combined(orthogonalise(m, newton_schulz_steps), vectors)  # noqa: E741
        move = SHAPE_FACTORS[shape_factor](*G.shape[-2:]) * O
        return as_before(move, G.shape).astype(G.dtype), as_before(kept, G.shape).astype(M.dtype)

    def update(grads: Any, state: TrionState, params: Any = None) -> tuple[Any, TrionState]:
        del params
        both = jax.tree.map(one, grads, state.momentum)
        # A tree of pairs (move, momentum) becomes two trees.
        moves, kept = (jax.tree.map(lambda _, x, i=i: x[i], grads, both) for i in (0, 1))
        return moves, TrionState(kept)

    return optax.GradientTransformation(init, update)


def trion(
    learning_rate: optax.ScalarOrSchedule,
    rank: int,
    *,
    projected: Projected,
    lr_scale: float = 1.0,
    momentum: float | Array = 0.95,
    newton_schulz_steps: int = 5,
    shape_factor: str = "kj",
    weight_decay: float = 0.0,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
) -> optax.GradientTransformationExtraArgs:
    """Creates Trion for the projected leaves, with AdamW for the others.

    State is float32 or wider, whatever the parameters' dtype.

    Args:
        learning_rate: number or schedule, for the other leaves.
        rank: see :func:`scale_by_trion`.
        projected: which leaves are projections: a tree of bools with the parameters' structure, or
            a callable that returns it for the parameters.
        lr_scale: factor on the learning rate of the projections. The authors' rate is 0.02, for
            ``learning_rate * lr_scale``.
        momentum: see :func:`scale_by_trion`.
        newton_schulz_steps: see :func:`scale_by_trion`.
        shape_factor: see :func:`scale_by_trion`.
        weight_decay: decoupled decay, ``learning rate * weight_decay`` per step.
        b1: decay of Adam's first moment.
        b2: decay of Adam's second moment.
        eps: added to the square root of Adam's corrected second moment.

    Returns:
        An ``optax.GradientTransformationExtraArgs``, learning rate included.

    Raises:
        ValueError: as :func:`scale_by_trion`; for an ``lr_scale`` of 0 or less; from ``update``,
            without ``params`` if there is a weight decay.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> params = {"w": jnp.eye(4), "b": jnp.zeros(4)}
        >>> tx = trion(0.01, rank=2, projected={"w": True, "b": False}, lr_scale=2.0)
        >>> grads = jax.tree.map(jnp.ones_like, params)
        >>> updates, _ = tx.update(grads, tx.init(params), params)
        >>> bool(0.6 * 0.02 < jnp.linalg.norm(updates["w"], 2) < 1.203 * 0.02)
        True
        >>> round(float(updates["b"][0]), 4)
        -0.01

    References:
        Modoranu et al., `SVD-Free Low-Rank Adaptive Gradient Optimization for Large Language Models
        <https://arxiv.org/abs/2505.17967>`_, 2025.
    """
    if isinstance(lr_scale, float | int) and lr_scale <= 0:
        raise ValueError(f"trion: lr_scale must be above 0, but is {lr_scale}.")

    direction = scale_by_trion(
        rank, momentum, newton_schulz_steps=newton_schulz_steps, shape_factor=shape_factor
    )
    tx = muon(
        learning_rate,
        projected=projected,
        lr_scale=lr_scale,
        weight_decay=weight_decay,
        b1=b1,
        b2=b2,
        eps=eps,
        direction=direction,
    )

    def update(grads: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        if params is None and weight_decay:
            raise ValueError("trion: update needs params, because weight_decay is not zero.")
        return tx.update(grads, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(tx.init, update)
