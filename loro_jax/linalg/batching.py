"""Deadlock-free mapping of matrix factorisations over batches, and loops shared by a batch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def one_by_one(fn: Callable, batch_axes: int) -> Callable:
    """Maps a function of single matrices over leading axes without batching LAPACK calls on CPU.

    jaxlib's CPU kernels for ``qr``, ``svd``, ``eigh`` and ``cholesky`` distribute a *batched* call
    over XLA's own thread pool and block a thread of that pool until it is done. Two such calls in
    flight on a machine with two cores block both threads, and the program hangs forever. Therefore
    any ``vmap`` on CPU, even one around the whole optimizer, becomes a loop of single calls; GPU
    and TPU batch as usual.

    The result can be differentiated like the function, in forward and reverse mode.

    Args:
        fn: function of matrices (arrays without batch axes).
        batch_axes: number of leading axes that all arguments share.

    Returns:
        The mapped function.
    """

    def dispatch(*matrices: jax.Array) -> Any:
        return jax.lax.platform_dependent(*matrices, cpu=maps_by_a_loop(fn), default=fn)

    mapped: Callable = dispatch
    looped: Callable = fn
    for _ in range(batch_axes):
        mapped = jax.vmap(mapped)
        looped = functools.partial(_loop, looped)

    # JAX has no reverse mode for `custom_vmap`, but it has one for a loop.
    differentiable = jax.custom_jvp(mapped)
    differentiable.defjvp(lambda primals, tangents: jax.jvp(looped, primals, tangents))
    return differentiable


def _loop(fn: Callable, *arguments: Any) -> Any:
    return jax.lax.map(lambda one: fn(*one), arguments)


def maps_by_a_loop(fn: Callable) -> Callable:
    """Returns a function of arrays whose ``vmap`` is a loop of single calls.

    Unlike ``jax.custom_batching.sequential_vmap`` it supports a mapped axis that is sharded over an
    explicit mesh, such as the members of an ensemble: each device loops over its own.
    """

    def loop(single: Callable, is_mapped: list[bool], leaves: list[jax.Array]) -> Any:
        def call(members: list[jax.Array]) -> Any:
            member = iter(members)
            return single(
                *(
                    next(member) if mapped else x
                    for x, mapped in zip(leaves, is_mapped, strict=True)
                )
            )

        mapped = [x for x, mapped in zip(leaves, is_mapped, strict=True) if mapped]
        return jax.lax.map(call, mapped)

    return _with_rule(fn, loop)


def joins_the_batch(fn: Callable) -> Callable:
    """Returns a function of batches whose ``vmap`` calls it once, with larger batches.

    All arrays that it takes and returns have a leading batch axis, whose entries do not affect each
    other. The batches of all members are concatenated; if the mapped axis is sharded over an
    explicit mesh, those of the members on each device.
    """

    def once(single: Callable, is_mapped: list[bool], leaves: list[jax.Array]) -> Any:
        members = next(len(x) for x, mapped in zip(leaves, is_mapped, strict=True) if mapped)
        every = (
            x if mapped else jax.numpy.broadcast_to(x, (members, *x.shape))
            for x, mapped in zip(leaves, is_mapped, strict=True)
        )
        results = single(*(x.reshape(-1, *x.shape[2:]) for x in every))
        return jax.tree.map(lambda x: x.reshape(members, -1, *x.shape[1:]), results)

    return _with_rule(fn, once)


# The function of leaves, which leaves are mapped, the leaves -> the mapped results.
_Rule = Callable[[Callable, list[bool], list[jax.Array]], Any]


def _with_rule(fn: Callable, rule: _Rule) -> Callable:
    """Returns the function with a rule for ``vmap``, applied on each device to its own members."""
    single = jax.custom_batching.custom_vmap(fn)

    @single.def_vmap
    def mapped(axis_size: int, in_batched: Any, *arguments: Any) -> Any:
        del axis_size
        leaves, tree = jax.tree.flatten(arguments)
        is_mapped = jax.tree.leaves(in_batched)

        def apply(*leaves: jax.Array) -> Any:
            of_leaves = lambda *leaves: single(*jax.tree.unflatten(tree, leaves))  # noqa: E731
            return rule(of_leaves, is_mapped, list(leaves))

        types = [jax.typeof(x) for x, mapped in zip(leaves, is_mapped, strict=True) if mapped]
        sharded = [x.sharding for x in types if x.sharding.spec[0] is not None]
        if sharded:
            axes = PartitionSpec(sharded[0].spec[0])
            apply = jax.shard_map(
                apply,
                mesh=sharded[0].mesh,
                in_specs=tuple(axes if mapped else PartitionSpec() for mapped in is_mapped),
                out_specs=axes,
                axis_names=set(jax.tree.leaves(tuple(axes))),
                check_vma=False,
            )
        results = apply(*leaves)
        return results, jax.tree.map(lambda _: True, results)

    return single


def batches_itself(fn: Callable) -> Callable:
    """Returns a function whose ``vmap`` calls it once, with one more leading axis.

    Used for loops that stop when all members of a batch are done: ``vmap`` would create one
    condition per member, which other transformations (``checkify``) do not support.

    Args:
        fn: function of arrays that treats leading axes as batch axes, and keeps them.

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


def zeros_beside(arrays: Any, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Returns zeros with the type of something computed from these arrays.

    The branches of a ``jax.lax.cond``, and a loop's carry before and after a step, must agree on
    the type, which includes the mesh.

    Args:
        arrays: a tree of arrays; other leaves are ignored.
        shape: the zeros' shape.
        dtype: their dtype.

    Returns:
        The zeros. They are placed on the arrays' mesh if that is explicit, and vary over the same
        axes of a ``jax.shard_map``.
    """
    found = [x for x in jax.tree.leaves(arrays) if isinstance(x, jax.Array)]
    meshes = [jax.typeof(x).sharding.mesh for x in found]
    # Outside of any program there are no branches, and zeros would need devices.
    traced = any(isinstance(x, jax.core.Tracer) for x in found)
    explicit = [mesh for mesh in meshes if traced and AxisType.Explicit in mesh.axis_types]
    device = NamedSharding(explicit[0], PartitionSpec()) if explicit else None
    zeros: jax.Array = varying_alike([jax.numpy.zeros(shape, dtype, device=device), *found])[0]
    return zeros


def count_of_none(arrays: Any) -> jax.Array:
    """Returns a zero count (int32) with the type of a count of entries of these arrays."""
    return zeros_beside(arrays, (), jax.numpy.int32)


def varying_alike(tree: Any) -> Any:
    """Makes all arrays vary over the same axes of a ``jax.shard_map``.

    A loop's carry must keep its type, which inside a ``shard_map`` includes the mesh axes that an
    array varies over. Constants, such as counters, vary over none, whatever they are combined with
    later.

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
    # The attribute depends on the version of JAX.
    manual = getattr(kind, "manual_axis_type", None)
    return frozenset(getattr(kind, "vma", ()) if manual is None else manual.varying)
