"""A refresh: moments of the old factors are dropped, and all else that a state holds stays.

A direction may be a chain of transformations, with injected hyperparameters, schedules and noise
among them. Only moments are made of gradients in the old basis. They are told from the rest by
their structure: trees like the parameters. What counts the gradients in them (for Adam's bias
correction) stands next to them, and starts anew with them.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def refreshed(stale: jax.Array, fresh: Any, state: Any, params: Any) -> Any:
    """A state whose moments are those of a fresh one where they are stale.

    Args:
        stale: boolean scalar.
        fresh: state that ``init`` gives.
        state: state of the same structure.
        params: the parameters of both.

    Returns:
        The state. In each node (a NamedTuple, a dict) that holds a tree of the structure of the
        parameters, such trees are fresh, and so are integers and booleans that are scalars: the
        counts of what is in the trees. Numbers, schedules' counts and random keys elsewhere stay.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> tx = optax.chain(optax.trace(0.9), optax.scale_by_schedule(lambda count: 1.0))
        >>> params = {"w": jnp.ones(2)}
        >>> _, state = tx.update(params, tx.init(params))
        >>> trace, schedule = refreshed(jnp.bool_(True), tx.init(params), state, params)
        >>> trace.trace["w"].tolist(), int(schedule.count)
        ([0.0, 0.0], 1)
    """
    like: Any = jax.tree.structure(params)
    return _refreshed(stale, fresh, state, like)


def _refreshed(stale: jax.Array, fresh: Any, state: Any, like: Any) -> Any:
    if _is_like(fresh, like):
        return jax.tree.map(lambda new, old: jnp.where(stale, new, old), fresh, state)
    news, _ = jax.tree.flatten(fresh, is_leaf=lambda node: node is not fresh)
    olds, structure = jax.tree.flatten(state, is_leaf=lambda node: node is not state)
    holds_moments = any(_is_like(new, like) for new in news)
    children = [
        jnp.where(stale, new, old)
        if holds_moments and _is_count(old)
        else old
        if old is state  # a leaf
        else _refreshed(stale, new, old, like)
        for new, old in zip(news, olds, strict=True)
    ]
    return jax.tree.unflatten(structure, children)


def _is_like(tree: Any, like: Any) -> bool:
    return bool(jax.tree.structure(tree) == like)


def _is_count(node: Any) -> bool:
    dtype = getattr(node, "dtype", None)
    whole = dtype is not None and (
        jnp.issubdtype(dtype, jnp.integer) or jnp.issubdtype(dtype, jnp.bool_)
    )
    return whole and jnp.ndim(node) == 0
