"""Initialisation of runs with the weights of a model in Hugging Face's format."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import jax
from flax import nnx

from loro_jax.errors import TrainingError
from loro_jax.text.tokenizers.tokenizer import Tokenizer, load_tokenizer
from loro_jax.training.config import Config
from loro_jax.training.step import TrainState, joined
from models.huggingface import CheckpointError, check_parameters, read_config, read_parameters
from models.llama import Llama

# Fields of the architecture, independent of the projections' kind and of precision.
_ARCHITECTURE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "max_sequence_length",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "tie_embeddings",
)


def with_architecture(config: Config) -> Config:
    """Replaces the architecture of a config with that of the model in ``init_from``.

    Rank, kind of projections and precision are kept.

    Args:
        config: config of a run.

    Returns:
        The new config; the same one if ``init_from`` is None.

    Raises:
        TrainingError: if the directory can't be read.
    """
    if config.init_from is None:
        return config
    try:
        there = read_config(config.init_from)
    except CheckpointError as error:
        raise TrainingError(f"config.init_from: {error}") from None
    fields = {name: getattr(there, name) for name in _ARCHITECTURE}
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **fields))


def check_start(config: Config, tokenizer: Tokenizer) -> None:
    """Raises TrainingError if a run can't start from ``init_from``, without reading tensors.

    The stored projections must be convertible to the run's, and the tokenizers must have the same
    number of ids.
    """
    if config.init_from is None:
        return
    model = nnx.eval_shape(lambda: Llama(config.model_config, nnx.Rngs(0)))
    try:
        check_parameters(config.init_from, nnx.to_pure_dict(nnx.state(model)))
    except CheckpointError as error:
        raise TrainingError(f"config.init_from: {error}") from None
    directory = pathlib.Path(config.init_from)
    files = [directory / name for name in ("tokenizer.json", "tokenizer.model")]
    path = next((path for path in files if path.is_file()), None)
    if path is None:
        return
    # With the run's special ids: only the number of ids is compared.
    theirs = load_tokenizer(str(path), eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id)
    if theirs.vocab_size != tokenizer.vocab_size:
        raise TrainingError(
            f"config.data.tokenizer = {config.data.tokenizer!r} has {tokenizer.vocab_size} ids, "
            f"but {path} has {theirs.vocab_size}; expected the tokenizer of config.init_from."
        )


def start_from(config: Config, state: TrainState) -> tuple[TrainState, str]:
    """Loads the weights of another model into a new state.

    Args:
        config: from :func:`with_architecture`, with an ``init_from``.
        state: a new state.

    Returns:
        (the state, a line that names the source and the truncation errors).

    Raises:
        TrainingError: if the directory can't be read, or does not fit the run's projections.
    """
    assert config.init_from is not None  # checked by the caller
    # Both parts are read as one model, and then taken apart again by their paths.
    fresh = {"params": state.params, "fixed": state.fixed}
    wanted = joined(state.params, state.fixed)
    try:
        found, errors = read_parameters(config.init_from, wanted)
    except CheckpointError as error:
        raise TrainingError(f"config.init_from: {error}") from None

    def pick(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        value: Any = found
        for entry in path[1:]:
            value = value[entry.key]
        # Placed leaf by leaf, so that no device holds the whole model if it is sharded.
        return jax.device_put(value, leaf.sharding)

    picked = jax.tree_util.tree_map_with_path(pick, fresh)
    line = f"starting from {config.init_from}"
    if errors:
        worst = max(error.error for error in errors)
        least = min(error.error for error in errors)
        line += (
            f", {len(errors)} projections as truncated SVDs "
            f"(relative errors {least:.3f} to {worst:.3f})"
        )
    # Of two zero factors each one's gradient is a product with the other: they would stay zero.
    zero = [error.name for error in errors if error.zero]
    if zero:
        line += f"; {', '.join(zero)} all zeros, so their factors can't be trained"
    return state._replace(params=picked["params"], fixed=picked["fixed"]), line
