"""The protocol of a direction, the part of a step that turns gradients into descent directions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import optax

from loro_jax.pairs import Pairs


@dataclasses.dataclass(frozen=True, eq=False)
class Direction:
    """A function from gradients of factors to directions, with its state.

    Attributes:
        init: parameters -> state.
        update: (gradients, state, parameters, pairs, **extra arguments) -> (directions, state). The
            trees contain only factors (``optax.MaskedNode`` elsewhere); ``pairs``, a
            :class:`loro_jax.pairs.Pairs`, takes (B, A) out of them and puts them back. When the
            direction is used for the other leaves, ``pairs`` is empty.
        kind: "gradients" for directions that behave like gradients of the factors, such as Adam's:
            an exact step turns them into a tangent vector. "moves" for moves of the factors, which
            are applied directly, times minus the learning rate.
        lr_scale: default factor on the learning rate; None: r / min(m, n) of each pair.

    Example:
        Gradients of both factors, divided by their common norm:

        >>> import jax.numpy as jnp, optax
        >>> from loro_jax import LowRank, loro
        >>> def normalised(pair):
        ...     norm = optax.tree.norm(pair)
        ...     return pair[0] / norm, pair[1] / norm
        >>> def update(grads, state, params, pairs, **extra_args):
        ...     return pairs.map(normalised, grads), state
        >>> direction = Direction(lambda params: optax.EmptyState(), update)
        >>> params = {"w": LowRank(jnp.ones((6, 2)), jnp.eye(2, 4))}
        >>> tx = loro(0.01, direction=direction)
        >>> updates, state = tx.update(params, tx.init(params), params)
    """

    init: Callable[[Any], Any]
    update: Callable[..., tuple[Any, Any]]
    kind: Literal["gradients", "moves"] = "gradients"
    lr_scale: float | None = None


def as_direction(given: optax.GradientTransformation | Direction) -> Direction:
    """Returns a direction unchanged, and converts an Optax transformation into one.

    Raises:
        ValueError: for anything else, such as ``orthogonal`` without a call.
    """
    if isinstance(given, Direction):
        return given
    if not isinstance(given, optax.GradientTransformation):
        raise ValueError(
            "loro: direction must be one that adam(...) or orthogonal(...) returns, or an Optax "
            f"transformation, but is {given!r}."
        )
    tx = optax.with_extra_args_support(given)

    def update(
        grads: Any, state: Any, params: Any, pairs: Pairs, **extra_args: Any
    ) -> tuple[Any, Any]:
        # An Optax transformation steps the factors like any other leaves.
        del pairs
        return tx.update(grads, state, params, **extra_args)

    return Direction(tx.init, update)
