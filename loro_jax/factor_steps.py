"""The two kinds of step of the factors, approximate and exact, for all pairs of a tree.

A pair is a tuple (B, A); its directions, moments and flags are tuples of the same form. Lists of
them are in the order of the pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from loro_jax.exact.transport import transport_moments
from loro_jax.exact.update import PairBatch, together
from loro_jax.linalg.batching import count_of_none
from loro_jax.linalg.precision import at_least_float32
from loro_jax.lowrank import rank_ratio
from loro_jax.pair_parallel import PairArrays, Shardings, map_pairs
from loro_jax.pairs import Both

Array = jax.Array


class FactorStep(NamedTuple):
    """One step of all pairs.

    Attributes:
        rate: the learning rate.
        number: the step's number, from 0.
        lr_scale: factor on the learning rate of approximate steps, or None.
        weight_decay: decoupled decay.
        exact_step: see :func:`loro_jax.riemannian_descent`; None if none is taken.
        factors: (B, A) of each pair.
        decays: for each pair, whether weight decay applies to B and to A.
        mesh: devices that share the exact steps, or None.
        shardings: for each pair, the factors' shardings on that mesh or None; None for all if the
            user gave none.
    """

    rate: Any
    number: Array
    lr_scale: Any
    weight_decay: Any
    exact_step: Any
    factors: Sequence[Both]
    decays: Sequence[Both]
    mesh: Any
    shardings: Sequence[Shardings | None] | None

    def scale(self, pair: Both) -> Any:
        """Returns the approximate step's factor: r / min(m, n) unless it is set."""
        return rank_ratio(*pair) if self.lr_scale is None else self.lr_scale


def approximate_updates(step: FactorStep, directions: Sequence[Both]) -> list[Both]:
    """Returns the updates of equation 11, ``-lr s (u + weight_decay p)``."""
    updates: list[Any] = []
    for pair, direction, decays in zip(step.factors, directions, step.decays, strict=True):
        size = -step.rate * step.scale(pair)
        updates.append(
            tuple(
                (size * (u + step.weight_decay * p if decay else u)).astype(p.dtype)
                for p, u, decay in zip(pair, direction, decays, strict=True)
            )
        )
    return updates


def exact_updates(step: FactorStep, directions: Sequence[Both]) -> tuple[list[Both], Array]:
    """Returns the updates of an exact step of all pairs, and the number of fallbacks (int32).

    A pair in which one factor's direction is zero takes an approximate step: the frozen factor (by
    ``jax.lax.stop_gradient``, for example) does not change, and its partner moves as if alone.
    """

    def step_of_batches(batches: list[PairArrays]) -> tuple[list[PairArrays], Array]:
        news, count = together(step.exact_step)(
            [PairBatch(B, A, dB, dA, step.rate) for (B, dB, *_), (A, dA, *_) in batches],
            step.number,
        )
        return [moved(*sides, new) for sides, new in zip(batches, news, strict=True)], count

    def moved(outs: tuple[Array, ...], ins: tuple[Array, ...], new: Both) -> PairArrays:
        frozen = is_frozen((outs[1], ins[1]))
        # Both outcomes are computed and one is selected: a batch may contain frozen and trained
        # pairs. Decay shrinks each new factor, and so the product by the square; it comes after the
        # retraction, because it is decoupled from the gradient.
        B_move, A_move = (
            jnp.where(frozen, size * (u + decay * p), (1 + size * decay) * x - p).astype(p.dtype)
            for x, (p, u, size, decay) in zip(new, (outs, ins), strict=True)
        )
        return (B_move,), (A_move,)

    # All of a pair's arithmetic is part of the batch, and so divided among the devices. Outside of
    # it, XLA would be free to shard the results, and approximate steps would have to gather them.
    sides: list[Any] = []
    for pair, direction, decays in zip(step.factors, directions, step.decays, strict=True):
        size = -step.rate * step.scale(pair)
        sides.append(
            tuple(
                (
                    p,
                    u.astype(p.dtype),
                    _per_matrix(size, p),
                    _per_matrix(step.weight_decay if decay else 0.0, p),
                )
                for p, u, decay in zip(pair, direction, decays, strict=True)
            )
        )
    updates, count = map_pairs(step_of_batches, sides, step.mesh, step.shardings)
    return [(B, A) for (B,), (A,) in updates], count


def _per_matrix(number: Any, p: Array) -> Array:
    """Returns a number once for each matrix of a stack: (..., 1, 1), float32 or wider."""
    dtype = at_least_float32(p.dtype)
    return jnp.broadcast_to(jnp.asarray(number, dtype), (*p.shape[:-2], 1, 1))


def transported(
    step: FactorStep,
    directions: Sequence[Both],
    updates: Sequence[Both],
    moments: Sequence[Sequence[Both]],
) -> list[list[Both]]:
    """Returns moments transported into the basis of the factors after an exact step.

    Args:
        step: the step.
        directions: directions of each pair; the moments of frozen pairs do not change.
        updates: updates of each pair.
        moments: first moments of each pair, and second moments if the state has them.

    Returns:
        The moments, in the same structure.
    """

    def of_batch(outs: tuple[Array, ...], ins: tuple[Array, ...]) -> PairArrays:
        # Each side brings its factor, its update, whether the pair is frozen, and its part of every
        # moment.
        (B, move_B, frozen, *of_B), (A, move_A, _, *of_A) = outs, ins
        both = [*zip(of_B, of_A, strict=True)]
        moved = transport_moments((B, A), (B + move_B, A + move_A), *both)
        # A frozen pair took an approximate step and kept its basis, so its moments still fit.
        new_B, new_A = zip(
            *(
                tuple(jnp.where(frozen, x, y) for x, y in zip(old, new, strict=True))
                for old, new in zip(both, moved, strict=True)
            ),
            strict=True,
        )
        return new_B, new_A

    def of_batches(batches: list[PairArrays]) -> tuple[list[PairArrays], Array]:
        return [of_batch(*sides) for sides in batches], count_of_none(batches)

    # map_pairs divides this work among devices in the same way as the step itself.
    frozen = [(is_frozen(direction),) * 2 for direction in directions]
    rows = zip(step.factors, updates, frozen, *moments, strict=True)
    sides: list[Any] = [tuple(zip(*row, strict=True)) for row in rows]
    moved, _ = map_pairs(of_batches, sides, step.mesh, step.shardings)
    return [[(outs[k], ins[k]) for outs, ins in moved] for k in range(len(moments))]


def is_frozen(direction: Both) -> Array:
    """Returns whether the direction of B or A is all zero, for each of a batch: (..., 1, 1)."""
    is_zero = [~jnp.any(u != 0, axis=(-2, -1), keepdims=True) for u in direction]
    return is_zero[0] | is_zero[1]
