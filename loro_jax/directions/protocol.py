"""A direction in two stages, so that an exact step need not store it.

Most optimizers keep moments and make a direction of them. Handing the direction to a branch of
the program makes XLA store it, one array as large as each factor, on all the steps that do not take
the branch. Handing over the moments, which are stored anyway, and letting each branch make the
direction for itself, stores nothing. Hence the two stages of a :class:`Direction`. Any Optax
transformation is one, too: with its direction as what it hands over.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from loro_jax.directions.adam import (
    AdamState,
    adam_direction,
    adam_moments,
    decay_is_lost,
    scale_by_uncorrected_adam,
)


class Direction(NamedTuple):
    """How gradients become directions.

    Attributes:
        init: parameters -> state.
        advance: (gradients, state, parameters, extra arguments) -> (carried, state), where the
            carried tree is shaped like the parameters.
        finish: (carried, state) -> directions.
        keep: (state, carried) -> state. What is carried may be a part of the state; on an exact
            step it is then overwritten by the move, and this is the state with that in its place.
        moves: whether the directions are moves of factors, to be made as they are (times minus the
            learning rate), where others are like gradients. ``advance`` is then told, by the
            keyword ``places``, where B and A of each pair stand among the leaves of the factors.
    """

    init: Callable[[Any], Any]
    advance: Callable[..., tuple[Any, Any]]
    finish: Callable[[Any, Any], Any]
    keep: Callable[[Any, Any], Any]
    moves: bool = False

    def update(self, grads: Any, state: Any, params: Any, **extra_args: Any) -> tuple[Any, Any]:
        """Both stages."""
        carried, state = self.advance(grads, state, params, **extra_args)
        return self.finish(carried, state), state

    def in_one_stage(self) -> Direction:
        """The same direction, itself handed over, and the state left alone."""
        return _one_stage(self.init, self.update)._replace(moves=self.moves)


def from_optax(tx: optax.GradientTransformation) -> Direction:
    """An Optax transformation as a direction."""
    extended = optax.with_extra_args_support(tx)
    return _one_stage(extended.init, extended.update)


def as_direction(given: optax.GradientTransformation | Direction) -> Direction:
    """A direction as it is, an Optax transformation as one."""
    return given if isinstance(given, Direction) else from_optax(given)


def _one_stage(init: Callable[[Any], Any], update: Callable[..., tuple[Any, Any]]) -> Direction:
    def advance(grads: Any, state: Any, params: Any, **extra_args: Any) -> tuple[Any, Any]:
        directions, state = update(grads, state, params, **extra_args)
        # Keeps XLA from moving the update into a branch, where it would run on one core.
        return jax.lax.optimization_barrier(directions), state

    return Direction(init, advance, lambda carried, _: carried, lambda state, _: state)


def adam(
    b1: jax.typing.ArrayLike,
    b2: jax.typing.ArrayLike,
    eps: jax.typing.ArrayLike,
    mu_dtype: Any | None,
) -> Direction:
    """:func:`loro_jax.scale_by_uncorrected_adam` as a direction that carries first moments.

    Where first moments may have another dtype than the parameters (a ``mu_dtype``, or a b1 that
    bfloat16 can't do) it carries itself: the direction is made of moments not yet rounded, and a
    move may need more precision than they have.
    """
    as_transformation = scale_by_uncorrected_adam(b1, b2, eps, mu_dtype)
    if mu_dtype is not None or decay_is_lost(b1, jnp.bfloat16):
        return from_optax(as_transformation)

    def advance(grads: Any, state: AdamState, params: Any, **extra_args: Any) -> tuple[Any, Any]:
        del params, extra_args
        moments = adam_moments(grads, state, b1, b2)
        state = jax.tree.map(lambda new, old: new.astype(old.dtype), moments, state)
        return state.mu, state

    return Direction(
        init=as_transformation.init,
        advance=advance,
        finish=lambda mu, state: adam_direction(state._replace(mu=mu), b1, b2, eps),
        keep=lambda state, mu: state._replace(mu=mu),
    )
