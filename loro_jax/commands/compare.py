r"""Trains methods side by side on the same text, with a learning-rate grid each and several seeds.

The grid is run with the first seed, then each method's best learning rate with all other seeds.
--arm slow=lowrank,lr_scale=0.25 adds an arm: a method with its own values of config fields. Every
run has its own directory and is resumable: run the same command again to finish an interrupted
comparison; two processes with the same command share the work. Runs that diverge are listed in the
table. --equal=flops gives each arm as many steps as the first arm's operations pay for.

Example:
  python -m loro_jax compare configs/default.py:paper --methods=full,lowrank,loro \
      --lrs=0.003,0.01 --seeds=0,1,2 --out=runs/comparison
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import math
import pathlib
import sys
from collections.abc import Sequence

from loro_jax.command_line import Parser, failing_in_one_line
from loro_jax.errors import TrainingError
from loro_jax.study.budgets import BUDGETS, with_equal_compute
from loro_jax.study.comparison import StoppedError, compare
from loro_jax.study.report import Arm, Run, config_of
from loro_jax.training.config import METHODS, Config
from loro_jax.training.fields import apply_changes, parse_change, set_field


def load_config(path: str, changes: Sequence[str]) -> Config:
    """Loads a config file and sets fields of it.

    Args:
        path: a Python file with ``get_config()``; text after a colon is its argument.
        changes: ``field=value`` each, with a dotted field and a value as JSON or a plain string.

    Returns:
        The config.

    Raises:
        TrainingError: if the file has no config, or a field does not exist.
    """
    file, *settings = path.split(":", 1)
    spec = importlib.util.spec_from_file_location("comparison_config", file)
    if spec is None or spec.loader is None or not pathlib.Path(file).is_file():
        raise TrainingError(
            f"CONFIG = {path!r}: expected a config file, such as configs/default.py."
        )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    try:
        config = module.get_config(*settings)
    except (TypeError, ValueError) as error:  # an argument that it does not accept
        raise TrainingError(f"CONFIG = {path!r}: {error}") from None
    if not isinstance(config, Config):
        raise TrainingError(f"CONFIG = {path!r}: get_config() must return a training Config.")
    apply_changes(config, changes)
    return config


def parse_arms(methods: str, options: Sequence[str], base: Config) -> list[Arm]:
    """Returns an arm for each method, and one for each ``NAME=METHOD,FIELD=VALUE,...``.

    Args:
        methods: names of methods, separated by commas.
        options: values of ``--arm``.
        base: config whose fields the arms change.

    Raises:
        TrainingError: for an unknown method or field, or two arms of one name.
    """
    arms = [Arm(method, method) for method in methods.split(",") if method]
    for option in options:
        name, separator, rest = option.partition("=")
        method, *changes = rest.split(",")
        try:
            arm = Arm(name, method, tuple(parse_change(change) for change in changes))
            # On a copy, to find wrong fields before the first run.
            for field, value in arm.changes:
                set_field(copy.deepcopy(base), field, value)
        except (AttributeError, ValueError):
            separator = ""
        if not separator or not name or "/" in name:
            raise TrainingError(
                f"--arm {option}: expected NAME=METHOD,FIELD=VALUE,... with fields of the config."
            )
        arms.append(arm)
    for arm in arms:
        if arm.method not in METHODS:
            raise TrainingError(f"--methods: {arm.method!r}; expected {', '.join(METHODS)}.")
        if sum(arm.name == other.name for other in arms) > 1:
            raise TrainingError(f"--methods, --arm: {arm.name!r} occurs more than once.")
    return arms


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
    parser.add_argument("config", metavar="CONFIG", help="a config file, as of train.py")
    parser.add_argument("--methods", default="full,lowrank,loro")
    parser.add_argument(
        "--arm",
        action="append",
        default=[],
        metavar="NAME=METHOD,FIELD=VALUE,...",
        help="another arm: a method with its own values of fields; may be repeated",
    )
    parser.add_argument("--seeds", default="0")
    parser.add_argument(
        "--lrs", action="append", help="RATES for all or NAME=RATES; may be repeated"
    )
    parser.add_argument(
        "--equal",
        choices=BUDGETS,
        default="tokens",
        help="what arms have in common: tokens, or the first arm's operations (steps follow)",
    )
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--out", default="runs/comparison")
    options = parser.parse_args(arguments)
    command = " ".join(["python -m loro_jax compare", *arguments])
    return failing_in_one_line(lambda: _compare(options, command))


def _compare(options: argparse.Namespace, command: str) -> int:
    try:
        seeds = [int(seed) for seed in options.seeds.split(",")]
    except ValueError:
        raise TrainingError(f"--seeds={options.seeds}: expected whole numbers.") from None
    base = load_config(options.config, options.set)
    arms = parse_arms(options.methods, options.arm, base)
    if options.equal == "flops":
        arms = with_equal_compute(base, arms)
    names = [arm.name for arm in arms]
    grids = _grids([str(base.learning_rate), *(options.lrs or [])], names)
    # All arms are validated before the first run starts.
    for arm in arms:
        config_of(base, Run(arm, grids[arm.name][0], seeds[0])).validate()
    try:
        compare(base, arms, seeds, grids, options.out, command)
    except StoppedError as stopped:
        print("stopped; run the same command again to resume", file=sys.stderr)
        return stopped.status
    print((pathlib.Path(options.out) / "table.md").read_text(encoding="utf-8"))
    return 0
