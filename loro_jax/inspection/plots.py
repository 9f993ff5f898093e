"""Figures of measures and spectra over training."""

from __future__ import annotations

import pathlib
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from loro_jax.inspection.history import History
from loro_jax.inspection.matrices import PARTS

_MEASURES = {
    "condition": ("conditions.png", "condition number"),
    "norm": ("norms.png", "Frobenius norm"),
    "stable_rank": ("stable_ranks.png", "stable rank"),
}
_COLOURS = matplotlib.colormaps["viridis"]


def plot_histories(histories: list[History], directory: pathlib.Path) -> None:
    """Writes figures of condition numbers, norms, stable ranks and spectra.

    Args:
        histories: one for each directory.
        directory: where ``conditions.png``, ``norms.png``, ``stable_ranks.png`` and
            ``spectra.png`` are written.
    """
    for measure, (name, label) in _MEASURES.items():
        _plot_measure(histories, measure, label, directory / name)
    _plot_spectra(histories, directory / "spectra.png")


def plot_line(rows: list[dict[str, Any]], x: str, y: str, title: str, path: pathlib.Path) -> None:
    """Draws one number over another, both fields of rows, as a PNG.

    Args:
        rows: the rows; those without a ``y`` are left out. Rows with the same ``arm``, if they have
            one, are one line.
        x: field of the horizontal axis.
        y: field of the vertical axis.
        title: title of the plot.
        path: the file.
    """
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    shown = [row for row in rows if row[y] is not None]
    for arm in dict.fromkeys(row.get("arm", "") for row in shown):
        own = [row for row in shown if row.get("arm", "") == arm]
        axes.plot([row[x] for row in own], [row[y] for row in own], marker="o", label=arm or None)
    if any(row.get("arm") for row in shown):
        axes.legend()
    axes.set(xlabel=x, ylabel=y, title=title, yscale="log")
    axes.grid(alpha=0.3)
    figure.savefig(path, format="png", dpi=120)


def _plot_measure(histories: list[History], measure: str, label: str, path: pathlib.Path) -> None:
    """Draws a panel for each part: the median over projections and layers, and the range."""
    parts = [part for part in (*PARTS, "W") if any(one.has_part(part) for one in histories)]
    figure = Figure(figsize=(5 * max(len(parts), 1), 4.5), layout="constrained")
    for axes, part in zip(np.ravel(figure.subplots(1, max(len(parts), 1))), parts, strict=False):
        for history in histories:
            steps, values = history.over_steps(part, measure)
            if not steps:
                continue
            middle = [float(np.median(one)) for one in values]
            (line,) = axes.plot(steps, middle, marker="o", markersize=3, label=history.name)
            low, high = ([f(one) for one in values] for f in (np.min, np.max))
            axes.fill_between(steps, low, high, alpha=0.15, color=line.get_color())
        axes.set(xlabel="step", ylabel=f"{label} (median and range)", title=part, yscale="log")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(path, format="png", dpi=120)


def _plot_spectra(histories: list[History], path: pathlib.Path) -> None:
    """Draws a row for each directory and a panel for each projection, with a line a checkpoint."""
    names = list(dict.fromkeys(name for one in histories for name in one.weights()))
    rows, columns = len(histories), max(len(names), 1)
    figure = Figure(figsize=(3.2 * columns, 3 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey="row")
    for row, history in zip(grid, histories, strict=True):
        steps = list(history.checkpoints)
        for axes, name in zip(row, names, strict=False):
            for i, step in enumerate(steps):
                spectrum = history.median_spectrum(step, name)
                if spectrum is None:
                    continue
                colour = _COLOURS(0.9 * i / max(len(steps) - 1, 1))
                axes.plot(np.arange(1, len(spectrum) + 1), spectrum, color=colour, label=str(step))
            axes.set(title=name, yscale="log", xlabel="index")
            axes.grid(alpha=0.3)
        row[0].set_ylabel(f"{history.name}\nsingular value (median of layers)")
        if len(steps) > 1:
            row[-1].legend(title="step", fontsize="x-small")
    figure.savefig(path, format="png", dpi=120)
