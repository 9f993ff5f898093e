"""What a run would take on devices that are not there: its step, compiled for simulated ones.

Nothing is allocated. The program is the one that XLA makes for the mesh, for CPUs in place of the
accelerators: who holds what, which products each device computes and who sends what to whom are the
same. Bytes are the most that an accelerator needs, for a CPU computes and exchanges bfloat16 in
float32, and all-reduces gradients of split parameters where a GPU or a TPU splits them in the same
exchange, which sends half as much.
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
    """A product of matrices on one device.

    Attributes:
        flops: operations of all its calls in a step.
        bytes: of its operands and its result, likewise.
    """

    flops: float
    bytes: float


class Plan(NamedTuple):
    """A compiled step.

    Attributes:
        devices: of the mesh.
        parameters: trained ones.
        state_bytes: parameters and optimizer state that one device holds.
        temporary_bytes: what else it holds within a step.
        tokens: of a step, over all devices.
        model_flops: of a step, over all devices, as :func:`flops_per_token` counts.
        products: of an approximate step on one device, recomputed ones among them.
        exchanges: of an approximate step.
        exact_exchanges: of an exact step, those of an approximate one among them.
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
        """Bytes that one device sends in an exact step besides these."""
        return sum(exchange.sent for exchange in self.exact_exchanges) - self.sent

    def seconds(self, accelerator: Accelerator) -> tuple[float, float]:
        """Least time of an approximate step at the peaks of an accelerator.

        Returns:
            Seconds of computing (each product as its operations or its bytes allow, then one pass
            over parameters and state), and of exchanges. A step takes at least the larger one, and
            their sum where nothing overlaps.
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
        devices: how many of JAX's devices, the first ones, stand for the run's; None: all.

    Returns:
        The plan.

    Raises:
        TrainingError: if the mesh does not make so many devices, or the batch does not split over
            it.

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
    """Bytes that one device holds of a sharded tree."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(state)
    )


def _product(dot: Instruction, item: int) -> Product:
    """``item``: bytes of an entry on an accelerator; a CPU may compute in a wider dtype."""
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", dot.text)
    axes = [int(n) for n in contracted[1].split(",") if n] if contracted else []
    depth = math.prod(dot.operands[0].sizes[axis] for axis in axes)
    entries = sum(shape.entries for shape in (*dot.results, *dot.operands))
    return Product(2.0 * dot.results[0].entries * depth * dot.times, entries * item * dot.times)
