"""CoSO: GaLore for tasks that follow each other, orthogonal to what earlier tasks have used.

With M (k x q) an orthonormal basis of the directions of earlier tasks, a gradient G loses its part
in them, ``G' = G - M M^T G``. Every T steps P becomes the first r left singular vectors of G', and
Adam's step is taken in this subspace, as in GaLore: the weight moves by ``-lr alpha P N`` with N
Adam's direction of ``P^T G'``. At the same steps a sketch of l columns by Frequent Directions
collects the gradients: it is replaced by the leading l directions of [sketch, the l leading
directions of G', times their singular values], with the square of the (l + 1)-th singular value
taken from all squares. When a task ends, :func:`next_task` appends to M the leading directions that
hold 98% of the sketch's energy, and everything else begins anew.

Here M is stored in an array of fixed size, with columns of zeros that have not been used yet; when
there are none left, further directions are not remembered (:func:`count_full`). The steps of
weights are orthogonal to M, unless there is weight decay. Leaves that are not projected are trained
as always.

Source: Cheng et al., "Continuous Subspace Optimization for Continual Learning", NeurIPS 2025 (arXiv
2505.11816), and the authors' code, whose constants depend on the data set (r 15 to 70, l 100 to
160, T 1 to 20). Differences from it:

* the side: the smaller side of a matrix is projected, as in GaLore; there the first axis;
* at the end of a task the directions hold at least the given share of the energy, as in the paper;
  there one less is taken;
* new directions are made orthonormal to M once more, against rounding, and directions that G' lacks
  (of singular value zero) are columns of zeros in P: an SVD fills them with arbitrary ones, which
  may be in M.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from loro_jax.linalg.batching import one_by_one
from loro_jax.linalg.precision import matmul
from loro_jax.peers.bases import is_due
from loro_jax.peers.projected import Projected, ProjectedSettings, Slots, projected_descent
from loro_jax.peers.projection import AdamConstants, adam, lift, project

Array = jax.Array


class CoSOState(NamedTuple):
    """State of :func:`coso`; k and l are the smaller and the larger side of a leaf.

    Attributes:
        count: number of steps taken in this task, int32 scalar.
        projector: tree like the parameters: P, (..., k, r); a scalar for leaves not projected, here
            and below.
        mu: tree of first moments: (..., r, l), or the leaf's own shape.
        nu: tree of second moments, shapes as ``mu``.
        memory: tree of M, (..., k, q): directions of earlier tasks, and columns of zeros.
        remembered: tree of the numbers of directions in M, int32 (...).
        sketch: tree of sketches of this task's gradients, (..., k, s).
    """

    count: jax.Array  # type: ignore[assignment]  # shadows tuple.count, as in Optax
    projector: Any
    mu: Any
    nu: Any
    memory: Any
    remembered: Any
    sketch: Any


def shrunk(sketch: Array, new: Array) -> Array:
    """Adds directions to a sketch, of one matrix, by Frequent Directions.

    Args:
        sketch: (k, s); its product with its own transpose is an estimate of that of all columns
            which were added.
        new: (k, t), columns to add.

    Returns:
        The new sketch, (k, s).

    Example:
        >>> sketch = shrunk(jnp.zeros((3, 1)), jnp.array([[3.0], [0.0], [0.0]]))
        >>> sketch = shrunk(sketch, jnp.array([[0.0], [2.0], [0.0]]))
        >>> [round(float(x), 3) for x in (sketch @ sketch.T).diagonal()]  # 9 - 4
        [5.0, 0.0, 0.0]
    """
    size = sketch.shape[-1]
    U, s, _ = jnp.linalg.svd(jnp.concatenate([sketch, new], axis=-1), full_matrices=False)
    # What is taken from all squares; 0 if there are not more directions than columns.
    least = s[size] ** 2 if len(s) > size else 0.0
    kept = jnp.sqrt(jnp.maximum(s[:size] ** 2 - least, 0))
    return U[:, :size] * kept


def leading_subspace(G: Array, memory: Array, sketch: Array, rank: int) -> tuple[Array, Array]:
    """Returns the projector of a gradient, and the sketch with the gradient's directions.

    Args:
        G: the gradient without its part in the memory, (..., k, l) with k <= l.
        memory: (..., k, q).
        sketch: (..., k, s).
        rank: number of directions of the projector.

    Returns:
        (..., k, rank), columns of length one, or of zeros where G has no further direction; and the
        sketch, (..., k, s).
    """

    def of_one(G: Array, M: Array, sketch: Array) -> tuple[Array, Array]:
        U, s, _ = jnp.linalg.svd(G, full_matrices=False)
        size = sketch.shape[-1]
        exists = s > jnp.finfo(G.dtype).eps * max(G.shape) * s[0]
        P = jnp.where(exists[:rank], U[:, :rank], 0)
        # The part that G has lost by rounding alone.
        P = P - matmul(M, matmul(M.T, P))
        return P, shrunk(sketch, U[:, :size] * s[:size])

    return one_by_one(of_one, G.ndim - 2)(G, memory, sketch)


def grown_memory(
    memory: Array, remembered: Array, sketch: Array, threshold: float
) -> tuple[Array, Array]:
    """Appends a sketch's leading directions to the memory, as far as it has columns left.

    Args:
        memory: M, (..., k, q): orthonormal columns, then zeros.
        remembered: number of directions in it, int32 (...).
        sketch: (..., k, s), of directions orthogonal to M.
        threshold: share of the sketch's energy, its squared norm, that the directions must hold.

    Returns:
        The new memory and the number of its directions.

    Example:
        >>> sketch = jnp.diag(jnp.array([0.0, 9.0, 1.0]))
        >>> memory, number = grown_memory(jnp.zeros((3, 2)), jnp.int32(0), sketch, 0.98)
        >>> int(number), jnp.abs(memory).round(3).tolist()
        (1, [[0.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    """

    def of_one(M: Array, number: Array, sketch: Array) -> tuple[Array, Array]:
        U, s, _ = jnp.linalg.svd(sketch, full_matrices=False)
        # Without a direction of M, and orthonormal again: the leading columns span what U's did.
        D = jnp.linalg.qr(U - matmul(M, matmul(M.T, U)))[0]
        energy = jnp.cumsum(s**2)
        enough = jnp.sum(energy < threshold * energy[-1]) + 1
        new = jnp.where(energy[-1] > 0, enough, 0)
        # Column j of the new memory is column j - number of the new directions.
        places = jnp.arange(M.shape[-1]) - number
        moved = jnp.take(D, jnp.clip(places, 0, D.shape[-1] - 1), axis=-1)
        is_new = (places >= 0) & (places < new)
        total = jnp.minimum(number + new, M.shape[-1])
        return jnp.where(is_new, moved, M), total.astype(jnp.int32)

    return one_by_one(of_one, memory.ndim - 2)(memory, remembered, sketch)


def next_task(state: CoSOState, threshold: float = 0.98) -> CoSOState:
    """Ends a task: the memory grows by what the sketch holds, and everything else begins anew.

    Args:
        state: the state at the end of a task.
        threshold: share of the sketch's energy that is remembered.

    Returns:
        The state at the beginning of the next task, with a count of zero.

    Raises:
        ValueError: if the threshold is not above 0 and at most 1.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"next_task: threshold must be above 0 and at most 1, is {threshold!r}.")
    treedef: Any
    memories, treedef = jax.tree.flatten(state.memory)
    rest = [treedef.flatten_up_to(tree) for tree in (state.remembered, state.sketch)]
    grown = [
        # Leaves that are not projected have a scalar.
        grown_memory(M, number, sketch, threshold) if M.ndim else (M, number)
        for M, number, sketch in zip(memories, *rest, strict=True)
    ]
    zeros = jax.tree.map(jnp.zeros_like, state)
    return zeros._replace(
        memory=treedef.unflatten([M for M, _ in grown]),
        remembered=treedef.unflatten([number for _, number in grown]),
    )


def count_full(state: CoSOState) -> tuple[int, int]:
    """Returns in how many matrices the memory has no column left, and the number of matrices.

    Example:
        >>> tx = coso(0.01, rank=1, projected=True, memory=0.5)
        >>> state = tx.init(jnp.zeros((3, 4, 6)))
        >>> count_full(state._replace(remembered=jnp.array([1, 2, 2])))
        (2, 3)
    """
    full = total = 0
    for M, number in zip(
        jax.tree.leaves(state.memory), jax.tree.leaves(state.remembered), strict=True
    ):
        # Leaves that are not projected have a scalar.
        if M.ndim:
            full += int(jnp.sum(number == M.shape[-1]))
            total += number.size
    return full, total


def coso(
    learning_rate: optax.ScalarOrSchedule,
    rank: int,
    *,
    projected: Projected,
    update_every: int = 1,
    scale: float = 1.0,
    sketch_rank: int = 100,
    memory: float = 0.5,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """Creates CoSO for the projected leaves, with Adam for the others.

    The state is float32 or wider for any dtype of the parameters. Between tasks call
    :func:`next_task` with it.

    Args:
        learning_rate: see :func:`loro_jax.peers.galore.galore`, as for the arguments not named
            here.
        rank: r of every projector.
        projected: which leaves to project.
        update_every: T. Steps 0, T, 2T, ... compute new projectors, and add to the sketch.
        scale: alpha, a factor on the projected leaves' updates.
        sketch_rank: number of columns of the sketch; at most the smaller side is used.
        memory: the largest share of the smaller side whose directions can be remembered.
        b1: decay of Adam's first moment.
        b2: decay of Adam's second moment.
        eps: Adam's epsilon.
        weight_decay: decoupled decay, in all directions.

    Returns:
        An ``optax.GradientTransformationExtraArgs``, learning rate included.

    Raises:
        ValueError: as GaLore; for a ``sketch_rank`` below 1, or a ``memory`` that is not between 0
            and 1.

    Example:
        >>> params = {"w": jnp.zeros((4, 6))}
        >>> tx = coso(0.01, rank=1, projected={"w": True})
        >>> G = {"w": jax.random.normal(jax.random.key(0), (4, 6))}
        >>> first, state = tx.update(G, tx.init(params), params)
        >>> state = next_task(state, threshold=0.5)  # remembers half of what the gradient was
        >>> second, state = tx.update(G, state, params)
        >>> bool(jnp.abs(state.memory["w"].T @ second["w"]).max() < 1e-6)
        True

    References:
        Cheng et al., `Continuous Subspace Optimization for Continual Learning
        <https://arxiv.org/abs/2505.11816>`_, NeurIPS 2025.
    """
    constants = AdamConstants(b1, b2, eps)
    settings = ProjectedSettings(
        learning_rate, rank, projected, update_every, scale, constants, weight_decay
    ).checked("coso")
    if sketch_rank < 1 or not 0 <= memory <= 1:
        raise ValueError(
            "coso: expected sketch_rank of at least 1 and memory between 0 and 1, but they are "
            f"{sketch_rank!r} and {memory!r}."
        )

    def begin(shape: tuple[int, ...], dtype: Any) -> Slots:
        *batch, k, _ = shape
        M = jnp.zeros((*batch, k, max(1, round(memory * k))), dtype)
        sketch = jnp.zeros((*batch, k, min(sketch_rank, k)), dtype)
        return (*settings.begin(shape, dtype), M, jnp.zeros(batch, jnp.int32), sketch)

    def step(G: Array, held: Slots, count: Array) -> tuple[Array, Slots]:
        P, mu, nu, M, number, sketch = held
        # G' = G - M M^T G; P = leading vectors of G', and the sketch collects more of them.
        G = G - lift(M, project(M, G))
        P, sketch = jax.lax.cond(
            is_due(count, update_every),
            lambda: leading_subspace(G, M, sketch, rank),
            lambda: (P, sketch),
        )
        # As in GaLore: R = P^T G', Adam's N of R, and W <- W - lr alpha P N.
        N, mu, nu = adam(project(P, G), mu, nu, count + 1, constants)
        return scale * lift(P, N), (P, mu, nu, M, number, sketch)

    return projected_descent("coso", settings, CoSOState, begin, step)
