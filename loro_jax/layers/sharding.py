"""Sharding of a pair and of its latents, on meshes with automatic or explicit axes."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from loro_jax.layers.kernels import Layout, pair_axes

Array = jax.Array


def placed_pair(kernel: Array, layout: Layout, B: Any, A: Any) -> tuple[Any, Any]:
    """Shards factors as the kernel whose place they take is sharded.

    Args:
        kernel: the kernel; a traced one says how it is sharded on a mesh with explicit axes alone.
        layout: its layout.
        B: output-side factor.
        A: input-side factor.

    Returns:
        Both factors, as they are if the kernel is not sharded.
    """
    if isinstance(kernel, jax.core.Tracer):
        sharding, place = jax.typeof(kernel).sharding, jax.sharding.reshard
    else:
        sharding, place = getattr(kernel, "sharding", None), jax.device_put
    if not isinstance(sharding, NamedSharding) or not any(sharding.spec):
        return B, A
    axes = (*sharding.spec, *[None] * (kernel.ndim - len(sharding.spec)))
    of_B, of_A = (NamedSharding(sharding.mesh, PartitionSpec(*a)) for a in pair_axes(layout, axes))
    if isinstance(B, jax.ShapeDtypeStruct):
        return B.update(sharding=of_B), A.update(sharding=of_A)
    return place(B, of_B), place(A, of_A)


def whole(kernel: Array) -> Array:
    """Returns a kernel that is not sharded over explicit axes: no reshape or SVD takes one."""
    if not any(jax.typeof(kernel).sharding.spec):
        return kernel
    return jax.sharding.reshard(kernel, PartitionSpec())


def latent_sharding(x: Array, contracted: tuple[int, ...] = (-1,)) -> PartitionSpec | None:
    """Returns the sharding of latents, for a product that contracts a sharded axis of its input.

    Args:
        x: the input.
        contracted: its axes that the latents do not have.

    Returns:
        That of the other axes of the input, the rank unsharded; None without a mesh with explicit
        axes, where the compiler chooses.
    """
    spec = jax.typeof(x).sharding.spec
    if not any(spec):
        return None
    gone = {axis % x.ndim for axis in contracted}
    return PartitionSpec(*(spec[axis] for axis in range(x.ndim) if axis not in gone), None)
