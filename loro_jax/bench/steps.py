"""Compiled training steps of the methods, as the benchmarks time them."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from loro_jax.bench.options import model_changes
from loro_jax.errors import TrainingError
from loro_jax.training import mesh as meshes
from loro_jax.training.config import METHODS, Config
from loro_jax.training.fields import apply_changes
from loro_jax.training.step import compile_program, make_program
from models.llama import LlamaConfig, preset
from models.loss import Batch

# LORO's step with an exact step every time.
EXACT = "loro exact"


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


def config_of_step(model: str, method: str, options: argparse.Namespace) -> Config:
    """Returns the config of a method's run; "loro exact" takes exact steps only.

    Raises:
        TrainingError: for an unknown field or invalid value in ``--set``.
    """
    changes = model_changes(options) | {"remat": _remat_of(method, options.remat)}
    if options.rank is not None:
        changes["rank"] = options.rank
    return step_config(
        preset(model, **changes),
        "loro" if method == EXACT else method,
        options,
        exact_every=1 if method == EXACT else 10_000,
        batch_size=options.batch_size,
        gradient_accumulation=options.gradient_accumulation,
    )


def step_config(
    model: LlamaConfig, method: str, options: argparse.Namespace, **changes: Any
) -> Config:
    """Returns the config of a benchmark's step.

    Args:
        model: the model.
        method: a name from :data:`loro_jax.training.config.METHODS`.
        options: options with ``sequence_length``, and ``set`` for further fields.
        changes: fields of the run.

    Returns:
        The validated config.

    Raises:
        TrainingError: for an unknown method, or an unknown field or invalid value in ``--set``.
    """
    if method not in METHODS:
        raise TrainingError(f"--methods: unknown {method!r}; expected {', '.join(METHODS)}.")
    config = Config(method=method, sequence_length=options.sequence_length, model=model, **changes)
    apply_changes(config, options.set)
    config.validate()
    return config


def _remat_of(method: str, given: str) -> str:
    """Returns ``--remat`` of one method: one name for all, or ``METHOD=NAME,...``."""
    if "=" not in given:
        return given
    chosen = dict(part.split("=", 1) for part in given.split(",") if "=" in part)
    if method.split()[0] not in chosen:
        raise TrainingError(f"--remat={given} has no entry for {method!r}; expected METHOD=NAME.")
    return chosen[method.split()[0]]


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
