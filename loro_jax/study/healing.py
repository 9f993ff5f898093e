"""What is lost by compression at each size, and how much of it further training heals."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
from flax import nnx
from matplotlib.figure import Figure

from loro_jax.errors import TrainingError
from loro_jax.memory import count_parameters
from loro_jax.planning.flops import flops_per_token
from loro_jax.planning.memory_table import held_by
from loro_jax.training.config import Config
from loro_jax.training.metrics import read_rows, seconds_of_steps
from loro_jax.training.trained import checkpoint_steps, is_hugging_face, load_model, run_config
from models.llama import Llama

# What a row calls a model before any training.
BEFORE = "before"
# Key of the dense model among those by directory: no directory has this name.
_DENSE = ""


def runs_by_start(runs: Sequence[str]) -> dict[str, list[tuple[str, Config]]]:
    """Groups runs by the compressed directory that each has started from.

    Args:
        runs: run directories.

    Returns:
        Runs and their configs by ``init_from``, in the order given.

    Raises:
        TrainingError: if one is no run, has no checkpoint, or did not start from a directory in
            Hugging Face's format that is still there.
    """
    found: dict[str, list[tuple[str, Config]]] = {}
    for run in runs:
        config = run_config(run)
        if config is None:
            raise TrainingError(f"{run} is a model in Hugging Face's format; expected a run.")
        if config.init_from is None or not is_hugging_face(config.init_from):
            raise TrainingError(
                f"{run}: config.init_from = {config.init_from!r}; expected a directory of "
                "python -m loro_jax compress."
            )
        checkpoint_steps(run)  # raises now and not after the others have been evaluated
        found.setdefault(config.init_from, []).append((run, config))
    return found


def healing_rows(
    dense: Llama,
    starts: dict[str, list[tuple[str, Config]]],
    perplexity: Callable[[Llama], float],
    speed_ups: Callable[[dict[str, Llama]], dict[str, float]],
) -> list[dict[str, Any]]:
    """Evaluates compressed models before and after training.

    Args:
        dense: the model that was compressed.
        starts: runs by the directory that they started from, of :func:`runs_by_start`.
        perplexity: evaluates a model.
        speed_ups: measures models by name, the first of which is dense: how many times as many
            tokens per second each generates.

    Returns:
        Rows, of the dense model first, then of each start and its runs: ``size`` (the directory),
        ``trained by``, parameters in millions, ``of dense`` (their fraction), perplexity and its
        ratio to the dense model's (None: not finite), trained tokens, minutes of its steps, bytes
        of weights, gradients and optimizer state in millions, FLOPs per trained token in millions,
        and the decoding speed over the dense model's.
    """
    models = {_DENSE: dense}
    for start in starts:
        models[start], _ = load_model(start)
    speeds = speed_ups(models)
    parameters = {name: _parameters(model) for name, model in models.items()}
    bound = perplexity(dense)

    def row(name: str, trained_by: str, value: float, **training: Any) -> dict[str, Any]:
        return {
            "size": pathlib.Path(name).name or "dense",
            "trained by": trained_by,
            "parameters M": parameters[name] / 1e6,
            "of dense": parameters[name] / parameters[_DENSE],
            # JSON has no infinity.
            "perplexity": value if math.isfinite(value) else None,
            "/ dense": value / bound if math.isfinite(value / bound) else None,
            "tokens": None,
            "minutes": None,
            "memory MB": None,
            "MFLOPs/token": None,
            "decoding / dense": speeds[name],
            **training,
        }

    rows = [row(_DENSE, BEFORE, bound)]
    for start, runs in starts.items():
        rows.append(row(start, BEFORE, perplexity(models.pop(start))))
        for run, config in runs:
            model, _ = load_model(run)
            rows.append(row(start, label(config), perplexity(model), **_training(run, config)))
    return rows


def label(config: Config) -> str:
    """Returns a short name of what trained a run.

    Example:
        >>> label(Config(method="lowrank")), label(Config(exact_every=25))
        ('lowrank', 'loro adam K=25')
    """
    if config.method != "loro":
        return config.method
    exact = f"K={config.exact_every}" if config.exact_every else "never exact"
    nearest = " nearest" if config.exact_every and config.basis == "nearest" else ""
    return f"loro {config.direction} {exact}{nearest}"


def plot_healing(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Draws perplexity over parameters, a line for each kind of training, as a PNG.

    Args:
        rows: of :func:`healing_rows`.
        path: the file.
    """
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    dense, *others = rows
    if dense["perplexity"] is not None:
        axes.axhline(dense["perplexity"], color="black", linestyle=":", label="dense")
    colours = matplotlib.colormaps["tab10"]
    for i, name in enumerate(dict.fromkeys(row["trained by"] for row in others)):
        own = sorted(
            (row["parameters M"], row["perplexity"])
            for row in others
            if row["trained by"] == name and row["perplexity"] is not None
        )
        if not own:
            continue
        style = "--" if name == BEFORE else "-"
        axes.plot(*zip(*own, strict=True), style, marker="o", color=colours(i), label=name)
    axes.set(xlabel="parameters, millions", ylabel="perplexity", yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, format="png", dpi=120)


def _parameters(model: Llama) -> int:
    return count_parameters(nnx.state(model, nnx.Param))


def _training(run: str, config: Config) -> dict[str, Any]:
    """Counts what a run has taken."""
    rows = [row for row in read_rows(pathlib.Path(run) / "metrics.jsonl") if "loss" in row]
    # Starting weights do not change the counts, and need not be read for them.
    held = held_by(dataclasses.replace(config, init_from=None))
    return {
        "tokens": rows[-1]["tokens"] if rows else 0,
        "minutes": seconds_of_steps(rows) / 60,
        "memory MB": (held.weights + held.optimizer + held.gradients) / 1e6,
        "MFLOPs/token": flops_per_token(config) / 1e6,
    }
