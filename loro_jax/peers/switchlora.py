"""SwitchLoRA: every step swaps a few single vectors of B and A for spare ones.

The weight is W0 + s B A with a frozen W0. A switch replaces a row of A (or a column of B) by a
candidate and adds the difference to W0: the function stays the same, but other directions can be
learned. Row k of A and column k of B are counterparts, because the gradient of one is a product
with the other. So a switch of one leaves its Adam moments valid and invalidates those of its
counterpart: these are zeroed, and the counterpart is frozen for N = 5 updates.

The order in a training step is: gradients, :func:`switch`, :func:`hold` on the gradients, Adam,
:func:`thaw`. The gradients may be from before the switch, because the gradient of a switched vector
depends only on the function and on its counterpart, and neither changes.

Source: Zhou, Wang, Xu, "SwitchLoRA: Switched Low-Rank Adaptation Can Learn Full-Rank
Information", arXiv 2406.06564, and for details the authors' code (github.com/asfsdsf/SwitchLoRA):
vectors and candidates take turns, with B half a round ahead of A. Rows of A take turns in a circle
of r, spare vectors in a circle of q.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from loro_jax.linalg.precision import at_least_float32
from loro_jax.lowrank import check_factors

Array = jax.Array
Pair = tuple[Array, Array]


class Candidates(NamedTuple):
    """The spare vectors of one weight, q = min(m, n) - r per side, and the number of switches.

    Attributes:
        B: spare columns, shape (..., m, q).
        A: spare rows, shape (..., q, n).
        switched: switches per side so far, int32 of shape (...); it determines the next turn.
    """

    B: Array
    A: Array
    switched: Array


class SwitchState(NamedTuple):
    """All parts of one weight that a switch changes.

    Attributes:
        W0: frozen weight (..., m, n); leading axes are layers.
        B: (..., m, r).
        A: (..., r, n).
        candidates: the spare vectors, which vectors that are switched out join.
        moments: pairs (for_B, for_A), as ``((mu_B, mu_A), (nu_B, nu_A))``.
        frozen: remaining steps of each column of B and row of A, :func:`nothing_frozen` at first.
    """

    W0: Array
    B: Array
    A: Array
    candidates: Candidates
    moments: tuple[Pair, ...]
    frozen: Pair


def switch(
    key: Array,
    step: jax.typing.ArrayLike,
    state: SwitchState,
    *,
    scale: float,
    total_steps: int,
    interval: float = 40.0,
    ratio: float = 0.1,
    freeze_steps: int = 5,
) -> SwitchState:
    """Switches a few rows of A and the same number of columns of B; keeps W0 + s B A.

    On average ``r / interval * switch_frequency(step)`` vectors per side are switched in a step,
    rounded up or down at random for each layer, but never frozen ones. Adam's bias correction
    should restart with zeroed moments, as in the authors' optimizer: if updates are counted for
    each vector, pass the counts as another pair of moments, (..., 1, r) and (..., r, 1).

    Args:
        key: a JAX random key, a new one for every step and weight.
        step: the step, from 0; may be traced.
        state: the weight's state.
        scale: s; the authors use 1 / r.
        total_steps: length of the run.
        interval: initial number of steps in which every vector is switched once.
        ratio: the fraction of the run after which the frequency has fallen to a third.
        freeze_steps: N, the number of updates for which a counterpart is frozen.

    Returns:
        The state after the switches, in the shapes and dtypes of the input.

    Raises:
        ValueError: if shapes do not fit or ``interval < 2 * freeze_steps``.

    Example:
        >>> keys = jax.random.split(jax.random.key(0), 3)
        >>> B, A = initialise_switchlora(keys[0], 16, 8, 4)
        >>> spare, W0 = initialise_candidates(keys[1], 16, 8, 4), jnp.zeros((16, 8))
        >>> before = SwitchState(W0, B, A, spare, (), nothing_frozen(B))
        >>> after = switch(
        ...     keys[2], 0, before, scale=0.25, total_steps=1_000, interval=2.0, freeze_steps=1)
        >>> bool(jnp.allclose(after.W0 + 0.25 * after.B @ after.A, W0 + 0.25 * B @ A, atol=1e-6))
        True
        >>> [held.tolist() for held in after.frozen]
        [[1, 1, 0, 0], [0, 0, 1, 1]]

    Source: arXiv 2406.06564, the algorithms of switching and of training.
    """
    _check_state(state)
    _check_rest(interval, freeze_steps)
    *layers, r, _ = state.A.shape
    # The expected number of switches per side in this step.
    rate = r / interval * switch_frequency(step, total_steps, ratio)
    most = _most_switches(r, state.candidates.A.shape[-2], interval)
    if most == 0:  # no spare vectors (or a single row, whose counterpart could never rest)
        return state
    one = functools.partial(_switch_one, rate, most, scale, freeze_steps)
    # One key and one vmap for each leading axis: every layer rounds its number by chance.
    keys = jax.random.split(key, tuple(layers)) if layers else key
    for _ in layers:
        one = jax.vmap(one)
    return one(keys, state)


def switch_frequency(step: jax.typing.ArrayLike, total_steps: int, ratio: float = 0.1) -> Array:
    """Returns ``exp(-theta step)``, the frequency of switches relative to step 0.

    theta is such that it is a third at ``ratio * total_steps``, as in the paper, where ``interval``
    is the one at the beginning. The authors' code has ``0.3 ** ((step + 1) / (ratio *
    total_steps))`` with steps from 0: 0.3 in place of a third, and one step ahead, so its first
    step already switches less often than ``interval`` says, by 0.01% in a run of 100,000 steps.

    Raises:
        ValueError: if ``total_steps`` or ``ratio`` is not positive.

    Example:
        >>> [round(float(switch_frequency(step, 1_000)), 3) for step in (0, 100, 200)]
        [1.0, 0.333, 0.111]
    """
    if total_steps <= 0 or ratio <= 0:
        raise ValueError(
            f"switch_frequency: expected total_steps > 0 and ratio > 0, but total_steps is "
            f"{total_steps} and ratio is {ratio}."
        )
    theta = math.log(3) / (ratio * total_steps)
    return jnp.exp(-theta * jnp.asarray(step, jnp.float32))


def nothing_frozen(B: Array) -> Pair:
    """Returns the initial freezing state: int32 zeros (..., r) for columns of B and rows of A."""
    zeros = jnp.zeros((*B.shape[:-2], B.shape[-1]), jnp.int32)
    return zeros, zeros


def hold(for_B: Array, for_A: Array, frozen: Pair) -> Pair:
    """Zeroes the gradients of frozen columns and rows.

    Adam does not move a vector whose moments and gradient are zero. With weight decay it does, so
    apply this to the updates, too.

    Example:
        >>> hold(jnp.ones((1, 2)), jnp.ones((2, 1)), (jnp.array([0, 2]), jnp.zeros(2)))[0].tolist()
        [[1.0, 0.0]]
    """
    return _zero_vectors((for_B, for_A), frozen[0] > 0, frozen[1] > 0)


def thaw(frozen: Pair) -> Pair:
    """Counts one update: reduces the remaining steps of frozen vectors by one.

    Example:
        >>> [held.tolist() for held in thaw((jnp.array([0, 2]), jnp.array([5, 1])))]
        [[0, 1], [4, 0]]
    """
    return jnp.maximum(frozen[0] - 1, 0), jnp.maximum(frozen[1] - 1, 0)


def _check_state(state: SwitchState) -> None:
    """Raises ValueError unless W0 and the candidates fit the factors."""
    W0, B, A, candidates, *_ = state
    check_factors(B, A, "switch")
    m, n = B.shape[-2], A.shape[-1]
    if W0.shape != (*B.shape[:-1], n):
        raise ValueError(
            f"switch: expected W0 of shape {(*B.shape[:-1], n)}, the shape of B A, but it has "
            f"shape {W0.shape}."
        )
    spare_B, spare_A = candidates.B.shape, candidates.A.shape
    q = spare_A[-2]
    if spare_B != (*B.shape[:-2], m, q) or spare_A != (*A.shape[:-2], q, n):
        raise ValueError(
            f"switch: expected candidates.B (..., {m}, q) and candidates.A (..., q, {n}) with the "
            f"leading axes {B.shape[:-2]}, but they have the shapes {spare_B} and {spare_A}."
        )


def _check_rest(interval: float, freeze_steps: int) -> None:
    """Raises ValueError unless enough vectors can be frozen."""
    if freeze_steps < 0 or interval <= 0 or interval < 2 * freeze_steps:
        raise ValueError(
            f"switch: expected 0 <= freeze_steps and interval >= 2 * freeze_steps, since only half "
            f"of the vectors can be frozen, but freeze_steps is {freeze_steps} and interval is "
            f"{interval}."
        )


def _most_switches(r: int, q: int, interval: float) -> int:
    """Returns the most vectors that one call can switch per side; a static shape under ``jit``."""
    return min(int(r // interval) + 1, r // 2, q)


def _switch_one(
    rate: Array,
    most: int,
    scale: float,
    freeze_steps: int,
    key: Array,
    state: SwitchState,
) -> SwitchState:
    """Switches ``rate`` vectors per side of one weight, rounded at random, at most ``most``."""
    W0, B, A, candidates, moments, frozen = state
    r, q = A.shape[0], candidates.A.shape[0]
    # B is half a round ahead. The frozen rows of A follow it, as the frozen columns of B follow A,
    # so a side can advance by half a round minus the number of frozen vectors.
    ahead = r // 2
    busy = jnp.maximum((frozen[0] > 0).sum(), (frozen[1] > 0).sum())
    # The fraction of the rate is the probability of one more.
    number = jnp.floor(rate) + (jax.random.uniform(key) < rate % 1)
    number = jnp.clip(number.astype(jnp.int32), 0, jnp.minimum(most, jnp.maximum(ahead - busy, 0)))

    # Shapes are static: `most` turns are prepared, and the first `number` of them are taken. The
    # others leave everything as it is.
    turns = candidates.switched + jnp.arange(most)
    chosen = jnp.arange(most) < number
    # Two circles: r vectors in use, and q spare ones.
    rows, columns, places = turns % r, (turns + ahead) % r, turns % q

    # W0 is rounded to its dtype once, after both sides.
    W = W0.astype(at_least_float32(jnp.result_type(W0, B, A)))
    W, A, spare_A = _swap_rows(W, B, A, candidates.A, rows, places, chosen, scale)
    # Columns of B by the same function: the transpose of W + s B A is W^T + s A^T B^T.
    Wt, Bt, spare_Bt = _swap_rows(W.T, A.T, B.T, candidates.B.T, columns, places, chosen, scale)

    # The counterparts lose their moments and are frozen: columns of B for switched rows of A, and
    # rows of A for switched columns of B.
    nobody = jnp.zeros(r, bool)
    lost_B, lost_A = nobody.at[rows].set(chosen), nobody.at[columns].set(chosen)
    return SwitchState(
        Wt.T.astype(W0.dtype),
        Bt.T,
        A,
        Candidates(spare_Bt.T, spare_A, candidates.switched + number),
        tuple(_zero_vectors(pair, lost_B, lost_A) for pair in moments),
        (
            jnp.where(lost_B, freeze_steps, frozen[0]),
            jnp.where(lost_A, freeze_steps, frozen[1]),
        ),
    )


def _zero_vectors(pair: Pair, columns: Array, rows: Array) -> Pair:
    """Zeroes the marked columns of the first array (..., m, r), rows of the second (..., r, n)."""
    for_B, for_A = pair
    return (
        jnp.where(columns[..., None, :], jnp.zeros_like(for_B), for_B),
        jnp.where(rows[..., :, None], jnp.zeros_like(for_A), for_A),
    )


def _swap_rows(
    W: Array,
    B: Array,
    A: Array,
    spare: Array,
    rows: Array,
    places: Array,
    chosen: Array,
    scale: float,
) -> tuple[Array, Array, Array]:
    """Swaps the chosen rows of A with spare rows; keeps W + scale B A.

    For columns of B, call it with all arguments transposed.
    """
    # What leaves A takes the place of its replacement among the spare vectors, and so returns after
    # q switches: the order of the authors' code, which keeps all r + q vectors in one circle.
    old, waiting = A[rows], spare[places]
    new = jnp.where(chosen[:, None], waiting.astype(A.dtype), old)
    # B A loses (column k of B) times (old - new row k of A), which W receives: the function of the
    # layer does not change.
    change = old.astype(W.dtype) - new.astype(W.dtype)
    W = W + scale * jnp.matmul(B[:, rows].astype(W.dtype), change, precision="highest")
    waiting = jnp.where(chosen[:, None], old.astype(spare.dtype), waiting)
    return W, A.at[rows].set(new), spare.at[places].set(waiting)


def initialise_switchlora(key: Array, m: int, n: int, r: int) -> tuple[Array, Array]:
    """Draws B (m, r) and A (r, n) with the standard deviations of SwitchLoRA.

    Entries are uniform around zero with ``std(B) = sqrt(g) (r / sqrt(m n))^(1/4)`` and
    ``std(A) = sqrt(g) (r sqrt(m) / n^(3/2))^(1/4)``, where g = sqrt(1/3). With the scale s = 1/r,
    which the rule assumes, s B A has the standard deviation g / sqrt(n) of a new dense layer, and
    a step of B moves the product as much as a step of A. B is not zero: to start from a given W,
    set W0 = W - s B A.

    Args:
        key: a JAX random key.
        m: output features.
        n: input features.
        r: the rank, between 1 and min(m, n).

    Returns:
        B and A in float32.

    Raises:
        ValueError: if the rank does not fit.

    Example:
        >>> B, A = initialise_switchlora(jax.random.key(0), 64, 32, 8)
        >>> B.shape, A.shape
        ((64, 8), (8, 32))

    Source: arXiv 2406.06564, the section on initialisation; the gain g (that of a leaky ReLU with
    slope sqrt(5)) and the uniform distribution are those of the authors' code.
    """
    _check_rank(m, n, r, "initialise_switchlora")
    return _draw(key, m, n, r, r)


def initialise_candidates(key: Array, m: int, n: int, r: int) -> Candidates:
    """Draws the spare vectors, from the distributions of B and A.

    Together with the r vectors in use there are min(m, n) per side, so that the products can span
    all of W. For stacked layers use
    ``jax.vmap(lambda k: initialise_candidates(k, m, n, r))(keys)``.

    Args:
        key: a JAX random key, different from that of B and A.
        m: output features.
        n: input features.
        r: the rank, between 1 and min(m, n).

    Returns:
        Candidates in float32. For narrower parameters, cast them to the dtypes of B and A.

    Raises:
        ValueError: if the rank does not fit.

    Example:
        >>> spare = initialise_candidates(jax.random.key(1), 64, 32, 8)
        >>> spare.B.shape, spare.A.shape, int(spare.switched)
        ((64, 24), (24, 32), 0)

    Source: arXiv 2406.06564, the sections on switching and on initialisation.
    """
    _check_rank(m, n, r, "initialise_candidates")
    B, A = _draw(key, m, n, r, min(m, n) - r)
    return Candidates(B, A, jnp.zeros((), jnp.int32))


def _draw(key: Array, m: int, n: int, r: int, count: int) -> tuple[Array, Array]:
    """Draws ``count`` columns for B and rows for A; r determines their standard deviation."""
    # r is the number of vectors in use, also when spare ones are drawn: all are exchangeable.
    gain = math.sqrt(1 / 3)
    std_B = math.sqrt(gain) * (r / math.sqrt(m * n)) ** 0.25
    std_A = math.sqrt(gain) * (r * math.sqrt(m) / n**1.5) ** 0.25

    def uniform(key: Array, shape: tuple[int, int], std: float) -> Array:
        # Uniform between -a and a, the standard deviation is a / sqrt(3).
        return math.sqrt(3) * std * jax.random.uniform(key, shape, minval=-1.0, maxval=1.0)

    key_B, key_A = jax.random.split(key)
    return uniform(key_B, (m, count), std_B), uniform(key_A, (count, n), std_A)


def _check_rank(m: int, n: int, r: int, where: str) -> None:
    if not 1 <= r <= min(m, n):
        raise ValueError(
            f"{where}: the rank must be between 1 and min(m, n) = {min(m, n)}, but is {r}."
        )
