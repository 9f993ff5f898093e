"""What is known of a directory's matrices: whole spectra of checkpoints, small tables between."""

from __future__ import annotations

import math
import statistics
from typing import Any, NamedTuple

import numpy as np

from loro_jax.inspection.matrices import PARTS, Matrix

_SHOWN = {
    "condition": "condition",
    "norm": "Frobenius norm",
    "stable_rank": "stable rank",
    "rank_99": "rank of 99%",
}


class History(NamedTuple):
    """The matrices of a directory over training.

    Attributes:
        name: the directory.
        checkpoints: matrices by step, in ascending order; the step of a directory in Hugging Face's
            format is 0.
        rows: the rows of ``inspect.jsonl``, as :func:`loro_jax.inspection.small_tables` makes them.
    """

    name: str
    checkpoints: dict[int, list[Matrix]]
    rows: list[dict[str, Any]]

    def has_part(self, part: str) -> bool:
        """Returns whether any checkpoint has such matrices."""
        return any(one.part == part for found in self.checkpoints.values() for one in found)

    def over_steps(self, part: str, measure: str) -> tuple[list[int], list[list[float]]]:
        """Returns steps, and the finite values of a measure of all layers and projections."""
        by_step: dict[int, list[float]] = {}
        for row in self.rows:
            tables = row["matrices"].items()
            values = [x for key, one in tables if _part(key) == part for x in one[measure]]
            by_step[row["step"]] = [value for value in values if value is not None]
        for step, found in self.checkpoints.items():
            values = [one.measures()[measure] for one in found if one.part == part]
            by_step[step] = [value for value in values if math.isfinite(value)]
        steps = sorted(step for step, values in by_step.items() if values)
        return steps, [by_step[step] for step in steps]

    def weights(self) -> list[str]:
        """Returns the names of projections that have a product or a dense weight."""
        last = self.checkpoints[max(self.checkpoints)]
        return list(dict.fromkeys(one.name for one in last if one.part in ("B A", "W")))

    def median_spectrum(self, step: int, name: str) -> np.ndarray | None:
        """Returns the median over layers of a projection's singular values; None: no such one.

        The product's is taken where a projection has both a product and a fixed weight.
        """
        own = [one for one in self.checkpoints[step] if one.name == name]
        for part in ("B A", "W"):
            values = [one.singular_values for one in own if one.part == part]
            if values:
                length = min(map(len, values))
                return np.median([one[:length] for one in values], axis=0)
        return None


def last_table(history: History) -> list[dict[str, Any]]:
    """Returns a row for each projection and part of the last checkpoint.

    Returns:
        Rows whose measures are "median (smallest to largest)" over the layers.
    """
    found = history.checkpoints[max(history.checkpoints)]
    rows = []
    for name, part in dict.fromkeys((one.name, one.part) for one in found):
        own = [one for one in found if (one.name, one.part) == (name, part)]
        measures = [one.measures() for one in own]
        rows.append(
            {"matrix": f"{name} {part}", "shape": f"{own[0].shape[0]} x {own[0].shape[1]}"}
            | {label: _range([one[key] for one in measures]) for key, label in _SHOWN.items()}
        )
    return rows


def steps_table(history: History) -> list[dict[str, Any]]:
    """Returns a row for each known step: medians over all projections and layers."""
    rows: dict[int, dict[str, Any]] = {}
    for part in (*PARTS, "W"):
        if not history.has_part(part):
            continue
        for measure in ("condition", "norm", "stable_rank"):
            for step, values in zip(*history.over_steps(part, measure), strict=True):
                row = rows.setdefault(step, {"step": step})
                row[f"{_SHOWN[measure]} of {part}"] = statistics.median(values)
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    return [{name: rows[step].get(name, "") for name in names} for step in sorted(rows)]


def as_json(history: History) -> dict[str, Any]:
    """Returns all numbers as JSON holds them; what is infinite is None."""
    return {
        "directory": history.name,
        "checkpoints": [
            {"step": step, "matrices": [_matrix(one) for one in found]}
            for step, found in history.checkpoints.items()
        ],
        "rows": history.rows,
    }


def _matrix(one: Matrix) -> dict[str, Any]:
    measures = {k: v if math.isfinite(v) else None for k, v in one.measures().items()}
    content = one._asdict() | measures
    # Last, because it is long.
    return content | {
        "singular_values": [float(f"{x:.6g}") for x in content.pop("singular_values")]
    }


def _part(key: str) -> str:
    """Returns the part of a table's name, such as "B A" of "attention/q B A"."""
    return key.partition(" ")[2]


def _range(values: list[float]) -> str:
    low, middle, high = min(values), statistics.median(values), max(values)
    if low == high:
        return f"{middle:.4g}"
    return f"{middle:.4g} ({low:.4g} to {high:.4g})"
