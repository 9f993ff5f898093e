"""Greedy decoding in turns with transformers' ``generate``, from the same directory of weights."""

from __future__ import annotations

import argparse
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
from flax import nnx

from loro_jax.bench.counterpart.process import in_turns, summary, threads, torch_process
from loro_jax.errors import TrainingError
from models.decoding import generate
from models.huggingface import read_model, write_model
from models.llama import Llama, LlamaConfig, preset

# The architecture of SmolLM2-135M, as its config.json has it; its weights are random here.
SMOLLM2 = "smollm2-135m"
_SMOLLM2 = LlamaConfig(
    vocab_size=49_152,
    hidden_size=576,
    intermediate_size=1536,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    max_sequence_length=8192,
    scope="none",
    rms_norm_eps=1e-5,
    rope_theta=100_000.0,
    tie_embeddings=True,
)


def decoding_rows(model: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measures text by a model, ours and transformers' in turns.

    A preset is decoded dense and low-rank: ours by its factors, transformers' merged into dense
    matrices, since that is the form of an exported model that transformers reads.

    Args:
        model: name of a preset, or :data:`SMOLLM2`.
        options: the parsed options of ``bench inference``.

    Returns:
        A row for each kind of projections and batch size.
    """
    if model == SMOLLM2:
        configs = {"full": _SMOLLM2}
    else:
        low_rank = preset(model, **({"rank": options.rank} if options.rank else {}))
        configs = {"full": low_rank.dense(), "low_rank": low_rank}
    rows = []
    for kind, config in configs.items():
        with tempfile.TemporaryDirectory() as folder:
            directory = pathlib.Path(folder) / "model"
            made = Llama(config, nnx.Rngs(0))
            write_model(made, directory)
            rows += _rows(model, kind, made, directory, options)
    return rows


def rows_of_directory(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measures text by the model in the directory ``options.weights``, read by both.

    Args:
        options: the parsed options of ``bench inference``.

    Returns:
        A row for each batch size.
    """
    directory = pathlib.Path(options.weights)
    made, _ = read_model(directory, dtype="float32")
    return _rows(directory.name, "full", made, directory, options)


def _rows(
    name: str, kind: str, model: Llama, directory: pathlib.Path, options: argparse.Namespace
) -> list[dict[str, Any]]:
    limit = model.config.max_sequence_length - options.prompt
    if not 1 <= options.new_tokens <= limit:
        raise TrainingError(
            f"--new_tokens={options.new_tokens}: expected 1 to {limit} after a prompt of "
            f"{options.prompt} with {name}."
        )
    rows = []
    for batch_size in options.batch_sizes:
        rng = np.random.default_rng(0)
        prompts = rng.integers(model.config.vocab_size, size=(batch_size, options.prompt)).tolist()
        settings = {
            "work": "generation",
            "directory": str(directory),
            "prompts": prompts,
            "new_tokens": options.new_tokens,
        }
        with torch_process(settings) as theirs:
            turns = in_turns(_ours(model, prompts, options.new_tokens), theirs, options.rounds)
        ours, others = (np.asarray(result) for result in turns.first)
        rows.append(
            {
                "model": name,
                "projections": kind,
                "batch": batch_size,
                **summary(turns, batch_size * options.new_tokens, "transformers"),
                "same tokens": float(np.mean(ours == others)),
                "threads": threads(),
            }
        )
    return rows


def _ours(model: Llama, prompts: list[list[int]], new_tokens: int) -> Callable[[], Any]:
    return lambda: np.stack(list(generate(model, prompts, new_tokens)), axis=1)
