"""LIFT: AdamW on the entries of a weight that are largest in its low-rank approximation.

For fine-tuning. Of a weight W (m x n) only ``k = (m + n) r`` entries are trained, as many as LoRA
of rank r has: the largest absolute entries of the best rank-f approximation of W. All others stay
as they are, to the bit. Every T steps the entries are chosen anew from the present W; Adam's
moments of entries that stay are kept, those of new ones begin at zero. The state is 3 k numbers for
a weight, its largest part indices of 32 bits; the gradient is as large as W.

Source: Liu et al., "LIFT the Veil for the Truth: Principal Weights Emerge after Rank Reduction for
Reasoning-Focused Supervised Fine-Tuning", ICML 2025 (arXiv 2506.00772), and the authors' code.
Differences from it:

* entries are chosen at steps 0, T, 2T, ...; there before the first step, and then after steps
  T - 1, 2 T - 1, ...;
* weight decay is that of AdamW, on the entries that are trained; there it decays them after Adam's
  step, by the same factor;
* leading axes are layers, each with its own entries;
* choices by other scores than this one, and the randomised SVD, are left out.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from loro_jax.linalg.precision import at_least_float32, matmul
from loro_jax.lowrank import from_dense
from loro_jax.peers.bases import is_due
from loro_jax.peers.cosine_columns import largest
from loro_jax.peers.projected import Projected
from loro_jax.peers.projection import AdamConstants, adam
from loro_jax.peers.wide import in_float32

Array = jax.Array
# Of one leaf: chosen entries, mu, nu.
_Slots = tuple[Array, Array, Array]


class LiftState(NamedTuple):
    """State of :func:`scale_by_lift`; k is the number of entries of each matrix that are trained.

    Attributes:
        count: number of steps taken, int32 scalar.
        entries: tree like the parameters: chosen entries of a matrix, counted row by row, int32
            (..., k), ascending.
        mu: tree of first moments, (..., k).
        nu: tree of second moments, (..., k).
    """

    count: jax.Array  # type: ignore[assignment]  # shadows tuple.count, as in Optax
    entries: Any
    mu: Any
    nu: Any


def principal_entries(W: Array, count: int, filter_rank: int) -> Array:
    """Returns the largest absolute entries of a weight's low-rank approximation.

    Args:
        W: (..., m, n); leading axes are layers.
        count: number of entries of each matrix, at most m n.
        filter_rank: f; from min(m, n) on the approximation is W itself.

    Returns:
        Their places in the matrix, counted row by row, int32 (..., count), ascending.

    Example:
        >>> W = jnp.array([[9.0, 9.0, 0.0], [9.0, 9.0, 0.0], [0.0, 0.0, 10.0]])
        >>> principal_entries(W, 4, filter_rank=1).tolist()  # without the 10
        [0, 1, 3, 4]
        >>> principal_entries(W, 4, filter_rank=3).tolist()[-1]
        8
    """
    W = W.astype(at_least_float32(W.dtype))
    if filter_rank < min(W.shape[-2:]):
        W = matmul(*from_dense(W, filter_rank))
    return largest(jnp.abs(_flat(W)), count)


def kept_moments(X: Array, old: Array, new: Array) -> Array:
    """Moves moments to other entries: those that were chosen before keep theirs.

    Args:
        X: moments of the old entries, (..., k).
        old: their places, (..., k), ascending.
        new: places of the new entries, (..., k).

    Returns:
        (..., k); zeros for entries that were not chosen before.

    Example:
        >>> X = jnp.array([1.0, 2.0, 3.0])
        >>> kept_moments(X, jnp.array([0, 4, 7]), jnp.array([4, 5, 7])).tolist()
        [2.0, 0.0, 3.0]
    """
    search = jnp.vectorize(jnp.searchsorted, signature="(k),(l)->(l)")
    found = jnp.minimum(search(old, new), old.shape[-1] - 1)
    same = jnp.take_along_axis(old, found, axis=-1) == new
    return jnp.where(same, jnp.take_along_axis(X, found, axis=-1), 0)


def scale_by_lift(
    rank: int,
    *,
    filter_rank: int = 128,
    update_every: int = 200,
    weight_decay: float = 0.0,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-6,
) -> optax.GradientTransformation:
    """Rescales gradients by Adam at the chosen entries, and zeroes all others.

    Args:
        rank: r: ``(m + n) r`` entries of a matrix are trained, all of them if it has fewer.
        filter_rank: f, the rank of the approximation whose entries are compared.
        update_every: T. Steps 0, T, 2T, ... choose the entries.
        weight_decay: added to the direction, times the weight, at the chosen entries.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the square root of the corrected second moment, as in ``optax.scale_by_adam``.

    Returns:
        An ``optax.GradientTransformation`` for leaves (..., m, n) whose leading axes are layers.
        State is float32 or wider, whatever the parameters' dtype.

    Raises:
        ValueError: for settings out of range; from ``init``, for a leaf that is no matrix; from
            ``update``, without ``params``.

    Example:
        >>> tx = scale_by_lift(1, filter_rank=1)
        >>> params = jnp.array([[1.0, 5.0, 5.0, 5.0], [0.0, 5.0, 5.0, 5.0], [0.0, 1.0, 1.0, 1.0]])
        >>> state = tx.init(params)
        >>> moves, state = tx.update(jnp.ones((3, 4)), state, params)
        >>> int((moves != 0).sum()), state.mu.shape
        (7, (7,))
    """
    for name, value in (
        ("rank", rank),
        ("filter_rank", filter_rank),
        ("update_every", update_every),
    ):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"lift: {name} must be a whole number of at least 1, is {value!r}.")
    constants = AdamConstants(b1, b2, eps)

    def init(params: Any) -> LiftState:
        def begin(path: Any, W: Array) -> Array:
            if jnp.ndim(W) < 2:
                raise ValueError(
                    f"lift: the leaf {jax.tree_util.keystr(path)} has shape {jnp.shape(W)}; "
                    "expected (..., m, n)."
                )
            dtype = at_least_float32(W.dtype)
            return jnp.zeros((*W.shape[:-2], _entries_of(W.shape, rank)), dtype)

        zeros = jax.tree_util.tree_map_with_path(begin, params)
        entries = jax.tree.map(lambda x: x.astype(jnp.int32), zeros)
        return LiftState(
            jnp.zeros([], jnp.int32), entries, zeros, jax.tree.map(jnp.zeros_like, zeros)
        )

    def step(count: Array, G: Array, W: Array, held: _Slots) -> tuple[Array, _Slots]:
        due = is_due(count, update_every)
        entries, mu, nu = jax.lax.cond(due, lambda: _renewed(W, held, filter_rank), lambda: held)
        D, mu, nu = adam(_at(G.astype(mu.dtype), entries), mu, nu, count + 1, constants)
        if weight_decay:
            D = D + weight_decay * _at(W, entries).astype(D.dtype)
        whole = jnp.put_along_axis(
            _flat(jnp.zeros(G.shape, D.dtype)), entries, D, axis=-1, inplace=False
        )
        return whole.reshape(G.shape).astype(G.dtype), (entries, mu, nu)

    def update(grads: Any, state: LiftState, params: Any = None) -> tuple[Any, LiftState]:
        if params is None:
            raise ValueError("lift: update needs params, whose largest entries are trained.")
        treedef: Any
        leaves, treedef = jax.tree.flatten(grads)
        columns = [treedef.flatten_up_to(tree) for tree in (params, *state[1:])]
        rows = zip(leaves, *columns, strict=True)
        results = [step(state.count, G, W, (at, mu, nu)) for G, W, at, mu, nu in rows]
        slots = zip(*(held for _, held in results), strict=True)
        fields = [treedef.unflatten(field) for field in slots] or state[1:]
        moves = treedef.unflatten([move for move, _ in results])
        return moves, LiftState(optax.safe_increment(state.count), *fields)

    return optax.GradientTransformation(init, update)


def _renewed(W: Array, held: _Slots, filter_rank: int) -> _Slots:
    old, mu, nu = held
    new = principal_entries(W, old.shape[-1], filter_rank)
    return new, kept_moments(mu, old, new), kept_moments(nu, old, new)


def _entries_of(shape: tuple[int, ...], rank: int) -> int:
    """Returns k, the number of entries that are trained."""
    m, n = shape[-2:]
    return min((m + n) * rank, m * n)


def _flat(W: Array) -> Array:
    return W.reshape(*W.shape[:-2], -1)


def _at(W: Array, entries: Array) -> Array:
    return jnp.take_along_axis(_flat(W), entries, axis=-1)


def lift(
    learning_rate: optax.ScalarOrSchedule,
    rank: int,
    *,
    projected: Projected,
    filter_rank: int = 128,
    update_every: int = 200,
    weight_decay: float = 0.0,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-6,
) -> optax.GradientTransformationExtraArgs:
    """Creates LIFT for the projected leaves, with AdamW for the others.

    State is float32 or wider, whatever the parameters' dtype.

    To leave the others as they are, chain :func:`scale_by_lift` and a learning rate for the
    projections, and use ``optax.partition`` with ``optax.set_to_zero`` for the rest.

    Args:
        learning_rate: number or schedule (the authors fine-tune at 2e-4).
        rank: see :func:`scale_by_lift`.
        projected: which leaves have few trained entries: a tree of bools with the parameters'
            structure, or a callable that returns it for the parameters.
        filter_rank: see :func:`scale_by_lift`.
        update_every: see :func:`scale_by_lift`.
        weight_decay: decoupled decay of the other leaves, and of trained entries.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the square root of the corrected second moment, as in ``optax.scale_by_adam``.

    Returns:
        An ``optax.GradientTransformationExtraArgs``, learning rate included.

    Raises:
        ValueError: as :func:`scale_by_lift`.

    Example:
        >>> params = {"w": jnp.arange(24.0).reshape(4, 6), "b": jnp.zeros(4)}
        >>> tx = lift(0.01, 1, projected={"w": True, "b": False})
        >>> state = tx.init(params)
        >>> updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
        >>> (updates["w"] != 0).sum(axis=1).tolist()  # ten entries, the largest
        [0, 0, 4, 6]

    References:
        Liu et al., `LIFT the Veil for the Truth <https://arxiv.org/abs/2506.00772>`_, ICML 2025.
    """

    def labels(params: Any) -> Any:
        flags = projected(params) if callable(projected) else projected
        return jax.tree.map(lambda flag: "projections" if flag else "others", flags)

    constants = {"b1": b1, "b2": b2, "eps": eps, "weight_decay": weight_decay}
    direction = scale_by_lift(rank, filter_rank=filter_rank, update_every=update_every, **constants)
    projections = optax.chain(direction, optax.scale_by_learning_rate(learning_rate))
    others = in_float32(optax.adamw(learning_rate, **constants))
    return optax.partition({"projections": projections, "others": others}, labels)
