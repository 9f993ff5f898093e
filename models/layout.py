"""Sharding of activations over the devices of a mesh.

Without constraints, XLA propagates the sharding of the weights to the activations: with weights
sharded to save memory, each device would multiply its part with the tokens of all devices and
exchange partial sums. The constraints here keep tokens in place, so that weights are gathered.

The axes are those of :mod:`loro_jax.training.mesh`. Outside :func:`laid_out_on` nothing happens.
"""

from __future__ import annotations

import contextlib
import contextvars
import math
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Array = jax.Array

BATCH_AXES = ("data", "fsdp")
TENSOR_AXIS = "tensor"

# In the context and not an argument, so that no module has to pass the mesh on.
_layout: contextvars.ContextVar[tuple[Mesh, dict[str, int]] | None] = contextvars.ContextVar(
    "mesh that activations are sharded over, and the sizes of its axes", default=None
)


@contextlib.contextmanager
def laid_out_on(mesh: Mesh | None, without: str | None = None) -> Iterator[None]:
    """Returns a context in which models shard their activations over a mesh.

    Args:
        mesh: mesh with the axes data, fsdp and tensor; None: no mesh.
        without: axis used by a ``jax.vmap`` around the model (its ``spmd_axis_name``).
    """
    sizes = {} if mesh is None else {k: v for k, v in mesh.shape.items() if k != without}
    token = _layout.set(None if mesh is None else (mesh, sizes))
    try:
        yield
    finally:
        _layout.reset(token)


def target_device() -> jax.Device:
    """Returns a device that a program is traced for: one of the mesh, or else the default device.

    It may be the device of an accelerator that is not there, for which the program is compiled.
    """
    layout = _layout.get()
    return jax.local_devices()[0] if layout is None else layout[0].devices.flat[0]


def batch_ways() -> int:
    """Returns the number of devices that a batch is sharded over."""
    _, sizes = _layout.get() or (None, {})
    return math.prod(sizes.get(axis, 1) for axis in BATCH_AXES)


def by_sequence(x: Array, split_axis: int | None = None) -> Array:
    """Shards activations over the batch axes of the mesh by their first axis.

    Args:
        x: activations, sequences along the first axis.
        split_axis: second axis to shard, over ``tensor``; None: none.

    Returns:
        The same values.
    """
    layout = _layout.get()
    if layout is None or layout[0].size == 1:
        return x
    mesh, sizes = layout
    spec: list[Any] = [None] * x.ndim
    # The axis of an enclosing vmap is not among `sizes`: spmd_axis_name adds it.
    spec[0] = tuple(axis for axis in BATCH_AXES if axis in sizes)
    # An axis that `tensor` does not divide stays whole.
    if split_axis is not None and x.shape[split_axis] % sizes[TENSOR_AXIS] == 0:
        spec[split_axis] = TENSOR_AXIS
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*spec)))
