"""Runs methods side by side on the same text, with a learning-rate grid each and several seeds.

The grid is run with the first seed, then each method's best learning rate with all other seeds.
Every run has its own directory and is resumable: repeat a comparison to finish it after an
interruption; two processes that run the same comparison share the work. Runs that diverge are
listed in the table.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from loro_jax.errors import DivergedError, InUseError
from loro_jax.study.report import (
    Arm,
    Result,
    Run,
    config_of,
    write_report,
)
from loro_jax.tables import replacing
from loro_jax.training.config import Config
from loro_jax.training.config_differences import differences
from loro_jax.training.loop import train
from loro_jax.training.metrics import read_rows, seconds_of_steps

Outcome = TypeVar("Outcome")

PATIENCE = 10.0  # seconds between two checks of runs that another process has locked


class StoppedError(Exception):
    """A signal ended a run; the comparison ends with it.

    Attributes:
        status: the exit status of the stopped run.
    """

    def __init__(self, status: int):
        super().__init__(status)
        self.status = status


def compare(
    base: Config,
    arms: Sequence[Arm],
    seeds: Sequence[int],
    grids: Mapping[str, Sequence[float]],
    out: str,
    command: str = "",
) -> list[Result]:
    """Runs a comparison, or the missing runs of one, and writes its table and plots.

    Args:
        base: config shared by all runs.
        arms: arms to compare.
        seeds: seeds of initialisation and data order; the first one's runs choose the learning
            rate.
        grids: learning rates by name of the arm.
        out: directory of the comparison.
        command: command line, for the report.

    Returns:
        All results, in the order of the runs.

    Raises:
        TrainingError: for an invalid config, or directories of other runs.
        StoppedError: if a signal ended a run.
    """
    directory = pathlib.Path(out)
    # Runs that another process has locked are left out, and looked at again until all are done.
    while True:
        results: list[Result] = []
        complete = True
        for arm in arms:
            found, all_found = run_grid(
                grids[arm.name],
                seeds,
                functools.partial(_finish, base, directory, arm),
                lambda result: result.perplexity,
            )
            results += found
            complete = complete and all_found
            if results:
                write_report(base, results, directory, command)
        if complete:
            return results
        time.sleep(PATIENCE)  # another process is running the rest


def run_grid(
    rates: Sequence[float],
    seeds: Sequence[int],
    run: Callable[[float, int], Outcome | None],
    loss: Callable[[Outcome], float | None],
) -> tuple[list[Outcome], bool]:
    """Runs all learning rates with the first seed, then the best of them with the other seeds.

    Args:
        rates: the learning rates.
        seeds: the seeds.
        run: (rate, seed) -> the outcome of that run; None: another process is running it.
        loss: what is lowest at the best rate; None for a run that diverged.

    Returns:
        The outcomes, and whether they are all that will be.

    Example:
        >>> run_grid([0.1, 0.2], [0, 1], lambda rate, seed: (rate, seed), lambda run: -run[0])
        ([(0.1, 0), (0.2, 0), (0.2, 1)], True)
    """
    found = [run(rate, seeds[0]) for rate in rates]
    losses = [(loss(one), rate) for one, rate in zip(found, rates, strict=True) if one is not None]
    finished = [(value, rate) for value, rate in losses if value is not None]
    # The best rate is known only when the grid is complete, here or in another process.
    if finished and None not in found:
        _, best = min(finished, key=lambda one: one[0])
        found += [run(best, seed) for seed in seeds[1:]]
    return [one for one in found if one is not None], None not in found


def _finish(
    base: Config, directory: pathlib.Path, arm: Arm, rate: float, seed: int
) -> Result | None:
    """Trains a run to its end, if not done yet; None: another process is running it."""
    run = Run(arm, rate, seed)
    config = config_of(base, run)
    workdir = directory / run.name
    if _belongs(config, workdir):
        note = noted_divergence(workdir)
        if note is not None:
            return _result(run, workdir, None, note)
        perplexity = _last_perplexity(config, workdir)
        if perplexity is not None:
            return _result(run, workdir, perplexity, "")
    note = finish_run(config, workdir, run.name)
    if note is None:
        return None
    if note:
        return _result(run, workdir, None, note)
    perplexity = _last_perplexity(config, workdir)
    print(f"{run.name}: validation perplexity {perplexity:.2f}", flush=True)
    return _result(run, workdir, perplexity, "")


def finish_run(config: Config, workdir: pathlib.Path, name: str) -> str | None:
    """Trains a run of a comparison to its end.

    Args:
        config: the run's config.
        workdir: the run directory.
        name: the run's name, for the printed lines.

    Returns:
        Why it diverged, which is recorded for :func:`noted_divergence`; empty if it did not; None
        if another process is running it.

    Raises:
        TrainingError: for an invalid config, or the directory of another run.
        StoppedError: if a signal ended the run.
    """
    print(f"{name} ...", flush=True)
    try:
        # The comparison prints one line per run; a run's own lines would bury them.
        with contextlib.redirect_stdout(io.StringIO()):
            outcome = train(config, str(workdir))
    except InUseError:
        print(f"{name}: running in another process", flush=True)
        return None
    except DivergedError as error:
        note = str(error).split(";")[0]
        # Recorded, so that a repeated comparison does not run it again.
        with replacing(_note_path(workdir)) as temporary:
            temporary.write_text(note, encoding="utf-8")
        print(f"{name}: diverged ({note})", flush=True)
        return note
    if outcome.exit_status:
        raise StoppedError(outcome.exit_status)
    return ""


def noted_divergence(workdir: pathlib.Path) -> str | None:
    """Returns why the run in a directory diverged, as :func:`finish_run` recorded it, or None."""
    path = _note_path(workdir)
    return path.read_text(encoding="utf-8") if path.exists() else None


def _note_path(workdir: pathlib.Path) -> pathlib.Path:
    # Beside the run directory, which accepts only files of its own.
    return workdir.with_name(f"{workdir.name}.diverged.txt")


def _belongs(config: Config, workdir: pathlib.Path) -> bool:
    """Returns whether a directory holds a run with this config."""
    try:
        stored = json.loads((workdir / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return not differences(stored, config)


def _last_perplexity(config: Config, workdir: pathlib.Path) -> float | None:
    rows = read_rows(workdir / "metrics.jsonl")
    last = [row for row in rows if row["step"] == config.steps]
    return next((row["val_ppl"] for row in last if "val_ppl" in row), None)


def _result(run: Run, workdir: pathlib.Path, perplexity: float | None, note: str) -> Result:
    found = read_rows(workdir / "metrics.jsonl")
    rows = [row for row in found if "loss" in row]
    curve = [(row["tokens"], row["loss"]) for row in rows]
    validation = [(row["tokens"], row["val_ppl"]) for row in found if "val_ppl" in row]
    return Result(run, perplexity, note, curve, seconds_of_steps(rows), validation)
