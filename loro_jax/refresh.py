"""Resets the moments in an optimizer's state after an exact step, and keeps everything else.

A direction may be a chain of transformations that includes injected hyperparameters, schedules and
noise. Only moments are averages of gradients in the old basis. They are recognised by their
structure, that of the parameters. The count of averaged gradients (for Adam's bias correction) is
in the same node, and is reset with them.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def refreshed(stale: jax.Array, fresh: Any, state: Any, params: Any) -> Any:
    """Resets the moments of a state, and their counts, if they are stale.

    Args:
        stale: boolean scalar.
        fresh: the state that ``init`` returns.
        state: state of the same structure.
        params: the parameters of both.

    Returns:
        The state. In each node (a NamedTuple, a dict) that contains a tree with the structure of
        the parameters, such trees are reset, together with integer and boolean scalars, which are
        their counts. Numbers, schedules' counts and random keys in other nodes are kept.

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
    # The children of this node only, whatever kind of container it is.
    news, _ = jax.tree.flatten(fresh, is_leaf=lambda node: node is not fresh)
    olds, structure = jax.tree.flatten(state, is_leaf=lambda node: node is not state)
    # A count belongs to the moments next to it. A schedule counts in a node without moments, and
    # must not restart.
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
