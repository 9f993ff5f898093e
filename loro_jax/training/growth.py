"""Growth of a model in depth: its stack of layers repeated in order (G_stack).

Source: Du et al., "Stacking Your Transformers: A Closer Look at Model Growth for Efficient LLM
Pre-Training", NeurIPS 2024 (arXiv 2405.15319): train a model of L / g layers, then repeat its stack
g times, 0..k, 0..k, ..., and train on. Layers are a leading axis of every array of the blocks, here
and in optimizer states, so that growing repeats arrays along it.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array


def grown(tree: Any, like: Any, times: int) -> Any:
    """Repeats the arrays of a tree along the axis of the layers.

    Args:
        tree: parameters, or an optimizer's state, of the smaller model.
        like: that of the grown model, or its shapes, with the same structure.
        times: g, how often the stack is repeated.

    Returns:
        The tree with the shapes of ``like``: layer i of the grown model is layer i mod k of the
        smaller one, bit for bit, and what is no layer's is unchanged.

    Raises:
        ValueError: if the structures differ, or a shape does not follow from growing.

    Example:
        >>> small = {"blocks": jnp.array([[1, 2], [3, 4]]), "norm": jnp.ones(2)}
        >>> large = {"blocks": jax.ShapeDtypeStruct((4, 2), jnp.int32), "norm": jnp.ones(2)}
        >>> grown(small, large, 2)["blocks"].tolist()
        [[1, 2], [3, 4], [1, 2], [3, 4]]
    """
    structure: Any
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    wanted, there = jax.tree.flatten(like)
    if structure != there:
        raise ValueError(f"expected arrays as in {_names(like)}, but found {_names(tree)}.")

    def repeated(path: Any, leaf: Array, shape: tuple[int, ...]) -> Array:
        if leaf.shape == shape:
            return leaf
        axes = [axis for axis, (a, b) in enumerate(zip(leaf.shape, shape, strict=False)) if a != b]
        fits = len(leaf.shape) == len(shape) and len(axes) == 1
        if not fits or leaf.shape[axes[0]] * times != shape[axes[0]]:
            raise ValueError(f"{_name(path)} has shape {leaf.shape}, expected {shape}.")
        return jnp.concatenate([leaf] * times, axis=axes[0])

    new = [repeated(path, x, y.shape) for (path, x), y in zip(leaves, wanted, strict=True)]
    return jax.tree.unflatten(structure, new)


def _names(tree: Any) -> str:
    """Returns the names of a tree's arrays, for messages."""
    names = [_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
