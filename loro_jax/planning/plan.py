"""Estimates of a run on missing devices, from its step compiled for simulated ones.

Nothing is allocated. XLA compiles the program for the mesh, with CPUs in place of accelerators:
sharding, products per device and collectives are the same. Bytes are upper bounds, because a CPU
computes and communicates bfloat16 in float32, and all-reduces gradients of sharded parameters where
a GPU or a TPU reduce-scatters them, which sends half as much.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp

from loro_jax.memory import count_parameters
from loro_jax.planning.accelerators import Accelerator
from loro_jax.planning.collectives import Collective, read_collectives
from loro_jax.planning.flops import flops_per_token
from loro_jax.planning.hlo import Instruction, read_instructions
from loro_jax.training import mesh as meshes
from loro_jax.training.config import Config
from loro_jax.training.step import compile_program, make_program
from models.loss import Batch


class Product(NamedTuple):
    """A matrix product on one device.

    Attributes:
        flops: operations of all its calls in a step.
        bytes: bytes of operands and results of all its calls in a step.
    """

    flops: float
    bytes: float


class Plan(NamedTuple):
    """A compiled step.

    Attributes:
        devices: number of devices in the mesh.
        parameters: number of trained parameters.
        state_bytes: bytes of parameters and optimizer state on one device.
        temporary_bytes: bytes of temporaries on one device within a step.
        tokens: tokens per step, over all devices.
        model_flops: operations per step, over all devices, as :func:`flops_per_token` counts.
        products: products of an approximate step on one device, including recomputed ones.
        exchanges: collectives of an approximate step.
        exact_exchanges: collectives of an exact step, including those of an approximate one.
    """

    devices: int
    parameters: int
    state_bytes: int
    temporary_bytes: int
    tokens: int
    model_flops: float
    products: list[Product]
    exchanges: list[Collective]
    exact_exchanges: list[Collective]

    @property
    def sent(self) -> float:
        """Bytes that one device sends in an approximate step."""
        return sum(exchange.sent for exchange in self.exchanges)

    @property
    def sent_more(self) -> float:
        """Additional bytes that one device sends in an exact step."""
        return sum(exchange.sent for exchange in self.exact_exchanges) - self.sent

    def seconds(self, accelerator: Accelerator) -> tuple[float, float]:
        """Returns lower bounds on the times of an approximate step, at an accelerator's peaks.

        Returns:
            Seconds of computation (each product bound by operations or bytes, plus one pass over
            parameters and state), and of communication. A step takes at least the larger of both,
            and their sum without overlap.
        """
        computing = sum(
            max(one.flops / accelerator.flops, one.bytes / accelerator.memory_bandwidth)
            for one in self.products
        )
        computing += 2 * self.state_bytes / accelerator.memory_bandwidth
        return computing, sum(map(accelerator.seconds, self.exchanges))


def make_plan(config: Config, devices: int | None = None) -> Plan:
    """Compiles a run's step for its mesh.

    Args:
        config: a validated config with a vocabulary.
        devices: number of JAX's devices to use, from the first on; None: all.

    Returns:
        The plan.

    Raises:
        TrainingError: if the mesh does not match the number of devices, or the batch can't be
            sharded over it.

    Example:
        >>> from models import LlamaConfig
        >>> model = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_layers=2,
        ...                     num_heads=4, rank=8)
        >>> plan = make_plan(Config(model=model, batch_size=4, sequence_length=16), 1)
        >>> plan.devices, plan.parameters, plan.exchanges
        (1, 12192, [])
    """
    mesh = meshes.make_mesh(config.mesh, devices)
    meshes.check_batch(config, mesh)
    program, state = compile_program(make_program(config, mesh), mesh)
    shape, sharding = (config.batch_size, config.sequence_length), meshes.batch_sharding(mesh)
    ids = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding)
    batch = Batch(ids, ids, jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding))
    compiled = program.train_step.lower(state, batch).compile()  # type: ignore[attr-defined]
    memory, text = compiled.memory_analysis(), compiled.as_text()
    tokens = math.prod(shape)
    item = jnp.dtype(config.model.dtype).itemsize
    return Plan(
        devices=mesh.size,
        parameters=count_parameters(state.params),
        state_bytes=_held(state),
        temporary_bytes=memory.temp_size_in_bytes,
        tokens=tokens,
        model_flops=tokens * flops_per_token(config),
        products=[_product(one, item) for one in read_instructions(text, ["dot"], min)],
        exchanges=read_collectives(text, mesh.size, min),
        exact_exchanges=read_collectives(text, mesh.size, max),
    )


def _held(state: object) -> int:
    """Returns the bytes of a sharded tree on one device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(state)
    )


def _product(dot: Instruction, item: int) -> Product:
    """Counts operations and bytes of a product, at ``item`` bytes per entry (CPUs use more)."""
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", dot.text)
    axes = [int(n) for n in contracted[1].split(",") if n] if contracted else []
    depth = math.prod(dot.operands[0].sizes[axis] for axis in axes)
    entries = sum(shape.entries for shape in (*dot.results, *dot.operands))
    return Product(2.0 * dot.results[0].entries * depth * dot.times, entries * item * dot.times)
