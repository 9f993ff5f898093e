"""What is handed to the branch of an exact step in place of the directions.

An exact step is a branch of the program, and its directions are made outside of it. Handing over
directions makes XLA store them, one array as large as each factor, on all steps. Adam's are made of
its moments, which are stored anyway: handing over the first moments and making the directions of
them where they are needed stores nothing. The branch returns moves, which then overwrite first
moments. That is sound only if the next step resets them.

With it an approximate step of the pairs, embedding and head of LLaMA-60M takes three quarters to
four fifths of the time on CPU (``python -m loro_jax.bench approximate_step``).
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


class Carrier(NamedTuple):
    """How a direction gets into the branch of an exact step, and moves get out of it.

    Attributes:
        advance: (gradients, state, parameters, pairs, **extra arguments) -> (carried, state), where
            the carried tree has the parameters' structure.
        finish: (carried, state) -> directions.
        keep: (state, carried) -> state. What is carried may be a part of the state, which a move
            then overwrites; this is the state with it put back.
    """

    advance: Callable[..., tuple[Any, Any]]
    finish: Callable[[Any, Any], Any]
    keep: Callable[[Any, Any], Any]


def carrier_of(direction: Direction, may_overwrite: bool) -> Carrier:
    """Returns how to carry a direction.

    Args:
        direction: any.
        may_overwrite: whether moments are reset after an exact step, so that moves may take their
            place.
    """
    # A first moment of another dtype than the parameters carries neither the direction, which is
    # made of moments not yet rounded, nor a move, which may need more precision.
    if (
        isinstance(direction, Adam)
        and may_overwrite
        and direction.mu_dtype is None
        and not decay_is_lost(direction.b1, jnp.bfloat16)
    ):
        return _first_moments(direction)
    return _directions(direction)


def _directions(direction: Direction) -> Carrier:
    def advance(*arguments: Any, **extra_args: Any) -> tuple[Any, Any]:
        directions, state = direction.update(*arguments, **extra_args)
        # Keeps XLA from moving the update into a branch, where it would run on one core.
        return jax.lax.optimization_barrier(directions), state

    return Carrier(advance, lambda carried, _: carried, lambda state, _: state)


def _first_moments(adam: Adam) -> Carrier:
    b1, b2, eps = adam.b1, adam.b2, adam.eps

    def advance(
        grads: Any, state: AdamState, params: Any, pairs: Any, **extra_args: Any
    ) -> tuple[Any, AdamState]:
        del params, pairs, extra_args
        moments = adam_moments(grads, state, b1, b2)
        state = jax.tree.map(lambda new, old: new.astype(old.dtype), moments, state)
        return state.mu, state

    return Carrier(
        advance,
        finish=lambda mu, state: adam_direction(state._replace(mu=mu), b1, b2, eps),
        keep=lambda state, mu: state._replace(mu=mu),
    )
