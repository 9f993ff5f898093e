r"""Trains methods side by side on the same text, with a learning-rate grid each and several seeds.

The grid is run with the first seed, then each method's best learning rate with all other seeds.
--arm slow=lowrank,lr_scale=0.25 adds an arm: a method with its own values of config fields. Every
run has its own directory and is resumable: run the same command again to finish an interrupted
comparison; two processes with the same command share the work. Runs that diverge are listed in the
table. --equal=flops gives each arm as many steps as the first arm's operations pay for,
--equal=seconds as many as its time on this machine (nothing else should run meanwhile), and
--equal=memory the largest rank that fits its weights, gradients and optimizer state.

With a config on GLUE, --methods are its settings without the task, such as loro_8,full, each run on
--tasks at the learning rates of its config, or at --lrs; the table is that of python -m loro_jax
glue.

Example:
  python -m loro_jax compare configs/default.py:paper --methods=full,lowrank,loro \
      --lrs=0.003,0.01 --seeds=0,1,2 --out=runs/comparison
"""

from __future__ import annotations

import argparse
import math
import pathlib
import sys
from collections.abc import Sequence

from loro_jax.command_line import Parser, failing_in_one_line
from loro_jax.commands.arms import add_arm_options, load_config, read_arms, read_seeds
from loro_jax.errors import TrainingError
from loro_jax.glue import TASKS
from loro_jax.study.comparison import StoppedError, compare
from loro_jax.study.glue_comparison import GlueArm, compare_on_glue
from loro_jax.study.glue_table import table
from loro_jax.study.report import Run, config_of
from loro_jax.tables import report
from loro_jax.training.glue_config import GlueRun
from loro_jax.training.method_options import settled


def _grids(options: Sequence[str], names: Sequence[str]) -> dict[str, list[float]]:
    """Returns learning rates by arm: ``0.003,0.01`` for all, ``loro=0.01,0.02`` for one."""
    grids: dict[str, list[float]] = {}
    for option in options:
        name, separator, text = option.rpartition("=")
        try:
            rates = [float(rate) for rate in text.split(",")]
        except ValueError:
            raise TrainingError(f"--lrs {option}: expected numbers, separated by commas.") from None
        if not all(0 < rate < math.inf for rate in rates):
            raise TrainingError(f"--lrs {option}: learning rates must be above 0.")
        if separator and name not in names:
            raise TrainingError(f"--lrs {option}: {name!r} is not among --methods and --arm.")
        for known in [name] if separator else names:
            grids[known] = rates
    return grids


def main(arguments: Sequence[str]) -> int:
    """Runs ``python -m loro_jax compare``; returns the exit status."""
    parser = Parser("python -m loro_jax compare", __doc__)
    add_arm_options(parser, "full,lowrank,loro", "runs/comparison")
    parser.add_argument(
        "--lrs", action="append", help="RATES for all or NAME=RATES; may be repeated"
    )
    parser.add_argument("--tasks", help="tasks of a config on GLUE, with commas; default: all")
    options = parser.parse_args(arguments)
    options.command = " ".join(["python -m loro_jax compare", *arguments])
    return failing_in_one_line(lambda: _compare(options))


def _compare(options: argparse.Namespace) -> int:
    try:
        if isinstance(load_config(options.config, options.set), GlueRun):
            _compare_on_glue(options)
        else:
            _compare_language_models(options)
    except StoppedError as stopped:
        print("stopped; run the same command again to resume", file=sys.stderr)
        return stopped.status
    return 0


def _compare_on_glue(options: argparse.Namespace) -> None:
    if options.arm or options.equal != "tokens":
        raise TrainingError("--arm, --equal: expected neither for a config on GLUE; use --methods.")
    if ":" in options.config:
        raise TrainingError(f"CONFIG = {options.config!r}: expected its settings in --methods.")
    seeds, methods = read_seeds(options.seeds), options.methods.split(",")
    tasks = options.tasks.split(",") if options.tasks else list(TASKS)
    for task in tasks:
        if task not in TASKS:
            raise TrainingError(f"--tasks: {task!r}; expected {', '.join(TASKS)}.")
    grids = _grids(options.lrs or [], methods)
    arms = []
    for task in tasks:
        for method in methods:
            config = settled(load_config(f"{options.config}:{method}_{task}", options.set), [])
            assert isinstance(config, GlueRun)  # as the config without settings
            config.validate()
            rates = grids.get(method, [config.learning_rate])
            arms.append(GlueArm(f"{method}/{task}", config, rates))
    results = compare_on_glue(arms, seeds, pathlib.Path(options.out))
    options.json = str(pathlib.Path(options.out) / "table.json")
    report(table(results), options)


def _compare_language_models(options: argparse.Namespace) -> None:
    if options.tasks:
        raise TrainingError("--tasks: expected a config on GLUE, such as configs/roberta_glue.py.")
    base, arms, seeds = read_arms(options)
    names = [arm.name for arm in arms]
    grids = _grids([str(base.learning_rate), *(options.lrs or [])], names)
    # All arms are validated before the first run starts.
    for arm in arms:
        config_of(base, Run(arm, grids[arm.name][0], seeds[0])).validate()
    compare(base, arms, seeds, grids, options.out, options.command)
    print((pathlib.Path(options.out) / "table.md").read_text(encoding="utf-8"))
