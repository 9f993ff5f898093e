"""The swap of SwitchLoRA on a single weight, without layer axes (see :mod:`.switchlora`).

Rows of A take turns in a circle of r, spare vectors in a circle of q. A vector that leaves takes
the place of the one that replaces it and so waits for q switches until it is back: the same order
as in the authors' code, which keeps all r + q vectors in one circle.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from loro_jax.linalg.precision import at_least_float32
from loro_jax.peers.switchlora_start import Candidates

Array = jax.Array
Pair = tuple[Array, Array]


def most_switches(r: int, q: int, interval: float) -> int:
    """The most vectors that one call can switch on a side; it sets the shapes under ``jit``."""
    return min(int(r // interval) + 1, r // 2, q)


def switch_one(
    rate: Array,
    most: int,
    scale: float,
    freeze_steps: int,
    key: Array,
    W0: Array,
    B: Array,
    A: Array,
    candidates: Candidates,
    moments: tuple[Pair, ...],
    frozen: Pair,
) -> tuple[Array, Array, Array, Candidates, tuple[Pair, ...], Pair]:
    """Switches ``rate`` vectors a side, rounded at random and at most ``most``."""
    r, q = A.shape[0], candidates.A.shape[0]
    # B runs half a round ahead. Behind it lie the frozen rows of A, behind A the frozen columns
    # of B, so a side may go on for half a round less what is frozen.
    ahead = r // 2
    busy = jnp.maximum((frozen[0] > 0).sum(), (frozen[1] > 0).sum())
    number = jnp.floor(rate) + (jax.random.uniform(key) < rate % 1)
    number = jnp.clip(number.astype(jnp.int32), 0, jnp.minimum(most, jnp.maximum(ahead - busy, 0)))

    turns = candidates.switched + jnp.arange(most)
    chosen = jnp.arange(most) < number
    rows, columns, places = turns % r, (turns + ahead) % r, turns % q

    # W0 is rounded to its dtype once, after both sides.
    W = W0.astype(at_least_float32(jnp.result_type(W0, B, A)))
    W, A, spare_A = _swap_rows(W, B, A, candidates.A, rows, places, chosen, scale)
    Wt, Bt, spare_Bt = _swap_rows(W.T, A.T, B.T, candidates.B.T, columns, places, chosen, scale)

    nobody = jnp.zeros(r, bool)
    lost_B, lost_A = nobody.at[rows].set(chosen), nobody.at[columns].set(chosen)
    return (
        Wt.T.astype(W0.dtype),
        Bt.T,
        A,
        Candidates(spare_Bt.T, spare_A, candidates.switched + number),
        tuple(zero_vectors(pair, lost_B, lost_A) for pair in moments),
        (
            jnp.where(lost_B, freeze_steps, frozen[0]),
            jnp.where(lost_A, freeze_steps, frozen[1]),
        ),
    )


def zero_vectors(pair: Pair, columns: Array, rows: Array) -> Pair:
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
    """Exchanges the chosen rows of A and spare rows and keeps W + scale B A.

    For columns of B, call it with everything transposed.
    """
    old, waiting = A[rows], spare[places]
    new = jnp.where(chosen[:, None], waiting.astype(A.dtype), old)
    change = old.astype(W.dtype) - new.astype(W.dtype)
    W = W + scale * jnp.matmul(B[:, rows].astype(W.dtype), change, precision="highest")
    waiting = jnp.where(chosen[:, None], old.astype(spare.dtype), waiting)
    return W, A.at[rows].set(new), spare.at[places].set(waiting)
