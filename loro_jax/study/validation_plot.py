"""Validation perplexity over tokens and training FLOPs, from the table of a comparison.

TABLE is a table.json that python -m loro_jax compare has written. Every arm is a line, at its best
learning rate and with the first of its seeds; --arms chooses some of them, in this order, and gives
them other names.

Example:
  python -m loro_jax plot runs/comparison/table.json --arms='full=dense Adam,loro' --out=plot.png
"""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib
from matplotlib.figure import Figure

from loro_jax.command_line import Parser, failing_in_one_line
from loro_jax.errors import TrainingError
from loro_jax.tables import replacing


class Line(NamedTuple):
    """The evaluations of one arm.

    Attributes:
        name: its label.
        tokens: trained tokens at each evaluation.
        perplexities: validation perplexities.
        flops: operations per token.
    """

    name: str
    tokens: Sequence[int]
    perplexities: Sequence[float]
    flops: float


def main(arguments: Sequence[str]) -> int:
    """Runs ``python -m loro_jax plot``; returns the exit status."""
    parser = Parser("python -m loro_jax plot", __doc__)
    parser.add_argument("table", metavar="TABLE", type=pathlib.Path)
    parser.add_argument("--arms", help="ARM or ARM=LABEL, separated by commas; default: all")
    parser.add_argument("--out", metavar="PNG", type=pathlib.Path, required=True)
    options = parser.parse_args(arguments)
    return failing_in_one_line(lambda: _plot(options.table, options.arms, options.out))


def _plot(table: pathlib.Path, arms: str | None, out: pathlib.Path) -> None:
    content = read_table(table)
    known = [row["arm"] for row in content["rows"]]
    labels = {arm: arm for arm in known}
    if arms is not None:
        pairs = [one.partition("=") for one in arms.split(",")]
        labels = {arm: label or arm for arm, _, label in pairs}
    for arm in labels:
        if arm not in known:
            raise TrainingError(f"--arms: {arm!r} is not in {table}; expected {', '.join(known)}.")
    lines = lines_of(content["rows"], content["runs"], labels)
    if not lines:
        raise TrainingError(f"{table}: none of these arms has evaluations to draw.")
    with replacing(out) as path:
        plot_validation(lines, path)
    print(f"{len(lines)} lines in {out}")


def read_table(path: pathlib.Path) -> dict[str, Any]:
    """Reads the table of a comparison.

    Raises:
        TrainingError: if it is none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        # All that is drawn is there.
        [(row["arm"], row["best lr"], row["MFLOPs/token"]) for row in content["rows"]]
        [(run["arm"], run["learning_rate"]) for run in content["runs"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainingError(
            f"{path} can't be read as the table.json of a comparison ({error})."
        ) from None
    return dict(content)


def lines_of(
    rows: Sequence[dict[str, Any]], runs: Sequence[dict[str, Any]], labels: dict[str, str]
) -> list[Line]:
    """Returns the lines of a comparison's arms, each of the first seed at the best rate.

    Args:
        rows: rows of its table.
        runs: its runs, with ``validation``: tokens and perplexity of each evaluation.
        labels: arms to draw, and what to call them.

    Returns:
        Their lines; arms that diverged, or whose evaluations are not recorded, have none.
    """
    by_arm = {row["arm"]: row for row in rows}
    lines = []
    for arm, label in labels.items():
        best = by_arm[arm]["best lr"]
        own = [run for run in runs if (run["arm"], run["learning_rate"]) == (arm, best)]
        recorded = own[0].get("validation", []) if own else []
        points = [point for point in recorded if math.isfinite(point[1])]  # no axis has infinity
        if points:
            tokens, perplexities = zip(*points, strict=True)
            flops = by_arm[arm]["MFLOPs/token"] * 1e6
            lines.append(Line(f"{label}: {perplexities[-1]:.4g}", tokens, perplexities, flops))
    return lines


def plot_validation(lines: Sequence[Line], path: pathlib.Path) -> None:
    """Draws perplexity over tokens and over operations, side by side, as a PNG.

    Args:
        lines: at least one.
        path: the file.
    """
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    over_tokens, over_flops = figure.subplots(1, 2, sharey=True)
    colours = matplotlib.colormaps["tab10" if len(lines) <= 10 else "tab20"]
    # Early evaluations are several times as high as the last ones, which are to be compared.
    top = 2.5 * min(line.perplexities[-1] for line in lines)
    for i, (name, tokens, perplexities, flops) in enumerate(lines):
        style = {"color": colours(i % colours.N), "marker": "o", "markersize": 4}
        over_tokens.plot([t / 1e6 for t in tokens], perplexities, label=name, **style)
        over_flops.plot([t * flops / 1e15 for t in tokens], perplexities, label=name, **style)
    over_tokens.set(xlabel="tokens (millions)", ylabel="validation perplexity", yscale="log")
    over_flops.set(xlabel="training PFLOPs")
    bottom = 0.95 * min(min(line.perplexities) for line in lines)
    over_tokens.set_ylim(bottom, top)
    for axes in (over_tokens, over_flops):
        axes.grid(alpha=0.3, which="both")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.yaxis.set_major_formatter("{x:g}")
    over_flops.legend(fontsize="small")
    figure.savefig(path, format="png", dpi=120)
