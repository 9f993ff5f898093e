"""Passes directions into the branch of an exact step without storing them.

An exact step is a branch of the program, and its directions are computed outside of it. Passing the
directions makes XLA store them, one array as large as each factor, on every step. Adam's directions
are computed from its moments, which are stored anyway: passing the first moments and computing the
directions inside the branch stores nothing. The branch returns moves, which overwrite the first
moments. This is sound only if the next step resets them.

It reduces the time of an approximate step of the pairs, embedding and head of LLaMA-60M to three
quarters to four fifths on CPU (``python -m loro_jax bench approximate_step``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from loro_jax.directions.adam import (
    Adam,
    AdamState,
    adam_direction,
    adam_moments,
    decay_is_lost,
)
from loro_jax.directions.protocol import Direction


class BranchOperand(NamedTuple):
    """Functions that pass a direction into the branch of an exact step, and moves out of it.

    Attributes:
        advance: (gradients, state, parameters, pairs, **extra arguments) -> (operand, state), where
            the operand is a tree with the parameters' structure.
        finish: (operand, state) -> directions.
        keep: (state, operand) -> state. The operand may be a part of the state, which a
            move overwrites; this puts it back into the state.
    """

    advance: Callable[..., tuple[Any, Any]]
    finish: Callable[[Any, Any], Any]
    keep: Callable[[Any, Any], Any]


def branch_operand(direction: Direction, may_overwrite: bool) -> BranchOperand:
    """Returns how to pass a direction into the branch.

    Args:
        direction: any direction.
        may_overwrite: whether moments are reset after an exact step, so that moves may overwrite
            them.
    """
    # A first moment in another dtype than the parameters would round the direction, which is
    # computed from unrounded moments, and the move, which may need more precision.
    if (
        isinstance(direction, Adam)
        and may_overwrite
        and direction.mu_dtype is None
        and not decay_is_lost(direction.b1, jnp.bfloat16)
    ):
        return _first_moments(direction)
    return _directions(direction)


def _directions(direction: Direction) -> BranchOperand:
    """Passes the directions themselves."""

    def advance(*arguments: Any, **extra_args: Any) -> tuple[Any, Any]:
        directions, state = direction.update(*arguments, **extra_args)
        # Keeps XLA from moving the direction's update into the branch, which runs on one core of a
        # CPU.
        return jax.lax.optimization_barrier(directions), state

    return BranchOperand(advance, lambda operand, _: operand, lambda state, _: state)


def _first_moments(adam: Adam) -> BranchOperand:
    """Passes Adam's first moments, from which the branch computes the directions."""
    b1, b2, eps = adam.b1, adam.b2, adam.eps

    def advance(
        grads: Any, state: AdamState, params: Any, pairs: Any, **extra_args: Any
    ) -> tuple[Any, AdamState]:
        del params, pairs, extra_args
        moments = adam_moments(grads, state, b1, b2)
        # Rounds to the stored dtypes; mu's is the parameters' here (see branch_operand).
        state = jax.tree.map(lambda new, old: new.astype(old.dtype), moments, state)
        return state.mu, state

    return BranchOperand(
        advance,
        finish=lambda mu, state: adam_direction(state._replace(mu=mu), b1, b2, eps),
        # After an exact step these are moves; `may_overwrite` says that they are reset before use.
        keep=lambda state, mu: state._replace(mu=mu),
    )
