"""The shardings of factors, from that of the kernel whose place they take."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from loro_jax.layers.kernels import Layout, pair_axes


def placed_pair(kernel: Any, layout: Layout, B: Any, A: Any) -> tuple[Any, Any]:
    """Returns the factors sharded as the kernel is, if it is sharded by the axes of a mesh."""
    sharding = None if isinstance(kernel, jax.core.Tracer) else getattr(kernel, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return B, A
    names = (*sharding.spec, *[None] * (len(kernel.shape) - len(sharding.spec)))
    of_B, of_A = (
        NamedSharding(sharding.mesh, PartitionSpec(*axes)) for axes in pair_axes(layout, names)
    )
    if isinstance(B, jax.ShapeDtypeStruct):
        return B.update(sharding=of_B), A.update(sharding=of_A)
    return jax.device_put(B, of_B), jax.device_put(A, of_A)
