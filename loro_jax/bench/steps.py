"""Configs of the training steps that the benchmarks time."""

from __future__ import annotations

import argparse
from typing import Any

from loro_jax.bench.options import model_changes
from loro_jax.errors import TrainingError
from loro_jax.training.config import METHODS, Config
from loro_jax.training.fields import apply_changes
from models.llama import LlamaConfig, preset

# LORO's step with an exact step every time.
EXACT = "loro exact"


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
