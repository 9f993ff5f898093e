"""Mapping matrix factorisations over batches, safely on CPU, and loops that batches may share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax


def one_by_one(fn: Callable, batch_axes: int) -> Callable:
    """Maps a function of single matrices over leading axes without batching LAPACK calls on CPU.

    jaxlib's CPU kernels for ``qr``, ``svd``, ``eigh`` and ``cholesky`` spread a *batched* call
    over XLA's own thread pool and block the calling thread of that pool until it is done. Two such
    calls in flight on a machine with two cores hold both threads, and the program hangs for ever.
    So on CPU any ``vmap``, also one around the whole optimizer, turns into a loop of single calls;
    on GPU and TPU batching stays.

    The result can be differentiated as the function can, forward and backward.

    Args:
        fn: function of matrices (arrays without batch axes).
        batch_axes: number of leading axes that all arguments share.

    Returns:
        The mapped function.
    """

    def dispatch(*matrices: jax.Array) -> Any:
        return jax.lax.platform_dependent(
            *matrices, cpu=jax.custom_batching.sequential_vmap(fn), default=fn
        )

    mapped: Callable = dispatch
    looped: Callable = fn
    for _ in range(batch_axes):
        mapped = jax.vmap(mapped)
        looped = functools.partial(_loop, looped)

    # JAX has no backward pass for what `sequential_vmap` makes; it has one for a loop.
    differentiable = jax.custom_jvp(mapped)
    differentiable.defjvp(lambda primals, tangents: jax.jvp(looped, primals, tangents))
    return differentiable


def _loop(fn: Callable, *arguments: Any) -> Any:
    return jax.lax.map(lambda one: fn(*one), arguments)


def batches_itself(fn: Callable) -> Callable:
    """A function whose ``vmap`` is the function itself, given one more leading axis.

    For a loop that stops when all members of a batch are done: ``vmap`` would give it a condition
    for each member, which other transformations (``checkify``) refuse.

    Args:
        fn: function of arrays that treats leading axes as batch axes, and returns arrays with them.

    Returns:
        The function.
    """
    mapped = jax.custom_batching.custom_vmap(fn)

    @mapped.def_vmap
    def rule(axis_size: int, in_batched: Any, *arguments: Any) -> Any:
        full = jax.tree.map(
            lambda x, batched: x if batched else jax.numpy.broadcast_to(x, (axis_size, *x.shape)),
            arguments,
            tuple(in_batched),
        )
        results = mapped(*full)
        return results, jax.tree.map(lambda _: True, results)

    return mapped


def varying_alike(tree: Any) -> Any:
    """The arrays, all varying over the same axes of a ``jax.shard_map``.

    What a loop carries has to keep its type, and inside a ``shard_map`` that says over which axes
    of the mesh an array may differ. Those made of nothing, such as counters, differ over none,
    whatever they are combined with later.

    Args:
        tree: arrays.

    Returns:
        The same tree; each array varies over all axes that any of them varies over.
    """
    axes = frozenset().union(*(_axes_of(x) for x in jax.tree.leaves(tree)))

    def vary(x: jax.Array) -> jax.Array:
        missing = tuple(sorted(axes - _axes_of(x)))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(vary, tree)


def _axes_of(x: Any) -> frozenset[str]:
    kind = jax.typeof(x)
    # Where it is written depends on the version of JAX.
    manual = getattr(kind, "manual_axis_type", None)
    return frozenset(getattr(kind, "vma", ()) if manual is None else manual.varying)
