"""SwitchLoRA: single vectors of B and A are swapped for spare ones, a few at every step.

The weight is W0 + s B A with a frozen W0. A switch replaces a row of A (or a column of B) by a
candidate and moves the difference into W0: the function stays, the directions that can be learned
change. Row k of A and column k of B are each other's counterparts, since the gradient of one is a
product with the other. So a switch of one leaves its own Adam moments valid and spoils those of
its counterpart: they are zeroed, and the counterpart is held for N = 5 updates.

Order within a training step: gradients, :func:`switch`, :func:`hold` on the gradients, Adam,
:func:`thaw`. The gradients may come from before the switch: that of a switched vector depends on
the function and on its counterpart alone, and both are as before.

Source: Zhou, Wang, Xu, "SwitchLoRA: Switched Low-Rank Adaptation Can Learn Full-Rank
Information", arXiv 2406.06564, and the authors' code (github.com/asfsdsf/SwitchLoRA), which
settles details: vectors and candidates take turns, and B runs half a round ahead of A.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp

from loro_jax.lowrank import check_factors
from loro_jax.peers.switchlora_start import (
    Candidates,
    initialise_candidates,
    initialise_switchlora,
)
from loro_jax.peers.switchlora_swap import most_switches, switch_one, zero_vectors

__all__ = [
    "Candidates",
    "hold",
    "initialise_candidates",
    "initialise_switchlora",
    "nothing_frozen",
    "switch",
    "switch_frequency",
    "thaw",
]

Array = jax.Array
Pair = tuple[Array, Array]


def switch(
    key: Array,
    step: jax.typing.ArrayLike,
    W0: Array,
    B: Array,
    A: Array,
    candidates: Candidates,
    moments: tuple[Pair, ...],
    frozen: Pair,
    *,
    scale: float,
    total_steps: int,
    interval: float = 40.0,
    ratio: float = 0.1,
    freeze_steps: int = 5,
) -> tuple[Array, Array, Array, Candidates, tuple[Pair, ...], Pair]:
    """Switches a few rows of A and as many columns of B, and keeps W0 + s B A.

    At a step ``r / interval * switch_frequency(step)`` vectors a side are switched on average,
    rounded up or down at random, layer by layer; never a frozen one. Adam's bias correction should
    start anew with zeroed moments, as in the authors' optimizer: where it counts the updates of
    each vector, pass the counts as one more pair of moments, (..., 1, r) and (..., r, 1).

    Args:
        key: a JAX random key, a new one for every step and weight.
        step: the step, from 0; may be traced.
        W0: frozen weight (..., m, n); leading axes are layers.
        B: (..., m, r).
        A: (..., r, n).
        candidates: the spare vectors; they take in what is switched out.
        moments: pairs (for_B, for_A), as ``((mu_B, mu_A), (nu_B, nu_A))``.
        frozen: remaining steps of each column of B and row of A, :func:`nothing_frozen` at first.
        scale: s; the authors' is 1 / r.
        total_steps: length of the run.
        interval: steps at the start in which every vector has its turn once.
        ratio: the part of the run after which a third of the frequency is left.
        freeze_steps: N, the updates for which a counterpart is held.

    Returns:
        W0, B, A, candidates, moments and frozen, in the shapes and dtypes of the input.

    Raises:
        ValueError: if shapes do not fit or ``interval < 2 * freeze_steps``.

    Example:
        >>> keys = jax.random.split(jax.random.key(0), 3)
        >>> B, A = initialise_switchlora(keys[0], 16, 8, 4)
        >>> spare, W0 = initialise_candidates(keys[1], 16, 8, 4), jnp.zeros((16, 8))
        >>> W1, B1, A1, spare, _, frozen = switch(
        ...     keys[2], 0, W0, B, A, spare, (), nothing_frozen(B), scale=0.25,
        ...     total_steps=1_000, interval=2.0, freeze_steps=1)
        >>> bool(jnp.allclose(W1 + 0.25 * B1 @ A1, W0 + 0.25 * B @ A, atol=1e-6))
        True
        >>> [held.tolist() for held in frozen]
        [[1, 1, 0, 0], [0, 0, 1, 1]]

    Source: arXiv 2406.06564, the algorithms of switching and of training.
    """
    check_factors(B, A, "switch")
    _check_rest(W0, B, A, candidates, interval, freeze_steps)
    rate = B.shape[-1] / interval * switch_frequency(step, total_steps, ratio)
    most = most_switches(B.shape[-1], candidates.A.shape[-2], interval)
    if most == 0:  # no spare vectors (or a single row, whose counterpart could never rest)
        return W0, B, A, candidates, moments, frozen
    one = functools.partial(switch_one, rate, most, scale, freeze_steps)
    keys = jax.random.split(key, B.shape[:-2]) if B.ndim > 2 else key
    for _ in range(B.ndim - 2):
        one = jax.vmap(one)
    return one(keys, W0, B, A, candidates, moments, frozen)


def switch_frequency(step: jax.typing.ArrayLike, total_steps: int, ratio: float = 0.1) -> Array:
    """``exp(-theta step)``: how often vectors switch at a step, relative to step 0.

    theta is such that a third is left at ``ratio * total_steps``; the authors' code leaves 0.3.

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
    """The freezing state of a fresh run: int32 zeros (..., r) for columns of B and rows of A."""
    zeros = jnp.zeros((*B.shape[:-2], B.shape[-1]), jnp.int32)
    return zeros, zeros


def hold(for_B: Array, for_A: Array, frozen: Pair) -> Pair:
    """Zeroes the gradients of frozen columns and rows.

    Adam does not move a vector whose moments and gradient are zero. An optimizer with weight
    decay does: hold its updates too.

    Example:
        >>> hold(jnp.ones((1, 2)), jnp.ones((2, 1)), (jnp.array([0, 2]), jnp.zeros(2)))[0].tolist()
        [[1.0, 0.0]]
    """
    return zero_vectors((for_B, for_A), frozen[0] > 0, frozen[1] > 0)


def thaw(frozen: Pair) -> Pair:
    """Counts one update: frozen vectors come a step closer to moving again.

    Example:
        >>> [held.tolist() for held in thaw((jnp.array([0, 2]), jnp.array([5, 1])))]
        [[0, 1], [4, 0]]
    """
    return jnp.maximum(frozen[0] - 1, 0), jnp.maximum(frozen[1] - 1, 0)


def _check_rest(
    W0: Array, B: Array, A: Array, candidates: Candidates, interval: float, freeze_steps: int
) -> None:
    """Raises ValueError unless W0 and the candidates fit the factors and vectors can rest."""
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
    if freeze_steps < 0 or interval <= 0 or interval < 2 * freeze_steps:
        raise ValueError(
            f"switch: expected 0 <= freeze_steps and interval >= 2 * freeze_steps, since only half "
            f"of the vectors can be frozen, but freeze_steps is {freeze_steps} and interval is "
            f"{interval}."
        )
