"""Methods side by side: the same text in the same order, a learning-rate grid each, several seeds.

``python -m loro_jax.compare CONFIG --methods=full,lowrank,loro --lrs=0.003,0.01 --seeds=0,1,2``

The grid is run with the first seed; the best learning rate of each method then with all others.
Every run has a directory of its own and goes on where it was stopped, so the same command again
finishes an interrupted comparison. A run whose loss is no longer finite is a row that says so.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import math
import pathlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from loro_jax.training.comparison_report import Result, Run, config_of, write_report
from loro_jax.training.config import METHODS, Config, differences
from loro_jax.training.errors import DivergedError, TrainingError
from loro_jax.training.loop import train
from loro_jax.training.metrics import read_rows


class _StoppedError(Exception):
    """A signal ended a run; the comparison ends with it."""

    def __init__(self, status: int):
        super().__init__(status)
        self.status = status


def compare(
    base: Config,
    methods: Sequence[str],
    seeds: Sequence[int],
    grids: Mapping[str, Sequence[float]],
    out: str,
) -> list[Result]:
    """Runs a comparison, or what is missing of one, and writes its table and plots.

    Args:
        base: the config that all runs share.
        methods: names from :data:`loro_jax.training.config.METHODS`.
        seeds: seeds of initialisation and order; the first one's runs choose the learning rate.
        grids: learning rates of each method.
        out: the comparison's directory.

    Returns:
        All results, in the order of the runs.

    Raises:
        TrainingError: for a bad config, or directories of other runs.
    """
    directory = pathlib.Path(out)
    results: list[Result] = []
    for method in methods:
        grid = [_finish(base, Run(method, rate, seeds[0]), directory) for rate in grids[method]]
        results += grid
        finished = [result for result in grid if result.perplexity is not None]
        if finished:
            best = min(finished, key=lambda result: result.perplexity or math.inf).run
            results += [_finish(base, best._replace(seed=seed), directory) for seed in seeds[1:]]
        write_report(base, results, directory)
    return results


def _finish(base: Config, run: Run, directory: pathlib.Path) -> Result:
    """Trains a run to its end, unless it has ended already."""
    workdir = directory / run.name
    note_path = directory / f"{run.name}.diverged.txt"
    if note_path.exists():
        return _result(run, workdir, None, note_path.read_text(encoding="utf-8"))
    perplexity = _ended(config_of(base, run), workdir)
    if perplexity is not None:
        return _result(run, workdir, perplexity, "")
    print(f"{run.name} ...", flush=True)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            outcome = train(config_of(base, run), str(workdir))
    except DivergedError as error:
        note = str(error).split(";")[0]
        note_path.write_text(note, encoding="utf-8")
        print(f"{run.name}: diverged ({note})", flush=True)
        return _result(run, workdir, None, note)
    if outcome.exit_status:
        raise _StoppedError(outcome.exit_status)
    print(f"{run.name}: validation perplexity {outcome.val_ppl:.2f}", flush=True)
    return _result(run, workdir, outcome.val_ppl, "")


def _ended(config: Config, workdir: pathlib.Path) -> float | None:
    """The last perplexity of a run that has ended already, with this very config."""
    try:
        stored = json.loads((workdir / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if differences(stored, config):
        return None
    last = [row for row in read_rows(workdir / "metrics.jsonl") if row["step"] == config.steps]
    return next((row["val_ppl"] for row in last if "val_ppl" in row), None)


def _result(run: Run, workdir: pathlib.Path, perplexity: float | None, note: str) -> Result:
    rows = [row for row in read_rows(workdir / "metrics.jsonl") if "loss" in row]
    curve = [(row["tokens"], row["loss"]) for row in rows]
    seconds = 0.0
    for before, row in zip([{"tokens": 0}, *rows], rows, strict=False):
        seconds += (row["tokens"] - before["tokens"]) / row["tokens_per_second"]
    return Result(run, perplexity, note, curve, seconds)


def load_config(path: str, changes: Sequence[str]) -> Config:
    """Loads a config file and sets fields of it.

    Args:
        path: a Python file with ``get_config()``.
        changes: ``field=value`` each, the field dotted, the value as JSON or a plain string.

    Returns:
        The config.

    Raises:
        TrainingError: if the file has none, or a field does not exist.
    """
    spec = importlib.util.spec_from_file_location("comparison_config", path)
    if spec is None or spec.loader is None or not pathlib.Path(path).is_file():
        raise TrainingError(
            f"CONFIG = {path!r}: expected a config file, such as configs/default.py."
        )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    if not isinstance(config, Config):
        raise TrainingError(f"CONFIG = {path!r}: get_config() must return a training Config.")
    for change in changes:
        name, separator, text = change.partition("=")
        *groups, field = name.split(".")
        target: Any = config
        for group in groups:
            target = getattr(target, group, None)
        if not separator or not hasattr(target, field):
            raise TrainingError(f"--set {change}: expected FIELD=VALUE with a field of the config.")
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        setattr(target, field, value)
    return config


def _grids(options: Sequence[str], methods: Sequence[str]) -> dict[str, list[float]]:
    """Learning rates by method: ``0.003,0.01`` for all, ``loro=0.01,0.02`` for one."""
    grids: dict[str, list[float]] = {}
    for option in options:
        name, separator, text = option.rpartition("=")
        try:
            rates = [float(rate) for rate in text.split(",")]
        except ValueError:
            raise TrainingError(f"--lrs {option}: expected numbers, separated by commas.") from None
        if not all(0 < rate < math.inf for rate in rates):
            raise TrainingError(f"--lrs {option}: learning rates must be above 0.")
        if separator and name not in methods:
            raise TrainingError(f"--lrs {option}: {name!r} is not among --methods.")
        for method in [name] if separator else methods:
            grids[method] = rates
    return grids


def _arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m loro_jax.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("--methods", default="full,lowrank,loro")
    parser.add_argument("--seeds", default="0")
    parser.add_argument(
        "--lrs", action="append", help="RATES for all methods or METHOD=RATES; may be repeated"
    )
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--out", default="runs/comparison")
    return parser.parse_args(arguments)


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    try:
        yield
    except TrainingError as error:
        sys.exit(f"error: {error}")


def main(arguments: Sequence[str]) -> int:
    """``python -m loro_jax.compare``."""
    options = _arguments(arguments)
    with _one_line_errors():
        methods = options.methods.split(",")
        for method in methods:
            if method not in METHODS:
                raise TrainingError(f"--methods: {method!r}; expected {', '.join(METHODS)}.")
        try:
            seeds = [int(seed) for seed in options.seeds.split(",")]
        except ValueError:
            raise TrainingError(f"--seeds={options.seeds}: expected whole numbers.") from None
        base = load_config(options.config, options.set)
        grids = _grids([str(base.learning_rate), *(options.lrs or [])], methods)
        for method in methods:
            config_of(base, Run(method, grids[method][0], seeds[0])).validate()
        try:
            compare(base, methods, seeds, grids, options.out)
        except _StoppedError as stopped:
            print("stopped; the same command goes on", file=sys.stderr)
            return stopped.status
    print((pathlib.Path(options.out) / "table.md").read_text(encoding="utf-8"))
    return 0
