"""Perplexity over a field of the config, from the directory of a comparison."""

from __future__ import annotations

import functools
import json
import pathlib
import statistics
from typing import Any

from loro_jax.errors import TrainingError
from loro_jax.training.trained import load_config


def over_field(directory: pathlib.Path, field: str) -> list[dict[str, Any]]:
    """Groups the runs of a comparison by a field's value; those of other settings are kept apart.

    Args:
        directory: directory of ``python -m loro_jax compare``.
        field: a dotted field of the config, such as ``exact_every``.

    Returns:
        Rows: ``arm`` (the method, and the arm's other changes), the field, best learning rate, mean
        perplexity over its seeds (None: all diverged), spread, seeds, and number of diverged runs.

    Raises:
        TrainingError: if the directory holds no comparison, there is no such field, or all runs
            have one value of it.
    """
    runs = _runs(directory / "table.json")
    found: dict[tuple[str, Any], list[dict[str, Any]]] = {}
    for run in runs:
        place = directory / run["arm"] / f"lr{run['learning_rate']:g}" / f"seed{run['seed']}"
        value = _value(place, field)
        others = [f"{name}={other}" for name, other in run["changes"].items() if name != field]
        found.setdefault((" ".join([run["method"], *others]), value), []).append(run)
    if len({value for _, value in found}) < 2:
        raise TrainingError(
            f"{directory}: all runs have the same {field}; expected arms that differ in it, such "
            f"as --arm=NAME=METHOD,{field}=VALUE."
        )
    rows = [_row(arm, field, value, own) for (arm, value), own in found.items()]
    return sorted(rows, key=lambda row: (row["arm"], *_order(row[field])))


def _runs(path: pathlib.Path) -> list[dict[str, Any]]:
    try:
        runs = json.loads(path.read_text(encoding="utf-8"))["runs"]
    except FileNotFoundError:
        raise TrainingError(
            f"{path.parent} is no directory of python -m loro_jax compare: it holds no table.json."
        ) from None
    except (OSError, ValueError, KeyError, TypeError):
        raise TrainingError(f"{path} can't be read as the table of a comparison.") from None
    return list(runs)


def _value(run: pathlib.Path, field: str) -> Any:
    """Reads the value of a field in a run's config."""
    config = load_config(run / "config.json")
    try:
        value = functools.reduce(getattr, field.split("."), config)
    except AttributeError:
        raise TrainingError(f"--over={field}: there is no such field of the config.") from None
    if not isinstance(value, int | float | str | None):
        raise TrainingError(f"--over={field}: expected a single field, not a group.")
    return "none" if value is None else value


def _row(arm: str, field: str, value: Any, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Summarises runs of one value, at the learning rate with the most seeds, then the best."""
    by_rate: dict[float, list[float]] = {}
    for run in runs:
        if run["perplexity"] is not None:
            by_rate.setdefault(run["learning_rate"], []).append(run["perplexity"])
    row: dict[str, Any] = {"arm": arm, field: value, "perplexity": None}
    row |= {"spread": None, "best lr": None, "seeds": 0}
    if by_rate:
        rate = max(by_rate, key=lambda one: (len(by_rate[one]), -statistics.mean(by_rate[one])))
        values = by_rate[rate]
        row |= {"perplexity": statistics.mean(values), "spread": max(values) - min(values)}
        row |= {"best lr": rate, "seeds": len(values)}
    return row | {"diverged": sum(run["perplexity"] is None for run in runs)}


def _order(value: Any) -> tuple[int, Any]:
    return (1, value) if isinstance(value, str) else (0, value)
