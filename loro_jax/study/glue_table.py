"""The table of tasks and methods from runs on GLUE, in the form of the paper's Table 6.

A cell is the mean over seeds of 100 times the task's first metric. As in the authors' script it is
the best evaluation of a run; the last one is there, too. Of several learning rates the one with
the best mean is shown.
"""

from __future__ import annotations

import pathlib
import statistics
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from loro_jax.errors import TrainingError
from loro_jax.glue import TASKS
from loro_jax.training.glue_config import GlueRun
from loro_jax.training.metrics import read_rows
from loro_jax.training.trained import load_config


class GlueResult(NamedTuple):
    """The result of a run.

    Attributes:
        name: the run directory.
        arm: its method, in words.
        task: name of the task.
        learning_rate: its peak.
        seed: its seed.
        best: best value of the task's first metric, times 100.
        last: its last value, times 100.
        step: the last evaluation's step.
        steps: steps of the whole run.
    """

    name: str
    arm: str
    task: str
    learning_rate: float
    seed: int
    best: float
    last: float
    step: int
    steps: int


def read_results(directories: Sequence[pathlib.Path]) -> list[GlueResult]:
    """Reads the results of all runs in and below some directories.

    Raises:
        TrainingError: if a directory has no runs on GLUE, or a run no evaluation.
    """
    results = []
    for directory in directories:
        runs = sorted(path.parent for path in directory.rglob("metrics.jsonl"))
        if not runs:
            raise TrainingError(f"{directory}: expected run directories in it, but found none.")
        results += [_result(run) for run in runs]
    return results


def _result(run: pathlib.Path) -> GlueResult:
    config = load_config(run / "config.json")
    if not isinstance(config, GlueRun):
        raise TrainingError(f"{run} is a run of a language model; expected one on GLUE.")
    name = f"val_{TASKS[config.task].metrics[0]}"
    rows = [row for row in read_rows(run / "metrics.jsonl") if name in row]
    if not rows:
        raise TrainingError(f"{run} has no evaluation yet.")
    steps = config.steps
    values = [100 * row[name] for row in rows]
    return GlueResult(
        str(run),
        arm_name(config),
        config.task,
        config.learning_rate,
        config.seed,
        max(values),
        values[-1],
        rows[-1]["step"],
        steps,
    )


def arm_name(config: GlueRun) -> str:
    """Returns the method of a run in words.

    Example:
        >>> config = GlueRun(method="full")
        >>> arm_name(config)
        'full'
        >>> config.method, config.adapter.kind = "loro", "lora"
        >>> arm_name(config)
        'loro, lora r=8 on query,value'
    """
    if config.has_adapters:
        adapter = config.adapter
        return f"{config.method}, {config.adapter_kind} r={adapter.rank} on {adapter.targets}"
    return config.method if config.method == "full" else f"{config.method} r={config.model.rank}"


def table(results: Iterable[GlueResult], which: str = "best") -> list[dict[str, Any]]:
    """Returns a row per method and a column per task, and the average of complete rows.

    Args:
        results: from :func:`read_results`.
        which: "best" or "last".

    Example:
        >>> run = GlueResult("a", "full", "cola", 1e-5, 0, 62.0, 61.0, 60, 60)
        >>> table([run, run._replace(seed=1, best=64.0), run._replace(learning_rate=1.0, best=0.0)])
        [{'method': 'full', 'CoLA': '63.00', 'average': '63.00'}]
    """
    results = list(results)
    tasks = [name for name in TASKS if any(one.task == name for one in results)]
    rows = []
    for arm in dict.fromkeys(one.arm for one in results):
        cells = [_cell([r for r in results if (r.arm, r.task) == (arm, t)], which) for t in tasks]
        known = [cell for cell in cells if cell is not None]
        average = statistics.mean(known) if len(known) == len(tasks) else None
        values = dict(zip((TASKS[task].title for task in tasks), cells, strict=True))
        rows.append(
            {"method": arm}
            | {
                name: "" if value is None else f"{value:.2f}"
                for name, value in (values | {"average": average}).items()
            }
        )
    return rows


def _cell(results: list[GlueResult], which: str) -> float | None:
    """Returns the mean over seeds at the learning rate where it is best."""
    by_rate: dict[float, list[float]] = {}
    for one in results:
        by_rate.setdefault(one.learning_rate, []).append(getattr(one, which))
    return max(map(statistics.mean, by_rate.values()), default=None)
