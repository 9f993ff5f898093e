"""Training steps in turns with PyTorch: transformers' LLaMA and fused AdamW."""

from __future__ import annotations

import argparse
import contextlib
import pathlib
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from flax import nnx

from loro_jax.bench.counterpart.process import Call, in_turns, summary, threads, torch_process
from loro_jax.bench.steps import config_of_step
from loro_jax.planning.flops import flops_per_token
from loro_jax.planning.measured_step import Case, prepare, random_batch
from loro_jax.training.config import Config
from loro_jax.training.methods import make_schedule
from loro_jax.training.threads import lapack_by_one_thread
from models.huggingface import write_model
from models.llama import Llama


@lapack_by_one_thread()  # as train.py does
def training_rows(model: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measures the steps of a model by each method, ours and PyTorch's in turns.

    Args:
        model: name of a preset.
        options: the parsed options of ``bench train_step``.

    Returns:
        A row for each method; ``speed-up`` is relative to the first method, on each side.
    """
    measured = {}
    for method in options.methods:
        config = config_of_step(model, method, options)
        case = prepare(config)
        with _torch_step(config) as theirs:
            measured[method] = (case, in_turns(_with_its_loss(case), theirs, options.rounds))
    tokens = options.batch_size * options.sequence_length
    rows = [
        {
            "model": model,
            "method": method,
            **summary(turns, tokens, "torch"),
            "loss": turns.first[0],
            "loss torch": turns.first[1],
            "threads": threads(),
        }
        for method, (_, turns) in measured.items()
    ]
    dense = measured[options.methods[0]][0].config
    for row, (case, _) in zip(rows, measured.values(), strict=True):
        row["speed-up"] = row["tokens/s"] / rows[0]["tokens/s"]
        row["speed-up torch"] = row["tokens/s torch"] / rows[0]["tokens/s torch"]
        row["FLOP ratio"] = flops_per_token(dense) / flops_per_token(case.config)
    return rows


def _with_its_loss(case: Case) -> Callable[[], float]:
    # As PyTorch's step, it returns the loss as a number: the work must be done by then.
    return lambda: float(case.step()["loss"])


@contextlib.contextmanager
def _torch_step(config: Config) -> Iterator[Callable[[], Call]]:
    """Yields the same step by PyTorch, from the same weights."""
    batch = random_batch(config)
    with tempfile.TemporaryDirectory() as folder:
        directory = pathlib.Path(folder) / "model"
        model = Llama(config.model_config, nnx.Rngs(config.seed))
        write_model(model, directory, keep_factors=config.model_config.scope != "none")
        del model
        settings = {
            "work": "training",
            "directory": str(directory),
            "inputs": np.asarray(batch.inputs).tolist(),
            "targets": np.asarray(batch.targets).tolist(),
            "micro_batches": config.gradient_accumulation,
            "clip_norm": config.clip_norm,
            "adamw": {
                "lr": float(make_schedule(config)(1)),
                "betas": [config.b1, config.b2],
                "eps": config.eps,
                "weight_decay": config.weight_decay,
            },
        }
        with torch_process(settings) as call:
            yield call
