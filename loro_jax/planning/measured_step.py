"""Compiled training steps, ready to be timed on the devices that are here."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from loro_jax.training import mesh as meshes
from loro_jax.training.config import Config
from loro_jax.training.step import compile_program, make_program
from models.loss import Batch


class Case(NamedTuple):
    """A method's compiled step, ready to be timed."""

    config: Config
    step: Callable[[], Any]
    gradient: Callable[[], Any]
    hlo: Callable[[], str]
    compile_seconds: float
    state_bytes: int
    temporary_bytes: int
    held_bytes: int


def prepare(config: Config, *, donate: bool = True) -> Case:
    """Compiles the step of a config, for a batch of random ids.

    Args:
        config: config of the run.
        donate: whether to donate the state's buffers to the step.

    Returns:
        The step, ready to be timed, and its memory.
    """
    devices = meshes.make_mesh(config.mesh)
    program, abstract = compile_program(make_program(config, devices), devices)
    batch = jax.device_put(random_batch(config), meshes.batch_sharding(devices))
    started = time.perf_counter()
    train_step: Any = program.train_step
    if not donate:
        train_step = jax.jit(train_step.__wrapped__)
    compiled = train_step.lower(abstract, batch).compile()
    compile_seconds = time.perf_counter() - started
    memory = compiled.memory_analysis()
    held = [program.init()]

    def step() -> Any:
        held[0], metrics = compiled(held[0], batch)
        return metrics

    return Case(
        config=config,
        step=step,
        hlo=compiled.as_text,
        gradient=lambda: program.loss_and_gradient(held[0].params, held[0].fixed, batch),
        compile_seconds=compile_seconds,
        state_bytes=memory.argument_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        held_bytes=memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes,
    )


def random_batch(config: Config) -> Batch:
    """Returns the batch of random ids that steps of a config are timed with."""
    rng = np.random.default_rng(0)
    shape = (config.batch_size, config.sequence_length)
    tokens = rng.integers(0, config.model.vocab_size, shape, np.int32)
    return Batch(tokens, np.roll(tokens, -1, axis=1), np.ones(shape, np.float32))
