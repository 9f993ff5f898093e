"""Table and plots of a comparison."""

from __future__ import annotations

import copy
import dataclasses
import json
import pathlib
import statistics
from typing import Any, NamedTuple

import matplotlib
from matplotlib.figure import Figure

from loro_jax.planning.flops import flops_per_token
from loro_jax.planning.memory_table import held_by
from loro_jax.study.validation_plot import lines_of, plot_validation
from loro_jax.tables import environment, replacing
from loro_jax.training.config import Config
from loro_jax.training.fields import set_field
from loro_jax.training.method_options import settled
from loro_jax.training.vocabulary import with_vocabulary

# Most points that are labelled in a plot; the legend lists all of them in any case.
_NAMED_POINTS = 12


class Arm(NamedTuple):
    """An arm of a comparison: a method with its own values of config fields.

    Attributes:
        name: name in the table, and of its directory.
        method: a name from :data:`loro_jax.training.config.METHODS`.
        changes: dotted fields and their values.
    """

    name: str
    method: str
    changes: tuple[tuple[str, Any], ...] = ()


class Run(NamedTuple):
    """One run of a comparison.

    Attributes:
        arm: arm of the run.
        learning_rate: peak learning rate.
        seed: seed of the run.
    """

    arm: Arm
    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        """Path of its directory, relative to the comparison's."""
        return f"{self.arm.name}/lr{self.learning_rate:g}/seed{self.seed}"


class Result(NamedTuple):
    """Result of a run.

    Attributes:
        run: the run.
        perplexity: its last validation perplexity; None if it diverged.
        note: reason if it diverged.
        curve: tokens and training loss of its rows.
        seconds: time of its steps, without evaluations and checkpoints.
        validation: tokens and validation perplexity of its evaluations.
    """

    run: Run
    perplexity: float | None
    note: str
    curve: list[tuple[int, float]]
    seconds: float
    validation: list[tuple[int, float]]


def config_of(base: Config, run: Run) -> Config:
    """Returns the config of one run: the shared one with its arm's fields, rate and seed.

    A vocabulary that is left to the tokenizer has its size, as in the run itself: parameters and
    operations are counted from it.

    Raises:
        TrainingError: if the arm sets a field that its method does not use, or for a tokenizer that
            can't be read.
    """
    # set_field changes the config in place.
    config = copy.deepcopy(base)
    asked = [set_field(config, name, value) for name, value in run.arm.changes]
    config = dataclasses.replace(
        config, method=run.arm.method, learning_rate=run.learning_rate, seed=run.seed
    )
    return with_vocabulary(settled(config, asked))


def write_report(
    base: Config, results: list[Result], directory: pathlib.Path, command: str = ""
) -> None:
    """Writes ``table.md``, ``table.json`` and two plots into a comparison's directory.

    ``curves.png`` shows training losses and memory, ``perplexity.png`` the evaluations.

    Args:
        base: config shared by all runs.
        results: all results so far.
        directory: directory of the comparison.
        command: command line of the comparison.
    """
    rows = summary(base, results)
    with replacing(directory / "table.md") as path:
        path.write_text(_markdown(rows), encoding="utf-8")
    runs = [_as_json(result) for result in results]
    content = {
        "command": command,
        "environment": environment(),
        "config": dataclasses.asdict(base),
        "rows": rows,
        "runs": runs,
    }
    with replacing(directory / "table.json") as path:
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    with replacing(directory / "curves.png") as path:
        _plot(base, results, rows, path)
    lines = lines_of(rows, runs, {row["arm"]: row["arm"] for row in rows})
    if lines:
        with replacing(directory / "perplexity.png") as path:
            plot_validation(lines, path)


