"""Device meshes, and the sharding of batches, parameters and optimizer state.

The batch is sharded over ``data`` and ``fsdp``. Parameters (and Adam's moments) are replicated over
``data``, sharded over ``fsdp`` along their longest axis, and over ``tensor`` along the axis that
needs no communication in a projection's products: outputs of q, k, v, gate and up, inputs of o and
down (of a RoBERTa, inputs of both ``output``). The products between factors then only exchange
arrays of the rank's size. All of this is GSPMD's automatic mode: the step is written for one
device. Activations: see :mod:`models.layout`.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from loro_jax.errors import TrainingError
from loro_jax.training.config import Config, MeshConfig
from models.loss import Batch

# Projections sharded over `tensor` along their input axis; the others along their output axis.
ROW_PARALLEL = ("o", "down", "output")


def make_mesh(config: MeshConfig, devices: int | Sequence[jax.Device] | None = None) -> Mesh:
    """Creates a device mesh with the axes data, fsdp and tensor.

    Args:
        config: sizes of the axes.
        devices: the devices, or the number of JAX's devices to use, from the first on; None: all.

    Raises:
        TrainingError: if the sizes do not multiply to the number of devices.
    """
    sizes = {"data": config.data, "fsdp": config.fsdp, "tensor": config.tensor}
    if devices is None or isinstance(devices, int):
        devices = jax.devices()[:devices]
    count = len(devices)
    fixed = int(np.prod([size for size in sizes.values() if size > 0]))
    free = [name for name, size in sizes.items() if size == -1]
    # A second -1, or a remainder, is left to the error below.
    if len(free) == 1 and count % fixed == 0:
        sizes[free[0]] = count // fixed
    if min(sizes.values()) < 1 or int(np.prod(list(sizes.values()))) != count:
        raise TrainingError(
            f"config.mesh = {config.data} x {config.fsdp} x {config.tensor} (data x fsdp x tensor) "
            f"does not make {count} device(s); at most one axis may be -1 (the remaining ones)."
        )
    # Automatic axes: XLA inserts the communication, and the step is written for one device.
    return jax.make_mesh(
        tuple(sizes.values()),
        tuple(sizes),
        axis_types=(AxisType.Auto,) * 3,
        devices=devices,
    )


def check_batch(config: Config, mesh: Mesh) -> None:
    """Raises TrainingError unless each micro-batch splits evenly over the batch axes."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    micro_batch = config.batch_size // config.gradient_accumulation
    if micro_batch % ways:
        raise TrainingError(
            f"config.batch_size / config.gradient_accumulation = {micro_batch} sequences do not "
            f"split over {ways} devices (mesh.data x mesh.fsdp)."
        )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch: sequences over ``data`` and ``fsdp``."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def rows_here(mesh: Mesh, batch_size: int) -> list[int]:
    """Returns the rows of the global batch that belong to the devices of this process."""
    slices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    rows = np.arange(batch_size)
    # A set, because the devices along `tensor` share their rows.
    return sorted(set(np.concatenate([rows[index] for index in slices]).tolist()))


def put_batch(mesh: Mesh, batch: Batch, rows: Sequence[int], batch_size: int) -> Batch:
    """Puts a batch on the devices.

    Args:
        mesh: the device mesh.
        batch: this process's rows of the batch.
        rows: indices of these rows, from :func:`rows_here`.
        batch_size: rows of the global batch.

    Returns:
        The global batch.
    """
    sharding = batch_sharding(mesh)

    def put(array: np.ndarray) -> jax.Array:
        def part(index: Any) -> np.ndarray:
            first, last, _ = index[0].indices(batch_size)
            # A device's rows are contiguous in the global batch, and so they are in this process.
            start = bisect.bisect_left(rows, first)
            return array[start : start + last - first]

        shape = (batch_size, *array.shape[1:])
        # Each process holds only its own rows, so the global array is made from its parts.
        return jax.make_array_from_callback(shape, sharding, part)

    return jax.tree.map(put, batch)


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array that is replicated on every device."""
    return NamedSharding(mesh, PartitionSpec())


def tree_shardings(mesh: Mesh, tree: Any) -> Any:
    """Returns a sharding for each leaf of parameters or optimizer state (moments as parameters)."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, _partition(mesh, path, leaf.shape)), tree
    )


def _partition(mesh: Mesh, path: Any, shape: tuple[int, ...]) -> PartitionSpec:
    names = [str(getattr(entry, "key", "")) for entry in path]
    # An adapter's factors and the weight beside them are sharded as those of a projection.
    names = [name for name in names if name not in ("base", "adapter")]
    axes: list[str | None] = [None] * len(shape)
    tensor_axis = _tensor_axis(names, len(shape))
    if tensor_axis is not None and shape[tensor_axis] % mesh.shape["tensor"] == 0:
        axes[tensor_axis] = "tensor"
    # The axis of scanned layers is not sharded, because each device needs every layer.
    candidates = [i for i in range("blocks" in names, len(shape)) if axes[i] is None]
    # `fsdp` takes the longest remaining axis that it divides; without one the leaf is replicated.
    for i in sorted(candidates, key=lambda i: -shape[i]):
        if shape[i] % mesh.shape["fsdp"] == 0 and shape[i] > 1:
            axes[i] = "fsdp"
            break
    return PartitionSpec(*axes)


def _tensor_axis(names: list[str], ndim: int) -> int | None:
    if ndim < 2:
        return None
    leaf = names[-1]
    row_parallel = len(names) > 1 and names[-2] in ROW_PARALLEL
    # Of two factors only the one next to the split activations is sharded: B (m x r) by outputs, or
    # A (r x n) by inputs. The other one is replicated over `tensor`.
    if leaf in ("W", "embedding"):
        return ndim - 1 if row_parallel else ndim - 2
    if leaf == "B" and not row_parallel:
        return ndim - 2
    if leaf == "A" and row_parallel:
        return ndim - 1
    return None
