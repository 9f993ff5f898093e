"""Estimates of a run on missing devices, from its step compiled for them, or for simulated ones.

Nothing is allocated. For a named accelerator, XLA compiles the program that would run there (see
:mod:`loro_jax.planning.topologies`). Otherwise it compiles the program for the mesh with CPUs in
place of accelerators: sharding, products per device and collectives are the same, but bytes are
upper bounds, because a CPU computes and communicates bfloat16 in float32, and all-reduces gradients
of sharded parameters where a GPU or a TPU reduce-scatters them, which sends half as much.
"""

from __future__ import annotations

import math
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from loro_jax.memory import count_parameters
from loro_jax.planning.accelerators import Accelerator
from loro_jax.planning.collectives import Collective, read_collectives
from loro_jax.planning.flops import flops_per_token
from loro_jax.planning.hlo import Instruction, read_instructions
from loro_jax.planning.kernels import Kernel, part_of, product_flops, read_kernels
from loro_jax.planning.topologies import Target, compile_for, make_target
from loro_jax.training import mesh as meshes
from loro_jax.training.config import Config
from loro_jax.training.step import compile_program, make_program, placed_teacher
from models.loss import Batch


class Plan(NamedTuple):
    """A compiled step.

    Attributes:
        accelerator: name of the accelerator that it is compiled for; None: for simulated devices.
        devices: number of devices in the mesh.
        parameters: number of trained parameters.
        state_bytes: bytes of parameters and optimizer state, and of a teacher, on one device.
        temporary_bytes: bytes of temporaries on one device within a step.
        tokens: tokens per step, over all devices.
        model_flops: operations per step, over all devices, as :func:`flops_per_token` counts.
        kernels: kernels of an approximate step on one device; for simulated devices its products,
            including recomputed ones, and one pass over parameters and state.
        exchanges: collectives of an approximate step.
        exact_exchanges: collectives of an exact step, including those of an approximate one.
        compile_seconds: time that compiling took.
    """

    accelerator: str | None
    devices: int
    parameters: int
    state_bytes: int
    temporary_bytes: int
    tokens: int
    model_flops: float
    kernels: list[Kernel]
    exchanges: list[Collective]
    exact_exchanges: list[Collective]
    compile_seconds: float

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
            Seconds of computation (each kernel bound by operations or bytes), and of communication.
            A step takes at least the larger of both, and their sum without overlap.
        """
        computing = sum(kernel.seconds(accelerator) for kernel in self.kernels)
        return computing, sum(map(accelerator.seconds, self.exchanges))


def make_plan(config: Config, devices: int | None = None, accelerator: str | None = None) -> Plan:
    """Compiles a run's step for its mesh.

    Args:
        config: a validated config with a vocabulary.
        devices: number of devices to use, from the first on; None: all of JAX's.
        accelerator: accelerator to compile for, which need not be here, one of
            :data:`loro_jax.planning.topologies.NAMES`; None: JAX's devices.

    Returns:
        The plan.

    Raises:
        TrainingError: if the mesh does not match the number of devices, the batch can't be sharded
            over it, or the accelerator's compiler is not installed or rejects the step.

    Example:
        >>> from models import LlamaConfig
        >>> model = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_layers=2,
        ...                     num_heads=4, rank=8)
        >>> plan = make_plan(Config(model=model, batch_size=4, sequence_length=16), 1)
        >>> plan.devices, plan.parameters, plan.exchanges
        (1, 12192, [])
    """
    target = make_target(accelerator, devices or 1) if accelerator else None
    mesh = meshes.make_mesh(config.mesh, target.devices if target else devices)
    meshes.check_batch(config, mesh)
    program, state = compile_program(make_program(config, mesh), mesh)
    beside = placed_teacher(program, mesh)
    started = time.perf_counter()
    compiled, text = _compile(program, (state, beside), config, mesh, target)
    seconds = time.perf_counter() - started
    memory: Any = compiled.memory_analysis()
    tokens = config.batch_size * config.sequence_length
    state_bytes = memory.argument_size_in_bytes if target else _held((state, beside))
    return Plan(
        accelerator=accelerator,
        devices=mesh.size,
        parameters=count_parameters(state.params),
        state_bytes=state_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        tokens=tokens,
        model_flops=tokens * flops_per_token(config),
        kernels=read_kernels(text, min)
        if target
        else _simulated_kernels(text, jnp.dtype(config.model.dtype).itemsize, state_bytes),
        exchanges=read_collectives(text, mesh.size, min),
        exact_exchanges=read_collectives(text, mesh.size, max),
        compile_seconds=seconds,
    )


def _compile(
    program: Any,
    held: tuple[Any, tuple[Any, ...]],
    config: Config,
    mesh: jax.sharding.Mesh,
    target: Target | None,
) -> tuple[jax.stages.Compiled, str]:
    shape, sharding = (config.batch_size, config.sequence_length), meshes.batch_sharding(mesh)
    ids = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding)
    batch = Batch(ids, ids, jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding))
    state, beside = held
    lowered = program.train_step.lower(state, batch, *beside)
    if target is not None:
        return compile_for(target, lowered)
    compiled = lowered.compile()
    return compiled, compiled.as_text()


def _held(state: object) -> int:
    """Returns the bytes of a sharded tree on one device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(state)
    )


def _simulated_kernels(text: str, item: int, state_bytes: int) -> list[Kernel]:
    """Returns a step's products, at ``item`` bytes an entry, and one pass over its state.

    The other kernels of a program for CPU say little about those of an accelerator, and its
    products have wider entries.
    """

    def kernel(dot: Instruction) -> Kernel:
        entries = sum(shape.entries for shape in (*dot.results, *dot.operands))
        part, flops = part_of(dot.text), dot.times * product_flops(dot)
        return Kernel(part, flops, dot.times * entries * item, "bfloat16", dot.times)

    products = [kernel(dot) for dot in read_instructions(text, ["dot"], min)]
    return [*products, Kernel("optimizer", 0.0, 2 * state_bytes, "bfloat16", 1)]