def summary(base: Config, results: list[Result]) -> list[dict[str, Any]]:
    """Summarises results in one row per arm, sorted by perplexity, diverged arms last.

    Args:
        base: config shared by all runs.
        results: all results.

    Returns:
        Rows: best learning rate, mean and spread (largest minus smallest) of the perplexity over
        the seeds at that rate, parameters, memory, tokens per second, FLOPs per token, minutes per
        run, and diverged runs.
    """
    rows = []
    for arm in dict.fromkeys(result.run.arm for result in results):
        own = [result for result in results if result.run.arm == arm]
        finished = [result for result in own if result.perplexity is not None]
        diverged = [
            f"lr {result.run.learning_rate:g} seed {result.run.seed}"
            for result in own
            if result.perplexity is None
        ]
        config = config_of(base, own[0].run)
        held = held_by(config)
        # All columns at first, in the table's order: an arm that diverged leaves them empty.
        row: dict[str, Any] = {"arm": arm.name, "best lr": None, "perplexity": None}
        row |= {"spread": None, "seeds": 0, "tokens/s": None, "minutes": None}
        if finished:
            best = min(finished, key=lambda result: result.perplexity or 0).run.learning_rate
            # Only the chosen rate was run with all seeds.
            by_rate: dict[float, list[Result]] = {}
            for result in finished:
                by_rate.setdefault(result.run.learning_rate, []).append(result)
            most = max(len(found) for found in by_rate.values())
            if most > 1:
                best = next(rate for rate, found in by_rate.items() if len(found) == most)
            chosen = by_rate[best]
            values = [result.perplexity or 0.0 for result in chosen]
            seconds = statistics.median(result.seconds for result in chosen)
            row |= {
                "best lr": best,
                "perplexity": statistics.mean(values),
                "spread": max(values) - min(values),
                "seeds": len(values),
                "tokens/s": chosen[0].curve[-1][0] / seconds if chosen[0].curve else None,
                "minutes": seconds / 60,
            }
        row |= {
            "trainable M": held.trainable / 1e6,
            "total M": held.total / 1e6,
            "memory MB": (held.weights + held.optimizer + held.gradients) / 1e6,
            "MFLOPs/token": flops_per_token(config) / 1e6,
            "diverged": "; ".join(diverged),
        }
        rows.append(row)
    return sorted(rows, key=lambda row: row["perplexity"] or float("inf"))


def _markdown(rows: list[dict[str, Any]]) -> str:
    names = list(rows[0]) if rows else []
    lines = [names, ["---"] * len(names)]
    lines += [[_cell(row[name]) for name in names] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _as_json(result: Result) -> dict[str, Any]:
    return {
        "arm": result.run.arm.name,
        "method": result.run.arm.method,
        "changes": dict(result.run.arm.changes),
        "learning_rate": result.run.learning_rate,
        "seed": result.run.seed,
        "perplexity": result.perplexity,
        "note": result.note,
        "seconds": result.seconds,
        "curve": result.curve,
        "validation": result.validation,
    }


def _plot(
    base: Config, results: list[Result], rows: list[dict[str, Any]], path: pathlib.Path
) -> None:
    """Plots loss against tokens and FLOPs at the best rate, and perplexity against memory."""
    figure = Figure(figsize=(18, 6), layout="constrained")
    axes = figure.subplots(1, 3)
    colours = matplotlib.colormaps["turbo"]
    for i, row in enumerate(rows):
        chosen = [
            result
            for result in results
            if result.run.arm.name == row["arm"] and result.run.learning_rate == row["best lr"]
        ]
        if not chosen or not chosen[0].curve:
            continue
        # The first seed at the best rate stands for the arm.
        tokens, losses = zip(*chosen[0].curve, strict=True)
        smooth = _running_mean(losses)
        flops = flops_per_token(config_of(base, chosen[0].run))
        style = {"color": colours((i + 0.5) / len(rows))}
        label = f"{row['arm']} {row['perplexity']:.4g}"
        axes[0].plot([t / 1e6 for t in tokens], smooth, label=label, **style)
        axes[1].plot([t * flops / 1e15 for t in tokens], smooth, **style)
        axes[2].scatter(row["memory MB"], row["perplexity"], **style)
        if len(rows) <= _NAMED_POINTS:
            axes[2].annotate(row["arm"], (row["memory MB"], row["perplexity"]))
    axes[0].set(xlabel="tokens (millions)", ylabel="training loss (nats)")
    axes[1].set(xlabel="PFLOPs", ylabel="training loss (nats)")
    axes[2].set(xlabel="weights, gradients, optimizer (MB)", ylabel="validation perplexity")
    if axes[0].lines:
        figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(path, format="png", dpi=120)


def _running_mean(values: tuple[float, ...], width: int = 10) -> list[float]:
    return [statistics.mean(values[max(0, i - width + 1) : i + 1]) for i in range(len(values))]
