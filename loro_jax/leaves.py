"""Leaves of users' trees: Python numbers, holes, and the mask of weight decay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# As in Optax: a tree of booleans like the parameters or a prefix of it, or a function that returns
# one, given the parameters.
Mask = Any | Callable[[Any], Any] | None
# Decoupled weight decay: a number for all leaves, or a pair (number, mask).
WeightDecay = Any | tuple[Any, Mask]

_NUMBERS = (bool, int, float, complex, np.ndarray, np.generic)


def in_arrays(tree: Any) -> Any:
    """Replaces Python numbers and NumPy arrays in a tree by JAX arrays.

    Example:
        >>> in_arrays({"scale": 1.0})["scale"].dtype
        dtype('float32')
    """

    def convert(leaf: Any) -> Any:
        return jnp.asarray(leaf, jnp.result_type(leaf)) if isinstance(leaf, _NUMBERS) else leaf

    return jax.tree.map(convert, tree)


def complete(grads: Any, params: Any) -> Any:
    """Fills gradients with zeros where they have None and the parameters have an array.

    Raises:
        ValueError: if the two trees have different numbers of leaves.
    """
    # None counts as a leaf on both sides; otherwise the two lists would be out of step.
    gradients, structure = jax.tree.flatten(grads, is_leaf=_is_hole)
    parameters = jax.tree.leaves(params, is_leaf=_is_hole)
    if len(gradients) != len(parameters):
        raise ValueError(
            f"loro: update was given gradients with {len(gradients)} leaves for parameters with "
            f"{len(parameters)}; expected trees of one structure."
        )
    full = [
        jnp.zeros_like(p) if g is None and p is not None else g
        for g, p in zip(gradients, parameters, strict=True)
    ]
    return jax.tree.unflatten(structure, full)


def with_holes_of(grads: Any, updates: Any) -> Any:
    """Puts None into updates where the gradients have None, as Optax's transformations do."""
    holes = [g is None for g in jax.tree.leaves(grads, is_leaf=_is_hole)]
    leaves, structure = jax.tree.flatten(updates, is_leaf=_is_hole)
    kept = [None if hole else leaf for hole, leaf in zip(holes, leaves, strict=True)]
    return jax.tree.unflatten(structure, kept)


def _is_hole(leaf: Any) -> bool:
    return leaf is None


def split_weight_decay(weight_decay: WeightDecay) -> tuple[Any, Mask]:
    """Splits ``weight_decay`` into the number and the mask (or None).

    Raises:
        ValueError: for a tuple that isn't a pair.

    Example:
        >>> split_weight_decay(0.1), split_weight_decay((0.1, {"w": True}))
        ((0.1, None), (0.1, {'w': True}))
    """
    if not isinstance(weight_decay, tuple):
        return weight_decay, None
    if len(weight_decay) != 2:
        raise ValueError(
            "loro: weight_decay must be a number or a pair (number, mask), but is a tuple of "
            f"{len(weight_decay)}."
        )
    return weight_decay


def decayed_leaves(mask: Mask, params: Any) -> list[bool]:
    """Returns whether weight decay applies to each leaf of the parameters.

    Raises:
        ValueError: if the mask has another structure, or leaves that are not booleans.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"w": jnp.ones((2, 2)), "norm": jnp.ones(2)}
        >>> decayed_leaves(lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree), params)
        [False, True]
    """
    structure: Any = jax.tree.structure(params)
    if mask is None:
        return [True] * structure.num_leaves
    # A callable module may also be a mask, like any tree, so a mask is only called if it is not a
    # tree of booleans.
    flags = None if callable(mask) else _broadcast(mask, params)
    if callable(mask):
        flags = _broadcast(mask, params) or _broadcast(mask(params), params)
    if flags is None:
        raise ValueError(
            "loro: the mask of weight_decay must be a tree of booleans like the parameters (or a "
            f"prefix of it), or a function that makes one; the parameters are {structure}."
        )
    return flags


def _broadcast(mask: Any, params: Any) -> list[bool] | None:
    """Broadcasts a mask to all leaves; None if it does not fit."""
    if not all(isinstance(flag, bool | np.bool_) for flag in jax.tree.leaves(mask)):
        return None
    try:
        # The mask may be a prefix of the parameters: a flag is valid for all leaves below it.
        flags = jax.tree.map(lambda flag, part: [bool(flag)] * _size(part), mask, params)
    except (ValueError, TypeError):
        return None
    return jax.tree.leaves(flags)


def _size(tree: Any) -> int:
    return len(jax.tree.leaves(tree))
