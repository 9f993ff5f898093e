"""Perplexities of models on a text, or on the validation set of a run."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx

from loro_jax.command_line import Parser
from loro_jax.commands.evaluate import read_stream
from loro_jax.commands.source_options import add_source_options
from loro_jax.errors import TrainingError
from loro_jax.text.tokenizers.tokenizer import Tokenizer
from loro_jax.training.language import LanguageInputs
from loro_jax.training.trained import run_config
from models.llama import Llama
from models.loss import Batch, next_token_loss
from models.windows import score

Perplexity = Callable[[Llama], float]


def on_text(
    source: str, directory: pathlib.Path, tokenizer: Tokenizer, options: argparse.Namespace
) -> Perplexity:
    """Returns a function that scores a model on a text, by disjoint windows.

    Args:
        source: any source that a run can read, as of ``python -m loro_jax evaluate``.
        directory: whose tokenizer reads it.
        tokenizer: that tokenizer.
        options: with ``window`` and ``max_tokens``.
    """
    parser = Parser("inspect")
    add_source_options(parser)
    given = parser.parse_args(["--", source])
    given.directory, given.split, given.max_tokens = str(directory), None, options.max_tokens
    stream = read_stream(given, tokenizer)

    def perplexity(model: Llama) -> float:
        length = min(options.window, model.config.max_sequence_length)
        return score(model, stream.ids, length, length, counted=stream.counted).perplexity

    return perplexity


def on_validation(directory: pathlib.Path) -> Perplexity:
    """Returns a function that scores a model on the validation set of a run."""
    config = run_config(directory)
    if config is None:
        raise TrainingError(f"{directory} is no run directory.")
    # On the current devices, whatever the run's were; weights come from the run itself.
    mesh = dataclasses.replace(config.mesh, data=-1, fsdp=1, tensor=1)
    inputs = LanguageInputs(dataclasses.replace(config, mesh=mesh, init_from=None))
    batches = [Batch(*map(np.asarray, batch)) for batch in inputs.validation]
    tokens = sum(float(batch.mask.sum()) for batch in batches)

    def perplexity(model: Llama) -> float:
        graphdef, state = nnx.split(model)
        mean = sum(float(_nats(graphdef, state, batch)) for batch in batches) / tokens
        return math.exp(mean) if mean < 700 else math.inf

    return perplexity


@functools.partial(jax.jit, static_argnums=0)
def _nats(graphdef: Any, state: Any, batch: Batch) -> jax.Array:
    return next_token_loss(nnx.merge(graphdef, state), batch)
