"""The options of commands that compare arms: a config, arms, seeds and a budget."""

from __future__ import annotations

import argparse
import copy
import importlib.util
import pathlib
from collections.abc import Sequence

from loro_jax.errors import TrainingError
from loro_jax.study.budgets import BUDGETS, with_budget
from loro_jax.study.report import Arm
from loro_jax.training.config import METHODS, Config
from loro_jax.training.fields import apply_changes, parse_change, set_field
from loro_jax.training.tasks import check_language


def add_arm_options(parser: argparse.ArgumentParser, methods: str, out: str) -> None:
    """Adds the options that all such commands have.

    Args:
        parser: the command's parser.
        methods: default of ``--methods``.
        out: default of ``--out``.
    """
    parser.add_argument("config", metavar="CONFIG", help="a config file, as of train.py")
    parser.add_argument("--methods", default=methods, help="arms by the names of their methods")
    parser.add_argument(
        "--arm",
        action="append",
        default=[],
        metavar="NAME=METHOD,FIELD=VALUE,...",
        help="another arm: a method with its own values of fields; may be repeated",
    )
    parser.add_argument("--seeds", default="0")
    parser.add_argument(
        "--equal",
        choices=BUDGETS,
        default="tokens",
        help="what arms have in common: tokens; the first arm's operations, or its time on this "
        "machine (steps follow); its weights, gradients and optimizer state (ranks follow)",
    )
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--out", default=out)


def read_arms(options: argparse.Namespace) -> tuple[Config, list[Arm], list[int]]:
    """Returns the shared config, the arms and the seeds that the options name.

    Args:
        options: parsed options of :func:`add_arm_options`.

    Raises:
        TrainingError: for a config, an arm or a seed that can't be read.
    """
    seeds = read_seeds(options.seeds)
    base = load_config(options.config, options.set)
    check_language(base, f"CONFIG = {options.config!r}")
    arms = parse_arms(options.methods, options.arm, base)
    if not arms:
        raise TrainingError("--arm: expected at least one arm, here or in --methods.")
    equal = with_budget(options.equal, base, arms, options.out)
    for arm, given in zip(equal, arms, strict=True):
        own = arm.changes[len(given.changes) :]
        if own:
            print(f"{arm.name}: " + ", ".join(f"{name}={value}" for name, value in own))
    return base, equal, seeds


def read_seeds(text: str) -> list[int]:
    """Returns the seeds of ``--seeds``.

    Raises:
        TrainingError: for what is no list of whole numbers.
    """
    try:
        return [int(seed) for seed in text.split(",")]
    except ValueError:
        raise TrainingError(f"--seeds={text}: expected whole numbers.") from None


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
