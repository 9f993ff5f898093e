"""What a run trains, by its config."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from loro_jax.errors import TrainingError
from loro_jax.training.config import Config
from loro_jax.training.glue_config import GlueRun
from loro_jax.training.glue_task import glue_task
from loro_jax.training.network import make_network
from loro_jax.training.registry import Task
from models.loss import Batch, next_token_loss


def task_of(config: Config) -> Task:
    """Returns the task of a run."""
    return glue_task(config) if isinstance(config, GlueRun) else language_task(config)


def language_task(config: Config) -> Task:
    """Returns the task of a language model: to predict the next token."""

    def tokens(batch: Batch) -> jax.Array:
        return jnp.sum(batch.mask)

    return Task(
        make=lambda: make_network(config),
        loss=next_token_loss,
        number=tokens,
        tokens=tokens,
        evaluate=lambda model, batch: (next_token_loss(model, batch), tokens(batch)),
    )


def check_language(config: Config, name: str) -> None:
    """Raises TrainingError unless a config is that of a language model.

    Args:
        config: config of a run.
        name: what has it, for the message.
    """
    if isinstance(config, GlueRun):
        raise TrainingError(
            f"{name} is about GLUE ({config.task}); expected a language model. (train.py trains "
            "classifiers, python -m loro_jax export writes them, python -m loro_jax glue shows "
            "tables.)"
        )
