"""Trains methods on tasks of GLUE, with learning rates and seeds, for the paper's Table 6.

For each task the learning rates of a method are run with the first seed, then the best of them with
the others. Every run has its own directory and is resumable, as in
:mod:`loro_jax.study.comparison`.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import pathlib
import time
from collections.abc import Sequence
from typing import NamedTuple

from loro_jax.study.comparison import PATIENCE, finish_run, noted_divergence, run_grid
from loro_jax.study.glue_table import GlueResult, read_results
from loro_jax.training.glue_config import GlueRun


class GlueArm(NamedTuple):
    """A method on a task.

    Attributes:
        name: path of its runs, relative to the comparison's directory.
        config: config of its runs.
        rates: the learning rates to be tried.
    """

    name: str
    config: GlueRun
    rates: Sequence[float]


def compare_on_glue(
    arms: Sequence[GlueArm], seeds: Sequence[int], out: pathlib.Path
) -> list[GlueResult]:
    """Runs a comparison, or the missing runs of one.

    Args:
        arms: methods on tasks, in the order in which they are run.
        seeds: seeds of initialisation and data order; the first one's runs choose the rate.
        out: directory of the comparison.

    Returns:
        The results of all runs that did not diverge.

    Raises:
        TrainingError: for an invalid config, tables that can't be read, or directories of other
            runs.
        StoppedError: if a signal ended a run.
    """
    while True:
        results: list[GlueResult] = []
        complete = True
        for arm in arms:
            ended, all_ended = run_grid(
                arm.rates, seeds, functools.partial(_run, out, arm), _Ended.loss
            )
            results += [one.result for one in ended if one.result is not None]
            complete = complete and all_ended
        if complete:
            return results
        time.sleep(PATIENCE)  # another process is running the rest


class _Ended(NamedTuple):
    """A run that has ended: its result, or None if it diverged."""

    result: GlueResult | None

    def loss(self) -> float | None:
        return None if self.result is None else -self.result.best


def _run(out: pathlib.Path, arm: GlueArm, rate: float, seed: int) -> _Ended | None:
    """Trains a run to its end; None: another process is running it."""
    name = f"{arm.name}/lr{rate:g}/seed{seed}"
    workdir = out / name
    if noted_divergence(workdir) is not None:
        return _Ended(None)
    config = dataclasses.replace(copy.deepcopy(arm.config), learning_rate=rate, seed=seed)
    # A run that is done ends at once, or says that it is another one.
    note = finish_run(config, workdir, name)
    if note is None:
        return None
    if note:
        return _Ended(None)
    (result,) = read_results([workdir])
    print(f"{name}: {result.best:.2f} (best), {result.last:.2f} (last)", flush=True)
    return _Ended(result)
