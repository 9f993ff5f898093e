"""TRP, trained rank pruning: dense matrices that are truncated again and again while they train.

Any optimizer takes its step; besides, each projected matrix moves by ``-lr lambda U V^T``, along a
subgradient of its nuclear norm. After every m-th step ``W = U S V^T`` keeps only its leading
singular values, the fewest whose squares are a share e of the sum of all squares. U and V of the
kept values are those of the subgradient until the next truncation. Ranks follow from the spectra,
so that they differ by matrix and change in training. After the last truncation the matrices have
these ranks, and pairs of them lose nothing (``python -m loro_jax compress --energy``).

Arrays have fixed shapes: values that are cut off are masked, and the rank is a count in the state.

Source: Xu et al., "TRP: Trained Rank Pruning for Efficient Deep Neural Networks", IJCAI 2020 (arXiv
2004.14566), and the authors' code, with m 1 to 20, e 0.9 to 0.99 and lambda 3e-4 for convolutions
and SGD. Differences from it:

* the step along the subgradient is taken beside the optimizer's, scaled by the learning rate alone,
  as the weight decay of AdamW is; there it is a part of the gradient. For plain SGD this is the
  same;
* truncations follow steps m, 2m, ...; there they precede steps 1, m + 1, ... Random initial
  weights, which have no leading directions, are not truncated;
* a matrix of rank r is stored as such to rounding errors of the parameters' dtype.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from loro_jax.linalg.batching import one_by_one
from loro_jax.linalg.precision import at_least_float32, matmul
from loro_jax.peers.bases import is_due
from loro_jax.peers.projected import Projected, flags_of
from loro_jax.schedules import value_at

Array = jax.Array


class TRPState(NamedTuple):
    """State of :func:`trp`.

    Attributes:
        count: number of steps taken, int32 scalar.
        optimizer: the state of the optimizer.
        subgradient: tree like the parameters: U V^T of the last truncation, (..., m, n), zeros
            before the first one; a scalar for leaves not projected, and for all if ``nuclear`` is
            0.
        rank: tree of the ranks at the last truncation, int32 (...); 0 before the first one, and for
            leaves not projected.
    """

    count: jax.Array  # type: ignore[assignment]  # shadows tuple.count, as in Optax
    optimizer: Any
    subgradient: Any
    rank: Any


class Truncation(NamedTuple):
    """A truncated matrix.

    Attributes:
        W: U S V^T with the singular values that are kept, (..., m, n).
        subgradient: U V^T of these, a subgradient of the nuclear norm at W.
        rank: their number, int32 (...).
    """

    W: Array
    subgradient: Array
    rank: Array


def truncated(W: Array, energy: float) -> Truncation:
    """Truncates matrices to the fewest singular values that hold a share of the energy.

    Args:
        W: (..., m, n), in float32 or wider.
        energy: the least share of the sum of squares, at most 1.

    Example:
        >>> found = truncated(jnp.diag(jnp.array([3.0, 1.0, 0.5])), 0.9)  # 10 of 10.25
        >>> int(found.rank), [round(float(x), 3) for x in found.W.diagonal()]
        (2, [3.0, 1.0, 0.0])
    """

    def of_one(W: Array) -> Truncation:
        U, s, Vt = jnp.linalg.svd(W, full_matrices=False)
        squares = jnp.cumsum(s**2)
        # A value is kept if those before it hold less than the share.
        before = jnp.concatenate([jnp.zeros_like(squares[:1]), squares[:-1]])
        kept = before < energy * squares[-1]
        U = jnp.where(kept, U, 0)
        return Truncation(matmul(U * s, Vt), matmul(U, Vt), jnp.sum(kept, dtype=jnp.int32))

    found: Truncation = one_by_one(of_one, W.ndim - 2)(W)
    return found


def trp(
    optimizer: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    *,
    projected: Projected,
    update_every: int = 5,
    energy: float = 0.9,
    nuclear: float = 3e-4,
) -> optax.GradientTransformationExtraArgs:
    """Adds truncations, and steps that lower the nuclear norm, to an optimizer.

    Args:
        optimizer: any optimizer, learning rate included.
        learning_rate: number or schedule, for the steps along the subgradient.
        projected: which leaves are truncated: a tree of bools with the parameters' structure, or a
            callable that returns it, given the parameters. Such a leaf is (..., m, n); leading axes
            are layers, each with its own rank.
        update_every: m. Steps m, 2m, ... are followed by a truncation.
        energy: share of the sum of squared singular values that a truncation keeps at least.
        nuclear: lambda, the weight of the nuclear norm. 0: no such steps, and no state for them.

    Returns:
        An ``optax.GradientTransformationExtraArgs``, which must be the last in a chain: it emits
        the difference from the truncated matrix. Its own state is float32 or wider for any dtype of
        the parameters.

    Raises:
        ValueError: for settings out of range; from ``init``, if ``projected`` does not match the
            parameters; from ``update``, without ``params``.

    Example:
        >>> params = {"w": jnp.diag(jnp.array([3.0, 1.0, 0.1])), "b": jnp.ones(3)}
        >>> tx = trp(optax.sgd(0.1), 0.1, projected={"w": True, "b": False}, update_every=2)
        >>> state = tx.init(params)
        >>> for _ in range(2):
        ...     updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
        ...     params = optax.apply_updates(params, updates)
        >>> values = [round(float(x), 4) for x in params["w"].diagonal()]
        >>> int(state.rank["w"]), values  # 10 of 10.01
        (2, [3.0, 1.0, 0.0])

    References:
        Xu et al., `TRP: Trained Rank Pruning for Efficient Deep Neural Networks
        <https://arxiv.org/abs/2004.14566>`_, IJCAI 2020.
    """
    if not isinstance(update_every, int) or isinstance(update_every, bool) or update_every < 1:
        raise ValueError(
            f"trp: update_every must be a whole number of at least 1, is {update_every!r}."
        )
    if not 0 < energy <= 1:
        raise ValueError(f"trp: energy must be above 0 and at most 1, is {energy!r}.")
    if nuclear < 0:
        raise ValueError(f"trp: nuclear must not be negative, is {nuclear!r}.")
    optimizer = optax.with_extra_args_support(optimizer)

    def init(params: Any) -> TRPState:
        count, inner = jnp.zeros([], jnp.int32), optimizer.init(params)
        treedef: Any
        leaves, treedef = jax.tree.flatten(params)
        if not leaves:  # includes Optax's placeholder for a tree of parameters
            return TRPState(count, inner, params, params)
        flags = flags_of(params, projected, 1, "trp")
        marked = list(zip(leaves, flags, strict=True))
        subgradients = [
            jnp.zeros(W.shape if flag and nuclear else (), at_least_float32(W.dtype))
            for W, flag in marked
        ]
        ranks = [jnp.zeros(W.shape[:-2] if flag else (), jnp.int32) for W, flag in marked]
        trees = (treedef.unflatten(leaves) for leaves in (subgradients, ranks))
        return TRPState(count, inner, *trees)

    def update(
        grads: Any, state: TRPState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, TRPState]:
        if params is None:
            raise ValueError("trp: update needs params, which are truncated.")
        updates, inner = optimizer.update(grads, state.optimizer, params, **extra_args)
        treedef: Any
        leaves, treedef = jax.tree.flatten(params)
        columns = [treedef.flatten_up_to(tree) for tree in (updates, state.subgradient, state.rank)]
        due = is_due(state.count + 1, update_every)
        shrink = nuclear * value_at(learning_rate, state.count)
        results = [
            _moved(due, shrink, energy, *row) if flag else row[1:]
            for flag, *row in zip(
                flags_of(params, projected, 1, "trp"), leaves, *columns, strict=True
            )
        ]
        # Without leaves zip yields nothing, and the empty trees stay.
        fields = [treedef.unflatten(field) for field in zip(*results, strict=True)]
        updates, subgradient, rank = fields or (updates, state.subgradient, state.rank)
        count = optax.safe_increment(state.count)
        return updates, TRPState(count, inner, subgradient, rank)

    return optax.GradientTransformationExtraArgs(init, update)


def _moved(
    due: Array, shrink: Any, energy: float, W: Array, step: Array, subgradient: Array, rank: Array
) -> tuple[Array, Array, Array]:
    """Returns the move of a leaf, and its subgradient and rank.

    Args:
        due: whether it is truncated.
        shrink: size of the step along the subgradient.
        energy: share that a truncation keeps.
        W: the leaf, (..., m, n).
        step: the optimizer's step.
        subgradient: that of the last truncation; a scalar if it is not used.
        rank: rank of the last truncation.
    """
    wide = at_least_float32(W.dtype)
    move = step.astype(wide)
    if subgradient.ndim:
        move = move - (shrink * subgradient).astype(wide)

    def truncation() -> tuple[Array, Array, Array]:
        found = truncated(W.astype(wide) + move, energy)
        kept = found.subgradient if subgradient.ndim else subgradient
        return found.W - W.astype(wide), kept, found.rank

    move, subgradient, rank = jax.lax.cond(due, truncation, lambda: (move, subgradient, rank))
    return move.astype(W.dtype), subgradient, rank
