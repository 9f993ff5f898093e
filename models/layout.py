"""Where activations lie on the devices of a mesh.

A model is written for one device, and XLA finds a layout for whatever nobody has laid out. It then
spreads the layout of the weights over the activations: of weights that are split to save memory,
every device multiplies its part with the tokens of all others, and the partial sums travel. So a
model says it itself: tokens stay where they are, and weights come to them.

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

_layout: contextvars.ContextVar[tuple[Mesh, dict[str, int]] | None] = contextvars.ContextVar(
    "mesh that models lay activations out on, and the sizes of its axes", default=None
)


@contextlib.contextmanager
def laid_out_on(mesh: Mesh | None, without: str | None = None) -> Iterator[None]:
    """A context in which models lay their activations out on a mesh.

    Args:
        mesh: with the axes data, fsdp and tensor; None: no mesh.
        without: an axis that a ``jax.vmap`` around the model takes (its ``spmd_axis_name``).
    """
    sizes = {} if mesh is None else {k: v for k, v in mesh.shape.items() if k != without}
    token = _layout.set(None if mesh is None else (mesh, sizes))
    try:
        yield
    finally:
        _layout.reset(token)


def batch_ways() -> int:
    """Devices that a batch is split over."""
    _, sizes = _layout.get() or (None, {})
    return math.prod(sizes.get(axis, 1) for axis in BATCH_AXES)


def by_sequence(x: Array, split_axis: int | None = None) -> Array:
    """An array of activations with its sequences split over the batch axes of the mesh.

    Args:
        x: sequences along the first axis.
        split_axis: another axis, split over ``tensor``; None: no other one is.

    Returns:
        The same values.
    """
    layout = _layout.get()
    if layout is None or layout[0].size == 1:
        return x
    mesh, sizes = layout
    spec: list[Any] = [None] * x.ndim
    spec[0] = tuple(axis for axis in BATCH_AXES if axis in sizes)
    if split_axis is not None and x.shape[split_axis] % sizes[TENSOR_AXIS] == 0:
        spec[split_axis] = TENSOR_AXIS
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*spec)))
