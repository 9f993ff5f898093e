"""Loss spikes after exact steps, and condition numbers of products, from run directories.

For every run below a directory (for example one of python -m loro_jax compare):

* the spike after its exact steps: the largest training loss of the five steps after an exact step
  minus the mean of the ten steps before it, in nats; the median and the largest over all exact
  steps. This needs a row for every step (--set log_every=1). If the ten steps before include
  another exact step (K below ten), they are used nevertheless;
* the condition number of each product, its largest singular value over its r-th: the median and the
  largest over all projections and layers of the last checkpoint; and the largest condition number
  of the factors B and A.

Example:
  python -m loro_jax stability runs/comparison
"""

from __future__ import annotations

import pathlib
import statistics
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from loro_jax.command_line import Parser, failing_in_one_line
from loro_jax.errors import TrainingError
from loro_jax.pairs import find_pairs
from loro_jax.tables import report
from loro_jax.training.config import Config
from loro_jax.training.metrics import read_rows
from loro_jax.training.trained import load_run
from models.llama import Llama

_BEFORE, _AFTER = 10, 5


def main(arguments: Sequence[str]) -> int:
    """Runs ``python -m loro_jax stability``; returns the exit status."""
    parser = Parser("python -m loro_jax stability", __doc__)
    parser.add_argument("directory", type=pathlib.Path, help="directory that contains runs")
    parser.add_argument("--json", help="write the results to this file, too")
    options = parser.parse_args(arguments)
    options.command = " ".join([parser.prog, *arguments])
    return failing_in_one_line(lambda: report(_rows(options.directory), options))


def _rows(directory: pathlib.Path) -> list[dict[str, Any]]:
    runs = sorted(path.parent for path in directory.rglob("metrics.jsonl"))
    if not runs:
        raise TrainingError(f"{directory}: expected run directories below it, but found none.")
    return [_row(run, str(run.relative_to(directory))) for run in runs]


def _row(run: pathlib.Path, name: str) -> dict[str, Any]:
    trained = load_run(run)
    rows = read_rows(run / "metrics.jsonl")
    losses = {row["step"]: row["loss"] for row in rows if "loss" in row}
    spikes = spikes_after(losses, exact_steps(trained.config))
    perplexities = [row["val_ppl"] for row in rows if "val_ppl" in row]
    products, factors = condition_numbers(trained.model)
    return {
        "run": name,
        "perplexity": perplexities[-1] if perplexities else float("nan"),
        "exact steps": len(exact_steps(trained.config)),
        "median spike": statistics.median(spikes) if spikes else float("nan"),
        "largest spike": max(spikes, default=float("nan")),
        "median condition of W": statistics.median(products),
        "largest condition of W": max(products),
        "largest condition of B, A": max(factors),
    }


def exact_steps(config: Config) -> list[int]:
    """Returns the exact steps of a run, counted from 1; empty for methods other than LORO.

    Example:
        >>> exact_steps(Config(steps=100, exact_every=30))
        [30, 60, 90]
    """
    if config.method != "loro" or not config.exact_every:
        return []
    return list(range(config.exact_every, config.steps + 1, config.exact_every))


def spikes_after(losses: dict[int, float], steps: Sequence[int]) -> list[float]:
    """Returns the rise of the loss after given steps, where all needed rows exist.

    Args:
        losses: losses by step.
        steps: the steps.

    Returns:
        One number per step.

    Example:
        >>> losses = {step: 2.0 for step in range(1, 60)} | {22: 2.5}
        >>> spikes_after(losses, [20, 40, 400])
        [0.5, 0.0]
    """
    found = []
    for step in steps:
        before = [losses.get(i) for i in range(step - _BEFORE, step)]
        after = [losses.get(i) for i in range(step + 1, step + 1 + _AFTER)]
        known_before = [loss for loss in before if loss is not None]
        known_after = [loss for loss in after if loss is not None]
        if len(known_before) == _BEFORE and len(known_after) == _AFTER:
            found.append(max(known_after) - statistics.mean(known_before))
    return found


def condition_numbers(model: Llama) -> tuple[list[float], list[float]]:
    """Computes the condition numbers of all products and of all factors.

    Args:
        model: model with low-rank projections.

    Returns:
        (those of the products, those of the factors), one per matrix and layer.

    Raises:
        TrainingError: if the model has no factors.
    """
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(params)]
    products, factors = [], []
    for pair in find_pairs(params, "all"):
        B, A = leaves[pair.B], leaves[pair.A]
        # Orthonormal factors do not change singular values: those of B A are those of R_B R_A^T,
        # which is r x r.
        R_B: Any = np.linalg.qr(B, mode="r")
        R_A: Any = np.linalg.qr(A.swapaxes(-1, -2), mode="r")
        products += _conditions(R_B @ R_A.swapaxes(-1, -2))
        factors += _conditions(R_B) + _conditions(R_A)
    if not products:
        raise TrainingError("expected runs of models with factors B and A, but found one without.")
    return products, factors


def _conditions(matrices: np.ndarray) -> list[float]:
    values = np.linalg.svd(matrices, compute_uv=False)
    smallest = np.maximum(values[..., -1], np.finfo(np.float64).tiny)
    return [float(ratio) for ratio in np.ravel(values[..., 0] / smallest)]
