"""The plot of a run. Matplotlib is loaded when a plot is drawn: a run need not wait for it."""

from __future__ import annotations

import math
import pathlib
from typing import TYPE_CHECKING, Any

import numpy as np

from loro_jax.errors import cannot_write
from loro_jax.text.ngram import NgramPerplexity

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's palette, safe for print and for colour-blind readers.
_BLUE, _ORANGE, _GREY = "#0072B2", "#D55E00", "#777777"


def plot_run(
    rows: list[dict[str, Any]], path: pathlib.Path, ngrams: NgramPerplexity | None, title: str
) -> None:
    """Draws loss (left axis) and perplexity (right axis) against tokens, as a PNG.

    Args:
        rows: the rows of ``metrics.jsonl``.
        path: the file to write.
        ngrams: perplexities to mark by horizontal lines; None: none.
        title: title of the plot.

    Raises:
        TrainingError: if it can't be written.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    training = [row for row in rows if "loss" in row]
    evaluation = [row for row in rows if "val_loss" in row]
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(
        [row["tokens"] for row in training],
        [row["loss"] for row in training],
        color=_BLUE,
        alpha=0.5,
        linewidth=1,
        label="training loss",
    )
    if evaluation:
        axes.plot(
            [row["tokens"] for row in evaluation],
            [row["val_loss"] for row in evaluation],
            color=_ORANGE,
            marker="o",
            markersize=4,
            label=f"validation loss (perplexity {evaluation[-1]['val_ppl']:.1f} at the end)",
        )
    for name, style in (("unigram", ":"), ("bigram", "--")):
        if ngrams is not None:
            perplexity = getattr(ngrams, name)
            axes.axhline(
                math.log(perplexity),
                color=_GREY,
                linestyle=style,
                label=f"{name} model (perplexity {perplexity:.1f})",
            )
    axes.set(xlabel="training tokens", ylabel="loss (nats per token)", title=title)
    # The same curve on two scales: perplexity is the exponential of the loss.
    perplexity_axis = axes.secondary_yaxis("right", functions=(np.exp, _log))
    perplexity_axis.set_ylabel("perplexity")
    perplexity_axis.set_yscale("log")
    perplexity_axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    perplexity_axis.yaxis.set_major_formatter(ScalarFormatter())
    perplexity_axis.yaxis.set_minor_formatter(NullFormatter())
    axes.legend()
    _write(figure, axes, path)


def plot_measures(rows: list[dict[str, Any]], path: pathlib.Path, name: str, title: str) -> None:
    """Draws losses (left axis) and a metric (right axis) against steps, as a PNG.

    Args:
        rows: the rows of ``metrics.jsonl``.
        path: the file to write.
        name: the metric's field in evaluations.
        title: title of the plot.

    Raises:
        TrainingError: if it can't be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for field, color, label in (
        ("loss", _BLUE, "training loss"),
        ("val_loss", _ORANGE, "validation loss"),
    ):
        found = [row for row in rows if field in row]
        steps, losses = ([row[key] for row in found] for key in ("step", field))
        axes.plot(steps, losses, color=color, label=label)
    axes.set(xlabel="step", ylabel="loss", title=title)
    axes.legend(loc="upper left")
    found = [row for row in rows if name in row]
    other = axes.twinx()
    steps, values = ([row[key] for row in found] for key in ("step", name))
    other.plot(steps, values, color=_GREY, marker="o", markersize=4, label=name)
    other.set_ylabel(name.removeprefix("val_"))
    other.legend(loc="upper right")
    _write(figure, axes, path)


def _write(figure: Figure, axes: Any, path: pathlib.Path) -> None:
    """Writes a figure completely or not at all."""
    axes.grid(alpha=0.3)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        figure.savefig(temporary, format="png", dpi=120)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise cannot_write(path, error) from None


def _log(perplexity: Any) -> Any:
    return np.log(np.maximum(perplexity, 1e-20))  # Matplotlib evaluates it at zero, too
